"""The network of the text encoder (`text_encoder/`, UMT5): transformers' own modules, weights brought by the engine that feeds the denoiser.

A layer is a block with its relative position biases; the last one has the norm behind it as well. Three ways to have them,
as in mova.residency: views of the mapped files, a slab for every layer, or two slabs in which all layers take turns. Rows of
the embedding are gathered from the mapped file, so that the 2 GB table is nowhere but there.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Component, TensorEntry, check_tensors
from .errors import CheckpointError, InputError
from .reading import stored_dtype
from .residency import MARGIN, SLABS, free_bytes, seat
from .slabs import Feeder, Key, Layout, Link, Slab, Traffic, Turn

log = logging.getLogger("mova")

EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one tensor; a file holds either or both
FINAL_NORM = "encoder.final_layer_norm.weight"
ACTIVATIONS = 2**29  # bytes; 512 tokens of the released model need less
OnLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class TextEncoderConfig:
    """text_encoder/config.json; the defaults are the released values."""

    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    vocab_size: int = 256384
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        if self.feed_forward_proj != "gated-gelu" or min(value for value in dataclasses.astuple(self) if isinstance(value, int)) < 1:
            raise CheckpointError(f"text_encoder/config.json describes no UMT5 encoder ({dataclasses.asdict(self)}): download the folder again.")


@dataclass
class EncoderLayer:
    """The modules of one layer, by the place their weights have in a slab."""

    block: nn.Module
    final_norm: nn.Module | None

    @property
    def last(self) -> nn.Module:
        return self.block if self.final_norm is None else self.final_norm


class UMT5:
    """The network on the meta device, and where the weights of its layers are while it computes."""

    def __init__(self, component: Component, config: TextEncoderConfig, device: torch.device, dtype: torch.dtype, mode: str) -> None:
        self.network, self.device, self.dtype = build_network(component, config, dtype), device, dtype
        blocks = self.network.encoder.block
        self.layers = [EncoderLayer(block, None) for block in blocks[:-1]] + [EncoderLayer(blocks[-1], self.network.encoder.final_layer_norm)]
        tensors = component.tensors()
        self.table = tensors[next(name for name in EMBEDDING if name in tensors)]  # [vocab_size, d_model], a view of the mapped file
        self.sources = layer_sources(component, len(self.layers))
        self.traffic, self.slabs, self.link = Traffic(), [], None
        count, why = choose_slabs(mode, device, is_stored(component, dtype), layer_bytes(component, dtype), len(self.layers))
        log.info("Text encoder weights: %s", why)
        if count:
            self.make_slabs(count)
        else:
            self.network.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in EMBEDDING}, assign=True, strict=False)
        self.network.requires_grad_(False)

    def make_slabs(self, count: int) -> None:
        """The last layer is of another kind than those before it; any slab has room for either."""
        kinds: dict[tuple, Layout] = {}
        slots = {key: tuple((name, names[name].shape, weight_dtype(name, self.dtype)) for name in sorted(names)) for key, names in self.sources.items()}
        layouts = {key: kinds.setdefault(needed, Layout(needed)) for key, needed in slots.items()}
        self.link = Link(layouts, self.device, self.sources, self.traffic)
        self.slabs = [Slab(kinds.values(), self.device) for _ in range(count)]
        self.traffic.slab_bytes = sum(slab.buffer.nbytes for slab in self.slabs)

    def encode(self, tokens: list[int], on_layer: OnLayer | None = None) -> Tensor:
        """Token ids of one prompt -> [tokens, d_model]; on_layer(done, layers) may raise to cancel."""
        embedded = self.table[torch.tensor(tokens)].to(self.device, self.dtype)
        with self.flow(on_layer):
            return self.network(inputs_embeds=embedded.unsqueeze(0)).last_hidden_state[0]

    @contextmanager
    def flow(self, on_layer: OnLayer | None) -> Iterator[None]:
        """While this is open, every layer finds its weights in place, and its slab is given back behind it."""
        turns = (Turn(key, frozenset(names)) for key, names in self.sources.items())
        feeder = Feeder(self.link, turns, lambda turn: self.slabs[turn.key[1] % len(self.slabs)]) if self.slabs else None
        held: list[Slab] = []

        def before(layer: EncoderLayer, *_: Any) -> None:
            if feeder is not None:
                held.append(feeder.take()[1])
                seat(layer, held[0])

        def behind(done: int, *_: Any) -> None:
            if held:
                held.pop().give_back()
            if on_layer is not None:
                on_layer(done, len(self.layers))

        hooks = [layer.block.register_forward_pre_hook(partial(before, layer)) for layer in self.layers]
        hooks += [layer.last.register_forward_hook(partial(behind, i + 1)) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if feeder is not None:
                feeder.stop()
            for slab in held:  # of a layer that was left by an error
                slab.give_back()

    def release(self) -> None:
        """Leaves nothing on the device."""
        if self.link is not None:
            self.link.close()
        self.network.to("meta")
        self.slabs, self.link = [], None


def build_network(component: Component, config: TextEncoderConfig, dtype: torch.dtype) -> Any:
    """transformers' encoder on the meta device; CheckpointError when the files do not hold its weights."""
    umt5: Any = import_transformers()
    # eager: the attention the reference used; others round bf16 differently
    settings = umt5.UMT5Config(**dataclasses.asdict(config), attn_implementation="eager")
    with torch.device("meta"):
        network = umt5.UMT5EncoderModel(settings).to(dtype).eval()  # older releases ask the network for its dtype
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items() if key not in EMBEDDING}
    stored = [name for name in EMBEDDING if name in component.index] or EMBEDDING[:1]
    check_tensors(component, shapes | dict.fromkeys(stored, (config.vocab_size, config.d_model)))
    return network


def layer_sources(component: Component, layers: int) -> dict[Key, dict[str, TensorEntry]]:
    """The stored tensors of every layer in order, by their names in a slab ("block.layer.0.SelfAttention.q.weight", ...)."""
    sources: dict[Key, dict[str, TensorEntry]] = {("text", i): {} for i in range(layers)}
    for name, entry in component.index.items():
        if name.startswith("encoder.block."):
            number, place = name.removeprefix("encoder.block.").split(".", 1)
            sources["text", int(number)]["block." + place] = entry
    sources["text", layers - 1]["final_norm.weight"] = component.index[FINAL_NORM]
    return sources


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """float16 overflows in the last projection of a block, so that one stays float32, as in transformers."""
    return torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype


def layer_weights(component: Component) -> dict[str, TensorEntry]:
    return {name: entry for name, entry in component.index.items() if name not in EMBEDDING}


def is_stored(component: Component, dtype: torch.dtype) -> bool:
    """Whether the files hold what is computed in."""
    return all(stored_dtype(entry) == weight_dtype(name, dtype) for name, entry in layer_weights(component).items())


def layer_bytes(component: Component, dtype: torch.dtype) -> int:
    """Of all layers together."""
    return sum(math.prod(entry.shape) * weight_dtype(name, dtype).itemsize for name, entry in layer_weights(component).items())


def needed_bytes(whole: int, slabs: int, layers: int) -> int:
    """Device memory for so many slabs, of layers that take `whole` bytes together, with what is computed beside them."""
    return whole * slabs // layers + ACTIVATIONS + MARGIN


def choose_slabs(mode: str, device: torch.device, stored: bool, whole: int, layers: int) -> tuple[int, str]:
    """How many slabs the layers get (none = views of the mapped files), in a sentence."""
    if device.type == "cpu" and mode != "stream" and stored:
        return 0, "views (the stored dtype on the CPU)"
    if mode != "auto":
        return (SLABS if mode == "stream" else layers), f"{mode} (as asked)"
    if device.type == "cpu":
        return SLABS, "stream (converted layer by layer)"
    if device.type != "cuda":
        return layers, f"resident (no streaming on {device})"
    free, needed = free_bytes(device), needed_bytes(whole, layers, layers)
    why = f"({free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed to have all layers there)"
    return (layers, f"resident {why}") if needed <= free else (SLABS, f"stream {why}")


def import_transformers() -> Any:
    """transformers, with what is needed of it loaded. InputError when that fails, for whatever reason below it."""
    try:
        import transformers

        with torch.device("cpu"):  # also where networks are built on the meta device: torchaudio, imported on the way, needs its constants
            transformers.UMT5EncoderModel  # noqa: B018  (a name is imported when it is asked for)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"The text encoder needs transformers, which cannot be loaded ({reason}): pip install transformers; if it is there, repair what it stumbles over, "
            "such as a torchaudio made for another version of torch."
        ) from None
    return transformers
