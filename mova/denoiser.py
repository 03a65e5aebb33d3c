"""MOVA's joint denoiser: two video experts, an audio tower and the bridge between them (spec/mova.md 3.9)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from .attention import Shapes, attention_kernel, choose_kernel
from .audio_vae import AudioVAEConfig
from .bridge import Bridge, BridgeConfig
from .cards import find_device
from .checkpoint import Component, check_tensors, checkpoint_folder, convert_value, open_component, read_config, read_json
from .compiling import compile_blocks
from .errors import CheckpointError, InputError, SamplingError
from .fp8 import check_stored, fixed_dtypes, follow_config
from .layers import Block, TextKeys
from .lora import LoadedLora, Lora, load_lora
from .lora.stack import stack_changes
from .parts import EXPERTS, FOLDERS, Layer, Parts
from .residency import Report, Residency
from .schedule import ScheduleConfig
from .towers import AudioTower, AudioTowerConfig, Grid, Tower, TowerConfig, VideoTower
from .work import add, forward_work

log = logging.getLogger("mova")

BOUNDARY_RATIO = 0.9  # where model_index.json does not tell
BLOCK_PEAK = 2.5  # live activations of a block beside its tokens, in units of them (bench.ledger counts it)
SMALL_TENSORS = 2**30  # bytes for all that does not grow with the clip, while the prompts are read
OnLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class Branch:
    """One guidance branch: what the model reads beside the latents, and how loud the bridge is in each direction."""

    context: Tensor  # [B or 1, L, text_dim]
    a2v_scale: float = 1.0
    v2a_scale: float = 1.0


@dataclass(frozen=True)
class StepTimes:
    """What the model is told in one step: timesteps 0..1000 of both streams, each [1 or B], and the expert that is asked."""

    video: Tensor
    audio: Tensor
    expert: str


class Denoiser:
    """Predicts velocities (noise - clean) of both streams. Made by `load_denoiser`."""

    loras: tuple[LoadedLora, ...] = ()

    def __init__(self, parts: Parts, residency: Residency, schedule: ScheduleConfig, boundary_ratio: float, folder: Path) -> None:
        self.parts, self.residency, self.schedule = parts, residency, schedule
        self.boundary_ratio, self.folder, self.attention = boundary_ratio, folder, "auto"
        self.device, self.dtype = residency.device, residency.dtype
        self.video_channels, self.audio_channels = parts.experts["high"].config.out_dim, parts.audio.config.out_dim

    def audio_clock(self) -> AudioVAEConfig:
        """The rates of the checkpoint's audio VAE, which tell how long the sound of a clip is."""
        return read_config(AudioVAEConfig, open_component(self.folder, "audio_vae").config, "audio_vae/config.json")

    def report(self) -> Report:
        """What moved since loading, and which residency was chosen why."""
        return self.residency.report()

    def release(self) -> None:
        """Leaves nothing on the device; the next call brings the weights back."""
        self.residency.release()

    def with_loras(self, loras: Iterable[Lora]) -> Denoiser:
        """Another denoiser over the same files, with these LoRAs on top of those this one has; this one stays as it is.

        A log line tells what each LoRA did; so does `loras[-1].report`. LoraError for files that are damaged, would run code,
        or were made for another model.
        """
        added = [load_lora(lora, self.parts.shapes()) for lora in loras]
        for lora in added:
            log.info("MOVA LoRA: %s", lora.report)
            if lora.report.partial:
                log.warning("MOVA LoRA %s: %s", lora.report.label, lora.report.partial)
        stack, parts = (*self.loras, *added), self.parts.bare()
        residency = Residency(parts, self.device, self.dtype, self.residency.mode, stack_changes(stack))
        other = Denoiser(parts, residency, self.schedule, self.boundary_ratio, self.folder)
        other.loras, other.attention = stack, self.attention
        return other

    @torch.no_grad()
    def velocity(
        self,
        video: Tensor,
        audio: Tensor,
        condition: Tensor,
        context: Tensor,
        timestep: float | Tensor,
        *,
        audio_timestep: float | Tensor | None = None,
        fps: float = 24.0,
        expert: str = "auto",
        a2v_scale: float = 1.0,
        v2a_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """One joint prediction -> (video velocity [B, 16, T, h, w], audio velocity [B, Ca, Ta]), float32.

        video [B, 16, T, h, w] and audio [B, Ca, Ta]: noisy latents, normalised. condition [B or 1, 20, T, h, w]: 4 mask +
        16 image latents. context [B or 1, L, text_dim], any L. timestep: float or [B], 0..1000; audio_timestep None = the same.
        expert: auto (by the video timestep; a whole batch on one side of the boundary) | high | low.
        a2v_scale, v2a_scale: how much the picture hears and the sound sees (1 = as trained, 0 = nothing). InputError for
        shapes that do not fit each other.
        """
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        audio_times = times if audio_timestep is None else torch.as_tensor(audio_timestep, dtype=torch.float32).reshape(-1)
        if expert not in ("auto", *EXPERTS):
            raise InputError(f"expert is {expert!r}; choose auto, high or low.")
        step = StepTimes(times, audio_times, self.choose_expert(times) if expert == "auto" else expert)
        with self.prepare(video, audio, condition, [Branch(context, a2v_scale, v2a_scale)], [step], fps) as run:
            ((video_velocity, audio_velocity),) = run.velocities(video, audio, 0)
        return video_velocity.to(video.device), audio_velocity.to(audio.device)

    def count_tokens(self, video_shape: tuple[int, ...]) -> int:
        """Tokens of video latents [B, 16, T, h, w]."""
        patches = (size // patch for size, patch in zip(video_shape[2:], self.parts.experts["high"].config.patch_size, strict=True))
        return video_shape[0] * math.prod(patches)

    def wanted_bytes(self, video_shape: tuple[int, ...], branches: int, text: int) -> int:
        """Free device memory that a run for latents [B, 16, T, h, w], so many guidance branches and rows of text makes use of; it works with less."""
        together = branches if self.device.type == "cpu" else 1
        return self.residency.wanted_bytes(activation_bytes(self, self.count_tokens(video_shape), branches, together, text, video_shape[0]))

    def choose_expert(self, timesteps: Tensor) -> str:
        high = timesteps >= self.boundary_ratio * self.schedule.num_train_timesteps
        if high.any() and not high.all():
            raise InputError(f"timesteps {timesteps.tolist()} lie on both sides of the expert boundary: call once per side, or name the expert (high, low).")
        return "high" if high.all() else "low"

    def prepare(self, video: Tensor, audio: Tensor, condition: Tensor, branches: list[Branch], steps: list[StepTimes], fps: float) -> JointRun:
        """A run over `steps` for latents of these shapes, to be used as a context; InputError when something does not fit."""
        check_streams(self, video, audio, condition, branches, steps, fps)
        choose_kernel(self.attention, self.attention_shapes, self.device, self.dtype)
        return JointRun(self, video, audio, condition, branches, steps, fps)

    def attention_backend(self) -> AbstractContextManager[None]:
        """The chosen kernel while the block runs; InputError when there is no such kernel, or it does not compute this model's attention there."""
        return attention_kernel(self.attention, self.attention_shapes, self.device, self.dtype)

    @cached_property
    def attention_shapes(self) -> Shapes:
        bridge = self.parts.bridge.config
        towers = {(config.num_heads, config.head_dim) for config in (self.parts.experts["high"].config, self.parts.audio.config)}
        return frozenset(towers | {(width // bridge.head_dim, bridge.head_dim) for width in (bridge.visual_hidden_dim, bridge.audio_hidden_dim)})


class Prompt:
    """A text as one tower reads it; the keys of a layer are computed when its weights are first there."""

    def __init__(self, tower: Tower, context: Tensor) -> None:
        self.tokens, self.bias = tower.read_prompt(context)
        self.keys: dict[int, TextKeys] = {}

    def at(self, i: int, block: Block) -> TextKeys:
        if i not in self.keys:
            self.keys[i] = block.cross_attn.keys(self.tokens, self.bias)
        return self.keys[i]


@dataclass
class Group:
    """Branches that travel through the layers as one batch [n * B]: contexts equally long, the bridge equally loud."""

    branches: list[int]
    context: Tensor  # [n * B, L, text_dim]
    a2v_scale: float
    v2a_scale: float
    video_prompt: Prompt | None = None
    audio_prompt: Prompt | None = None


class JointRun:
    """Predictions for one pair of streams and a fixed set of guidance branches, step by step.

    Layer i runs for all branches while its weights are there (lock-step guidance). What does not change from step to
    step is computed once: rotary tables, prompts and their keys, time embeddings.
    """

    def __init__(self, denoiser: Denoiser, video: Tensor, audio: Tensor, condition: Tensor, branches: list[Branch], steps: list[StepTimes], fps: float) -> None:
        self.denoiser, self.steps, self.branches = denoiser, steps, len(branches)
        self.batch, self.device, self.dtype = video.shape[0], denoiser.device, denoiser.dtype
        self.condition = condition.to(self.device, torch.float32).expand(self.batch, -1, -1, -1, -1)
        self.groups = self.group(branches)
        tower, audio_tower = denoiser.parts.experts["high"], denoiser.parts.audio
        self.grid: Grid = tuple(size // patch for size, patch in zip(video.shape[2:], tower.config.patch_size, strict=True))
        self.video_rope, self.audio_rope = tower.rope(self.grid).to(self.device), audio_tower.rope(audio.shape[2]).to(self.device)
        aligned = denoiser.parts.bridge.rope(self.grid, audio.shape[2], fps, self.dtype)
        self.bridge_ropes = None if aligned is None else tuple((cos.to(self.device), sin.to(self.device)) for cos, sin in aligned)
        self.audio_length = audio.shape[2]
        self.expert: str | None = None
        self.started = False
        self.video_times: dict[int, tuple[Tensor, Tensor]] = {}
        self.audio_times: dict[int, tuple[Tensor, Tensor]] = {}

    def group(self, branches: list[Branch]) -> list[Group]:
        """On the CPU branches of one kind run as one batch, which is faster; on a GPU one by one, which needs less memory."""
        alike: dict[object, list[int]] = {}
        for i, branch in enumerate(branches):
            kind = (branch.context.shape[1], branch.a2v_scale, branch.v2a_scale) if self.device.type == "cpu" else i
            alike.setdefault(kind, []).append(i)
        groups = []
        for together in alike.values():
            context = torch.cat([branches[i].context.expand(self.batch, -1, -1) for i in together]).to(self.device, self.dtype)
            groups.append(Group(together, context, branches[together[0]].a2v_scale, branches[together[0]].v2a_scale))
        return groups

    def __enter__(self) -> JointRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.denoiser.residency.end()

    def begin(self, k: int) -> None:
        """Weights start to flow for step k and all that follow."""
        experts = [step.expert for step in self.steps]
        self.denoiser.residency.settle(self.activation_bytes(), self.layer_seconds())
        self.denoiser.residency.begin([(expert, expert not in experts[k : k + later]) for later, expert in enumerate(experts[k:])])
        self.expert, self.started = None, True

    def activation_bytes(self) -> int:
        together, text = max(len(group.branches) for group in self.groups), max(group.context.shape[1] for group in self.groups)
        return activation_bytes(self.denoiser, self.batch * math.prod(self.grid), self.branches, together, text, self.batch)

    def layer_seconds(self) -> float:
        """How long a GPU computes on one layer for all branches, at least."""
        if self.device.type != "cuda":
            return math.inf
        parts, card = self.denoiser.parts, find_device(torch.cuda.get_device_name(self.device), None)
        work = add(forward_work(parts, math.prod(self.grid), self.audio_length).values())
        return self.batch * self.branches * card.least_seconds(*work) / parts.count

    def enter(self, expert: str) -> None:
        """Makes an expert the active one; its tower reads the prompts and the timesteps it will be asked at."""
        residency, audio_tower = self.denoiser.residency, self.denoiser.parts.audio
        tower = residency.enter(expert)
        asked = [k for k, step in enumerate(self.steps) if step.expert == expert]
        self.video_times = self.embed_times(tower, {k: self.steps[k].video for k in asked})
        self.audio_times = self.embed_times(audio_tower, {k: self.steps[k].audio for k in asked})
        for group in self.groups:
            group.video_prompt, group.audio_prompt = Prompt(tower, group.context), Prompt(audio_tower, group.context)
        residency.put_preparation_away()
        self.expert = expert

    def embed_times(self, tower: Tower, times: dict[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """(t [1 or B, D], t_mod [1 or B, 1, 6, D]) of every step."""
        t, t_mod = tower.time(torch.stack(list(times.values())).to(self.device))
        return dict(zip(times, zip(t.to(self.dtype), t_mod.to(self.dtype), strict=True), strict=True))

    def velocities(self, video: Tensor, audio: Tensor, k: int, on_layer: OnLayer | None = None) -> list[tuple[Tensor, Tensor]]:
        """Step k: (video velocity, audio velocity) of every branch, float32 on the device; on_layer(done, total) may raise to cancel.

        Steps are asked in order. Where the device runs out of memory, fewer layers are kept on it and the step is tried again.
        """
        while True:
            try:
                if not self.started:
                    self.begin(k)
                if self.expert != self.steps[k].expert:
                    self.enter(self.steps[k].expert)
                with self.denoiser.attention_backend():
                    return self.forward(video, audio, k, on_layer)
            except torch.cuda.OutOfMemoryError as error:
                self.started = False
                if not self.denoiser.residency.shrink():
                    raise SamplingError(
                        f"The device has too little memory for this clip even with the weights streamed ({error}): make it smaller or shorter, or close other programs."
                    ) from error

    def forward(self, video: Tensor, audio: Tensor, k: int, on_layer: OnLayer | None) -> list[tuple[Tensor, Tensor]]:
        tower, audio_tower = self.denoiser.parts.experts[self.steps[k].expert], self.denoiser.parts.audio
        x, _ = tower.embed(torch.cat((video.to(self.condition), self.condition), dim=1).to(self.dtype))  # [B, Lv, D]
        y = audio_tower.embed(audio.to(self.device, self.dtype))  # [B, Ta, Da]
        states = [(x.repeat(len(group.branches), 1, 1), y.repeat(len(group.branches), 1, 1)) for group in self.groups]
        del x, y
        with closing(self.denoiser.residency.walk(self.steps[k].expert)) as layers:  # a layer in use is given back on cancel, too
            for i, layer in enumerate(layers):
                for g, group in enumerate(self.groups):
                    states[g] = self.pass_layer(i, layer, group, k, *states[g])
                if on_layer is not None:
                    on_layer(i + 1, len(tower.blocks))
        predicted: list = [None] * self.branches
        for group, (x, y) in zip(self.groups, states, strict=True):
            v = tower.predict(x, self.repeat(self.video_times[k][0], group), self.grid).float()
            a = audio_tower.predict(y, self.repeat(self.audio_times[k][0], group)).float()
            for branch, pair in zip(group.branches, zip(v.split(self.batch), a.split(self.batch), strict=True), strict=True):
                predicted[branch] = pair
        return predicted

    def pass_layer(self, i: int, layer: Layer, group: Group, k: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One layer for one group; the bridge comes first, and both directions read the states from before it."""
        ropes, heard = self.bridge_ropes, y
        if layer.to_audio is not None and group.v2a_scale:
            heard = layer.to_audio(y.clone(), x, ropes and ropes[::-1], group.v2a_scale, self.grid)
        if layer.to_video is not None and group.a2v_scale:
            x = layer.to_video(x, y, ropes, group.a2v_scale)
        x = layer.video(x, group.video_prompt.at(i, layer.video), self.repeat(self.video_times[k][1], group), self.video_rope)
        if layer.audio is not None:
            heard = layer.audio(heard, group.audio_prompt.at(i, layer.audio), self.repeat(self.audio_times[k][1], group), self.audio_rope)
        return x, heard

    def repeat(self, times: Tensor, group: Group) -> Tensor:
        """Per-sample times for every branch of a group; a time shared by the batch broadcasts as it is."""
        return times if len(times) == 1 else torch.cat([times] * len(group.branches))


def activation_bytes(denoiser: Denoiser, tokens: int, branches: int, together: int, text: int, batch: int = 1) -> int:
    """Device memory of a run beside its layers, at most, at any time: the tokens of every branch, a block at work on the branches that go together,
    the keys of the prompts (`text` rows each)."""
    config = denoiser.parts.experts["high"].config
    prompts = 2 * batch * branches * text * config.num_layers
    return int((tokens * (branches + BLOCK_PEAK * together) + prompts) * config.dim * denoiser.dtype.itemsize) + SMALL_TENSORS


def check_streams(denoiser: Denoiser, video: Tensor, audio: Tensor, condition: Tensor, branches: list[Branch], steps: list[StepTimes], fps: float) -> None:
    """InputError when the streams do not fit the model or each other."""
    config = denoiser.parts.experts["high"].config
    patch = config.patch_size
    if video.ndim != 5 or video.shape[1] != config.out_dim or any(size < step or size % step for size, step in zip(video.shape[2:], patch, strict=True)):
        raise InputError(
            f"video latents are {list(video.shape)}; [B, {config.out_dim}, T, h, w] is needed, with h and w multiples of {patch[1]} and {patch[2]}."
        )
    batch = video.shape[0]
    if audio.ndim != 3 or audio.shape[:2] != (batch, denoiser.audio_channels) or not audio.shape[2]:
        raise InputError(f"audio latents are {list(audio.shape)}; [{batch}, {denoiser.audio_channels}, Ta] is needed beside this video.")
    needed = (config.in_dim - config.out_dim, *video.shape[2:])
    if condition.ndim != 5 or tuple(condition.shape[1:]) != needed or condition.shape[0] not in (1, batch):
        raise InputError(f"condition is {list(condition.shape)}; [1 or {batch}, {', '.join(map(str, needed))}] is needed beside this video.")
    for branch in branches:
        context = branch.context
        if context.ndim != 3 or context.shape[2] != config.text_dim or context.shape[0] not in (1, batch) or not context.shape[1]:
            raise InputError(
                f"context is {list(context.shape)}; [1 or {batch}, L, {config.text_dim}] is needed. Text must be encoded by this checkpoint's text encoder (UMT5-XXL)."
            )
    if any(len(times) not in (1, batch) for step in steps for times in (step.video, step.audio)):
        raise InputError(f"timesteps must be one number or one for each of the {batch} samples.")
    if not 0 < fps < math.inf:
        raise InputError(f"fps is {fps}; it must be a positive number (24 is what MOVA was trained on).")


def load_denoiser(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, residency: str = "auto", compile: bool = False
) -> Denoiser:
    """Opens video_dit, video_dit_2, audio_dit, dual_tower_bridge and scheduler of a released checkpoint; no weight is read yet.

    dtype None = as stored in video_dit; quantized weights (mova.fp8) stay so whatever it is, and torch.float8_e4m3fn insists on them. residency: auto | resident |
    stream (see mova.residency). compile: blocks are compiled in the first step (see mova.compiling), or run as they are
    where that is not possible. CheckpointError lists every tensor that is missing, unexpected or misshapen.
    """
    root = checkpoint_folder(folder)
    opened = {name: open_component(root, part) for name, part in FOLDERS.items()}
    with torch.device("meta"):
        experts = {name: VideoTower(read_config(TowerConfig, opened[name].config, f"{FOLDERS[name]}/config.json")) for name in EXPERTS}
        audio = AudioTower(read_config(AudioTowerConfig, opened["audio"].config, "audio_dit/config.json"))
        bridge = Bridge(read_config(BridgeConfig, opened["bridge"].config, "dual_tower_bridge/config.json"))
    check_towers(experts, audio, bridge)
    modules = {**experts, "audio": audio, "bridge": bridge}
    for name, module in modules.items():
        follow_config(module, opened[name].config, f"{FOLDERS[name]}/config.json")
        module.requires_grad_(False)
        check_tensors(opened[name], {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()})
        check_stored(opened[name], module)
    if compile:
        compile_blocks([*experts.values(), audio])
    tensors, entries = ({name: make(component) for name, component in opened.items()} for make in (Component.tensors, attrgetter("index")))
    parts = Parts(experts, audio, bridge, tensors, entries)
    stored = parts.tensors["high"]["patch_embedding.weight"].dtype
    if dtype == torch.float8_e4m3fn:
        if not fixed_dtypes(experts["high"]):
            raise CheckpointError(f"{root} holds no 8-bit weights: write them once with 'python -m mova quantize {root} OUT', and load OUT.")
        dtype = stored
    schedule = read_config(ScheduleConfig, read_json(root / "scheduler" / "scheduler_config.json"), "scheduler/scheduler_config.json")
    boundary = convert_value(read_json(root / "model_index.json").get("boundary_ratio", BOUNDARY_RATIO), float, "model_index.json: boundary_ratio")
    return Denoiser(parts, Residency(parts, torch.device(device), dtype or stored, residency), schedule, boundary, root)


def check_towers(experts: dict[str, VideoTower], audio: AudioTower, bridge: Bridge) -> None:
    """CheckpointError when the parts were not made for each other."""
    high, low, config = experts["high"].config, experts["low"].config, bridge.config
    if high != low:
        raise CheckpointError("video_dit and video_dit_2 have different config.json: both experts of one checkpoint are needed.")
    if high.text_dim != audio.config.text_dim:
        raise CheckpointError(f"audio_dit reads text of width {audio.config.text_dim}, video_dit of {high.text_dim}: they are not of one checkpoint.")
    meant = (config.visual_hidden_dim, config.audio_hidden_dim, config.visual_layers, config.audio_layers)
    found = (high.dim, audio.config.dim, high.num_layers, audio.config.num_layers)
    if meant != found:
        raise CheckpointError(f"dual_tower_bridge joins towers of widths and layers {meant}, but the folder holds {found}: they are not of one checkpoint.")
