"""Errors whose message is one sentence for the user."""


class OptionError(ValueError):
    """An option cannot be fulfilled; the message says what was wrong, what was expected and what to do."""


class DataError(RuntimeError):
    """The data cannot be read; the message says where."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which and why."""
