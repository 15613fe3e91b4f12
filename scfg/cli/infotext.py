"""The text of a picture, as Stable Diffusion tools write and read it: prompt, negative prompt, a line of facts."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ..config import Emphasis
from ..errors import BadInput
from ..regional.picture import opened
from ..schedule import Spacing
from .arguments import SAMPLER_NAMES

FACT = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # as A1111's programs read it
NEGATIVE = "Negative prompt:"
OPTIONS = {  # facts whose values are options of sample.py as they stand
    "Steps": "steps",
    "Size": "size",
    "Eta": "eta",
    "Clip skip": "clip-skip",
    "Prediction": "prediction",
    "Precision": "dtype",
    "Refiner switch at": "refiner-from",
}
FLAGS = {"EMA": "ema", "Zero terminal SNR": "zero-terminal-snr", "Literal": "literal"}  # facts that are True
FILES = {"VAE": "vae", "Text encoder": "text", "Refiner": "refiner"}  # facts that only name a file


class Infotext(NamedTuple):
    prompt: str
    negative: str
    facts: dict[str, str]


def quote(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n\r]', text) or text != text.strip() else text


def unquote(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text
    except json.JSONDecodeError:
        return text


def write(prompt: str, negative: str, facts: Mapping[str, Any]) -> str:
    """The text of a picture; facts without a value are left out."""

    def text(facts: Mapping[str, Any]) -> str:
        line = ", ".join(f"{name}: {quote(value)}" for name, value in facts.items() if value not in (None, ""))
        return "\n".join([prompt, *([f"{NEGATIVE} {negative}"] if negative else []), line])

    plain = text(facts)
    ambiguous = read(plain)[:2] != (prompt, negative)  # the prompt has a line that reads as a negative one
    return text({**facts, "Prompts": json.dumps([prompt, negative], ensure_ascii=False)}) if ambiguous else plain


def read(text: str) -> Infotext:
    """The inverse of `write`, also for other programs' texts; raises BadInput where there are no facts."""
    *lines, last = text.split("\n")
    facts = {name: unquote(value) for name, value in FACT.findall(last)}
    if len(facts) < 3:
        raise BadInput("it holds no settings of a Stable Diffusion tool")
    first = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompts = ["\n".join(lines[:first]), "\n".join(lines[first:]).removeprefix(NEGATIVE).removeprefix(" ")]
    prompts = listed(facts.pop("Prompts")) if "Prompts" in facts else prompts
    if len(prompts) != 2:
        raise BadInput("its prompts are not two texts")
    prompt, negative = prompts
    return Infotext(prompt, negative, facts)


def read_picture(path: Path) -> Infotext:
    """The settings in the text of a picture; raises BadInput where there are none."""
    with opened(path) as image:
        text = image.info.get("parameters")
    if not isinstance(text, str):
        raise BadInput(f"--from {path}: it has no text that says how it was made")
    try:
        return read(text)
    except BadInput as error:
        raise BadInput(f"--from {path}: {error}") from None


def options(facts: Mapping[str, str]) -> list[str]:
    """The words of a command line that repeats what the facts say, for the same parser that reads typed ones."""
    words = [f"--{option}={facts[name]}" for name, option in OPTIONS.items() if name in facts]
    words += [f"--{option}" for name, option in FLAGS.items() if facts.get(name) == "True"]
    emphasis = facts.get("Emphasis", "").lower().replace(" ", "-")  # others write "No norm"
    words += [f"--emphasis={emphasis}"] if emphasis in get_args(Emphasis) else []
    named = {name.lower(): sampler for sampler, name in SAMPLER_NAMES.items()}
    if "Sampler" in facts:
        sampler = facts["Sampler"].lower()
        if sampler.endswith(" karras"):  # the WebUI's way before it told schedules apart
            sampler = sampler.removesuffix(" karras")
            words.append("--spacing=karras")
        words.append(f"--sampler={named.get(sampler, facts['Sampler'])}")
    if facts.get("Schedule type", "").lower() in get_args(Spacing):
        words.append(f"--spacing={facts['Schedule type'].lower()}")
    if "Guidance" in facts:
        words.append(f"--guidance={facts['Guidance']}")
    elif "CFG scale" in facts:  # another program's picture
        words += ["--guidance=cfg", f"--scale={facts['CFG scale']}"]
    words += [f"--region={text}" for text in listed(facts.get("Region prompts", "[]"))]
    place, size = (facts.get(name, default) for name, default in (("Batch pos", "0"), ("Batch size", "1")))
    if not all(number.isascii() and number.isdigit() for number in (place, size, facts.get("Seed", "0"))):
        raise BadInput("its seed and batch are no whole numbers")
    first = int(facts.get("Seed", "0")) - int(place)
    if first < 0:
        raise BadInput("its batch would begin with a seed below 0")
    # the batch as a whole, since a picture's last bits depend on how many are computed at once
    return [*words, f"--seed={first}", f"--count={size}", f"--batch={size}"]


def listed(text: str) -> list[str]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise BadInput("its prompts are no list of texts")
    return found
