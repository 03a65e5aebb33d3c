"""The text encoder of a checkpoint (`tokenizer/` and `text_encoder/`, UMT5): prompts to embeddings, kept on disk between runs (spec/mova.md 5.3)."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import logging
import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .checkpoint import Component, check_tensors, checkpoint_folder, open_component, read_config, weight_files
from .errors import CheckpointError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("mova")

EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one tensor; a file holds either or both
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CACHE_VERSION = 1  # part of every key: raise it when an encoding changes
CACHED_PROMPTS = 512  # files kept in a cache folder, 4 MB each at most with the released model in bf16


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
        self, component: Component, config: TextEncoderConfig, tokenizer_file: Path, device: torch.device, dtype: torch.dtype | None, cache: PromptCache | None
    ) -> None:
        self.component = component
        self.config = config
        self.text_dim = config.d_model
        self.tokenizer_file = tokenizer_file
        self.device = device
        self.requested_dtype = dtype
        self.cache = cache
        self.model: nn.Module | None = None

    @torch.no_grad()
    def encode(self, prompts: str | list[str], max_length: int = 512) -> Tensor:
        """Prompts -> [B, max_length, text_dim] on the device; rows behind a prompt's own tokens are exactly zero.

        The empty prompt is one end token; a prompt longer than max_length tokens is cut, which one log line says. InputError for what is no text.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"A prompt must be text, or a list of texts with at least one in it; given was {texts!r:.80}.")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise InputError(f"max_length is {max_length!r}: give the number of tokens to encode, 512 for MOVA.")
        embeddings = [self.encode_prompt(clean_prompt(text), max_length) for text in texts]  # each alone: [tokens, text_dim]
        return torch.stack([nn.functional.pad(rows, (0, 0, 0, max_length - len(rows))) for rows in embeddings])

    def encode_prompt(self, prompt: str, max_length: int) -> Tensor:
        """A cleaned prompt -> [tokens, text_dim], from the cache where it is there."""
        if self.cache is None:
            return self.compute_rows(prompt, max_length)
        key = self.cache_key(prompt, max_length)
        rows = self.cache.read(key, self.text_dim)
        if rows is None:
            rows = self.compute_rows(prompt, max_length)
            self.cache.write(key, rows)
        return rows.to(self.device)

    def compute_rows(self, prompt: str, max_length: int) -> Tensor:
        """A cleaned prompt -> [tokens, text_dim]. Padding would be masked, so it is not computed."""
        tokens = self.tokenize(prompt, max_length)
        if self.model is None:
            self.model = build_encoder(self.component, self.config, self.device, self.dtype)
        rows = self.model(input_ids=torch.tensor([tokens], device=self.device)).last_hidden_state[0]
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

    def release(self) -> None:
        """Drops the weights; the next prompt that is not in the cache opens them again."""
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


@dataclass(frozen=True)
class PromptCache:
    """A folder with one safetensors file per encoded prompt. A cache that fails costs a log line, never the encoding."""

    folder: Path

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
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, cache_dir: str | Path | None = None
) -> TextEncoder:
    """Prepares `folder/tokenizer` and `folder/text_encoder`; weights stay closed until a prompt needs them.

    dtype None = as stored. cache_dir keeps encoded prompts between runs. CheckpointError when a file is missing.
    """
    if dtype not in (None, *DTYPES.values()):
        raise InputError(f"The text encoder cannot compute in {dtype}: use torch.bfloat16 or torch.float32.")
    component = open_component(folder, "text_encoder")
    config = read_config(TextEncoderConfig, component.config, str(component.folder / "config.json"))
    weight_files(component.folder)  # complains about missing ones now, not after the first prompt was typed
    tokenizer_file = checkpoint_folder(folder) / "tokenizer" / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise CheckpointError(f"{tokenizer_file} is missing: download the tokenizer folder of the checkpoint again.")
    cache = PromptCache(Path(cache_dir)) if cache_dir is not None else None
    return TextEncoder(component, config, tokenizer_file, torch.device(device), dtype, cache)


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


def build_encoder(component: Component, config: TextEncoderConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The UMT5 encoder with weights as views of the mapped files where device and dtype allow."""
    umt5: Any = import_transformers()
    # eager: the attention the reference used; others round bf16 differently
    settings = umt5.UMT5Config(**dataclasses.asdict(config), attn_implementation="eager")
    with torch.device("meta"):
        model = umt5.UMT5EncoderModel(settings)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in EMBEDDING}
    stored = [name for name in EMBEDDING if name in component.index] or EMBEDDING[:1]
    check_tensors(component, shapes | dict.fromkeys(stored, (config.vocab_size, config.d_model)))
    # float16 overflows in the last projection of a block, so that one stays float32, as in transformers
    weights = {
        key: tensor.to(device, torch.float32 if dtype == torch.float16 and key.endswith(".wo.weight") else dtype) for key, tensor in component.tensors().items()
    }
    model.load_state_dict(weights | dict.fromkeys(EMBEDDING, weights[stored[0]]), assign=True)
    return model.requires_grad_(False).eval()


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"The text encoder needs transformers ({error}): pip install transformers.") from None
    return transformers
