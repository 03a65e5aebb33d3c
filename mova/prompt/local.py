"""A language model in a folder of the user's, run by transformers: opened at a question, let go after the last one."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import PromptError
from .enhance import OnText, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("mova")

ANSWER_TOKENS = 2048
TEMPERATURE, TOP_P = 0.7, 0.9
TICK = 0.1  # seconds between two calls of on_text
ROOM = 1.25  # device memory per byte of weights, for what is computed
SEEDS = 2**64  # torch takes no larger number
FAILURES = (RuntimeError, ValueError, LookupError, TypeError)  # what models and processors raise on what they cannot do
SHARES = {None: 1.0, "8-bit": 0.55, "4-bit": 0.32}  # of 16-bit weights, by how bitsandbytes keeps them


class LocalModel:
    """Looks at pictures with the model in `folder` and writes with the one in `writer` (None: the same). Runs in the calling thread."""

    def __init__(self, folder: str | Path, writer: str | Path | None = None, *, device: str | torch.device = "cpu", answer_tokens: int = ANSWER_TOKENS) -> None:
        self.folder, self.writer = Path(folder), Path(writer or folder)
        self.device, self.answer_tokens = torch.device(device), answer_tokens
        self.opened: OpenModel | None = None

    def ask(self, question: Question, seed: int, on_text: OnText) -> str:
        """The answer; the same seed gives the same one on the same machine. PromptError for a folder or model that cannot be used."""
        folder = self.folder if question.picture is not None else self.writer
        if self.opened is None or self.opened.folder != folder:
            self.release()
            on_text(f"Opening {folder.name}")
            self.opened = open_model(folder, self.device)
            on_text(f"Reading the {'picture' if question.picture is not None else 'idea'}")
        try:
            return self.opened.answer(question, seed, self.answer_tokens, on_text)
        except torch.cuda.OutOfMemoryError:
            raise too_large(folder, self.device) from None

    def bytes_needed(self) -> int:
        """Device memory to be free before the first question: for the larger of both models as stored."""
        return int(ROOM * max(weight_bytes(folder) for folder in {self.folder, self.writer}))

    def release(self) -> None:
        """Drops the weights and gives their memory back to the device."""
        if self.opened is not None:
            self.opened = None
            gc.collect()  # a transformers model refers to itself
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


class OpenModel:
    """A model with its tokenizer, and its reader of pictures where it has one."""

    def __init__(self, folder: Path, model: PreTrainedModel, processor: Any, sees: bool) -> None:
        self.folder, self.model, self.processor, self.sees = folder, model, processor, sees
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def answer(self, question: Question, seed: int, answer_tokens: int, on_text: OnText) -> str:
        inputs = self.encode(question).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        self.check_length(length + answer_tokens)
        stream = TokenStream(self.tokenizer, on_text)
        settings = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "max_new_tokens": answer_tokens, "pad_token_id": self.padding()}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), watched(self.model, stream.tell):
                torch.manual_seed(seed % SEEDS)
                made = self.model.generate(**inputs, **settings, streamer=stream)[0, length:]
        except FAILURES as error:
            if stream.telling or isinstance(error, torch.cuda.OutOfMemoryError):  # telling: the listener raised it, to cancel
                raise
            raise PromptError(
                f"{self.folder.name} failed while it wrote ({first_line(error)}): are its files whole? Download it again, or use another model"
            ) from None
        if len(made) == answer_tokens and int(made[-1]) not in self.ends():
            raise PromptError(f"{self.folder.name} did not come to an end within {answer_tokens} tokens: use another model (an 'Instruct' one)")
        return self.tokenizer.decode(made, skip_special_tokens=True)

    def encode(self, question: Question) -> Any:
        """The question as the model's own chat template puts it."""
        if question.picture is not None and not self.sees:
            raise PromptError(f"{self.folder.name} cannot look at pictures: choose a vision-language model such as Qwen3-VL, or disconnect the picture")
        content: Any = question.text
        if self.sees:
            content = [{"type": "image"}] * (question.picture is not None) + [{"type": "text", "text": question.text}]
        try:
            text = self.apply_template([{"role": "system", "content": question.rules}, {"role": "user", "content": content}])
        except Exception as error:  # a template is a program of its own and raises whatever it likes
            raise PromptError(f"the chat template of {self.folder.name} cannot be used ({error}): use an 'Instruct' model") from None
        more = {"images": [question.picture]} if question.picture is not None else {}
        if not self.sees:
            more = {"return_token_type_ids": False}  # tokenizers of transformers before 5 make them, and models that only write refuse them
        try:
            return self.processor(text=[text], **more, return_tensors="pt", add_special_tokens=False)
        except FAILURES as error:
            raise PromptError(
                f"{self.folder.name} cannot take the question ({first_line(error)}): use a picture of usual proportions, or another model"
            ) from None

    def apply_template(self, messages: list[dict[str, Any]]) -> str:
        if self.sees:
            messages = [{"role": "system", "content": [{"type": "text", "text": messages[0]["content"]}]}, *messages[1:]]
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False)

    def check_length(self, tokens: int) -> None:
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise PromptError(f"{self.folder.name} reads {limit} tokens, question and answer take {tokens}: shorten the idea, or use a model that reads more")

    def ends(self) -> set[int]:
        given = self.model.generation_config.eos_token_id
        return set(given) if isinstance(given, list) else {given, self.tokenizer.eos_token_id}

    def padding(self) -> int | None:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id


class TokenStream:
    """What `generate` hands its tokens to: tells the text so far, at most ten times a second."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.asked, self.told, self.telling = False, 0.0, False

    def put(self, tokens: torch.Tensor) -> None:
        if self.asked:  # the first ones are the question
            self.tokens += tokens.flatten().tolist()
        self.asked = True

    def end(self) -> None:
        self.told = 0.0
        self.tell()

    def tell(self) -> None:
        """Calls on_text when it is time, from between two layers as well."""
        if time.monotonic() - self.told >= TICK:
            self.told, text = time.monotonic(), self.tokenizer.decode(self.tokens, skip_special_tokens=True)
            self.telling = True
            self.on_text(text)
            self.telling = False


@contextlib.contextmanager
def watched(model: nn.Module, call: Callable[[], None]) -> Iterator[None]:
    """Calls `call` before every layer while the block runs; what it raises ends the run."""
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    hooks = [layer.register_forward_pre_hook(lambda *_: call()) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- opening


def open_model(folder: Path, device: torch.device) -> OpenModel:
    """The model of a folder on the device, in 8 or 4 bit where it fits no other way and bitsandbytes is there. Nothing in the folder is run."""
    sees = "vision_config" in read_config(folder)
    try:
        import transformers
    except ImportError:
        raise PromptError("A local language model needs transformers, which is not installed: pip install transformers") from None
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    reader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
    precision = choose_precision(folder, device)
    log.info("Opening %s on %s%s", folder.name, device, f" in {precision}" if precision else "")
    try:
        processor = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        settings = quantized(precision, device) if precision else {}
        model = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, torch_dtype="auto", **settings)
        return OpenModel(folder, model.eval() if precision else model.to(device).eval(), processor, sees)
    except torch.cuda.OutOfMemoryError:
        raise too_large(folder, device) from None
    except Exception as error:  # transformers raises everything from KeyError to safetensors' own for a folder that does not fit
        raise PromptError(
            f"{folder} cannot be opened by transformers {transformers.__version__} ({type(error).__name__}: {first_line(error)}): "
            "is it complete, in safetensors, and of a kind that needs no code of its own?"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PromptError(f"{folder} holds no config.json: give a folder as 'hf download' makes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"{file} cannot be read ({error}): download it again") from None
    if not isinstance(config, dict):
        raise PromptError(f"{file} is no configuration of a model: download it again")
    return config


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def choose_precision(folder: Path, device: torch.device) -> str | None:
    """None (as stored) where the weights fit into the free memory of the device, or nothing else is possible; else "8-bit" or "4-bit"."""
    if device.type != "cuda" or "quantization_config" in read_config(folder) or not has_bitsandbytes():
        return None
    return fitting_precision(weight_bytes(folder), torch.cuda.mem_get_info(device)[0])


def fitting_precision(weights: int, free: int) -> str | None:
    return next((name for name, share in SHARES.items() if weights * share * ROOM <= free), "4-bit")


def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None and find_spec("accelerate") is not None


def quantized(precision: str, device: torch.device) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    bits = {"8-bit": {"load_in_8bit": True}, "4-bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_type": "nf4"}}
    return {"quantization_config": BitsAndBytesConfig(**bits[precision]), "device_map": {"": device}}


def too_large(folder: Path, device: torch.device) -> PromptError:
    return PromptError(f"{folder.name} does not fit in the memory of {device}: use a smaller one{'' if has_bitsandbytes() else ', or install bitsandbytes'}")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
