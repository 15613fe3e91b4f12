"""Files and folders of any known layout -> one source of tensors by original names."""

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from ..checkpoint import FIRST_STAGE, UNET, Source, build, family_of, shortened, with_prefix
from ..config import Config, VAEConfig
from ..data import stated_config
from ..errors import BadInput
from ..vae import VAE
from .content import read_file
from .family import check_kind, config_of, place_towers, stated_schedule, without_last_layer
from .folder import read_folder
from .names import averaged, original_names
from .sizes import vae_sizes
from .tokenizer import read_tokenizer

log = logging.getLogger("scfg")


@dataclass
class Contents:
    """What one path holds, or several together, by original names; towers are numbered."""

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # original names -> the files' own
    metadata: dict[str, str] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)  # fields of the Schedule that the files state
    config: dict[str, Any] = field(default_factory=dict)  # and of the Config
    tokenizer: Path | None = None
    from_transformers: bool = False  # whether the text towers are

    def has(self, part: str) -> bool:
        return any(name.startswith(part) for name in self.tensors)

    def family(self) -> Config:
        return stated_config(self.metadata) or family_of(self.tensors)


def read(paths: Sequence[Path], vae: Path | None, tokenizer: Path | None, ema: bool) -> Source:
    """The first path's checkpoint, completed by the others; raises BadInput with one line that says what is wrong."""
    given = read_tokenizer(tokenizer) if tokenizer else None
    contents = contents_of(paths[0], ema)
    for path in paths[1:]:
        contents = completed(contents, contents_of(path, ema=False))
    other = contents_of(vae, ema=False) if vae else None
    try:
        return source_of(contents, other, given)
    except BadInput as error:
        named = str(error).startswith((str(paths[0]), str(vae)))
        raise error if named else BadInput(f"{paths[0]}: {error}") from None


def contents_of(path: Path, ema: bool) -> Contents:
    """What one file or folder holds."""
    found = Contents(path)
    if path.is_dir():
        own, found.schedule, found.config, found.tokenizer = read_folder(path, ema)
    else:
        own, found.metadata = read_file(path)
        found.schedule = stated_schedule(own, found.metadata)
    named = original_names(own)
    found.tensors, found.names = named.tensors, named.names
    found.from_transformers = any(
        original.startswith("text.") and not re.match(r"cond_stage|conditioner|.*\.resblocks\.", name)
        for original, name in named.names.items()
    )
    if not path.is_dir():
        use_averaged(found, own, ema)
    try:
        check_kind(own, found.tensors)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    if not found.tensors:
        begin = sorted(own)[0]
        raise BadInput(f"{path} holds no part of a Stable Diffusion checkpoint: its names begin with {begin!r}")
    if named.unused:
        log.info(f"{path}: ignored {len(named.unused)} tensors that sampling does not read: {shortened(named.unused)}")
    if named.unknown:
        count, which = len(named.unknown), shortened(named.unknown)
        warnings.warn(f"{path}: ignored {count} tensors that belong to no part that is known: {which}", stacklevel=6)
    return found


def use_averaged(found: Contents, own: Mapping[str, Tensor], ema: bool) -> None:
    """Take the U-Net's averaged (EMA) weights where they are asked for, or where there are no others."""
    if not ema and found.has(UNET):
        return
    names = averaged({**own, **{name: tensor for name, tensor in found.tensors.items() if name.startswith(UNET)}})
    if ema and not names:
        raise BadInput(f"{found.path} holds no averaged (EMA) weights of its U-Net: leave --ema out")
    if names and not ema:
        log.info(f"{found.path} holds only averaged (EMA) weights of its U-Net: they are used")
    found.tensors |= {original: own[name] for original, name in names.items()}
    found.names |= names


def part(name: str) -> str:
    """The part of a checkpoint that a tensor is in; every text tower is one."""
    return re.match(r"text\.\d|[^.]*", name)[0]  # type: ignore[index]  # it matches whatever the name


def completed(first: Contents, other: Contents) -> Contents:
    """The first contents with the other's text towers, in place of its own, and parts that it lacks."""
    towers = sorted({part(name) for name in other.tensors if name.startswith("text.")})
    if len(towers) == 1 and first.has(UNET):
        other = moved(other, towers[0], place_of(first, other, towers[0]))
    kept = {part(name) for name in first.tensors if not name.startswith("text.")}
    taken = {part(name) for name in other.tensors} - kept
    if kept & {part(name) for name in other.tensors}:
        log.info(f"{other.path}: only {', '.join(sorted(taken)) or 'nothing'} is taken, the rest is {first.path}'s")

    def together(own: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in own.items() if part(name) not in taken}
        return found | {name: value for name, value in more.items() if part(name) in taken}

    lead = other if other.has(UNET) and not first.has(UNET) else first  # what files say is about their own U-Net
    return replace(
        first,
        tensors=together(first.tensors, other.tensors),
        names=together(first.names, other.names),
        metadata=lead.metadata,
        schedule=lead.schedule,
        config=lead.config,
        tokenizer=first.tokenizer or other.tokenizer,
        from_transformers=other.from_transformers if towers else first.from_transformers,
    )


def moved(contents: Contents, tower: str, place: str) -> Contents:
    """The contents with a text tower at another place."""

    def placed(own: Mapping[str, Any]) -> dict[str, Any]:
        return {re.sub(rf"^{tower}\.", f"{place}.", name): value for name, value in own.items()}

    return replace(contents, tensors=placed(contents.tensors), names=placed(contents.names))


def place_of(first: Contents, other: Contents, own: str) -> str:
    """The place of a lone text tower: that of the family's tower of its width, else its own or the first free one."""
    widths = {f"text.{i}": tower.width for i, tower in enumerate(first.family().text)}
    embedding = next(
        (tensor for name, tensor in other.tensors.items() if name.endswith("token_embedding.weight")), None
    )
    fitting = [place for place in widths if embedding is not None and widths[place] == embedding.shape[-1]]
    named = [own] if own in widths and own != "text.0" else []
    free = [place for place in widths if not first.has(f"{place}.")]
    return [*fitting, *named, *free, "text.0"][0]


def source_of(contents: Contents, vae: Contents | None, tokenizer: CLIPTokenizer | None) -> Source:
    """One source of everything, its config included; vae: whose VAE is taken."""
    if not contents.has(UNET):
        held = [what for part, what in ((FIRST_STAGE, "a VAE"), ("text.", "text towers")) if contents.has(part)]
        what = f"this holds {' and '.join(held)} but no U-Net"
        raise BadInput(f"{what}: give it beside a checkpoint, with --vae or --text")
    sizes = VAEConfig()
    if vae:
        sizes = checked_vae(vae)
        own = {name: tensor for name, tensor in contents.tensors.items() if not name.startswith(FIRST_STAGE)}
        contents = replace(contents, tensors=own | first_stage(vae))
    elif not contents.has(FIRST_STAGE):
        raise BadInput("this checkpoint has no VAE: give one of its family with --vae FILE")
    if len(contents.family().text) == 1 and not contents.has("text.0."):  # diffusers calls a refiner's the second
        contents = moved(contents, "text.1", "text.0")
    stated = stated_config(contents.metadata)
    tensors, names = place_towers(contents.tensors, contents.names, contents.family())
    config = stated or without_last_layer(
        config_of(tensors, contents.schedule, contents.config), tensors, contents.from_transformers
    )
    if vae:
        check_family(config, contents, vae, sizes)
        config = replace(config, vae=replace(sizes, overflows=config.vae.overflows))
    if tokenizer is None and contents.tokenizer:
        tokenizer = read_tokenizer(contents.tokenizer)
    known = "prediction" in contents.schedule or stated is not None
    return Source(tensors, contents.metadata, config, known, tokenizer, names)


def first_stage(contents: Contents) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in contents.tensors.items() if name.startswith(FIRST_STAGE)}


def checked_vae(contents: Contents) -> VAEConfig:
    """The sizes of another file's VAE, which must be whole."""
    path, tensors = contents.path, first_stage(contents)
    if not tensors:
        raise BadInput(f"{path} holds no VAE")
    try:
        sizes = vae_sizes(contents.family().vae if contents.has(UNET) else VAEConfig(), tensors)

        def label(name: str) -> str:
            return contents.names.get(FIRST_STAGE + name, name)

        _, complaints = build(lambda: VAE(sizes), with_prefix(tensors, FIRST_STAGE), torch.float32, label)
    except Exception as error:  # absurd shapes fail in many ways
        raise BadInput(f"{path} holds no VAE of Stable Diffusion's layout ({type(error).__name__})") from None
    if complaints:
        raise BadInput(f"{path} holds no whole VAE: {shortened(complaints)}")
    return sizes


def check_family(config: Config, contents: Contents, vae: Contents, sizes: VAEConfig) -> None:
    """Refuse another file's VAE that does not go with the U-Net; a VAE alone does not say its family."""
    family = vae.family() if vae.has(UNET) else None
    if family and family.latent_scale != contents.family().latent_scale:
        what = f"{vae.path} is {family.name}, whose latents are not those of {config.name}"
        raise BadInput(f"{what}: give a VAE of this family")
    if sizes.latent_channels != config.unet.in_channels:
        channels = config.unet.in_channels
        what = f"{vae.path} has latents of {sizes.latent_channels} channels, those of {config.name} have {channels}"
        raise BadInput(f"{what}: give a VAE of this family")
    if not family:
        what = f"a VAE alone does not say its family: {vae.path} is taken for one of {config.name}"
        warnings.warn(what, stacklevel=6)
