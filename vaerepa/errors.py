"""Errors that are the user's to mend."""


class OptionError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong, what was expected and what to do."""


class DataError(RuntimeError):
    """The data cannot be read; the message says where."""
