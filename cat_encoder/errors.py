"""What can go wrong with the ear, in one kind of sentence."""


class CatError(Exception):
    """A sound, checkpoint or setting that the encoder cannot use: says what was given, what is needed and what to do."""
