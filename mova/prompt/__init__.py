"""From an idea to the prompt MOVA was trained with: by a template, a local language model or a service."""

from .enhance import Enhanced, LanguageModel, Question, compose_prompt, enhance_prompt
from .fields import Elements, Fields, Line, parse_lines
from .local import LocalModel
from .remote import RemoteModel
from .service import Service, read_service
from .template import compose_negative

__all__ = [
    "Elements",
    "Enhanced",
    "Fields",
    "LanguageModel",
    "Line",
    "LocalModel",
    "Question",
    "RemoteModel",
    "Service",
    "compose_negative",
    "compose_prompt",
    "enhance_prompt",
    "parse_lines",
    "read_service",
]
