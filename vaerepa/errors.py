"""The error that is the user's to mend."""


class OptionError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong, what was expected and what to do."""
