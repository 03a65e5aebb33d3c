"""The demo model: the released layout, the same bytes for the same seed, and values every stage can work with."""

import json

import pytest
import torch
from safetensors import safe_open

from mova.audio_vae import load_audio_vae
from mova.checkpoint import open_component
from mova.demo_model import CONFIGS, write_demo_model
from mova.denoiser import load_denoiser
from mova.errors import InputError, MovaError
from mova.image import image_condition
from mova.text import load_text_encoder, read_tokenizer
from mova.video_vae import load_video_vae

TEXTS = [
    "A man in a blue blazer speaks.",
    "他在雨中说话。",
    "Она поёт",
    "نص عربي",
    "हिन्दी",
    "🐈‍⬛ 😀",
    "naïve café — “quoted” ½",
    "<pad> </s>x",
    "tab\\n{}[]~`",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo_model(tmp_path_factory.mktemp("models") / "demo")


def all_files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def stored_keys(folder, name):
    return {file.name: sorted(safe_open(file, "pt").keys()) for file in (folder / name).glob("*.safetensors")}


def test_layout_is_the_references(demo, tiny_mova):
    """The same folders, files, config keys and tensor names as the checkpoint that the reference wrote, where layer counts are equal."""
    ours, theirs = all_files(demo), all_files(tiny_mova)
    assert set(theirs) - {"tokenizer/spiece.model"} <= set(ours) and set(ours) - set(theirs) == {"README.txt"}
    for name in ("video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge", "video_vae", "text_encoder"):
        assert stored_keys(demo, name) == stored_keys(tiny_mova, name)
    for name in [name for name in theirs if name.endswith("config.json") and not name.startswith(("text_encoder", "video_vae", "tokenizer"))]:
        assert set(json.loads(theirs[name])) - {"_diffusers_version"} == set(json.loads(ours[name])), name
    assert sum(map(len, ours.values())) < 12e6


def test_audio_vae_has_the_released_rates(demo):
    assert len(open_component(demo, "audio_vae").index) == 224  # spec/mova.md 2.4
    vae = load_audio_vae(demo)
    assert vae.sample_rate == 48000 and vae.hop == 960


def test_same_seed_same_bytes(demo, tmp_path):
    assert all_files(write_demo_model(tmp_path / "again", seed=0)) == all_files(demo)
    other = all_files(write_demo_model(tmp_path / "other", seed=1))
    assert {name for name, content in other.items() if content != all_files(demo)[name]} == {"README.txt"} | {
        name for name in other if name.endswith(".safetensors")
    }


def test_experts_differ(demo):
    high, low = (open_component(demo, name).tensors() for name in ("video_dit", "video_dit_2"))
    assert all(not torch.equal(high[key], low[key]) for key in high)


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5, 3.0])
def test_decoders_give_something_to_see_and_hear(demo, spread):
    generator = torch.Generator().manual_seed(7)
    vae = load_video_vae(demo)
    frames = vae.decode(vae.denormalize(spread * torch.randn(1, 16, 3, 6, 8, generator=generator)))
    assert frames.std() > 0.1 and frames.flatten(0, 2).std(dim=0).min() > 0.1  # every colour varies
    assert ((frames <= 0) | (frames >= 1)).float().mean() < 0.2
    sound = load_audio_vae(demo).decode(spread * torch.randn(1, 16, 50, generator=generator))
    assert 0.05 < sound.abs().max() < 0.85 and sound.std() > 0.005


def test_every_stage_stays_in_range(demo):
    generator = torch.Generator().manual_seed(3)
    context = load_text_encoder(demo).encode(["A man speaks at the window.", ""])
    assert context.shape == (2, 512, CONFIGS["text_encoder"]["d_model"]) and 0.3 < context[0, :5].std() < 3
    vae = load_video_vae(demo)
    condition = image_condition(vae, torch.rand(48, 64, 3, generator=generator), height=48, width=64, num_frames=9)
    video, audio = torch.randn(1, 16, 3, 6, 8, generator=generator), torch.randn(1, 16, 19, generator=generator)
    denoiser = load_denoiser(demo)
    for timestep in (1000.0, 900.0, 500.0, 20.0):
        for velocity in denoiser.velocity(video, audio, condition, context[:1], timestep):
            assert 0.3 < velocity.std() < 3
    latents = load_audio_vae(demo).encode(torch.rand(1, 1, 9600, generator=generator) * 0.4 - 0.2, 48000)
    assert 0.1 < latents.std() < 5


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_takes_any_text(demo, text):
    tokenizer = read_tokenizer(demo / "tokenizer" / "tokenizer.json", open_component(demo, "text_encoder").config["vocab_size"])
    encoded = tokenizer.encode(text)
    assert encoded.ids[-1] == 1 and "<unk>" not in encoded.tokens
    assert tokenizer.decode([i for i in encoded.ids if i > 1]) == text.replace("<pad> </s>", "")


def test_tokenizer_loads_with_transformers(demo, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer, T5TokenizerFast

    for kind in (AutoTokenizer, T5TokenizerFast):
        tokenizer = kind.from_pretrained(demo / "tokenizer")
        batch = tokenizer("A man sings.", padding="max_length", truncation=True, max_length=512, return_tensors="pt")
        assert batch.input_ids.shape == (1, 512) and tokenizer("").input_ids == [1] and tokenizer.pad_token_id == 0
        assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == "A man sings."
        assert tokenizer.model_max_length == 512 and len(tokenizer) == open_component(demo, "text_encoder").config["vocab_size"]


def test_readme_says_what_it_is(demo):
    assert "noise, not films" in (demo / "README.txt").read_text(encoding="utf-8")


# ---------------------------------------------------------------- where it may be written


def test_empty_and_own_folders_are_taken(demo, tmp_path):
    (tmp_path / "empty").mkdir()
    own = write_demo_model(tmp_path / "empty", seed=5)
    (own / "video_vae" / "config.json").unlink()
    write_demo_model(own, seed=0)
    assert all_files(own) == all_files(demo)
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("name", ["notes.txt", "video_dit/my_lora.bin", "loras/own.safetensors"])
def test_folder_with_something_else_is_refused(tmp_path, name):
    for folder in (tmp_path / "plain", write_demo_model(tmp_path / "demo")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("keep me")
        before = all_files(folder)
        with pytest.raises(InputError, match="not empty"):
            write_demo_model(folder)
        assert all_files(folder) == before


def test_another_model_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "MOVA", "_name_or_path": "checkpoints/MOVA-360p"}')
    with pytest.raises(InputError, match="another model"):
        write_demo_model(tmp_path / "model")


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MovaError, match="give "):
            write_demo_model(target)
    monkeypatch.setattr("mova.demo_model.write_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_demo_model(tmp_path / "demo")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
