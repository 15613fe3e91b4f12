"""The --region option."""

import argparse
import re
from collections.abc import Callable
from typing import NamedTuple

from ..errors import BadInput
from ..regional import Area, Region, parse_area

EXAMPLE = "'car:scale=9' or 'sky.png & ~car:start=0.2,end=0.6,prompt=a night sky'"


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is no {whole}number from {low} to {high}")
        return value

    return parse


OPTIONS: dict[str, Callable[[str], float]] = {  # and prompt
    "scale": number(float, 0, 1000),
    "times": number(float, 0, 1000),
    "start": number(float, 0, 1),
    "end": number(float, 0, 1),
    "feather": number(int, 0, 1000),
    "base": number(float, 0, 1),
}


class RegionOption(NamedTuple):
    """A --region: a scale of its own, a prompt of its own, or both."""

    text: str  # as it was typed
    area: Area
    region: Region | None
    prompt: str  # empty: none of its own
    base: float
    start: float
    end: float

    def prompted(self) -> str:
        """The option that asks for this area's prompt alone."""
        return f"{self.area}:start={self.start},end={self.end},base={self.base},prompt={self.prompt}"


# what stands before the first colon outside quotes
DESCRIPTION = re.compile(r"""(?:'(?:\\.|[^\\'])*'|"(?:\\.|[^\\"])*"|[^:])*""")


def region(text: str) -> RegionOption:
    """AREA:name=value,...; a prompt comes last and may hold commas."""

    def wrong(what: str) -> argparse.ArgumentTypeError:
        return argparse.ArgumentTypeError(f"{text!r}{what}, as in {EXAMPLE}")

    matched = DESCRIPTION.match(text)
    description = matched[0] if matched else ""
    options = text[len(description) + 1 :]
    options, prompt = [*re.split(r"(?:^|,)\s*prompt=", options, maxsplit=1), ""][:2]
    late = re.search(rf",\s*({'|'.join(OPTIONS)})\s*=", prompt)
    if late:
        raise wrong(f": {late[1]} comes after the prompt, which comes last; put it before")
    values = {}
    for name, _, value in (option.strip().partition("=") for option in options.split(",") if option.strip()):
        if name not in OPTIONS:
            raise wrong(f" asks for {name!r}: a region has {', '.join(OPTIONS)} and prompt")
        if name in values:
            raise argparse.ArgumentTypeError(f"{text!r} gives {name} twice: give it once")
        try:
            values[name] = OPTIONS[name](value)
        except argparse.ArgumentTypeError as error:
            raise wrong(f": {name} {error}") from None
    if not prompt and not {"scale", "times"} & set(values):
        raise wrong(" asks for nothing: give a scale, times or a prompt")
    if "base" in values and not prompt:
        raise wrong(": base is what the whole prompt still counts where another one is given")
    start, end = values.pop("start", 0.0), values.pop("end", 1.0)
    if start >= end:
        raise wrong(" is over before it starts: give a start below its end")
    try:
        area = parse_area(description)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    area = area.feathered(int(values.pop("feather"))) if "feather" in values else area
    base = values.pop("base", 0.0)
    return RegionOption(
        text, area, Region(area, **values, start=start, end=end) if values else None, prompt, base, start, end
    )
