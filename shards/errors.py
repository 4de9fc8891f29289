"""The one error that means "your input", so that the command line can answer it with one line and exit code 2."""


class InputError(Exception):
    """What the user gave cannot be used; the message says what is wrong, where, and what would be right."""


class Elsewhere(InputError):
    """What another process of the run says to the user; this one ends alike, and says nothing."""
