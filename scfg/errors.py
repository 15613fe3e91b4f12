"""The one exception of this package, and checks of what callers give."""

import operator
from typing import Any


class BadInput(ValueError):
    """The caller's input cannot be used; the message is one line that says what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def whole_number(what: str, value: Any, low: int, high: int) -> int:
    """Whatever counts as a whole number, also numpy's and torch's, as an int; raises BadInput for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise BadInput(f"{what}: give a whole number from {low} to {high}, not {shown(value)}")
    return number


def listed(what: str, values: Any) -> list[Any]:
    """What was given as several values; raises BadInput for a single one."""
    try:
        return list(values)
    except TypeError:
        raise BadInput(f"{what}: give several numbers, not {shown(values)}") from None


def one_line(text: str, most: int = 1500) -> str:
    """A text that may quote what strangers wrote: on one line, what cannot be printed escaped, shortened."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: Any) -> str:
    """Whatever was given, in a few characters of one line."""
    return one_line(repr(value), 60)
