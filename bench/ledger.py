"""`python -m bench.ledger`: what one guided step of the released model costs, counted on the meta device (spec/performance.md 1.2, 1.6, 1.7, 5.1). Prints JSON.

The real code runs at the released widths on tensors without memory: a model of two layers, one with sound and bridge and one
without, stands for 30 and 10 of them; the traffic of weights is counted on all 40. A unit U is one video activation, tokens x width.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mova import towers
from mova.bridge import Bridge, BridgeConfig, Conditioner
from mova.checkpoint import TensorEntry
from mova.denoiser import Branch, Denoiser, JointRun, StepTimes
from mova.layers import Block, CrossAttention
from mova.parts import LAYERS, Parts
from mova.reading import Reader
from mova.residency import PREPARATION, SLABS, Residency
from mova.schedule import ScheduleConfig
from mova.slabs import Link, ring_bytes
from mova.towers import AudioTower, AudioTowerConfig, TowerConfig, VideoTower
from mova.work import forward_work

from .counting import FLASH, GPUKernels, Ledger

META, DTYPE = torch.device("meta"), torch.bfloat16
LATENTS = {"360p": (49, 44, 80), "720p": (49, 90, 160)}  # T, h, w of 193 frames; tokens are T * h/2 * w/2
AUDIO, TEXT, BRANCHES = 403, 512, 2
REAL_TEXT = 128  # of a long prompt; the other rows are padding, which is collapsed (assumed)
CONTEXT_BYTES = 600e6  # of the CUDA context and small tensors (1.7, assumed)
PROCESS_BYTES = 1.5e9  # RAM of Python, PyTorch and CUDA (assumed)
PUBLISHED = {"360p": 5.533e15, "720p": 61.13e15}  # FLOPs of a guided step of the reference (1.2)
STREAMED_BY_REFERENCE = 72.4e9  # bytes per step: every weight for each branch


def build_denoiser(video_layers: int, audio_layers: int) -> Denoiser:
    """The released model with fewer layers, weights streamed from files that are not there."""
    with META:
        experts = {name: VideoTower(TowerConfig(num_layers=video_layers)).to(DTYPE) for name in ("high", "low")}
        audio = AudioTower(AudioTowerConfig(num_layers=audio_layers)).to(DTYPE)
        bridge = Bridge(BridgeConfig(visual_layers=video_layers, audio_layers=audio_layers)).to(DTYPE)
    modules = {**experts, "audio": audio, "bridge": bridge}
    tensors = {name: module.requires_grad_(False).state_dict() for name, module in modules.items()}
    entries = {
        name: {key: TensorEntry(Path(name), tuple(tensor.shape), "BF16", 0, tensor.nbytes) for key, tensor in found.items()} for name, found in tensors.items()
    }
    parts = Parts(experts, audio, bridge, tensors, entries)
    return Denoiser(parts, Residency(parts, META, DTYPE, "stream"), ScheduleConfig(), 0.9, Path("released"))


@contextmanager
def nothing_is_read(text: int) -> Iterator[None]:
    """Layers arrive at once, and `text` rows of a prompt are left after its padding is collapsed (which looks at values)."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(Reader, "read", lambda reader, wanted: None))
        stack.enter_context(patch.object(towers, "collapse_padding", lambda context: (context[:, :text], context.new_zeros(1, 1, 1, text))))
        stack.enter_context(torch.no_grad())
        yield


# ---------------------------------------------------------------- compute


class Root(nn.Module):
    """One name for every module of a run, for the counter."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.video, self.audio, self.bridge = parts.experts["high"], parts.audio, parts.bridge

    def forward(self, run: JointRun, streams: tuple[Tensor, Tensor], k: int) -> None:
        if run.expert is None:
            run.enter("high")
        run.forward(*streams, k, None)


class Observed(SimpleNamespace):
    """Of one step: flops by component; peak_bytes of the step beside what was there; layers[i] = (peak bytes, elementwise bytes) of layer i for one branch."""


def observe_steps(denoiser: Denoiser, latents: tuple[int, int, int], text: int) -> list[Observed]:
    """The first step of an expert, which reads the prompts, and any later one."""
    streams = torch.empty(1, 16, *latents, device=META), torch.empty(1, 128, AUDIO, device=META)
    condition, context = torch.empty(1, 20, *latents, device=META), torch.empty(1, TEXT, 4096, device=META)
    times = [StepTimes(torch.ones(1, device=META), torch.ones(1, device=META), "high")] * 2
    with nothing_is_read(text), denoiser.prepare(*streams, condition, [Branch(context)] * BRANCHES, times, 24.0) as run:
        run.begin(0)
        root = Root(denoiser.parts)
        return [observe(root, run, streams, k) for k in range(2)]


def observe(root: Root, run: JointRun, streams: tuple[Tensor, Tensor], k: int) -> Observed:
    ledger, counter, layers, step_peak = Ledger(), FlopCounterMode(display=False), {}, 0
    pass_layer = JointRun.pass_layer

    def watched(run: JointRun, i: int, *args: object) -> tuple[Tensor, Tensor]:
        nonlocal step_peak
        step_peak, ledger.peak = max(step_peak, ledger.peak), ledger.live
        live, traffic = ledger.live, ledger.traffic
        result = pass_layer(run, i, *args)
        layers[i] = (ledger.peak - live, ledger.traffic - traffic)
        return result

    with patch.object(JointRun, "pass_layer", watched), GPUKernels(), counter, ledger:
        root(run, streams, k)
    flops = count_components(root, counter.get_flop_counts())
    return Observed(flops=flops, peak_bytes=max(step_peak, ledger.peak), layers=layers)


# ---------------------------------------------------------------- FLOPs

LINEAR = (
    (r"video\.blocks\.\d+\.self_attn", "self-attention projections"),
    (r"video\.blocks\.\d+\.cross_attn", "cross-attention"),
    (r"video\.blocks\.\d+\.ffn", "feed-forward"),
    (r"bridge\.audio_to_video", "bridge audio to video"),
    (r"bridge\.video_to_audio", "bridge video to audio"),
    (r"audio\.", "audio tower"),
    (r"video\.", "patch, head, text"),
)
FIRST = {"video": 30, "audio": 30, "bridge": 30}  # layers that layer 0 stands for
SECOND = 10  # layers that layer 1 stands for: video alone


def count_components(root: Root, counts: dict[str, dict]) -> Counter[str]:
    """FLOPs by component at 40 layers, from those of modules at two."""
    flops: Counter[str] = Counter()
    for name, module in root.named_modules(prefix="Root"):
        found = counts.get(name, {})
        label = next((label for pattern, label in LINEAR if re.match(rf"Root\.{pattern}", name)), None)
        layer = re.match(r"Root\.(?:video\.blocks|audio\.blocks|bridge\.\w+)\.(\d+)", name)
        times = 1 if layer is None else SECOND if layer[1] == "1" else FIRST[name.split(".")[1]]
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv3d):
            flops[label] += times * sum(found.values())
        elif isinstance(module, CrossAttention | Conditioner):
            flops[label] += times * found.get(FLASH, 0)
        elif isinstance(module, Block):
            own = found.get(FLASH, 0) - counts.get(f"{name}.cross_attn", {}).get(FLASH, 0)
            flops["audio tower" if label == "audio tower" else "self-attention"] += times * own
    return flops


def compare_flops(full: Parts, size: str, first: Observed, usual: Observed) -> dict[str, object]:
    """A guided step in TFLOP: the closed form, the same counted in a first step without padding, and what a usual step computes."""
    closed = {name: BRANCHES * work.total for name, work in forward_work(full, video_tokens(size), AUDIO, TEXT).items()}
    table = {"closed form": closed, "counted, nothing saved": first.flops, "counted, usual step": usual.flops}
    return {
        "components_tflop": {title: {name: round(flops / 1e12, 2) for name, flops in rows.items()} for title, rows in table.items()},
        "step_pflop": {title: round(sum(rows.values()) / 1e15, 4) for title, rows in table.items()} | {"published": PUBLISHED[size] / 1e15},
    }


def video_tokens(size: str) -> int:
    return math.prod(LATENTS[size]) // 4


# ---------------------------------------------------------------- memory of compute


def describe_activations(step: Observed, size: str) -> dict[str, float]:
    """In U: the most a layer holds beside the tokens, what a step holds in all, and elementwise reads and writes per layer and branch."""
    unit = unit_bytes(size)
    (with_sound, traffic_with_sound), (alone, traffic_alone) = step.layers[0], step.layers[1]
    return {
        "unit_bytes": unit,
        "layer_peak_u": round(with_sound / unit, 3),
        "video_block_peak_u": round(alone / unit, 3),
        "step_peak_u": round(step.peak_bytes / unit, 3),
        "step_peak_bytes": step.peak_bytes,
        "video_block_traffic_u": round(traffic_alone / unit, 1),
        "bridge_and_audio_traffic_u": round((traffic_with_sound - traffic_alone) / unit, 1),
    }


def unit_bytes(size: str) -> int:
    return video_tokens(size) * TowerConfig().dim * DTYPE.itemsize


# ---------------------------------------------------------------- weights on their way


def count_streaming(denoiser: Denoiser, steps: int = 3) -> dict[str, object]:
    """Three steps of the high expert and three of the low one through the real feeder and slabs, all layers streamed; nothing is computed."""
    residency, traffic = denoiser.residency, denoiser.residency.traffic
    moved, copies, made, send = [0], [0], [], Link.send

    def counted(link: Link, *args: object) -> None:
        with Ledger() as ledger:
            send(link, *args)
        made.append(ledger.made)

    with nothing_is_read(TEXT), patch.object(Link, "send", counted):
        residency.settle(0)
        for expert in ("high", "low"):
            for step in range(steps):
                residency.begin([(expert, step == 0)])  # a run of one step, or the feeder would be ahead when the step is counted
                for _ in residency.walk(expert):
                    continue
                residency.end()
                moved.append(traffic.bytes_moved)
                copies.append(traffic.copies)
        residency.release()
    slabs, layer = traffic.slab_bytes, traffic.slab_bytes // SLABS
    difference = [after - before for before, after in zip(moved, moved[1:], strict=False)]
    return {
        "first_step_bytes": difference[0],
        "later_step_bytes": difference[1],
        "of_the_reference": round(difference[1] / STREAMED_BY_REFERENCE, 3),
        "steps_equal": difference == (difference[:1] + difference[1:2] * (steps - 1)) * 2,
        "first_step_copies": copies[1],
        "later_step_copies": copies[2] - copies[1],
        "tensors_made_in_the_loop": sum(made),
        "layer_bytes": layer,
        "slab_bytes": slabs,
        "pinned_bytes": ring_bytes(layer),
    }


def count_device(parts: Parts, streaming: dict[str, int], activations: int, size: str) -> dict[str, int]:
    """Device memory of a streamed run: the largest sum of what is there at one time, without what the allocator loses to fragments."""
    outside = {name: sum(tensor.nbytes for key, tensor in parts.tensors[name].items() if not key.startswith(LAYERS)) for name in ("high", "audio", "bridge")}
    preparation = sum(tensor.nbytes for name in ("high", "audio") for key, tensor in parts.tensors[name].items() if key.startswith(PREPARATION))
    row = sum(2 * BRANCHES * tower.config.dim * tower.config.num_layers * DTYPE.itemsize for tower in (parts.experts["high"], parts.audio))
    rope = video_tokens(size) * parts.experts["high"].config.head_dim * (4 + 2 * DTYPE.itemsize)
    found = {
        "states_and_block": activations,
        "slabs": streaming["slab_bytes"],
        "embeddings_and_heads": sum(outside.values()) - preparation,
        "keys_of_prompts": REAL_TEXT * row,
        "rotary_tables": rope,
        "context_and_small_tensors": int(CONTEXT_BYTES),
    }
    total = sum(found.values())
    return found | {
        "sum": total,
        "sum_with_unpadded_prompts": total + (TEXT - REAL_TEXT) * row,
        "while_prompts_are_read": total - found["states_and_block"] + preparation,
    }


def measure() -> dict[str, object]:
    two, full = build_denoiser(2, 1), build_denoiser(40, 30)
    streaming = count_streaming(full)
    result: dict[str, object] = {"benchmark": "ledger", "streaming": streaming}
    for size in LATENTS:
        first, usual = observe_steps(two, LATENTS[size], TEXT)[0], observe_steps(two, LATENTS[size], REAL_TEXT)[1]
        activations = describe_activations(usual, size)
        result[size] = {
            "flops": compare_flops(full.parts, size, first, usual),
            "activations": activations,
            "device_bytes": count_device(full.parts, streaming, activations["step_peak_bytes"], size),
        }
    host = {"pinned": streaming["pinned_bytes"], "process": int(PROCESS_BYTES)}
    return result | {"unreclaimable_host_bytes": host | {"sum": sum(host.values())}}


def main() -> None:
    argparse.ArgumentParser(prog="bench.ledger", description="Counts FLOPs, memory and traffic of a guided step at the released size, as JSON.").parse_args()
    print(json.dumps(measure() | {"torch": torch.__version__}, indent=2))


if __name__ == "__main__":
    main()
