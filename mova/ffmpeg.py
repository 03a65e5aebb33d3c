"""FFmpeg, through PyAV."""

from __future__ import annotations

from types import ModuleType

from .errors import MediaError


def load_av() -> ModuleType:
    """PyAV, loaded when first needed; MediaError where it is not installed."""
    try:
        import av
    except ImportError:
        raise MediaError("Films and sound files need PyAV, which is not installed: pip install av") from None
    return av
