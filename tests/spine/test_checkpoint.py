"""Original files: their family by names and shapes, loaded whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from conftest import DATA
from families import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import scfg
from scfg import checkpoint
from scfg.checkpoint import Source
from scfg.config import SDXL, Config
from scfg.data import config_to_json
from scfg.diffusion import embedded_checkpoint


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "tiny_sd1.safetensors")


def saved(folder: Path, tensors: dict[str, Tensor], config: Config, metadata: dict[str, str] = {}) -> Path:
    """A file that says what it is, as one of other than published sizes must for the spine alone to read it."""
    path = folder / "model.safetensors"
    save_file(tensors, path, {"scfg.config": config_to_json(config)} | metadata)
    return path


def published(name: str) -> dict[str, Tensor]:
    """The tensors of a published file, without their numbers."""
    keys = {}
    for part in (name, "vae", f"text_{name}"):
        keys |= json.loads((DATA / "keys" / f"{part}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_names_and_shapes_of_whole_files_are_the_originals(name):
    """Every tensor of a published file finds its place, no place stays empty, and its sizes are the family's."""
    tensors = published(name)
    assert checkpoint.family_of(tensors) == FAMILIES[name]
    _, unet, _, text, known = checkpoint.assemble(Path(name), Source(tensors), torch.float16)
    assert unet.out[2].weight.is_meta and len(text.towers) == len(FAMILIES[name].text)
    assert not known
    for key in [key for key in tensors if not checkpoint.UNUSED.fullmatch(key)][::97]:
        lacking = Source({k: v for k, v in tensors.items() if k != key}, config=FAMILIES[name])
        with pytest.raises(scfg.BadInput, match="missing"):
            checkpoint.assemble(Path(name), lacking, torch.float16)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_a_small_file_of_a_family_loads_whole(tmp_path, name):
    config = families.small(FAMILIES[name])
    tensors = families.original(config)
    model = scfg.load(saved(tmp_path, tensors, config))
    assert model.config == config
    for tower in config.text:  # some published files lack the prefix within
        tensors = {key.replace(f"{tower.prefix}text_model.", tower.prefix): tensor for key, tensor in tensors.items()}
    again = scfg.load(saved(tmp_path, tensors, config))
    assert all(torch.equal(a, b) for a, b in zip(model.text.parameters(), again.text.parameters(), strict=True))


def test_a_file_that_carries_its_tokenizer_needs_no_other(tmp_path):
    merges = [("c", "a"), ("ca", "t</w>")]
    vocabulary = families.vocabulary(merges)
    config = families.small(FAMILIES["sd1"], len(vocabulary))
    path = saved(tmp_path, families.original(config), config, families.tokenizer_metadata(merges))
    ids, words = scfg.load(path).text.tokenize("a cat")
    assert ids == [len(vocabulary) - 2, vocabulary["a</w>"], vocabulary["cat</w>"], len(vocabulary) - 1]
    assert [word.text for word in words] == ["a", "cat"]


def test_a_file_that_says_what_it_is_is_taken_at_its_word(tmp_path, tiny, tensors):
    """The config of the metadata, whose lists are tuples again, in place of what names and shapes say."""
    config = replace(tiny.config, name="mine", size=(128, 64), min_contrast=(1.5, 1.25), aesthetic_scores=(2.0, 6.0))
    assert scfg.load(saved(tmp_path, tensors, config)).config == config


def test_a_missing_tower_or_its_last_layers_are_named():
    tensors = published("sdxl")
    for i, tower in enumerate(SDXL.text):
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(tower.prefix)}
        with pytest.raises(scfg.BadInput, match=f"its text tower {tower.prefix}.* is missing"):
            checkpoint.assemble(Path("xl"), Source(rest), torch.float16)
        last = f"{('layers', 'resblocks')[i]}.{tower.layers - 1}."
        short = {key: tensor for key, tensor in tensors.items() if last not in key}
        with pytest.raises(scfg.BadInput, match=f"missing {tower.prefix}.*layers.{tower.layers - 1}."):
            checkpoint.assemble(Path("xl"), Source(short), torch.float16)


def test_buffers_of_published_files_are_not_read(tmp_path, tensors, tiny):
    extra = {
        "model_ema.decay": torch.ones(1),
        "betas": torch.ones(1000),
        "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
        "posterior_mean_coef2": torch.ones(1000),
        "model_ema.num_updates": torch.ones(1),
    }
    model = scfg.load(saved(tmp_path, tensors | extra, tiny.config))
    assert torch.equal(model.unet.out[2].weight, tiny.unet.out[2].weight)


def broken(tensors):
    """Tensors that make no model of one config, and what is said of them."""
    some = checkpoint.UNET + "output_blocks.3.0.in_layers.2.weight"
    inpainting = tensors | {checkpoint.UNET + "input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(checkpoint.FIRST_STAGE)}
    yield {name: tensor for name, tensor in tensors.items() if name != some}, f"missing {some}"
    yield tensors | {some: torch.ones(3, 3)}, rf"{some} is \[3, 3\], not \[64, 128, 3, 3\]"
    yield tensors | {checkpoint.UNET + "surprise": torch.ones(2)}, "unexpected model.diffusion_model.surprise"
    yield tensors | {"surprise": torch.ones(2)}, "unexpected surprise"
    yield tensors | {checkpoint.UNET + "out.2.bias": torch.ones(4, dtype=torch.int8)}, "out.2.bias holds torch.int8"
    yield rest, "missing first_stage_model.decoder.conv_in.bias"
    yield inpainting, r"input_blocks.0.0.weight is \[32, 9, 3, 3\], not \[32, 4, 3, 3\]"


def test_what_does_not_fit_is_one_line_that_names_it_as_the_file_does(tensors, tiny):
    for changed, message in broken(tensors):
        with pytest.raises(scfg.BadInput, match=message) as caught:
            checkpoint.assemble(Path("model.safetensors"), Source(changed, config=tiny.config), torch.float32)
        assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value), message


def test_tensors_of_no_family_are_one_line():
    with pytest.raises(scfg.BadInput, match="^x: unknown architecture"):
        checkpoint.assemble(Path("x"), Source({"x": torch.ones(2)}), torch.float32)


def with_field(data: dict, path: tuple, value: object) -> dict:
    """A copy of nested dicts and lists with another value at a place."""
    copied = json.loads(json.dumps(data))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copied


def places(data: object, path: tuple = ()) -> list[tuple]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in inner for place in [(*path, key), *places(value, (*path, key))]]


ABSURD = ["x", None, -1, 0, 1e9, 10**9, 2**28, [], {}, [[1]], True, float("nan"), float("inf"), "\0" * 99]


def test_absurd_metadata_is_one_line_or_makes_a_model_that_runs(capfd):
    """Every value of the embedded model's config in turn: nothing hangs, fills memory or fails as Python does."""
    with safe_open(embedded_checkpoint(), "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["scfg.config"])
    broken = ["", "{", "[]", "3", "[" * 100_000, '{"name": "x"}', json.dumps({**config, "surprise": 1})]
    broken += [json.dumps(with_field(config, place, value)) for place in places(config) for value in ABSURD]
    source, refused = checkpoint.read(embedded_checkpoint()), 0
    for text in broken:
        try:
            parts = checkpoint.assemble(Path("x"), source._replace(metadata={"scfg.config": text}), torch.float32)
        except scfg.BadInput as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1500, text
        else:
            assert len(parts[0].schedule.sigmas) > 1
    assert len(broken) > 800 and refused > len(broken) / 2


@pytest.mark.parametrize("name", ["vocab", "merges", "words"])
@pytest.mark.parametrize(
    "value", ["{", "3", "[3]", "[[1, 2]]", '["x", 1]', '{"a": 7}', '{"a": "x"}', "null", '[["a"]]']
)
def test_absurd_vocabularies_are_one_line_or_make_a_model(name, value):
    source = checkpoint.read(embedded_checkpoint())
    source = source._replace(metadata=source.metadata | {f"scfg.{name}": value})
    try:
        parts = checkpoint.assemble(Path("x"), source, torch.float32)
    except scfg.BadInput as error:
        assert "\n" not in str(error)
    else:
        assert (name, value) in [("vocab", "null"), ("merges", "null"), ("words", "null")] and parts[3]


def test_prediction_and_dtype_can_be_chosen():
    with pytest.warns(UserWarning, match="prediction v was asked for, but this checkpoint says eps"):
        model = scfg.load(DATA / "tiny_sd1.safetensors", prediction="v", dtype=torch.bfloat16)
    assert model.config.schedule.prediction == "v" and model.dtype == torch.bfloat16
    for network in (model.unet, model.vae):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    with pytest.raises(scfg.BadInput, match="not available"):
        scfg.load(device="cuda:99")
    with pytest.raises(scfg.BadInput, match="prediction is eps or v, not 'x0'"):
        scfg.load(prediction="x0")


def test_a_file_without_a_text_tower_refuses_prompts_only(tiny):
    with pytest.raises(scfg.BadInput, match="no text tower"):
        tiny.prompt("a cat")
    assert tiny.text is None and next(tiny.unet.parameters()).dtype == torch.float32


def test_weights_in_the_files_own_dtype_stay_in_the_file():
    """They lie in one mapping of it, none was copied; in another dtype none stays there."""
    for dtype, stay in ((torch.float16, True), (torch.float32, False)):
        model = scfg.load(DATA / "tiny_sd1.safetensors", dtype=dtype)
        maps = [line.split() for line in open("/proc/self/maps") if "tiny_sd1.safetensors" in line]
        spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
        parameters = [*model.unet.parameters(), *model.vae.parameters()]
        assert {parameter.dtype for parameter in parameters} == {dtype}
        inside = [any(low <= p.data_ptr() < high for low, high in spans) for p in parameters]
        assert all(inside) if stay else not any(inside)
        assert bool(spans) or not stay
