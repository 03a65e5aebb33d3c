"""LoRA files: every kind of adapter is what its formula says, scales are chosen with care, and a damaged file is one sentence."""

import io
import json
import pickle
import random
import zipfile

import loras
import pytest
import torch
from conftest import golden_path
from safetensors.torch import load_file, save_file

import mova
from mova import LoraError
from mova.lora import load_lora
from mova.lora.deltas import Change, merge

LAYER = "blocks.0.ffn.0"  # [176, 80] in the small model


@pytest.fixture(scope="module")
def shapes(tiny_mova):
    return mova.load_denoiser(tiny_mova).parts.shapes()


@pytest.fixture
def write(tmp_path):
    """write({"lora_A.weight": ..., ...}) -> a file with these tensors on LAYER of the high-noise expert; keys with a dot before them are whole."""

    def write(tensors, metadata=None, name="robot.safetensors"):
        save_file({f"video_dit.{LAYER}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / name, metadata=metadata)
        return tmp_path / name

    return write


def load(file, shapes, **given):
    return load_lora(mova.Lora(file, **given), shapes)


def changed(found, weight, key=f"{LAYER}.weight"):
    """The weight with the LoRA added, as residency adds it."""
    weight = weight.clone()
    merge(weight, [(change, change.delta.tensors) for change in found.changes["high"][key]])
    return weight


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# ---------------------------------------------------------------- kinds


def loha(t):
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def lokr(t):
    sides = (t[f"lokr_{name}"] if f"lokr_{name}" in t else t[f"lokr_{name}_a"] @ t[f"lokr_{name}_b"] for name in ("w1", "w2"))
    return torch.kron(*sides)


def lora(t):
    return t["lora_B.weight"].flatten(1) @ t["lora_A.weight"].flatten(1)


FACTORS = {"lora_A.weight": draw(4, 80), "lora_B.weight": draw(176, 4)}
KINDS = {  # tensors -> the delta they stand for, before alpha
    "lora": (FACTORS, lora, 4),
    "lora as 1x1 convolutions": ({"lora_A.weight": draw(4, 80, 1, 1), "lora_B.weight": draw(176, 4, 1, 1)}, lora, 4),
    "loha": ({"hada_w1_a": draw(176, 3), "hada_w1_b": draw(3, 80), "hada_w2_a": draw(176, 3, seed=1), "hada_w2_b": draw(3, 80, seed=1)}, loha, 3),
    "lokr, both whole": ({"lokr_w1": draw(11, 8), "lokr_w2": draw(16, 10)}, lokr, None),
    "lokr, one split": ({"lokr_w1": draw(11, 8), "lokr_w2_a": draw(16, 2), "lokr_w2_b": draw(2, 10)}, lokr, 2),
    "lokr, both split": ({"lokr_w1_a": draw(11, 2), "lokr_w1_b": draw(2, 8), "lokr_w2_a": draw(16, 2), "lokr_w2_b": draw(2, 10)}, lokr, 2),
    "difference": ({"diff": draw(176, 80)}, lambda t: t["diff"], None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds(write, shapes, kind, dtype, monkeypatch):
    tensors, formula, rank = KINDS[kind]
    alpha = {"alpha": torch.tensor(1.5)} if rank else {}
    found = load(write(tensors | alpha), shapes)
    weight = draw(176, 80).to(dtype)
    expected = (weight.float() + (1.5 / rank if rank else 1.0) * formula(tensors)).to(dtype)
    monkeypatch.setattr("mova.lora.deltas.PIECE", {"cpu": 80 * 13})  # rows in pieces that divide nothing
    assert torch.allclose(changed(found, weight).float(), expected.float(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert (changed(found, weight) == expected).float().mean() > (0.0 if dtype == torch.float32 else 0.999)
    half = load(write(tensors | alpha), shapes, video_high=-0.5)
    assert torch.allclose(changed(half, torch.zeros(176, 80)), -0.5 * changed(found, torch.zeros(176, 80)), atol=1e-6)


@pytest.mark.parametrize("name", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_dora_changes_length_and_direction(write, shapes, name, columns):
    weight, scale = draw(176, 80), torch.rand(1, 80) + 0.5 if columns else torch.rand(176, 1) + 0.5
    stored = scale.flatten() if name != "dora_scale" and not columns else scale
    found = load(write(FACTORS | {"alpha": torch.tensor(2.0), name: stored}), shapes)
    wanted = weight + 0.5 * lora(FACTORS)
    expected = scale * wanted / wanted.norm(dim=0 if columns else 1, keepdim=True)
    assert torch.allclose(changed(found, weight), expected, atol=1e-5) and "DoRA" in str(found.report)
    half = load(write(FACTORS | {"alpha": torch.tensor(2.0), name: stored}), shapes, video_high=0.5)
    assert torch.allclose(changed(half, weight), (weight + expected) / 2, atol=1e-5)


def test_a_dora_row_of_zeros_stays_one(write, shapes):
    found = load(write({key: torch.zeros_like(tensor) for key, tensor in FACTORS.items()} | {"dora_scale": torch.full((176, 1), 100.0)}), shapes)
    assert torch.equal(changed(found, torch.zeros(176, 80)), torch.zeros(176, 80))


def test_a_lora_with_bias(write, shapes):
    found = load(write(FACTORS | {"lora_B.bias": draw(176), "alpha": torch.tensor(2.0)}), shapes)
    assert torch.allclose(changed(found, torch.zeros(176), f"{LAYER}.bias"), 0.5 * draw(176))


def test_a_lora_on_the_patch_embedding(tmp_path, shapes):
    down, up = draw(4, 36, 1, 2, 2), draw(80, 4, 1, 1, 1)
    save_file({"video_dit.patch_embedding.lora_down.weight": down, "video_dit.patch_embedding.lora_up.weight": up}, tmp_path / "patch.safetensors")
    found = load(tmp_path / "patch.safetensors", shapes)
    expected = torch.einsum("or,ritxy->oitxy", up.flatten(1), down)
    assert torch.allclose(changed(found, torch.zeros(80, 36, 1, 2, 2), "patch_embedding.weight"), expected, atol=1e-5)


# ---------------------------------------------------------------- scales


def scale_of(found):
    return found.changes["high"][f"{LAYER}.weight"][0].delta.scale


def test_scale_in_a_safetensors_file(write, shapes, tmp_path):
    plain, alpha = write(FACTORS), write(FACTORS | {"alpha": torch.tensor(1.0)}, name="alpha.safetensors")
    assert scale_of(load(plain, shapes)) == 1 and "the file names no alpha" in str(load(plain, shapes).report)
    assert scale_of(load(alpha, shapes)) == 0.25 and scale_of(load(alpha, shapes, alpha=8.0)) == scale_of(load(plain, shapes, alpha=8.0)) == 2
    noted = write(FACTORS, {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})})
    assert scale_of(load(noted, shapes)) == 0.5
    assert scale_of(load(write(FACTORS, {"lora_adapter_metadata": "{"}), shapes)) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_alpha_may_be_a_whole_number(write, shapes, tmp_path, dtype):
    tensors = FACTORS | {"alpha": torch.tensor(2, dtype=dtype)}
    assert scale_of(load(write(tensors), shapes)) == 0.5
    torch.save({f"video_dit.{LAYER}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "lora.pt")
    assert scale_of(load(tmp_path / "lora.pt", shapes)) == 0.5


HUGE = "9" * 400  # more than a float can say


@pytest.mark.parametrize("notes", [f'{{"r": 4, "lora_alpha": {HUGE}}}', f'{{"r": {HUGE}, "lora_alpha": 4}}', '{"r": 4, "lora_alpha": 1e999}', "[" * 10**5])
def test_notes_that_are_no_numbers(write, shapes, notes):
    assert scale_of(load(write(FACTORS, {"lora_adapter_metadata": notes}), shapes)) == 1


@pytest.mark.parametrize(
    ("config", "scale"), [({"r": 4, "lora_alpha": 8}, 2), ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4), ({"r": 16, "lora_alpha": 8}, 1), ({}, 1)]
)
def test_scale_of_a_peft_folder(tmp_path, write, shapes, config, scale):
    (tmp_path / "peft").mkdir()
    write(FACTORS).rename(tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    assert scale_of(load(tmp_path / "peft", shapes)) == scale
    torch.save(load_file(tmp_path / "peft" / "adapter_model.safetensors"), tmp_path / "peft" / "adapter_model.bin")
    assert scale_of(load(tmp_path / "peft" / "adapter_model.bin", shapes)) == scale
    (tmp_path / "peft" / "adapter_config.json").write_text("[" * 10**5)
    with pytest.raises(LoraError, match="not readable JSON"):
        load(tmp_path / "peft", shapes)


@pytest.mark.parametrize("values", [{"rank": "MOVATrain", "alpha": 16.0}, {"rank": 4, "alpha": "16"}, {"rank": 4, "alpha": float("nan")}, {"rank": True}, {}])
def test_a_garbage_config_is_no_scale(tmp_path, shapes, values):
    torch.save({f"video_dit.{LAYER}.{key}": tensor for key, tensor in FACTORS.items()}, tmp_path / "lora_weights.pt")
    torch.save(values, tmp_path / "lora_config.pt")
    found = load(tmp_path, shapes)
    assert scale_of(found) == 1 and "is not about these tensors" in str(found.report)
    assert scale_of(load(tmp_path, shapes, alpha=2.0)) == 0.5


# ---------------------------------------------------------------- files and folders


def test_folders(tmp_path, write, shapes):
    file = write(FACTORS)
    assert scale_of(load(tmp_path, shapes)) == 1  # the only file
    file.rename(tmp_path / "other.safetensors")
    write(FACTORS)
    with pytest.raises(LoraError, match=r"several LoRAs: give one of other.safetensors, robot.safetensors"):
        load(tmp_path, shapes)
    (tmp_path / "run" / "step-200").mkdir(parents=True)
    with pytest.raises(LoraError, match="holds no LoRA file"):
        load(tmp_path / "run", shapes)
    torch.save({}, tmp_path / "run" / "step-200" / "lora_weights.pt")
    with pytest.raises(LoraError, match="give one of step-200"):
        load(tmp_path / "run", shapes)
    with pytest.raises(LoraError, match="is not there"):
        load(tmp_path / "nowhere", shapes)
    with pytest.raises(LoraError, match="cannot be read"):
        load(tmp_path / ("x" * 5000), shapes)


def test_the_file_that_the_trainer_left_empty(shapes):
    with pytest.raises(LoraError, match="holds no weights. MOVA's single-GPU trainer writes such empty files"):
        load(golden_path("lora/accelerate_r16_nonfsdp_as_trainer_calls_it"), shapes)
    with pytest.raises(LoraError, match="settings of a training"):
        load(golden_path("lora/accelerate_r16_nonfsdp_as_trainer_calls_it/lora_config.pt"), shapes)


def test_a_whole_checkpoint_is_no_lora(tiny_mova, shapes):
    with pytest.raises(LoraError, match="holds no LoRA: none of its .* tensors changes another one"):
        load(tiny_mova / "video_dit" / loras.WEIGHTS, shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_stored_dtypes(write, shapes, dtype):
    found = load(write({key: tensor.to(dtype) for key, tensor in FACTORS.items()}), shapes)
    rounded = {key: tensor.to(dtype).float() for key, tensor in FACTORS.items()}
    assert torch.allclose(changed(found, torch.zeros(176, 80)), lora(rounded), atol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "r0bot style\n"}, "r0bot style"),
        ({"ss_tag_frequency": json.dumps({"10_r0bot": {"r0bot": 20, "a street": 3, "night": 19}})}, "r0bot, night"),
        ({"trigger_words": "r0bot", "ss_tag_frequency": "{}"}, "r0bot"),
        ({"ss_tag_frequency": "[1, 2"}, ""),
        ({"ss_tag_frequency": "[1, 2]"}, ""),
        ({"ss_tag_frequency": '{"a": {"b": "many"}}'}, ""),
        ({"ss_tag_frequency": '{"a": {"b": 1e999}}'}, ""),
        ({"ss_tag_frequency": f'{{"a": {{"b": {HUGE}}}}}'}, ""),
        ({"ss_tag_frequency": "[" * 10**5}, ""),
        ({}, ""),
    ],
)
def test_trigger_words(write, shapes, metadata, words):
    assert load(write(FACTORS, metadata), shapes).report.words == words


# ---------------------------------------------------------------- damage


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the pickle ran",))


@pytest.mark.parametrize("name", ["lora_weights.pt", "robot.safetensors"])
@pytest.mark.parametrize("bare", [False, True], ids=["torch.save", "pickle"])
def test_a_malicious_pickle_is_refused(tmp_path, shapes, name, bare):
    content = {"lora_state_dict": {f"video_dit.{LAYER}.lora_A": FACTORS["lora_A.weight"]}, "rank": Trap()}
    if bare:
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(LoraError, match="could run code"):
        load(tmp_path / name, shapes)


def test_a_malicious_config_is_refused(tmp_path, shapes):
    torch.save({f"video_dit.{LAYER}.{key}": tensor for key, tensor in FACTORS.items()}, tmp_path / "lora_weights.pt")
    torch.save({"rank": Trap()}, tmp_path / "lora_config.pt")
    with pytest.raises(LoraError, match=r"lora_config.pt holds more than weights"):
        load(tmp_path, shapes)


DAMAGE = {
    "no up": ({"lora_A.weight": draw(4, 80)}, "has a 'down' matrix but no 'up'"),
    "other rank": ({"lora_A.weight": draw(4, 80), "lora_B.weight": draw(176, 5)}, "cannot be multiplied"),
    "no rank": ({"lora_A.weight": draw(0, 80), "lora_B.weight": draw(176, 0)}, "is empty"),
    "scalar": ({"lora_A.weight": torch.tensor(1.0), "lora_B.weight": torch.tensor(1.0)}, "changes a tensor of 1 x 1"),
    "nan": (FACTORS | {"lora_A.weight": draw(4, 80).fill_(torch.nan)}, "NaN or infinite"),
    "inf": (FACTORS | {"lora_B.weight": torch.full((176, 4), torch.inf)}, "NaN or infinite"),
    "inf alpha": (FACTORS | {"alpha": torch.tensor(torch.inf)}, "NaN or infinite"),
    "overflow": ({key: tensor * 1e25 for key, tensor in FACTORS.items()}, "so large"),
    "alpha alone": ({"alpha": torch.tensor(1.0), "lora_B.bias": draw(176)}, None),
    "many alphas": (FACTORS | {"alpha": draw(2)}, "one number is needed"),
    "dora": (FACTORS | {"dora_scale": draw(7, 1)}, "DoRA scale"),
    "half a lokr": ({"lokr_w1": draw(11, 8)}, "but no 'lokr_w2'"),
    "half a split": ({"lokr_w1": draw(11, 8), "lokr_w2_a": draw(16, 2)}, "but no 'lokr_w2'"),
    "loha": ({"hada_w1_a": draw(176, 3), "hada_w1_b": draw(3, 80), "hada_w2_a": draw(80, 3), "hada_w2_b": draw(3, 80)}, "differ in shape"),
    "tucker": (FACTORS | {"lora_mid.weight": draw(4, 4, 1, 1)}, "a Tucker decomposition"),
    "oft": ({"oft_blocks": draw(4, 8, 8)}, "OFT"),
    "integers": (FACTORS | {"lora_A.weight": torch.ones(4, 80, dtype=torch.int8)}, "no plain numbers"),
    "two names": (FACTORS | {"lora_A.other.weight": draw(4, 80), "lora_B.other.weight": draw(176, 4)}, "two adapters"),
    "huge rank": ({"lora_A.weight": draw(9000, 80), "lora_B.weight": draw(80, 9000)}, "changes a tensor of 80 x 80"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_belong_together(write, shapes, damage):
    tensors, said = DAMAGE[damage]
    if said is None:
        assert load(write(tensors), shapes).changes["high"].keys() == {f"{LAYER}.bias"}
        return
    with pytest.raises(LoraError, match=said):
        load(write(tensors), shapes)


def test_an_archive_that_is_not_what_it_seems(tmp_path, shapes):
    """One number shown as a terabyte; a compressed archive; something else by name."""
    path = f"video_dit.{LAYER}"
    torch.save({f"{path}.lora_A": torch.zeros(1).expand(10**6, 10**6), f"{path}.lora_B": draw(176, 4)}, tmp_path / "wide.pt")
    with pytest.raises(LoraError, match="no plain tensor"):
        load(tmp_path / "wide.pt", shapes)
    numbers = torch.zeros(10**4)
    torch.save({f"{path}.{i}.lora_A": numbers[i:] for i in range(100)}, tmp_path / "again.pt")
    with pytest.raises(LoraError, match="times the numbers it holds"):
        load(tmp_path / "again.pt", shapes)
    buffer = io.BytesIO()
    torch.save({f"{path}.lora_A": torch.zeros(4, 80), f"{path}.lora_B": torch.zeros(176, 4)}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(LoraError, match="compressed"):
        load(tmp_path / "small.pt", shapes)
    for content in ([1, 2], {"epoch": 3}, {1: torch.zeros(1)}, torch.zeros(3)):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(LoraError):
            load(tmp_path / "other.pt", shapes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_mova):
    """A LoRA as safetensors and as the low-resource trainer writes it."""
    folder = tmp_path_factory.mktemp("whole")
    factors = {"video_dit": dict(list(loras.full_factors(tiny_mova)["video_dit"].items())[:6])}
    loras.write_full_lora(folder / "lora.safetensors", factors)
    torch.save({"lora_state_dict": load_file(folder / "lora.safetensors"), "rank": 4, "alpha": 8.0}, folder / "lora.pt")
    return folder


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_sentences(whole, tmp_path, shapes, ending, seed):
    """Cut, overwritten, and with bytes exchanged anywhere: a LoRA that is whole, or a LoraError; nothing else ever."""
    original, dice, refused = (whole / f"lora.{ending}").read_bytes(), random.Random(seed), 0
    for number in range(60):
        content = bytearray(original)
        if number % 3 == 0:
            content = content[: dice.randrange(len(content))]
        else:
            start = 0 if number % 3 == 1 else dice.randrange(len(content))  # the header is where it hurts
            reach = min(len(content) - start, 4000)
            for _ in range(dice.randrange(1, 30)):
                content[start + dice.randrange(reach)] = dice.randrange(256)
        file = tmp_path / f"damaged.{ending}"
        file.write_bytes(content)
        try:
            load(file, shapes)
        except LoraError as error:
            refused += 1
            assert len(str(error)) > 20
    assert refused > 20


@pytest.mark.parametrize("seed", range(3))
def test_swapped_keys_are_sentences(whole, tmp_path, shapes, seed):
    dice, tensors = random.Random(seed), load_file(whole / "lora.safetensors")
    for _ in range(40):
        keys = list(tensors)
        dice.shuffle(keys)
        save_file(dict(zip(keys, tensors.values(), strict=True)), tmp_path / "swapped.safetensors")
        try:
            load(tmp_path / "swapped.safetensors", shapes)
        except LoraError:
            continue


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html>", b"version https://git-lfs", b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", bytes(64)]
)
def test_impostors_are_sentences(tmp_path, shapes, content):
    for name in ("file.safetensors", "file.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoraError, match=f"{name} "):
            load(tmp_path / name, shapes)


def test_strength_is_no_part_of_the_delta(write, shapes):
    found = load(write(FACTORS), shapes, video_high=2.0)
    assert found.changes["high"][f"{LAYER}.weight"] == [Change(found.changes["high"][f"{LAYER}.weight"][0].delta, 2.0)]
