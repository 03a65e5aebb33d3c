"""Which service writes prompts: a settings file and the environment. Keys come from the environment alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import PromptError

PREFIX = "MOVA_PROMPT_"
KEY_VARIABLE = f"{PREFIX}API_KEY"
EXAMPLE = '{"base_url": "http://127.0.0.1:8080/v1", "model": "qwen3-vl"}'
SECONDS = (1, 3600)
SHORTEST_SECRET = 8  # characters


@dataclass(frozen=True)
class Service:
    """An OpenAI-compatible service. The key is never shown, logged or stored."""

    base_url: str  # with the version, such as http://127.0.0.1:8080/v1
    model: str  # writes the prompt, and looks at pictures unless vision_model does
    vision_model: str = ""
    timeout: float = 120.0  # seconds without a new word
    key_variable: str = KEY_VARIABLE  # the environment variable that holds the key
    key: str = field(default="", repr=False)

    def hide(self, text: str) -> str:
        """The text without the key, which servers like to repeat. A word such as "none" or "ollama", for servers that ask for any key, is no secret."""
        return text.replace(self.key, "***") if len(self.key) >= SHORTEST_SECRET else text


def read_service(file: Path | None, environ: Mapping[str, str] = os.environ) -> Service:
    """The service of the settings file; MOVA_PROMPT_BASE_URL, _MODEL, _VISION_MODEL and _TIMEOUT win over it. PromptError says what is lacking."""
    names = [item.name for item in fields(Service) if item.name != "key"]
    place = file or "a settings file"
    given = read_settings(file) if file and file.is_file() else {}
    if unknown := sorted(given.keys() - set(names)):
        about_keys = f" A key is never read from a file: put it into the environment variable {KEY_VARIABLE}." if any("key" in name for name in unknown) else ""
        raise PromptError(f"{file} holds {', '.join(unknown)}; {', '.join(names)} are known.{about_keys}")
    given |= {name: environ[PREFIX + name.upper()] for name in names if environ.get(PREFIX + name.upper())}
    for name in ("base_url", "model"):
        if not str(given.get(name) or "").strip():
            raise PromptError(f"No {name} of a language model service is set: write it into {place}, such as {EXAMPLE}, or set {PREFIX}{name.upper()}.")
    settings = {name: str(value).strip() for name, value in given.items() if value is not None}
    variable = settings.get("key_variable", KEY_VARIABLE)
    settings["base_url"] = check_url(settings["base_url"])
    key = environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise PromptError(f"{variable} holds blanks or signs that no key has: set it again.")  # and never show what it holds
    return Service(**settings | {"timeout": read_seconds(settings.get("timeout", "120")), "key": key})


def read_settings(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"{file} is no readable JSON ({error}): write {EXAMPLE} into it.") from None
    if not isinstance(found, dict):
        raise PromptError(f"{file} must hold a JSON object such as {EXAMPLE}.")
    return found


def check_url(url: str) -> str:
    """The URL up to the version. PromptError for one that is no http(s) address, or holds a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PromptError(f"base_url '{url}' is no address ({error}): give one such as http://127.0.0.1:8080/v1.") from None
    if "@" in parts.netloc or parts.query:
        raise PromptError(f"base_url of {parts.hostname} holds a name, a password or a query: give the bare address, and the key in {KEY_VARIABLE}.")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise PromptError(f"base_url '{url}' is no http or https address: give one such as http://127.0.0.1:8080/v1.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def read_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SECONDS[0] <= seconds <= SECONDS[1]:
        raise PromptError(f"timeout is {text}: {SECONDS[0]} to {SECONDS[1]} seconds are needed.")
    return seconds
