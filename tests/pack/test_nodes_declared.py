"""What the nodes declare, for ever."""

import subprocess
import sys

import pytest
from conftest import ROOT
from node_stand_ins import first_value

MODEL, DEVICE = ("model", "COMBO", "small/tiny"), ("device", "COMBO", "auto")
SOCKETS = ("MOVA_MODEL", "MOVA_TEXT_ENCODER", "CONDITIONING", "VAE", "LATENT", "IMAGE", "AUDIO")
DECLARED = {
    "MOVALoadModel": (
        "Load MOVA Model", "MOVA/loaders",
        [MODEL, ("precision", "COMBO", "as stored"), ("residency", "COMBO", "auto"), ("attention", "COMBO", "auto")],
        [("model", "MOVA_MODEL")],
    ),
    "MOVALoadTextEncoder": ("Load MOVA Text Encoder", "MOVA/loaders", [MODEL, DEVICE], [("text_encoder", "MOVA_TEXT_ENCODER")]),
    "MOVALoadVideoVAE": ("Load MOVA Video VAE", "MOVA/loaders", [MODEL], [("vae", "VAE")]),
    "MOVALoadAudioVAE": ("Load MOVA Audio VAE", "MOVA/loaders", [MODEL], [("vae", "VAE")]),
    "MOVAEncodeText": (
        "MOVA Text Encode", "MOVA/conditioning",
        [("text_encoder", "MOVA_TEXT_ENCODER"), ("prompt", "STRING", ""), ("negative_prompt", "STRING", "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指")],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
    ),
    "MOVAImageToVideoAudio": (
        "MOVA Image to Video+Audio", "MOVA/conditioning",
        [
            ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("vae", "VAE"), ("size", "COMBO", "match image 360p"), ("width", "INT", 640),
            ("height", "INT", 352), ("length", "INT", 193), ("fps", "FLOAT", 24.0), ("batch_size", "INT", 1), ("start_image", "IMAGE"), ("end_image", "IMAGE"),
        ],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("video", "LATENT"), ("audio", "LATENT"), ("fps", "FLOAT")],
    ),
    "MOVADenoise": (
        "MOVA Joint Denoiser", "MOVA/sampling",
        [
            ("model", "MOVA_MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("video", "LATENT"), ("audio", "LATENT"), ("seed", "INT", 42),
            ("steps", "INT", 50), ("cfg", "FLOAT", 5.0), ("shift", "FLOAT", 0.0), ("schedule", "COMBO", "reference"), ("audio_cfg", "FLOAT", 0.0),
            ("audio_shift", "FLOAT", 0.0), ("bridge_guidance", "FLOAT", 1.0), ("boundary", "FLOAT", 0.0), ("denoise", "FLOAT", 1.0),
            ("keep_every", "INT", 0),
        ],
        [("video", "LATENT"), ("audio", "LATENT")],
    ),
    "MOVAKeepStream": (
        "MOVA Keep Picture / Sound", "MOVA/latent",
        [("samples", "LATENT"), ("keep", "FLOAT", 1.0), ("from_seconds", "FLOAT", 0.0), ("to_seconds", "FLOAT", 0.0), ("fps", "FLOAT", 24.0)],
        [("samples", "LATENT")],
    ),
    "MOVADecodeVideo": ("MOVA Video Decode", "MOVA/decode", [("samples", "LATENT"), ("vae", "VAE"), ("tiling", "COMBO", "auto")], [("images", "IMAGE")]),
    "MOVADecodeAudio": ("MOVA Audio Decode (Vocoder)", "MOVA/decode", [("samples", "LATENT"), ("vae", "VAE")], [("audio", "AUDIO")]),
    "MOVAEncodeAudio": (
        "MOVA Audio Encode", "MOVA/latent", [("audio", "AUDIO"), ("vae", "VAE"), ("length", "INT", 193), ("fps", "FLOAT", 24.0)], [("audio", "LATENT")]
    ),
    "MOVAEstimate": (
        "MOVA Estimate", "MOVA/sampling",
        [
            ("model", "MOVA_MODEL"), ("width", "INT", 640), ("height", "INT", 352), ("length", "INT", 193), ("steps", "INT", 50), ("cfg", "FLOAT", 5.0),
            ("residency", "COMBO", "auto"), ("device", "COMBO", "this machine"), ("bridge_guidance", "FLOAT", 1.0),
        ],
        [("text", "STRING"), ("vram_gb", "FLOAT"), ("ram_gb", "FLOAT"), ("minutes", "FLOAT")],
    ),
}  # fmt: skip
OPTIONAL = {
    "MOVAImageToVideoAudio": ["start_image", "end_image"],
    "MOVADenoise": ["audio", "keep_every"],
    "MOVAKeepStream": ["from_seconds", "to_seconds", "fps"],
}
ADVANCED = {
    "MOVALoadModel": ["attention"],
    "MOVADenoise": ["audio_cfg", "audio_shift", "bridge_guidance", "boundary", "denoise", "keep_every"],
    "MOVAEstimate": ["bridge_guidance"],
}


@pytest.mark.parametrize("node_id", DECLARED)
def test_ids_inputs_and_outputs_stay_as_they_are(pack, node_id):
    schema = pack.nodes[node_id].GET_SCHEMA()
    inputs = [(item.id, item.io_type, first_value(item)) if item.is_widget else (item.id, item.io_type) for item in schema.inputs]
    assert (schema.display_name, schema.category, inputs, [(item.display_name, item.io_type) for item in schema.outputs]) == DECLARED[node_id]
    assert [item.id for item in schema.inputs if item.optional] == OPTIONAL.get(node_id, [])
    assert [item.id for item in schema.inputs if item.advanced] == ADVANCED.get(node_id, [])


def test_every_node_and_input_is_explained(pack):
    for node in pack.nodes.values():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.search_aliases
        assert all(item.tooltip for item in schema.inputs), schema.node_id


def test_seed_is_controlled_and_choices_are_complete(pack):
    inputs = {node_id: {item.id: item for item in node.GET_SCHEMA().inputs} for node_id, node in pack.nodes.items()}
    assert inputs["MOVADenoise"]["seed"].control_after_generate and inputs["MOVADenoise"]["seed"].max == 2**64 - 1
    assert inputs["MOVALoadModel"]["precision"].options == ["as stored", "bf16", "fp16", "fp32", "fp8"]
    assert inputs["MOVALoadModel"]["attention"].options == ["auto", "flash", "cudnn", "memory-efficient", "math"]
    assert inputs["MOVAImageToVideoAudio"]["size"].options == ["match image 360p", "match image 720p", "custom"]
    assert inputs["MOVADenoise"]["schedule"].options == ["reference", "simple"]


def test_loading_the_pack_is_light(tmp_path):
    code = f"""
import importlib.util, sys, time
from pathlib import Path
from headless.host import installed
with installed(*[Path({str(tmp_path)!r})] * 3):
    spec = importlib.util.spec_from_file_location("p", "__init__.py", submodule_search_locations=["."])
    sys.modules["p"] = module = importlib.util.module_from_spec(spec)
    start = time.process_time()
    spec.loader.exec_module(module)
    print([name for name in ("transformers", "diffusers", "torchaudio", "av", "mediapipe") if name in sys.modules], time.process_time() - start < 2)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[] True"
