"""Files, networks and texts against diffusers at small width, with the same random weights."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.loaders.single_file_utils import (  # noqa: E402
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

import scfg  # noqa: E402
from compare import TEXT, close, model, no_gradients, normal  # noqa: E402, F401
from original import vae as autoencoder  # noqa: E402
from small import FAMILIES, reference  # noqa: E402

from scfg.prompting import encode, tokenize  # noqa: E402

pytestmark = pytest.mark.slow

KEYS = Path(__file__).parents[1] / "data" / "keys"
every_family = pytest.mark.parametrize("family", FAMILIES)


def towers(pipe: diffusers.DiffusionPipeline) -> list[nn.Module]:
    """The text towers that a pipeline has."""
    return [tower for tower in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if tower is not None]


def read_back(weights: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
    """What diffusers' converters find of a text tower in the original file."""
    if tower.config.hidden_act == "quick_gelu":
        return convert_ldm_clip_checkpoint(weights)
    prefixes = ("cond_stage_model.model.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model.")
    prefix = next(prefix for prefix in prefixes if prefix + "ln_final.weight" in weights)
    return convert_open_clip_checkpoint(tower, weights, prefix=prefix)


def ranks(shapes: dict[str, list[int]]) -> dict[str, int]:
    """The number of axes by name, without the numbers of text layers."""
    return {re.sub(r"(resblocks|encoder\.layers)\.\d+", r"\1", name): len(shape) for name, shape in shapes.items()}


@every_family
def test_file_has_the_original_names(family: str) -> None:
    """The names and axes are those of full-size files."""
    expected = {}
    for part in (family, "vae", f"text_{family}"):
        expected |= json.loads((KEYS / f"{part}.json").read_text())
    assert ranks({name: list(value.shape) for name, value in reference(family).weights.items()}) == ranks(expected)


@every_family
def test_file_has_the_original_layout(family: str) -> None:
    """diffusers' own reader of original files gives back the weights that were written."""
    pipe, weights, *_ = reference(family)
    for convert, module in (convert_ldm_unet_checkpoint, pipe.unet), (convert_ldm_vae_checkpoint, pipe.vae):
        read, written = convert(weights, dict(module.config)), module.state_dict()
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], written[name]) for name in written)


@every_family
def test_towers(family: str) -> None:
    """diffusers' reader and scfg's find the weights of every text tower."""
    pipe, weights, *_ = reference(family)
    assert len(model(family).text.towers) == len(towers(pipe))
    for tower, ours in zip(towers(pipe), model(family).text.towers):
        read = {name.removeprefix("text_model."): value for name, value in read_back(weights, tower).items()}
        for name, value in tower.state_dict().items():
            name = name.removeprefix("text_model.")
            assert torch.equal(read[name], value)
            assert torch.equal(
                ours.state_dict()[name if name == "text_projection.weight" else f"transformer.{name}"], value
            )


@every_family
@pytest.mark.parametrize("height, width", [(32, 32), (13, 19), (26, 38)])
def test_unet(family: str, height: int, width: int) -> None:
    """Square, and as 1216x832 pixels are, also with odd sides; at whole and fractional timesteps."""
    unet = reference(family).pipe.unet
    x, context, t = (
        normal(2, 4, height, width),
        normal(2, 77, unet.config.cross_attention_dim, seed=1),
        torch.tensor([740.25, 3.0]),
    )
    vector, added = None, None
    if "sdxl" in family:
        numbers = torch.tensor([[104.0, 152, 0, 8, 104, 152], [832, 1216, 0, 0, 1024, 1024]])
        numbers = (
            torch.cat([numbers[:, :4], torch.tensor([[6.0], [2.5]])], dim=1) if family == "sdxl_refiner" else numbers
        )
        pooled = normal(2, unet.config.projection_class_embeddings_input_dim - 256 * numbers.shape[1], seed=2)
        vector = torch.cat([pooled, unet.add_time_proj(numbers.flatten()).reshape(2, -1)], dim=1)
        added = {"text_embeds": pooled, "time_ids": numbers}
    close(
        model(family).unet(x, t, scfg.Conditioning(context, vector))[0],
        unet(x, t, context, added_cond_kwargs=added).sample,
    )


@every_family
@pytest.mark.parametrize("height, width", [(64, 64), (64, 104)])
def test_vae(family: str, height: int, width: int) -> None:
    """Encoding, decoding of an unscaled latent, and decoding of a sampled latent to an image in [0, 1]."""
    pipe, ours = reference(family).pipe, model(family)
    image, latent = normal(2, 3, height, width).tanh(), normal(2, 4, height // 8, width // 8)
    mean, log_variance = ours.vae.encode(image)
    expected = pipe.vae.encode(image).latent_dist
    close(mean, expected.mean)
    close(log_variance, expected.logvar)
    close(ours.vae.decode(latent), pipe.vae.decode(latent).sample)
    sampled = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
    close(ours.decode(latent), pipe.image_processor.postprocess(sampled, output_type="pt"))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_another_vae(tmp_path: Path, prefix: str) -> None:
    """A file of nothing but an autoencoder replaces the checkpoint's; the latent's scale stays the family's."""
    pipe, latent = reference("sd2").pipe, normal(1, 4, 8, 13)
    save_file(
        {prefix + name: value.contiguous() for name, value in autoencoder(pipe.vae).items()},
        tmp_path / "vae.safetensors",
    )
    with pytest.warns(UserWarning, match="family"):
        ours = scfg.load(reference("sdxl").checkpoint, vae=tmp_path / "vae.safetensors")
    sampled = pipe.vae.decode(latent / reference("sdxl").pipe.vae.config.scaling_factor).sample
    close(ours.decode(latent), pipe.image_processor.postprocess(sampled, output_type="pt"))


def encoded(
    family: str, texts: list[str], negatives: list[str] | None, clip_skip: int | None = None
) -> dict[str, dict[str, Tensor]]:
    """diffusers' contexts and pooled states by row."""
    pipe = reference(family).pipe
    if "sdxl" in family:
        cond, uncond, pooled, pooled_uncond = pipe.encode_prompt(
            texts, device="cpu", negative_prompt=negatives, clip_skip=clip_skip
        )
        return {"context": {"uncond": uncond, "cond": cond}, "pooled": {"uncond": pooled_uncond, "cond": pooled}}
    tower = pipe.text_encoder  # diffusers looks for the norm where older transformers had it
    tower.text_model = SimpleNamespace(final_layer_norm=tower.final_layer_norm)
    cond, uncond = pipe.encode_prompt(texts, "cpu", 1, True, negatives, clip_skip=clip_skip)
    return {"context": {"uncond": uncond, "cond": cond}, "pooled": {}}


@every_family
@pytest.mark.parametrize("negative", [None, "", "blue dog"])
def test_text(family: str, negative: str | None) -> None:
    """Contexts and pooled states of prompts and of the negative prompt."""
    texts = [TEXT, "dog", ""]
    expected = encoded(family, texts, None if negative is None else [negative] * len(texts))
    prompt = model(family).prompt(texts, negative=negative)
    for name, rows in expected.items():
        ours = getattr(prompt, name)
        assert ours.keys() == rows.keys()
        for row, value in rows.items():
            close(ours[row].expand_as(value), value)


@every_family
def test_long_text(family: str) -> None:
    """Every chunk is encoded as a prompt of its own; the pooled state is the first one's."""
    long = "red dog on a cat " * 30
    words = tokenize(model(family).text, long).words
    assert [word.start for word in words if word.start % 77 == 1] == [1, 78]
    chunks = [" ".join(word.text for word in words if word.start // 77 == i) for i in range(2)]
    expected, prompt = encoded(family, chunks, ["blue dog", ""]), encode(model(family), long, negative="blue dog")
    close(prompt.context["cond"], rearrange(expected["context"]["cond"], "chunks t d -> 1 (chunks t) d"))
    close(prompt.context["uncond"], expected["context"]["uncond"][:1])  # one chunk is enough for it
    for row, value in expected["pooled"].items():
        close(prompt.pooled[row], value[:1])


@pytest.mark.parametrize(
    "family, ours, theirs",
    [
        ("sd1", 1, 0),
        ("sd1", 2, 1),
        ("sd1", 3, 2),
        ("sd2", 2, 0),
        ("sd2", 3, 1),
        ("sdxl", 2, 0),
        ("sdxl", 3, 1),
        ("sdxl_refiner", 4, 2),
    ],
)
def test_clip_skip(family: str, ours: int, theirs: int) -> None:
    """Layers counted from the last, for the negative too; diffusers counts on from the family's own."""
    prompt = model(family).prompt([TEXT, "dog"], negative="blue dog", layer_from_end=ours)
    for row, texts in ("cond", [TEXT, "dog"]), ("uncond", ["blue dog"] * 2):
        expected = encoded(family, texts, None, clip_skip=theirs)
        close(prompt.context[row].expand_as(expected["context"]["cond"]), expected["context"]["cond"])
        if prompt.pooled:
            close(prompt.pooled[row].expand_as(expected["pooled"]["cond"]), expected["pooled"]["cond"])
