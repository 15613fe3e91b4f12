"""A Guidance or a Config as plain data, for JSON and back.

Such data comes from strangers, in the text of a picture or the header of a checkpoint: only the classes of one table
can come of it, and every field is checked against its annotation.
"""

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import CLIPTokenizer

from .config import Config, TextConfig, UNetConfig, VAEConfig
from .errors import BadInput, shown
from .schedule import Schedule
from .segment import CONDITIONAL, OFFICIAL, PAPER, Recipe

CLASSES = {  # by name, where they are
    "Guidance": "guidance",
    "CFG": "guidance",
    "SCFG": "guidance",
    "Recipe": "segment",
    "Energy": "methods",
    "Product": "methods",
    "ByRegion": "regional",
    "Region": "regional",
    "APG": "methods",
    "FDG": "methods",
    "OptimizedScale": "methods",
    "TCFG": "methods",
    "PAG": "methods",
    "SEG": "methods",
    "Rescale": "methods",
    "Interval": "methods",
    "Ramp": "methods",
}
RULES = ("CFG", "SCFG", "Energy", "Product", "ByRegion")
SLOTS = {  # the classes that may fill a field whose annotation names none
    ("Guidance", "scale"): RULES,
    ("Guidance", "direction"): ("APG", "FDG", "OptimizedScale", "TCFG"),
    ("Guidance", "perturb"): ("PAG", "SEG"),
    ("Guidance", "rescale"): ("Rescale",),
    ("Guidance", "when"): ("Interval", "Ramp"),
    ("Product", "first"): RULES,
    ("Product", "second"): RULES,
    ("ByRegion", "base"): RULES,
}
CONFIGS = (Config, UNetConfig, VAEConfig, TextConfig, Schedule)
BLOCKS = ("res_blocks", "transformer_depth", "middle_depth", "layers")  # fields that are numbers of blocks
MOST_BLOCKS, MOST = 64, 2**20  # in one place; and of any other number
RECIPES = {"official": OFFICIAL, "conditional": CONDITIONAL, "paper": PAPER}


def class_of(name: str) -> type[Any]:
    return getattr(importlib.import_module(f".{CLASSES[name]}", __package__), name)


def to_dict(value: Any) -> dict[str, Any]:
    """A Guidance, or whatever may be part of one, as dicts, lists, numbers and strings: {"class": NAME, FIELD: ...}.

    Areas become their descriptions, the recipes of this package their names, infinity "inf". Raises BadInput for what
    data cannot hold: functions, tensors, masks of tensors, classes of other packages.
    """
    name = type(value).__name__
    if name not in CLASSES or type(value) is not class_of(name):
        raise BadInput(f"{value!r} cannot be written as data: a Guidance may hold {', '.join(CLASSES)}")
    return {"class": name} | {field.name: plain(getattr(value, field.name)) for field in fields(value)}


def plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if isinstance(value, Recipe):
        return next((name for name, recipe in RECIPES.items() if recipe == value), None) or to_dict(value)
    return description(value) if hasattr(value, "needs_regions") else to_dict(value)


def description(area: Any) -> str:
    """An area as text, from which it can be read back."""
    from .regional import parse_area

    try:
        if parse_area(str(area)) == area:
            return str(area)
    except BadInput:
        pass
    raise BadInput(f"{area} has no description: give its mask as a file")


def from_dict(data: dict[str, Any]) -> Any:
    """The inverse of `to_dict`; fields that are left out have their defaults. Raises BadInput for anything else."""
    try:
        return made(data, tuple(CLASSES), "guidance")
    except RecursionError:
        raise BadInput("guidance: it is too deep to be read") from None


def made(data: Any, allowed: tuple[str, ...], where: str) -> Any:
    """An instance of one of the allowed classes."""
    name = data.get("class") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in allowed:
        raise BadInput(f"{where}: {shown(data)} is none of the classes {', '.join(allowed)}")
    return filled(class_of(name), {key: value for key, value in data.items() if key != "class"}, where)


def filled(kind: type[Any], given: dict[str, Any], where: str) -> Any:
    """An instance of a class with these fields."""
    name, hints = kind.__name__, get_type_hints(kind)
    unknown = sorted(map(str, given.keys() - {field.name for field in fields(kind)}))
    if unknown:
        raise BadInput(f"{where}: {name} has no {shown(unknown[0])}")
    values = {
        field: slot(value, SLOTS[name, field], f"{where}.{field}")
        if (name, field) in SLOTS
        else checked(value, hints[field], f"{where}.{field}")
        for field, value in given.items()
    }
    try:
        return kind(**values)
    except TypeError:
        raise BadInput(f"{where}: {name} lacks a field") from None


def slot(value: Any, allowed: tuple[str, ...], where: str) -> Any:
    """What fills a slot; an empty one says None, which Guidance itself refuses where there must be something."""
    return None if value is None else made(value, allowed, where)


def checked(value: Any, hint: Any, where: str) -> Any:
    """The value that data stands for, by a field's annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        hints = [one for one in arguments if one is not type(None)]
        if value is None and len(hints) < len(arguments):
            return None
        return checked(value, hints[isinstance(value, list)] if len(hints) > 1 else hints[0], where)
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(checked(one, kind, f"{where}[{i}]") for i, (one, kind) in enumerate(zip(value, kinds)))
    if origin is Literal and value in arguments:
        return value
    if hint is float and value in ("inf", "-inf"):
        return float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is Recipe:
        return RECIPES[value] if isinstance(value, str) and value in RECIPES else made(value, ("Recipe",), where)
    if isinstance(hint, type) and is_dataclass(hint):
        own = hint in CONFIGS and isinstance(value, dict)
        return filled(hint, value, where) if own else made(value, (hint.__name__,), where)
    if getattr(hint, "__name__", "") == "Area" and isinstance(value, str):
        from .regional import parse_area

        return parse_area(value)
    raise BadInput(f"{where}: {shown(value)} cannot be its value")


def check_guidance(part: Any) -> None:
    """Raise BadInput where a part of a Guidance stands in a slot of another kind, or its numbers are none.

    Parts of other packages are not looked into.
    """
    kind = type(part).__name__
    if kind not in CLASSES or type(part) is not class_of(kind):
        return
    hints, parts = get_type_hints(type(part)), {name for names in SLOTS.values() for name in names}
    for field in fields(part):
        value, where = getattr(part, field.name), f"{kind}.{field.name}"
        slot = SLOTS.get((kind, field.name))
        misplaced = slot and type(value).__name__ in parts - set(slot)
        if misplaced or (slot and kind != "Guidance" and not callable(value)):
            raise BadInput(f"{where} is one of {', '.join(slot or ())}, not {shown(value)}")
        if not fits(value, hints[field.name]):
            raise BadInput(f"{where} is {kind_of(hints[field.name])}, not {shown(value)}")
        for inner in value if isinstance(value, tuple | list) else [value]:
            check_guidance(inner)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value can be what a field's annotation says; numbers may be numpy's or torch's."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple and isinstance(value, tuple | list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin is tuple:
        return False
    if hint in (int, float) and isinstance(value, int):
        return abs(value) < 2**63  # torch's largest
    if hint in (int, float):
        return hasattr(type(value), "__float__") and not getattr(value, "ndim", 0) and not math.isnan(value)
    if is_dataclass(hint):  # or a caller's own, which has its methods
        return all(hasattr(value, name) for name, own in vars(hint).items() if callable(own) and name[0] != "_")
    return hint not in (bool, str, type(None)) or isinstance(value, hint)


def kind_of(hint: Any) -> str:
    """What an annotation asks for, in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(kind_of, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return {int: "a number", float: "a number", type(None): "None"}.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def config_to_json(config: Config) -> str:
    return json.dumps(asdict(config))


def stated_config(metadata: Mapping[str, str]) -> Config | None:
    """What a checkpoint says that it is, in its header; raises BadInput for what is no config."""
    if "scfg.config" not in metadata:
        return None
    try:
        data = json.loads(metadata["scfg.config"])
        config: Config = checked(data, Config, "scfg.config")
    except (ValueError, RecursionError) as error:
        raise BadInput(f"scfg.config is no JSON of a config ({type(error).__name__})") from None
    return config


def check_config(config: Config) -> None:
    """Raise BadInput where no such model can be, or its parts do not go together."""
    for name, number in numbers(asdict(config)):
        if not 0 <= number <= (MOST_BLOCKS if name in BLOCKS else MOST):
            raise BadInput(f"its config cannot be: {number} is its {name}")
    unet, towers, schedule = config.unet, config.text, config.schedule
    sizes = (*config.size, config.map_divisor, config.latent_scale)
    if not (0 < schedule.beta_start <= schedule.beta_end < 1 and schedule.timesteps > 1 and min(sizes) > 0):
        raise BadInput("its config cannot be: look at betas, timesteps, size, latent_scale and map_divisor")
    for tower in towers:
        if (
            tower.length < 3
            or (tower.pad or 0) >= tower.vocabulary
            or not 1 <= tower.layer_from_end <= tower.layers + 1
        ):
            raise BadInput(f"its config cannot be: a text tower is {tower}")
    facts = [("channels", unet.in_channels, config.vae.latent_channels)]
    facts += [("channels", unet.in_channels, unet.out_channels)]
    if towers:
        facts += [("channels of text", unet.context_dim, sum(tower.width for tower in towers))]
    if towers and unet.vector_dim:
        vector = sum(tower.pooled for tower in towers) + 256 * (5 if config.aesthetic_scores else 6)
        facts += [("channels beside the text", unet.vector_dim, vector)]
    for what, taken, found in facts:
        if taken != found:
            raise BadInput(f"the U-Net takes {taken} {what}, not {found}: only text-to-image checkpoints are supported")


def stated_tokenizer(metadata: Mapping[str, str]) -> tuple[CLIPTokenizer | None, list[str]]:
    """The tokenizer in a checkpoint's header, if any, and the words that it was trained on; none: all.

    Raises BadInput for what cannot be.
    """
    names = ("vocab", "merges", "words", "added")
    try:
        vocab, merges, words, added = (json.loads(metadata.get(f"scfg.{name}", "[]")) for name in names)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"its vocabulary is no JSON ({type(error).__name__})") from None
    pairs = isinstance(merges, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in merges)
    lists = pairs and isinstance(words, list) and isinstance(added, list)
    texts = [*words, *added, *(part for pair in merges for part in pair)] if lists else [None]
    if not all(isinstance(text, str) for text in texts):
        raise BadInput("its merges are not pairs of texts, or its words no texts")
    if vocab and (not isinstance(vocab, dict) or sorted(vocab.values(), key=str) != sorted(range(len(vocab)), key=str)):
        raise BadInput("its vocabulary does not number its tokens from 0 on")
    if not vocab:
        return None, words
    # transformers annotates merges as text and takes pairs
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(map(tuple, merges)))  # type: ignore[arg-type]
    tokenizer.add_tokens(added)
    return tokenizer, words


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a config's dict, and the field that it is in."""
    inner = value.items() if isinstance(value, dict) else [(name, one) for one in value]
    for field, one in inner:
        if isinstance(one, dict | tuple):
            yield from numbers(one, field)
        elif isinstance(one, int | float):
            yield field, one
