"""scfg against diffusers at small width with the same random weights; every expected value is diffusers' own."""

from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint  # noqa: E402

import sample  # noqa: E402
import scfg  # noqa: E402
from small import CONTEXT, original, pipeline, save_original, scheduler  # noqa: E402

TEXT = "A Red cat's 12 hats, déjà-vu on a dog"


class Reference(NamedTuple):
    """diffusers' pipeline and the files holding the same weights and vocabulary."""

    pipe: diffusers.StableDiffusionPipeline
    checkpoint: Path
    tokenizer: Path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The reference pipeline and its files."""
    folder = tmp_path_factory.mktemp("parity")
    pipe = pipeline()
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    return Reference(pipe, save_original(pipe, folder / "small.safetensors"), folder / "tokenizer")


@pytest.fixture(scope="module")
def model(reference: Reference) -> scfg.Diffusion:
    """scfg's model of the same file, which predicts eps by default."""
    return scfg.load(reference.checkpoint, tokenizer=reference.tokenizer)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Run every test without gradients."""
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Unit noise of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Demand equality to a fraction of the largest expected value."""
    assert ours.shape == expected.shape
    error = float((ours.double() - expected.double()).abs().max() / expected.abs().max())
    assert error <= tolerance, f"error {error:.2e} of the largest value"


def test_file_has_the_original_layout(reference: Reference) -> None:
    """diffusers' own reader of original files gives back the weights that were written."""
    for convert, module in (convert_ldm_unet_checkpoint, reference.pipe.unet), (convert_ldm_vae_checkpoint, reference.pipe.vae):
        read, written = convert(original(reference.pipe), dict(module.config)), module.state_dict()
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], written[name]) for name in written)


@pytest.mark.parametrize("height, width", [(32, 32), (16, 40), (19, 27), (52, 76)])
def test_unet(reference: Reference, model: scfg.Diffusion, height: int, width: int) -> None:
    """Square, wide and odd latents, and half of 832x1216 pixels; at whole and fractional timesteps."""
    x, context, t = normal(2, 4, height, width), normal(2, 77, CONTEXT, seed=1), torch.tensor([740.25, 3.0])
    close(model.unet(x, t, context)[0], reference.pipe.unet(x, t, context).sample)


@pytest.mark.parametrize("height, width", [(64, 64), (64, 104)])
def test_vae(reference: Reference, model: scfg.Diffusion, height: int, width: int) -> None:
    """Encoding, decoding of an unscaled latent, and decoding of a sampled latent to an image in [0, 1]."""
    vae, image, latent = reference.pipe.vae, normal(2, 3, height, width).tanh(), normal(2, 4, height // 8, width // 8)
    mean, log_variance = model.vae.encode(image)
    expected = vae.encode(image).latent_dist
    close(mean, expected.mean)
    close(log_variance, expected.logvar)
    close(model.vae.decode(latent), vae.decode(latent).sample)
    sampled = vae.decode(latent / vae.config.scaling_factor).sample
    close(model.decode(latent), reference.pipe.image_processor.postprocess(sampled, output_type="pt"))


@pytest.mark.parametrize("negative", [None, "blue dog"])
def test_text(reference: Reference, model: scfg.Diffusion, negative: str | None) -> None:
    """The text tower's states of prompts and of the negative prompt."""
    texts = [TEXT, "dog"]
    negatives = None if negative is None else [negative] * 2
    cond, uncond = reference.pipe.encode_prompt(texts, "cpu", 1, True, negatives)
    ours = model.prompt(texts, negative=negative).context
    close(ours["cond"], cond)
    close(ours["uncond"].expand_as(uncond), uncond)


def reference_sigmas(sampler: str, spacing: str, steps: int) -> Tensor:
    """diffusers' sigmas at the start of every step."""
    reference = scheduler(sampler, spacing)
    reference.set_timesteps(steps)
    if sampler != "ddim":
        return reference.sigmas[:-1]
    alphas = reference.alphas_cumprod.double()[reference.timesteps]
    return ((1 - alphas) / alphas).sqrt()


def test_sigma_table() -> None:
    """The thousand sigmas of training, up to diffusers' single precision."""
    alphas = scheduler("ddim", "leading").alphas_cumprod.double().numpy()
    np.testing.assert_allclose(scfg.noise.sigma_table(), np.sqrt((1 - alphas) / alphas), rtol=1e-4)


@pytest.mark.parametrize("sampler, spacing, steps", [
    ("ddim", "leading", 8), ("ddim", "leading", 7), ("ddim", "linspace", 7), ("ddim", "trailing", 7), ("dpmpp_2m", "linspace", 7),
    ("dpmpp_2m", "trailing", 7), ("dpmpp_2m", "karras", 7)])
def test_spacing(model: scfg.Diffusion, sampler: str, spacing: str, steps: int) -> None:
    """The sigmas that steps start from; between table entries they tell timesteps one apart."""
    prompt = scfg.Prompt(context={"uncond": normal(1, 77, CONTEXT), "cond": normal(1, 77, CONTEXT, seed=1)})
    taken = list(model.sample(prompt, sampler=sampler, spacing=spacing, steps=steps, size=(64, 64)))
    assert [step.index for step in taken] == list(range(steps))
    ours, expected = torch.tensor([float(step.sigma) for step in taken]), reference_sigmas(sampler, spacing, steps)
    assert len(expected) == steps
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sampler, spacing, steps", [
    ("ddim", "leading", 8), ("ddim", "leading", 5), ("dpmpp_2m", "linspace", 7), ("dpmpp_2m", "linspace", 16),
    ("dpmpp_2m", "karras", 7)])
def test_sampler(reference: Reference, sampler: str, spacing: str, steps: int, prediction: str) -> None:
    """A guided trajectory of ready-made contexts from the same noise."""
    pipe, noise = reference.pipe, normal(2, 4, 16, 24)
    uncond, cond = normal(2, 77, CONTEXT, seed=1), normal(2, 77, CONTEXT, seed=2)
    pipe.scheduler = scheduler(sampler, spacing, prediction)
    expected = pipe(prompt_embeds=cond, negative_prompt_embeds=uncond, latents=noise, num_inference_steps=steps,
                    guidance_scale=7.5, height=128, width=192, output_type="latent").images
    model = scfg.load(reference.checkpoint, prediction=prediction)
    prompt = scfg.Prompt(context={"uncond": uncond, "cond": cond})
    *_, last = model.sample(prompt, guidance=scfg.CFG(7.5), sampler=sampler, spacing=spacing, steps=steps, size=(192, 128),
                            latent=noise)
    close(last.latent, expected)


@pytest.mark.parametrize("sampler, spacing, prediction, size, negative, count", [
    ("ddim", "leading", "eps", (128, 128), None, 2), ("ddim", "leading", "v", (192, 128), "blue dog", 1),
    ("dpmpp_2m", "linspace", "eps", (128, 192), "blue dog", 2), ("dpmpp_2m", "linspace", "v", (128, 128), None, 1)])
def test_command(reference: Reference, tmp_path: Path, sampler: str, spacing: str, prediction: str, size: tuple[int, int],
                 negative: str | None, count: int) -> None:
    """The command from text and seed to final latents, each image's noise drawn from its own seed."""
    width, height = size
    words = [TEXT, "--checkpoint", str(reference.checkpoint), "--tokenizer", str(reference.tokenizer), "--guidance", "cfg",
             "--scale", "7.5", "--sampler", sampler, "--steps", "8", "--size", f"{width}x{height}", "--seed", "3",
             "--count", str(count), "--prediction", prediction, "--out", str(tmp_path)]
    ours = sample.run(sample.parse(words + ([] if negative is None else ["--negative", negative])))
    pipe = reference.pipe
    pipe.scheduler = scheduler(sampler, spacing, prediction)
    noise = torch.cat([normal(1, 4, height // 8, width // 8, seed=3 + i) for i in range(count)])
    expected = pipe([TEXT] * count, negative_prompt=None if negative is None else [negative] * count, latents=noise,
                    num_inference_steps=8, guidance_scale=7.5, height=height, width=width, output_type="latent").images
    close(ours.cpu(), expected)
