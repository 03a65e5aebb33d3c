"""VAE sockets, model folders, and that nothing stays behind."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import distance
from node_stand_ins import Cancelled

# ---------------------------------------------------------------- VAE


class CoreVAE:
    """Core's Wan VAE as other nodes see it: films come back as [B, F, H, W, 3]."""

    latent_channels = 16

    def __init__(self, socket):
        self.socket, self.tiled = socket, 0

    def encode(self, pixels):
        return self.socket.encode(pixels)

    def decode(self, samples):
        return self.socket.decode(samples)

    def decode_tiled(self, samples):
        self.tiled += 1
        return self.socket.decode_tiled(samples)

    def temporal_compression_decode(self):
        return 4


def test_cores_vae_works_in_our_nodes(clip, run, parts):
    core, picture = CoreVAE(parts.video_vae), torch.rand(1, 48, 64, 3, generator=torch.manual_seed(0))
    ours, theirs = (clip(vae=vae, start_image=picture) for vae in (parts.video_vae, core))
    assert distance(theirs.positive[0][1]["concat_latent_image"], ours.positive[0][1]["concat_latent_image"]) < 1e-5
    assert torch.equal(theirs.positive[0][1]["concat_mask"], ours.positive[0][1]["concat_mask"])
    latent = {"samples": torch.randn(2, 16, 2, 6, 8, generator=torch.manual_seed(0))}
    assert torch.equal(run("MOVADecodeVideo", samples=latent, vae=core)[0], run("MOVADecodeVideo", samples=latent, vae=parts.video_vae)[0])
    run("MOVADecodeVideo", samples=latent, vae=core, tiling="on")
    assert core.tiled == 1


def test_video_vae_as_core_uses_it(parts):
    vae, latents = parts.video_vae, torch.randn(2, 16, 2, 6, 8, generator=torch.manual_seed(0))
    film = vae.decode(latents)
    assert film.shape == (2, 5, 48, 64, 3) and 0 <= film.min() and film.max() <= 1
    film.mul_(0)  # as core does
    assert vae.decode(latents).any()
    tiled = vae.decode_tiled(latents, tile_x=4, tile_y=4, overlap=1, tile_t=16, overlap_t=2)
    assert tiled.shape == film.shape
    assert vae.encode(torch.rand(7, 50, 71, 4)).shape == (1, 16, 2, 6, 8)  # cut to 5 pictures of 48x64
    assert vae.encode_tiled(torch.rand(5, 48, 64, 3), tile_x=64, tile_y=64, overlap=16).shape == (1, 16, 2, 6, 8)
    assert (vae.spacial_compression_decode(), vae.spacial_compression_encode(), vae.temporal_compression_decode(), vae.latent_channels) == (8, 8, 4, 16)
    vae.throw_exception_if_invalid()


def test_audio_vae_as_core_uses_it(parts):
    vae, latents = parts.audio_vae, torch.randn(2, 16, 5, generator=torch.manual_seed(0))
    sound = vae.decode(latents)
    assert sound.shape == (2, 150, 1) and vae.audio_sample_rate == 1500
    sound /= 2
    assert not torch.equal(vae.decode(latents), sound) and torch.equal(vae.decode_tiled(latents, tile_x=64, overlap=8), vae.decode(latents))
    assert vae.encode(torch.zeros(1, 150, 2)).shape == (1, 16, 5)
    vae.throw_exception_if_invalid()


@pytest.mark.parametrize("samples", [100, 5000])
def test_encoded_sound_is_as_long_as_the_clip(run, parts, clip, samples):
    stereo = torch.rand(1, 2, samples, generator=torch.manual_seed(0)) - 0.5
    (latent,) = run("MOVAEncodeAudio", audio={"waveform": stereo, "sample_rate": 3000}, vae=parts.audio_vae, length=9)
    assert latent["samples"].shape == clip().audio["samples"].shape
    assert (latent["type"], latent["sample_rate"], latent["downscale_ratio_temporal"]) == ("audio", 1500, 30)
    mono = {"waveform": stereo.mean(1, keepdim=True), "sample_rate": 3000}
    assert distance(run("MOVAEncodeAudio", audio=mono, vae=parts.audio_vae, length=9)[0]["samples"], latent["samples"]) < 1e-5


def test_sound_that_cannot_be_encoded(run, parts, pack):
    with pytest.raises(pack.errors.InputError, match="no sound"):
        run("MOVAEncodeAudio", audio=None, vae=parts.audio_vae)
    with pytest.raises(pack.errors.InputError, match="Load MOVA Audio VAE"):
        run("MOVAEncodeAudio", audio={"waveform": torch.zeros(1, 1, 9), "sample_rate": 9}, vae=CoreVAE(parts.video_vae))


# ---------------------------------------------------------------- model folders


def test_only_listed_folders_are_opened(pack, models, run, tmp_path):
    outside = models.parent / "outside"
    outside.mkdir()
    (outside / "model_index.json").write_text("{}")
    for name in ("../../outside", str(outside), "small", "small/tiny/video_dit", "small\\tiny", "", "."):
        complaint = pack.nodes["MOVALoadVideoVAE"].validate_inputs(model=name)
        assert "hf download OpenMOSS-Team/MOVA-360p --local-dir" in complaint and "small/tiny" in complaint
        with pytest.raises(pack.errors.InputError, match="model_index.json"):
            run("MOVALoadVideoVAE", model=name)
    assert pack.nodes["MOVALoadVideoVAE"].validate_inputs(model="small/tiny") is True
    assert pack.nodes["MOVALoadVideoVAE"].validate_inputs() is True  # the name comes over a link


@pytest.fixture
def folders(pack, monkeypatch, tmp_path):
    """An empty models/mova of its own."""
    monkeypatch.setattr(sys.modules["folder_paths"], "get_folder_paths", lambda name: [str(tmp_path / "mova")])
    return tmp_path / "mova"


def test_the_list_is_never_empty_and_walks_to_the_first_hit(pack, folders):
    schema = pack.nodes["MOVALoadModel"].GET_SCHEMA  # with no folder at all
    assert schema().inputs[0].options == ["put a MOVA folder into models/mova"]
    assert pack.nodes["MOVALoadModel"].validate_inputs(model="put a MOVA folder into models/mova").startswith("No model is chosen.")
    for place in ("b/deep", "b/deep/copy", "a", "c"):
        (folders / place).mkdir(parents=True)
    for place in ("b/deep", "b/deep/copy", "a"):
        (folders / place / "model_index.json").write_text("{}")
    assert schema().inputs[0].options == ["a", "b/deep"]
    (folders / "model_index.json").write_text("{}")
    assert schema().inputs[0].options == ["mova"]


def test_links_in_a_circle_end(pack, folders):
    folders.mkdir()
    try:
        (folders / "round").symlink_to(folders, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert pack.host.walk_folders("mova", "model_index.json") == {}


# ---------------------------------------------------------------- nothing stays behind


def placed(model):
    return not model.residency.empty


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize("asked", [1, 3, 9])
def test_cancel_takes_the_weights_off_the_device(clip, denoise, pack, cancel_after, residency, asked):
    made = clip()
    (model,) = pack.nodes["MOVALoadModel"].execute(model="small/tiny", precision="as stored", residency=residency, attention="auto").result
    cancel_after(asked)
    with pytest.raises(Cancelled):
        denoise(made, model=model)
    assert not placed(model)


def test_a_cancelled_run_that_is_kept_goes_on_where_it_stopped(clip, denoise, pack, cancel_after, monkeypatch):
    made, steps = clip(), []
    expected = denoise(made, steps=3)
    cancel_after(8)  # 4 layers and a step are asked about: in the second step
    with pytest.raises(Cancelled):
        denoise(made, steps=3, keep_every=100)
    monkeypatch.undo()
    assert len(list(pack.host.kept_runs().iterdir())) == 1
    advance = pack.host.SamplingProgress.on_step
    monkeypatch.setattr(pack.host.SamplingProgress, "on_step", lambda progress, step: (steps.append(step.index), advance(progress, step)))
    again = denoise(made, steps=3, keep_every=100)
    assert steps == [1, 2] and not list(pack.host.kept_runs().iterdir())
    assert all(torch.equal(a["samples"], b["samples"]) for a, b in zip(again, expected, strict=True))


def test_success_and_errors_take_them_off_too(clip, denoise, parts, pack):
    made = clip()
    denoise(made)
    assert not placed(parts.model)
    with pytest.raises(pack.errors.InputError):
        denoise(made, audio={"samples": torch.ones(1, 3, 19)})
    assert not placed(parts.model)


def test_room_is_made_before_and_vaes_leave_the_device(parts, pack, monkeypatch, cancel_after, run, clip, denoise):
    """Places as a GPU host would see them: each part is moved there after room was made, and back however it ends."""
    events = []
    monkeypatch.setattr(parts.text, "cache", None)  # a prompt that is known needs no room
    monkeypatch.setattr(sys.modules["comfy.model_management"], "free_memory", lambda need, device: events.append(("room", need > 0)))
    monkeypatch.setattr(sys.modules["comfy.model_management"], "vae_device", lambda: torch.device("cpu", 0))
    for socket in (parts.video_vae, parts.audio_vae):
        move = socket.vae.to
        monkeypatch.setattr(socket.vae, "to", lambda device, move=move: (events.append(("to", str(device))), move("cpu"))[1], raising=False)
    visit = [("room", True), ("to", "cpu:0"), ("to", "cpu")]
    latents = {"samples": torch.randn(1, 16, 3, 6, 8)}
    run("MOVADecodeVideo", samples=latents, vae=parts.video_vae)
    run("MOVADecodeAudio", samples={"samples": torch.randn(1, 16, 5)}, vae=parts.audio_vae)
    assert events == visit * 2
    made = clip()  # encodes the text, then the picture
    assert events == visit * 2 + [("room", True)] + visit and parts.text.model is None
    denoise(made)
    assert events[-1] == ("room", True)
    cancel_after(2)
    with pytest.raises(Cancelled):
        run("MOVADecodeVideo", samples=latents, vae=parts.video_vae)
    assert events[-3:] == visit


def test_text_encoder_is_released_when_cancelled(parts, pack, cancel_after, run):
    cancel_after(2)
    with pytest.raises(Cancelled):
        run("MOVAEncodeText", text_encoder=parts.text, prompt="A prompt that was never encoded before.")
    assert parts.text.model is None


def test_progress_counts_layers_and_the_preview_moves(clip, denoise, pack, monkeypatch):
    made, shown, bar = clip(), [], []

    class Previewer:
        def decode_latent_to_preview_image(self, preview_format, x0):
            shown.append(x0)
            return (preview_format, "picture", 512)

    preview, formats = ModuleType("latent_preview"), ModuleType("comfy.latent_formats")
    preview.get_previewer, formats.Wan21 = lambda device, latent_format: Previewer(), type("Wan21", (), {})
    monkeypatch.setitem(sys.modules, "latent_preview", preview)
    monkeypatch.setitem(sys.modules, "comfy.latent_formats", formats)
    monkeypatch.setattr(pack.host, "PREVIEW_SECONDS", 0)
    monkeypatch.setattr(
        sys.modules["comfy.utils"], "ProgressBar", lambda total: SimpleNamespace(update_absolute=lambda value, total, preview=None: bar.append((value, total)))
    )
    denoise(made, steps=3)
    assert bar == [(value, 12) for value in (1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12)]  # 4 layers; a picture after every step
    assert all(frame.shape == (1, 16, 1, 6, 8) for frame in shown) and len(shown) == 11
    assert not torch.equal(shown[0], shown[1]) and torch.equal(shown[0], shown[3])  # three latent frames, again and again
