"""A language model behind an OpenAI-compatible service: llama.cpp, vLLM, Ollama, LM Studio, SGLang, hosted ones."""

from __future__ import annotations

import base64
import email.utils
import io
import random
import re
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import PromptError
from .enhance import OnText, Question
from .exchange import TICK, Exchange, ServiceError, host_of
from .service import Service, read_service

TRIES = 4
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time
TEMPERATURE = 0.7
ANSWER_TOKENS = 8192  # thoughts included
SEEDS = 2**31  # services take 32-bit numbers
JPEG_QUALITY = 90
# What not every service knows; what one complains of is left out.
OPTIONAL = ("response_format", "seed", "temperature", "max_tokens")


class RemoteModel:
    """Asks a service, and again after a pause when it is busy. The key goes into one header and nowhere else."""

    def __init__(self, settings: str | Path | None = None) -> None:
        """settings: the JSON file of `read_service`; None = the environment tells everything. Read at the first question."""
        self.settings = settings

    @cached_property
    def service(self) -> Service:
        return read_service(self.settings and Path(self.settings))

    def ask(self, question: Question, seed: int, on_text: OnText) -> str:
        """The complete answer; PromptError says what is wrong with service, key or model, without the key."""
        body = self.build_body(question, seed)
        for attempt in range(1, TRIES + len(OPTIONAL) + 1):
            try:
                return self.attempt(body, on_text)
            except ServiceError as error:
                if error.status in (400, 422) and (lacking := unknown_settings(body, str(error))):
                    body = {name: value for name, value in body.items() if name not in lacking}
                    continue
                if not error.transient or attempt >= TRIES:
                    raise PromptError(self.explain(error, attempt)) from None
                pause(self.wait_seconds(error, attempt), f"{host_of(self.service.base_url)} is busy or failed", on_text)
        raise PromptError(f"{host_of(self.service.base_url)} accepts none of the usual settings: is it OpenAI-compatible?")

    def attempt(self, body: dict[str, Any], on_text: OnText) -> str:
        headers = {"Accept": "text/event-stream, application/json", "User-Agent": "mova-studio"}
        if self.service.key:
            headers["Authorization"] = f"Bearer {self.service.key}"
        exchange = Exchange(f"{self.service.base_url}/chat/completions", headers, body, self.service.timeout)
        answer: list[str] = []
        for piece in exchange.text(lambda: on_text(self.service.hide("".join(answer)))):
            answer.append(piece)
        return self.service.hide("".join(answer))

    def build_body(self, question: Question, seed: int) -> dict[str, Any]:
        content: Any = question.text
        model = self.service.model
        if question.picture is not None:
            content = [{"type": "image_url", "image_url": {"url": data_url(question.picture)}}, {"type": "text", "text": question.text}]
            model = self.service.vision_model or model
        body = {
            "model": model,
            "messages": [{"role": "system", "content": question.rules}, {"role": "user", "content": content}],
            "stream": True,
            "seed": seed % SEEDS,
            "temperature": TEMPERATURE,
            "max_tokens": ANSWER_TOKENS,
        }
        if question.schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "elements", "strict": True, "schema": question.schema}}
        return body

    def wait_seconds(self, error: ServiceError, attempt: int) -> float:
        """As long as the service asks for, else doubled each time with some chance in it."""
        asked = retry_seconds(error.wait)
        if asked is not None and asked > LONGEST_WAIT:
            raise PromptError(f"{host_of(self.service.base_url)} is busy and asks to wait {asked:.0f} seconds (HTTP {error.status}): try again then.")
        return asked if asked is not None else FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)

    def explain(self, error: ServiceError, attempt: int) -> str:
        """What happened and what to do, in a sentence."""
        host, service = host_of(self.service.base_url), self.service
        key = f"the key in {service.key_variable}" if service.key else f"no key ({service.key_variable} is not set)"
        advice = {
            400: "The model may be unable to see pictures, or the text is too long for it.",
            401: f"It was asked with {key}: set the right one in the environment and restart.",
            403: f"It was asked with {key}: may that one use the model?",
            404: f"Is '{service.model}' a model of this service, and base_url {service.base_url} right?",
            413: "The picture is too large for it: use another service.",
        }
        tried = f", {attempt} times" if attempt > 1 else ""
        message = re.sub(r"\b(sk|key)-[\w*.-]{4,}", "***", service.hide(str(error)))
        if not error.status:
            return message[:1].upper() + message[1:] + (f" ({attempt} tries)." if attempt > 1 else "" if message.endswith(("?", ".")) else ".")
        return f"{host} answered with HTTP {error.status}{tried}: {message.rstrip('.')}. {advice.get(error.status, '')}".strip()

    def release(self) -> None:
        """Nothing is held between questions."""


def unknown_settings(body: dict[str, Any], message: str) -> set[str]:
    """Settings in the body that the service does not take: those it names, else the form of the answer."""
    named = {name for name in OPTIONAL if name in body and name in message}
    return named or {"response_format"} & body.keys()


def data_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def retry_seconds(header: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds of a Retry-After header, which tells a number or a date; None when it tells neither."""
    if header is None:
        return None
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", header):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now())
    except (TypeError, ValueError, OverflowError):
        return None


def pause(seconds: float, reason: str, on_text: OnText) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        on_text(f"{reason}: trying again in {left:.0f} s")
        time.sleep(min(TICK, left))
