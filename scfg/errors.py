"""The one exception of this package."""


class BadInput(ValueError):
    """The caller's input cannot be used; the message is one line that says what to do."""
