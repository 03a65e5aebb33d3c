"""What can go wrong, in sentences: each error says what was given, what is needed and what to do."""


class MovaError(Exception):
    """Base of every error that a wrong file, value or environment causes."""


class CheckpointError(MovaError):
    """A checkpoint folder or one of its files cannot be used."""


class InputError(MovaError):
    """A value given by the caller is out of range or does not fit the others."""


class LoraError(MovaError):
    """A LoRA file cannot be used with this model."""


class MediaError(MovaError):
    """A picture, sound or film cannot be read or written."""


class PromptError(MovaError):
    """A prompt cannot be written: the language model cannot be used, failed or refused."""


class SamplingError(MovaError):
    """The model left the range of numbers while sampling."""
