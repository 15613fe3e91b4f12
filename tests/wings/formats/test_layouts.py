"""Every layout that files come in, for every family: the same networks and latents as of the original, to the bit.

A part that another file replaces holds other numbers in the main file.
"""

import copy
import gc
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import families
import layouts
import numpy as np
import pytest
import torch
from layouts import UNET, VAE, Tensors, negated, part, save, under, without
from safetensors.torch import load_file
from torch import Tensor

import sample
import scfg
from scfg import config
from scfg.config import Config

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("ignore:the SDXL refiner finishes:UserWarning"),
    pytest.mark.filterwarnings("ignore:a VAE alone does not say its family:UserWarning"),
]
FAMILIES = dict(zip(("sd1", "sd2_base", "sd2_v", "sdxl", "sdxl_refiner"), config.FAMILIES, strict=True))
ALL = tuple(FAMILIES)
SD2, XL, REFINER, CLIP, OPEN_CLIP = ALL[1:3], ("sdxl",), ("sdxl_refiner",), ("sd1", "sdxl"), ALL[1:]
ONE, TWO = ("sd1",), CLIP  # which stand for all where how a file is read does not depend on the family
PROMPT = "cat on a red dog"


class Clean(NamedTuple):
    """A family's original file and what scfg makes of it."""

    config: Config
    tensors: Tensors
    file: Path
    model: scfg.Diffusion
    latent: Tensor
    commanded: list[Tensor]  # the command's of this file, as soon as it has run, and of layouts


class Given(NamedTuple):
    """What is given to load one layout."""

    paths: list[Path]
    options: dict[str, Any] = {}


Change = Callable[[Tensors], Tensors]
Rest = Callable[..., Tensors]  # tensors and prefixes -> what becomes of the tensors that another file has
Towers = Callable[[Clean], list[Tensors]]
Write = Callable[[Clean, Path], Given]


# files and folders of whole checkpoints


def whole(change: Change = dict, name: str = "model.safetensors", **options: Any) -> Write:
    """One file of the tensors by other names; name: of the file."""
    return lambda clean, folder: Given([save(folder / name, change(clean.tensors))], options)


def pickled(wrap: Callable[[Tensors], dict[str, Any]], zipped: bool = True, name: str = "model.ckpt") -> Write:
    return lambda clean, folder: Given([layouts.pickle(folder / name, wrap(clean.tensors), zipped)])


def training_state(tensors: Tensors) -> dict[str, Any]:
    """What the original training program writes."""
    counts = {"global_step": 7, "epoch": np.int64(3), "lr_schedulers": [], "pytorch-lightning_version": "1.4.2"}
    callbacks = {"checkpoint": {"best_model_score": torch.tensor(0.1), "best_model_path": "a.ckpt"}}
    optimizers = [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}]
    return counts | {"callbacks": callbacks, "optimizer_states": optimizers, "state_dict": tensors}


def with_others(tensors: Tensors) -> dict[str, Any]:
    """A dict of tensors with what else is found beside them."""
    return tensors | {"global_step": np.float64(7), "epoch": None, "merged_from": ["a", "b"], "ratio": 0.5}


def in_folder(cached: bool = False, **options: Any) -> Write:
    """As diffusers writes it, with its scheduler's prediction; cached: as the hub's cache keeps it."""

    def write(clean: Clean, folder: Path) -> Given:
        found = layouts.diffusers_folder(folder / "pipeline", clean.tensors, clean.config, **options)
        return Given([layouts.as_hub_cache(found, folder / "cache") if cached else found])

    return write


def one_diffusers_file(clean: Clean, folder: Path) -> Given:
    return Given([save(folder / "model.safetensors", layouts.diffusers_file(clean.tensors, clean.config))])


# parts in files of their own


def with_vae(spell: Change, rest: Rest = negated, name: str | None = None) -> Write:
    """Another file's VAE, or that in a folder of this name."""

    def write(clean: Clean, folder: Path) -> Given:
        vae = spell(part(clean.tensors, VAE))
        path = layouts.save_part(folder / name, vae) if name else save(folder / "vae.safetensors", vae)
        return Given([save(folder / "model.safetensors", rest(clean.tensors, VAE))], {"vae": path})

    return write


def own_towers(clean: Clean) -> list[Tensors]:
    """Without prefixes, by the names of the original file: open_clip's, or for CLIP's own tower transformers'."""
    return [part(clean.tensors, tower.prefix) for tower in clean.config.text]


def original_towers(clean: Clean) -> list[Tensors]:
    return [under(tower.prefix, own) for tower, own in zip(clean.config.text, own_towers(clean))]


def transformers_towers(clean: Clean) -> list[Tensors]:
    """As diffusers' folders have them."""
    parts = layouts.diffusers_parts(clean.tensors, clean.config)
    return [parts[name] for name in layouts.text_parts(clean.config)]


def whole_towers(clean: Clean) -> list[Tensors]:
    """By transformers' names with what no sampling reads: SD 2.x's last layer, positions."""
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    return [layouts.transformers_names(own) | positions for own in own_towers(clean)]


def bare_towers(clean: Clean) -> list[Tensors]:
    return [*map(layouts.without_text_model, transformers_towers(clean))]


def with_text(towers: Towers, rest: Rest = without, order: slice = slice(None), name: str = "") -> Write:
    """Text towers in files of their own, given in this order, or in folders of this name, diffusers' own for {}."""

    def write(clean: Clean, folder: Path) -> Given:
        others = []
        for place, own in zip(layouts.text_parts(clean.config), towers(clean)):
            path = folder / (name or "{}.safetensors").format(place)
            others.append(layouts.save_part(path, own) if name else save(path, own))
        main = rest(clean.tensors, *[tower.prefix for tower in clean.config.text][order])
        return Given([save(folder / "model.safetensors", main), *others[order]])

    return write


def with_unet(spell: Change, first: bool, name: str | None = None) -> Write:
    """A U-Net alone that a file of the rest completes, or else a whole file, whose U-Net is not taken."""

    def write(clean: Clean, folder: Path) -> Given:
        own = spell(part(clean.tensors, UNET))
        unet = layouts.save_part(folder / name, own) if name else save(folder / "unet.safetensors", own)
        other = save(folder / "rest.safetensors", (without if first else negated)(clean.tensors, UNET))
        return Given([unet, other])

    return write


def beside(extra: Change) -> Change:
    return lambda tensors: tensors | extra(tensors)


def unread_projection(spelling: str) -> Write:
    return whole(beside(lambda tensors: layouts.unread_projection(tensors, spelling)))


def as_transformers(above: str, change: Change = dict) -> Write:
    return whole(lambda tensors: change(layouts.open_clip_as_transformers(tensors, above)))


def prefixed(prefix: str, change: Change = dict) -> Change:
    return lambda tensors: under(prefix, change(tensors))


REVERSED, FIRST, SECOND = slice(None, None, -1), slice(0, 1), slice(1, 2)
LAYOUTS: dict[str, tuple[Write, tuple[str, ...]]] = {
    "original": (whole(), ALL),
    "sgm": (whole(layouts.sgm), ALL[:3]),
    "ldm": (whole(layouts.ldm), REFINER),
    "without text_model": (whole(layouts.without_text_model), CLIP),
    "text_projection.weight": (whole(layouts.converted_projection), OPEN_CLIP),
    "open_clip as model.text_model": (as_transformers("model."), OPEN_CLIP),
    "open_clip as transformer.text_model": (as_transformers("transformer."), OPEN_CLIP),
    "open_clip as transformer": (as_transformers("transformer.", layouts.without_text_model), OPEN_CLIP),
    "without last text layer": (whole(layouts.without_last_layer), SD2),
    "vae matrices": (whole(layouts.inside(VAE, layouts.vae_matrices)), ALL),
    "vae to_q": (whole(layouts.inside(VAE, layouts.vae_to_names)), ALL),
    "module": (whole(prefixed("module.")), ALL),
    "ema alone": (whole(lambda tensors: without(tensors, UNET) | layouts.ema(tensors)), ALL),
    "ema asked for": (whole(lambda tensors: negated(tensors, UNET) | layouts.ema(tensors), ema=True), ALL),
    "ema unread": (whole(beside(lambda tensors: negated(layouts.ema(tensors), "model_ema.diff"))), TWO),
    "schedule buffers": (whole(beside(lambda tensors: layouts.schedule_buffers())), ALL),
    "training leftovers": (whole(beside(lambda tensors: layouts.training_leftovers())), ALL),
    "text buffers": (whole(beside(layouts.text_buffers)), ALL),
    "unread text_projection": (unread_projection("text_projection"), CLIP),
    "unread text_projection.weight": (unread_projection("text_projection.weight"), CLIP),
    "unread transformer.text_projection": (unread_projection("transformer.text_projection.weight"), CLIP),
    "unread text_model.text_projection": (unread_projection("transformer.text_model.text_projection"), CLIP),
    "ckpt": (pickled(training_state), ALL),
    "old ckpt": (pickled(training_state, zipped=False), ALL),
    "ckpt of bare tensors": (pickled(with_others), TWO),
    "old ckpt of bare tensors": (pickled(with_others, zipped=False), ONE),
    "ckpt nested twice": (pickled(lambda tensors: {"state_dict": {"state_dict": with_others(tensors)}}), ONE),
    "ckpt of a module": (pickled(lambda tensors: {"state_dict": under("module.", tensors)}), TWO),
    "ckpt named safetensors": (pickled(training_state, name="model.safetensors"), ONE),
    "old ckpt named safetensors": (pickled(training_state, zipped=False, name="model.safetensors"), ONE),
    "ckpt named CKPT": (pickled(training_state, name="MODEL.CKPT"), ONE),
    "ckpt without suffix": (pickled(training_state, name="model"), ONE),
    "safetensors named ckpt": (whole(name="model.ckpt"), ONE),
    "safetensors named SAFETENSORS": (whole(name="MODEL.SAFETENSORS"), ONE),
    "safetensors without suffix": (whole(name="model"), ONE),
    "folder": (in_folder(), ALL),
    "folder fp16": (in_folder(kinds=("fp16",)), ALL),
    "folder both": (in_folder(kinds=("fp16", "safetensors")), ONE),
    "folder old": (in_folder(kinds=("bin",), vae=layouts.old_diffusers_vae, published=True), ALL),
    "folder sharded": (in_folder(kinds=("sharded",)), TWO),
    "folder in the hub's cache": (in_folder(cached=True), TWO),
    "diffusers in one file": (one_diffusers_file, ALL),
    "without vae": (with_vae(prefixed(VAE), without), TWO),
    "without vae, bare": (with_vae(dict, without), TWO),
    "vae bare": (with_vae(dict), ALL),
    "vae bare matrices": (with_vae(layouts.vae_matrices), TWO),
    "vae diffusers": (with_vae(layouts.diffusers_vae), ALL),
    "vae diffusers old": (with_vae(layouts.old_diffusers_vae), ALL),
    "vae diffusers prefixed": (with_vae(prefixed("vae.", layouts.diffusers_vae)), TWO),
    "vae diffusers old prefixed": (with_vae(prefixed(VAE, layouts.old_diffusers_vae)), TWO),
    "vae folder": (with_vae(layouts.diffusers_vae, without, "vae"), TWO),
    "vae folder of another name": (with_vae(layouts.diffusers_vae, without, "sd-vae-ft-mse"), ONE),
    "text original": (with_text(original_towers), ALL),
    "text transformers": (with_text(transformers_towers), ALL),
    "text transformers whole": (with_text(whole_towers), ALL),
    "text transformers bare": (with_text(bare_towers), ALL),
    "text open_clip": (with_text(own_towers), OPEN_CLIP),
    "text folder": (with_text(transformers_towers, name="{}"), ALL),
    "text folder of another name": (with_text(transformers_towers, name="clip-vit-large-patch14"), ONE),
    "text replaced by original": (with_text(original_towers, negated), TWO),
    "text replaced by transformers": (with_text(transformers_towers, negated), ALL),
    "text replaced by open_clip": (with_text(own_towers, negated), OPEN_CLIP),
    "text replaced by folder": (with_text(transformers_towers, negated, name="{}"), (*TWO, *REFINER)),
    "text second first": (with_text(transformers_towers, order=REVERSED), XL),
    "text second first, open_clip": (with_text(own_towers, order=REVERSED), XL),
    "text second first, folder": (with_text(transformers_towers, order=REVERSED, name="{}"), XL),
    "text first alone": (with_text(transformers_towers, order=FIRST), XL),
    "text second alone": (with_text(transformers_towers, order=SECOND), XL),
    "text first replaced": (with_text(transformers_towers, negated, FIRST), XL),
    "text second replaced": (with_text(own_towers, negated, SECOND), XL),
    "unet first": (with_unet(prefixed(UNET), True), ALL),
    "unet first, bare": (with_unet(dict, True), TWO),
    "unet first, diffusers": (with_unet(layouts.diffusers_unet, True), ALL),
    "unet replaced": (with_unet(prefixed(UNET), False), TWO),
    "unet replaced by diffusers": (with_unet(layouts.diffusers_unet, False), ALL),
    "unet replaced by diffusers prefixed": (with_unet(prefixed("unet.", layouts.diffusers_unet), False), TWO),
    "unet replaced by folder": (with_unet(layouts.diffusers_unet, False, "unet"), TWO),
}
COMMANDS = {
    "sd1": ("without text_model", "ema asked for", "vae to_q", "ckpt", "ckpt named safetensors", "folder", "folder old")
    + ("diffusers in one file", "vae folder", "vae diffusers", "text transformers", "unet replaced by diffusers"),
    "sdxl": ("text_projection.weight", "ema asked for", "folder", "text second first", "text replaced by open_clip"),
}


def small(name: str) -> Config:
    """A family with few channels, wherever it has transformers 64 of them, and of these at most two at a place."""
    family = families.small(FAMILIES[name], len(families.vocabulary(layouts.MERGES)))
    depth, middle = tuple(min(2, depth) for depth in family.unet.transformer_depth), min(2, family.unet.middle_depth)
    narrow = not (family.unet.head_channels and depth[0])  # heads of a width of their own need no 64 channels there
    channels, mult = (32, (1, 2, 2, 2)[: len(depth)]) if narrow else (64, (1, 1, 1, 1))
    unet = replace(family.unet, transformer_depth=depth, middle_depth=middle)
    unet = replace(unet, model_channels=channels, channel_mult=mult)
    return replace(family, unet=unet, vae=replace(family.vae, channel_mult=(1, 2, 2, 2)))


def know_at_this_size(patch: pytest.MonkeyPatch) -> None:
    """Make the small families those that scfg knows, by whose widths and layers it judges what a file holds."""
    known = {id(family): small(name) for name, family in FAMILIES.items()}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "scfg"]:
        for name, value in list(vars(module).items()):
            if id(value) in known:
                patch.setattr(module, name, known[id(value)])


def told_apart(tensors: Tensors) -> Tensors:
    """No two vectors alike, as the ones and zeros of new norms are."""
    torch.manual_seed(1)
    return {name: t + 0.1 * torch.randn_like(t) if t.ndim == 1 else t for name, t in tensors.items()}


def load(given: Given, family: Config) -> scfg.Diffusion:
    """With no option that the layout does not need; a folder says its prediction and brings its tokenizer."""
    first, *more = given.paths
    said = {} if (first / "model_index.json").exists() else {"prediction": family.schedule.prediction}
    model = scfg.load([first, *more] if more else first, **said, **given.options)
    assert (model.text.tokenizer is None) == bool(said)
    model.text.tokenizer = model.text.tokenizer or layouts.tokenizer()
    return aligned(model)


def aligned(model: scfg.Diffusion) -> scfg.Diffusion:
    """With parameters in memory of their own: where they lie in a file, in a model that is mapped, changes rounding."""
    for one in (model.unet, model.vae, model.text):
        for parameter in one.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def latent_of(model: scfg.Diffusion) -> Tensor:
    *_, step = model.sample(PROMPT, scfg.CFG(5.0), steps=2, size=(64, 64))
    return step.latent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[tuple[Path, dict[str, Clean]]]:
    """Where the original files are, and those so far."""
    folder = tmp_path_factory.mktemp("clean")
    gc.freeze()  # what is imported is not searched for garbage again and again: a fifth of the time
    yield folder, {}
    gc.unfreeze()
    shutil.rmtree(folder)


@pytest.fixture
def clean(request, made, monkeypatch) -> Clean:
    name, (folder, known) = request.param, made
    know_at_this_size(monkeypatch)
    if name not in known:
        family = small(name)
        tensors = told_apart(families.original(family))
        file = save(folder / f"{name}.safetensors", tensors)
        model = load(Given([file]), family)
        known[name] = Clean(family, tensors, file, model, latent_of(model), [])
    return known[name]


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Emptied at once: all of them together are many gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def assert_same(model: scfg.Diffusion, expected: scfg.Diffusion) -> None:
    """Of SD 2.x the last text layer may be missing, on which the states before it do not depend."""
    unread = ".encoder.layers.2." if expected.config.name.startswith("SD 2") else "none"
    assert replace(model.config, text=()) == replace(expected.config, text=())
    for name in ("unet", "vae", "text"):
        found, wanted = (getattr(one, name).state_dict() for one in (model, expected))
        assert found.keys() <= wanted.keys() <= found.keys() | {key for key in wanted if unread in key}
        assert not [key for key, tensor in found.items() if not torch.equal(tensor, wanted[key])]


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, which says more than that there is one."""
    return (a - b).abs().max().item()


def cases(rows: list[tuple[str, str]]) -> Any:
    return pytest.mark.parametrize("clean, layout", rows, indirect=["clean"], ids=map(": ".join, rows))


@cases([(family, layout) for family in FAMILIES for layout, (_, of) in LAYOUTS.items() if family in of])
def test_a_layout_is_read_as_the_original(clean, layout, folder, monkeypatch):
    for layer in (torch.nn.Linear, torch.nn.Conv2d):  # whose first numbers are replaced: half of the time
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    model = load(LAYOUTS[layout][0](clean, folder), clean.config)
    expected, latent = clean.model, clean.latent
    if layout == "folder fp16":
        expected = copy.deepcopy(expected)
        for one in (expected.unet, expected.vae, expected.text):
            one.half().float()
        latent = latent_of(expected)
        assert not torch.equal(latent, clean.latent)
    assert_same(model, expected)
    assert difference(latent_of(model), latent) == 0


def commanded(given: Given, folder: Path, family: Config) -> Tensor:
    """The latents of the command."""
    first, *towers = given.paths
    words = [PROMPT, "--checkpoint", first, "--out", folder / "out", "--steps", 2, "--size", "64x64", "--device", "cpu"]
    words += [word for tower in towers for word in ("--text", tower)]
    words += ["--ema"] * given.options.get("ema", False)
    words += ["--vae", given.options["vae"]] if "vae" in given.options else []
    if not (first / "model_index.json").exists():
        layouts.tokenizer().save_pretrained(folder / "tokenizer")
        words += ["--prediction", family.schedule.prediction, "--tokenizer", folder / "tokenizer"]
    return sample.run(sample.parse(list(map(str, words))))


@cases([(family, layout) for family, chosen in COMMANDS.items() for layout in chosen])
def test_the_command_reads_it_too(clean, layout, folder, monkeypatch):
    read = sample.cli.load
    monkeypatch.setattr(sample.cli, "load", lambda *given: aligned(read(*given)))
    for given in [Given([clean.file])] * (not clean.commanded) + [LAYOUTS[layout][0](clean, folder)]:
        clean.commanded.append(commanded(given, folder, clean.config))
    assert difference(clean.commanded[0], clean.commanded[-1]) == 0


@pytest.mark.parametrize("layout", ["original", "folder"])
@pytest.mark.parametrize("clean", ALL, indirect=True)
def test_a_saved_model_is_the_original_file(clean, layout, folder):
    model = clean.model if layout == "original" else load(LAYOUTS[layout][0](clean, folder), clean.config)
    scfg.save(model, folder / "saved.safetensors")
    found, unread = load_file(folder / "saved.safetensors"), r".*logit_scale"
    if clean.config.name.startswith("SD 2"):
        unread += r"|.*\.text_projection" + r"|.*\.resblocks\.2\..*" * (layout == "folder")
    wanted = {name: tensor for name, tensor in clean.tensors.items() if not re.fullmatch(unread, name)}
    assert found.keys() == wanted.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])]
    again = scfg.load(folder / "saved.safetensors")  # no option, and no warning of what it predicts
    assert again.config == model.config and difference(latent_of(aligned(again)), clean.latent) == 0
