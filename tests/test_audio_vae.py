"""The audio VAE against the reference, and what it makes of odd sounds and wrong folders."""

import json
import shutil
import sys

import pytest
import torch
from conftest import distance, golden_path
from safetensors.torch import load_file, save_file

from mova.audio_vae import DAC, AudioVAEConfig, load_audio_vae, stored_shapes
from mova.errors import CheckpointError, InputError, MediaError

WEIGHTS = "diffusion_pytorch_model.safetensors"
TOLERANCE = {"main": 1e-5, "cont_wn": 1e-5, "release_rates": 3e-5}


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(audio_vae folder) -> a checkpoint folder with a copy of it that a test may spoil."""

    def copy(source):
        (tmp_path / "model_index.json").write_text("{}")
        (tmp_path / "audio_vae").mkdir()
        for file in source.iterdir():
            shutil.copyfile(file, tmp_path / "audio_vae" / file.name)
        return tmp_path

    return copy


@pytest.fixture
def vae(tiny_mova):
    return load_audio_vae(tiny_mova)


def change_config(folder, **values):
    file = folder / "audio_vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("tag", TOLERANCE)
def test_matches_reference(tag, golden, checkpoint):
    source = golden_path("tiny-mova/audio_vae" if tag == "main" else f"dac_models/{tag}")
    vae, tensors, limit = load_audio_vae(checkpoint(source)), golden("dac"), TOLERANCE[tag]
    posterior = vae.posterior(tensors[f"{tag}.audio_in"], vae.sample_rate)
    for name, actual in (("mean", posterior.mean), ("logvar", posterior.logvar), ("kl", posterior.kl)):
        assert distance(actual, tensors[f"{tag}.{name}"]) <= limit, name
    assert distance(vae.decode(tensors[f"{tag}.mean"]), tensors[f"{tag}.decode_mean"]) <= limit
    assert distance(vae.decode(tensors[f"{tag}.z_rand"]), tensors[f"{tag}.decode_rand"]) <= limit


@pytest.mark.parametrize("tag", TOLERANCE)
def test_round_trip_of_a_length_that_is_no_multiple_of_the_hop(tag, golden, checkpoint):
    vae, tensors = load_audio_vae(checkpoint(golden_path("tiny-mova/audio_vae" if tag == "main" else f"dac_models/{tag}"))), golden("dac")
    sound = tensors[f"{tag}.audio_odd"]
    posterior = vae.posterior(sound, vae.sample_rate)
    latents = posterior.mean + (0.5 * posterior.logvar).exp() * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(9))
    assert distance(latents, tensors[f"{tag}.fwd.z"]) <= TOLERANCE[tag]
    decoded = vae.decode(latents)
    assert decoded.shape == (1, 1, vae.hop * latents.shape[-1])
    assert distance(decoded[..., : sound.shape[-1]], tensors[f"{tag}.fwd.audio"]) <= TOLERANCE[tag]
    assert posterior.kl.mean().item() == pytest.approx(tensors[f"{tag}.fwd.kl_loss"].item(), rel=1e-5)


def test_decodes_the_loop_of_the_reference(golden, vae):
    loop = golden("cfg_loop")
    assert distance(vae.decode(loop["step3.audio_latents"]), loop["audio"]) <= 1e-5


def test_bf16_weights_compute_in_float32(golden, tiny_mova):
    loop, vae = golden("cfg_loop_bf16"), load_audio_vae(tiny_mova, dtype=torch.bfloat16)
    decoded = vae.decode(loop["step3.audio_latents"])
    assert decoded.dtype == torch.float32
    assert distance(decoded, loop["audio"]) <= 1e-5  # alphas upcast before the reciprocal are 1.7e-3 away


def test_bf16_checkpoint_equals_bf16_dtype(vae, tiny_mova, checkpoint):
    folder = checkpoint(tiny_mova / "audio_vae")
    save_file({key: tensor.bfloat16() for key, tensor in vae.weights.items()}, folder / "audio_vae" / WEIGHTS)
    latents = torch.randn(1, 16, 5, generator=torch.Generator().manual_seed(0))
    stored, asked = load_audio_vae(folder), load_audio_vae(tiny_mova, dtype=torch.bfloat16)
    assert torch.equal(stored.decode(latents), asked.decode(latents))
    assert not torch.equal(stored.decode(latents), vae.decode(latents))


def test_matches_the_rows_of_the_specification():
    network = DAC(AudioVAEConfig(encoder_dim=4, encoder_rates=(2, 3), latent_dim=6, decoder_dim=16, decoder_rates=(3, 2)))
    filled = {}
    for number, (key, tensor) in enumerate(sorted(network.state_dict().items())):
        position = torch.arange(tensor.numel(), dtype=torch.float64)
        filled[key] = (0.1 * torch.sin(0.37 * position + 0.11 * number) + key.endswith("alpha")).float().reshape(tensor.shape)
    network.load_state_dict(filled)
    with torch.no_grad():
        decoded = network.decode(torch.cos(0.3 * torch.arange(42, dtype=torch.float64)).float().reshape(1, 6, 7))
        sound = torch.cos(0.05 * torch.arange(40, dtype=torch.float64)).float().reshape(1, 1, 40)
        mean = network.encode(torch.nn.functional.pad(sound, (0, 2))).mean
    assert decoded.shape == (1, 1, 42) and mean.shape == (1, 6, 7)
    rows = [
        (decoded, -3.669591, 0.08737123, [-0.076343, -0.080005, -0.079548, -0.088415]),
        (mean, -2.840644, 0.07049347, [-0.046922, -0.027887, -0.019875, -0.020405]),
    ]
    for actual, total, size, first in rows:
        assert actual.sum().item() == pytest.approx(total, abs=1e-5)
        assert actual.abs().mean().item() == pytest.approx(size, abs=1e-7)
        assert actual.flatten()[:4].tolist() == pytest.approx(first, abs=1e-6)


def test_released_size():
    with torch.device("meta"):
        network = DAC(AudioVAEConfig())
    assert sum(tensor.numel() for tensor in network.parameters()) == 371_539_137
    assert len(stored_shapes(network, weight_normed=False)) == 224
    assert len(stored_shapes(network, weight_normed=True)) == 298


def test_weight_norm_is_fused(vae, tiny_mova, checkpoint):
    folder, stored = checkpoint(tiny_mova / "audio_vae"), {}
    for key, tensor in vae.weights.items():
        if key.endswith(".weight") and key.startswith(("encoder.", "decoder.")):
            stored[f"{key}_v"] = tensor * 3.0
            stored[f"{key}_g"] = tensor.norm(dim=(1, 2), keepdim=True)
        else:
            stored[key] = tensor
    save_file(stored, folder / "audio_vae" / WEIGHTS)
    latents = torch.randn(1, 16, 5, generator=torch.Generator().manual_seed(0))
    assert distance(load_audio_vae(folder).decode(latents), vae.decode(latents)) <= 1e-5


@pytest.mark.parametrize(("num_frames", "fps", "length"), [(193, 24.0, 403), (1, 24, 3), (25, 23.976, 53)])
def test_latent_length(num_frames, fps, length, vae):
    assert AudioVAEConfig().latent_length(num_frames, fps) == length
    assert vae.config.latent_length(9, 24.0) == 19


def test_latent_length_of_nothing(vae):
    for num_frames, fps in ((0, 24.0), (9, 0.0), (9, -1.0), (9, float("nan"))):
        with pytest.raises(InputError, match="frame rate"):
            vae.config.latent_length(num_frames, fps)


@pytest.mark.parametrize(("channels", "rate", "samples"), [(1, 1500, 1), (2, 8000, 4000), (7, 8000, 801), (1, 44100, 44101), (2, 1500, 900), (1, 11025, 3)])
def test_any_sound_becomes_whole_latents(channels, rate, samples, vae):
    sound = torch.rand(2, channels, samples, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before = sound.clone()
    latents = vae.encode(sound, rate)
    resampled = -(-samples * vae.sample_rate // rate)
    assert latents.shape == (2, vae.latent_channels, -(-resampled // vae.hop)) and torch.isfinite(latents).all()
    assert torch.equal(sound, before)


def test_channels_are_averaged_and_the_end_is_zero_padded(vae):
    sound = torch.rand(1, 2, 100, generator=torch.Generator().manual_seed(2)) * 2 - 1
    padded = torch.nn.functional.pad(sound.mean(1, keepdim=True), (0, 20))
    assert torch.equal(vae.encode(sound, 1500), vae.encode(padded, 1500))


def test_results_can_be_trained_on(vae):
    latents = vae.encode(torch.zeros(1, 1, 90), 1500)
    scale = torch.ones(1, requires_grad=True)
    (latents * scale).sum().backward()
    assert scale.grad is not None and not vae.decode(latents).is_inference()


@pytest.mark.parametrize(
    ("sound", "rate", "message"),
    [
        (torch.zeros(100), 1500, "channels, samples"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), 1500, "float tensor"),
        ([0.0], 1500, "given was list"),
        (torch.zeros(1, 1, 0), 1500, "empty"),
        (torch.full((1, 1, 9), float("nan")), 1500, "NaN"),
        (torch.full((1, 1, 9), float("inf")), 1500, "infinite"),
        (torch.zeros(1, 1, 9), 0, "sample rate is 0"),
        (torch.zeros(1, 1, 9), -8000, "sample rate is -8000"),
        (torch.zeros(1, 1, 9), float("nan"), "sample rate is nan"),
        (torch.zeros(1, 1, 9), None, "sample rate is None"),
    ],
)
def test_what_is_no_sound(sound, rate, message, vae):
    with pytest.raises(InputError, match=message):
        vae.encode(sound, rate)


@pytest.mark.parametrize(("shape", "message"), [((1, 15, 4), "15 channels"), ((16, 4), "float tensor"), ((1, 16, 0), "empty")])
def test_what_is_no_latent(shape, message, vae):
    with pytest.raises(InputError, match=message):
        vae.decode(torch.zeros(shape))


def test_without_torchaudio(vae, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    assert vae.encode(torch.zeros(1, 1, 60), 1500).shape == (1, 16, 2)  # not needed at the VAE's own rate
    with pytest.raises(MediaError, match="pip install"):
        vae.encode(torch.zeros(1, 1, 60), 8000)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"continuous": False}, "continuous: false"),
        ({"encoder_rates": [2, 3, 7]}, "same product"),
        ({"decoder_dim": 0}, "positive"),
        ({"sample_rate": "48k"}, "sample_rate"),
        ({"encoder_dim": 16}, "misshapen"),
    ],
)
def test_config_that_does_not_fit(values, message, tiny_mova, checkpoint):
    folder = checkpoint(tiny_mova / "audio_vae")
    change_config(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        load_audio_vae(folder)


def test_latent_dim_null_is_the_encoders_width(tiny_mova, checkpoint):
    folder = checkpoint(tiny_mova / "audio_vae")
    change_config(folder, latent_dim=None)
    with pytest.raises(CheckpointError, match=r"needed \[64, 64, 3\]"):
        load_audio_vae(folder)
    assert AudioVAEConfig(latent_dim=None).latent_channels == 4096


def test_one_error_lists_all_that_is_wrong_with_the_weights(tiny_mova, checkpoint):
    folder = checkpoint(tiny_mova / "audio_vae")
    weights = load_file(folder / "audio_vae" / WEIGHTS)
    del weights["quant_conv.bias"]
    save_file(weights | {"extra": torch.zeros(1), "decoder.model.0.bias": torch.zeros(3)}, folder / "audio_vae" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 missing: quant_conv.bias; 1 unexpected: extra; 1 misshapen: decoder.model.0.bias is \[3\]"):
        load_audio_vae(folder)


def test_truncated_weights(tiny_mova, checkpoint):
    folder = checkpoint(tiny_mova / "audio_vae")
    file = folder / "audio_vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_audio_vae(folder)
