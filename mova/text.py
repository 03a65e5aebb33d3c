"""The text encoder of a checkpoint (`tokenizer/` and `text_encoder/`, UMT5): prompts to embeddings, kept on disk between runs (spec/mova.md 5.3)."""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .checkpoint import Component, checkpoint_folder, open_component, read_config, weight_files
from .errors import CheckpointError, InputError
from .residency import MODES, SLABS
from .umt5 import UMT5, OnLayer, TextEncoderConfig, layer_bytes, needed_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("mova")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CACHE_VERSION = 1  # part of every key: raise it when an encoding changes
CACHED_PROMPTS = 512  # files kept in a cache folder, 4 MB each at most with the released model in bf16


def clean_prompt(text: str) -> str:
    """Mends broken characters, resolves HTML entities, makes every run of white space one blank."""
    try:
        import ftfy
    except ImportError:
        raise InputError("Prompts are cleaned with ftfy, which is not installed: pip install ftfy.") from None
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class TextEncoder:
    """Prompts -> embeddings. The weights are opened at the first prompt that is not in the cache."""

    def __init__(
        self,
        component: Component,
        config: TextEncoderConfig,
        tokenizer_file: Path,
        device: torch.device,
        dtype: torch.dtype | None,
        cache: PromptCache | None,
        residency: str = "auto",
    ) -> None:
        self.component = component
        self.config = config
        self.text_dim = config.d_model
        self.tokenizer_file = tokenizer_file
        self.device = device
        self.requested_dtype = dtype
        self.cache = cache
        self.residency = residency
        self.model: UMT5 | None = None

    @torch.no_grad()
    def encode(self, prompts: str | list[str], max_length: int = 512, *, on_layer: OnLayer | None = None) -> Tensor:
        """Prompts -> [B, max_length, text_dim] on the device; rows behind a prompt's own tokens are exactly zero.

        The empty prompt is one end token; a prompt longer than max_length tokens is cut, which one log line says. on_layer(done, total)
        is called behind each layer of every prompt that is not in the cache, and may raise to cancel. InputError for what is no text.
        """
        texts = check_prompts(prompts)
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise InputError(f"max_length is {max_length!r}: give the number of tokens to encode, 512 for MOVA.")
        embeddings = [self.encode_prompt(clean_prompt(text), max_length, on_layer) for text in texts]  # each alone: [tokens, text_dim]
        return torch.stack([nn.functional.pad(rows, (0, 0, 0, max_length - len(rows))) for rows in embeddings])

    def encode_prompt(self, prompt: str, max_length: int, on_layer: OnLayer | None) -> Tensor:
        """A cleaned prompt -> [tokens, text_dim], from the cache where it is there."""
        if self.cache is None:
            return self.compute_rows(prompt, max_length, on_layer)
        key = self.cache_key(prompt, max_length)
        rows = self.cache.read(key, self.text_dim)
        if rows is None:
            rows = self.compute_rows(prompt, max_length, on_layer)
            self.cache.write(key, rows)
        return rows.to(self.device)

    def compute_rows(self, prompt: str, max_length: int, on_layer: OnLayer | None) -> Tensor:
        """A cleaned prompt -> [tokens, text_dim]. Padding would be masked, so it is not computed."""
        tokens = self.tokenize(prompt, max_length)
        if self.model is None:
            self.model = UMT5(self.component, self.config, self.device, self.dtype, self.residency)
        rows = self.model.encode(tokens, on_layer)
        if not torch.isfinite(rows).all():
            raise CheckpointError(
                f"The text encoder in {self.component.folder} made values that are not numbers ({self.dtype}): use bfloat16, or download it again."
            )
        return rows

    def tokenize(self, prompt: str, max_length: int) -> list[int]:
        """Token ids of a cleaned prompt, the end token last, at most max_length."""
        tokens = self.tokenizer.encode(prompt).ids
        if len(tokens) <= max_length:
            return tokens
        cut = self.tokenizer.decode(tokens[max_length - 1 : max_length + 11])
        log.warning("The prompt has %d tokens, the model reads %d: everything from '%s' on is cut.", len(tokens), max_length, cut)
        return [*tokens[: max_length - 1], tokens[-1]]

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, its end token included, before any cut."""
        return len(self.tokenizer.encode(clean_prompt(text)).ids)

    def bytes_needed(self, prompts: list[str], max_length: int = 512) -> int:
        """Device memory to be free before prompts are encoded: for the whole model where the device is that large, else for streaming it; 0 when all are
        in the cache."""
        keys = [self.cache_key(clean_prompt(text), max_length) for text in check_prompts(prompts)]
        if self.cache is not None and all(map(self.cache.holds, keys)):
            return 0
        whole, layers = layer_bytes(self.component, self.dtype), self.config.num_layers
        resident, streamed = (needed_bytes(whole, slabs, layers) for slabs in (layers, SLABS))
        too_large = self.device.type == "cuda" and resident > torch.cuda.mem_get_info(self.device)[1]
        return streamed if self.residency == "stream" or (self.residency == "auto" and too_large) else resident

    def release(self) -> None:
        """Drops the weights; the next prompt that is not in the cache opens them again."""
        if self.model is not None:
            self.model.release()
            self.model = None

    def to(self, device: str | torch.device) -> TextEncoder:
        """Computes on another device from now on. The weights are mapped anew there, so coming back to the CPU copies nothing."""
        if torch.device(device) != self.device:
            self.release()
            self.device = torch.device(device)
        return self

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the embeddings are made in: as asked for, else as stored."""
        if self.requested_dtype is not None:
            return self.requested_dtype
        stored = {entry.dtype for entry in self.component.index.values()}
        if len(stored) != 1 or not stored <= DTYPES.keys():
            raise CheckpointError(f"{self.component.folder} stores {', '.join(sorted(stored))}; give a dtype (torch.bfloat16), or use the released files.")
        return DTYPES[stored.pop()]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.tokenizer_file, self.config.vocab_size)

    @cached_property
    def identity(self) -> str:
        """Names tokenizer and weights without reading the weights: a file that is replaced has another size or time."""
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(self.component.folder)]
        tokenizer = hashlib.sha256(self.tokenizer_file.read_bytes()).hexdigest()
        return json.dumps([CACHE_VERSION, tokenizer, self.component.config, stats], sort_keys=True)

    def cache_key(self, prompt: str, max_length: int) -> str:
        return hashlib.sha256(json.dumps([prompt, max_length, str(self.requested_dtype), self.identity]).encode()).hexdigest()


def check_prompts(prompts: str | list[str]) -> list[str]:
    """As a list; InputError for what is no text."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"A prompt must be text, or a list of texts with at least one in it; given was {texts!r:.80}.")
    return texts


@dataclass(frozen=True)
class PromptCache:
    """A folder with one safetensors file per encoded prompt. A cache that fails costs a log line, never the encoding."""

    folder: Path

    def holds(self, key: str) -> bool:
        return (self.folder / f"{key}.safetensors").is_file()

    def read(self, key: str, text_dim: int) -> Tensor | None:
        """Rows [tokens, text_dim] on the CPU; None when they are not there or damaged."""
        file = self.folder / f"{key}.safetensors"
        try:
            rows = load(file.read_bytes())["rows"]
            if rows.dim() != 2 or rows.shape[1] != text_dim:
                raise ValueError(f"shape {list(rows.shape)}")
            os.utime(file)  # used now: the oldest go first
            return rows
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("The cached prompt %s cannot be used (%s) and is encoded again.", file, error)
            return None

    def write(self, key: str, rows: Tensor) -> None:
        """Stores rows [tokens, text_dim], complete or not at all, and removes the oldest files beyond the limit."""
        draft = self.folder / f"{key}.{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(save({"rows": rows.cpu().contiguous()}))
                os.replace(draft, self.folder / f"{key}.safetensors")
            finally:
                draft.unlink(missing_ok=True)
            self.remove_oldest()
        except OSError as error:
            log.warning("The encoded prompt is not kept in %s (%s): it is encoded again next time.", self.folder, error)

    def remove_oldest(self) -> None:
        own = [file for file in self.folder.glob("*.safetensors") if len(file.stem) == hashlib.sha256().digest_size * 2]
        for file in sorted(own, key=lambda file: file.stat().st_mtime_ns)[:-CACHED_PROMPTS]:
            file.unlink(missing_ok=True)


def load_text_encoder(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cache_dir: str | Path | None = None,
    residency: str = "auto",
) -> TextEncoder:
    """Prepares `folder/tokenizer` and `folder/text_encoder`; weights stay closed until a prompt needs them.

    dtype None = as stored. cache_dir keeps encoded prompts between runs. residency: auto (all layers on the device where they
    fit) | resident | stream (two at a time). CheckpointError when a file is missing.
    """
    if dtype not in (None, *DTYPES.values()):
        raise InputError(f"The text encoder cannot compute in {dtype}: use torch.bfloat16 or torch.float32.")
    if residency not in MODES:
        raise InputError(f"residency is {residency!r}; choose {', '.join(MODES)}.")
    component = open_component(folder, "text_encoder")
    config = read_config(TextEncoderConfig, component.config, str(component.folder / "config.json"))
    weight_files(component.folder)  # complains about missing ones now, not after the first prompt was typed
    tokenizer_file = checkpoint_folder(folder) / "tokenizer" / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise CheckpointError(f"{tokenizer_file} is missing: download the tokenizer folder of the checkpoint again.")
    cache = PromptCache(Path(cache_dir)) if cache_dir is not None else None
    return TextEncoder(component, config, tokenizer_file, torch.device(device), dtype, cache, residency)


def read_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """tokenizer.json exactly as written: transformers 5 would rebuild it and put a blank before the text, which gives other tokens."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise CheckpointError(f"{file} is no readable tokenizer ({error}): download it again.") from None
    if tokenizer.get_vocab_size() > vocab_size:
        raise CheckpointError(f"{file} has {tokenizer.get_vocab_size()} tokens, but the text encoder knows {vocab_size}: they belong to different models.")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
