"""A loaded model: prompt, denoise, sample, encode, decode; and the loop over a sampler's steps."""

import copy
import math
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import load_parts
from .config import Config
from .denoise import Denoised, Denoiser, step
from .errors import BadInput, listed, shown, whole_number
from .guidance import Guidance, Rule, named_rule
from .samplers import MULTISTEP, SAMPLERS, Denoise, Noise, Sampler, Steps
from .schedule import Prediction, Spacing
from .segment import OFFICIAL, Recipe
from .text import Prompt, PromptLike, Text, Texts, prompt_of
from .unet import Capture, UNet, exact
from .vae import VAE


class Step(NamedTuple):
    """A run after one of its steps."""

    index: int  # type: ignore[assignment]  # 0 .. count - 1; a tuple has methods of these names
    count: int  # type: ignore[assignment]
    sigma: float  # the noise level it started from
    next_sigma: float
    x: Tensor  # (b c h w) after the step: x0 + next_sigma * noise; what is sent back takes its place
    latent: Tensor  # (b c h w) x / sqrt(next_sigma^2 + 1): what decode takes
    denoised: Denoised  # what was computed at its start


def run(
    denoise: Denoise, sampler: str | Sampler, x: Tensor, sigmas: Sequence[float], noise: Noise
) -> Generator[Step, Tensor | None, None]:
    """The loop: one Step at a time from x = x0 + sigmas[0] * noise down to sigmas[-1].

    `steps.send(x)` replaces step.x. Raises FloatingPointError where the latent after a step is not finite; this is
    checked one step late, so that no step waits for the device.
    """
    from .checks import falling

    sigmas = falling(sigmas)
    chosen = SAMPLERS.get(sampler) if isinstance(sampler, str) else sampler
    if not callable(chosen) or isinstance(chosen, type):
        raise BadInput(f"no sampler {shown(sampler)}: give {', '.join(SAMPLERS)} or a function such as scfg.lcm")
    return loop(chosen(denoise, x, sigmas, noise), sigmas)


def loop(steps: Steps, sigmas: Sequence[float]) -> Generator[Step, Tensor | None, None]:
    from .checks import check_sent

    count, sent, finite = len(sigmas) - 1, None, []
    if not hasattr(steps, "send"):
        raise BadInput(f"a sampler is a generator of steps, such as scfg.samplers.ddim; it gave {shown(steps)}")
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        with torch.no_grad():  # never across a yield: it would leak into the caller's loop
            x, denoised = steps.send(sent)
            finite.append(x.isfinite().all())
        for k in [i - 1] * (i > 0) + [i] * (i == count - 1):  # the step before, and the last one itself
            if not finite[k]:
                what = f"the latent is not finite after step {k + 1} of {count}"
                raise FloatingPointError(f"{what}: try float32, lower prompt weights or another file")
        sent = yield Step(i, count, sigma, target, x, x / math.sqrt(target**2 + 1), denoised)
        check_sent(sent, x)


@dataclass(frozen=True)
class Diffusion:
    """A loaded model: its networks and what its family is like."""

    config: Config
    unet: UNet
    vae: VAE
    text: Text | None  # may stay on the CPU: its towers are then copied to the device one by one to encode
    step: Callable[..., Denoised] = step  # what its denoisers compute with; scfg.gpu.compiled replaces it

    @property
    def device(self) -> torch.device:
        return self.unet.get_parameter("out.2.weight").device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.get_parameter("out.2.weight").dtype

    @torch.no_grad()
    def prompt(self, text: Texts, negative: Texts | None = None, layer_from_end: int | None = None) -> Prompt:
        """Encode one text a picture, as it is, with one negative for all or one each.

        negative: by default the empty text, for SDXL zeros. layer_from_end: of the text towers, in place of the
        family's. Weights, BREAK and longer texts are read by scfg.prompting.encode.
        """
        from .checks import paired_texts

        texts, negatives = paired_texts(text, negative, self.config)
        towers = self.towers()
        cond = towers.encode_texts(texts, self.device, layer_from_end)
        uncond = None if negatives is None else towers.encode_texts(negatives, self.device, layer_from_end)
        return prompt_of(cond, uncond, towers.length)

    def encoded(self, prompt: PromptLike | Texts) -> PromptLike:
        """A prompt that is encoded, or texts as they are, encoded."""
        if isinstance(prompt, str | list | tuple):
            return self.prompt(prompt)
        if not hasattr(prompt, "conditioner"):
            raise BadInput(f"a prompt is a text, a list of texts or what encoding them returns, not {shown(prompt)}")
        return prompt  # type: ignore[return-value]  # no other sequence has this method

    def towers(self) -> Text:
        """The text towers; raises BadInput where the checkpoint has none."""
        if self.text is None:
            what = f"this {self.config.name} checkpoint has no text tower"
            raise BadInput(f"{what}: use one that has, or Prompt(context=...)")
        return self.text

    def denoiser(
        self,
        prompt: PromptLike | Texts,
        guidance: Guidance | Rule | None = None,
        segment: Recipe | None = None,
        capture: Capture | None = None,
        once: bool = False,
    ) -> Denoiser:
        """The method itself, (x, sigma, previous Denoised or None) -> Denoised; differentiable.

        prompt: encoded, or texts as they are; that of one picture serves any batch. guidance: by default S-CFG at the
        family's scale. segment: read regions by this recipe at every step, in place of the rule's own. capture: maps
        to return in Denoised.maps. once: project the prompt's tokens once, for a run during which the weights stay.
        """
        from .checks import check_layers, check_readers
        from .data import check_guidance

        check_readers(segment, capture)
        prompt = self.encoded(prompt)
        usual = "cfg" if self.config.unet.guidance_dim else "scfg"
        guidance = named_rule(usual, self.config.scale, self.config) if guidance is None else guidance
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(scale=guidance)
        check_guidance(guidance)
        if hasattr(guidance.scale, "on"):  # what does not change of it is placed once
            guidance = replace(guidance, scale=guidance.scale.on(self.device))
        check_layers(guidance.perturb.layers if guidance.perturb else (), self.unet.transformer_names())
        segment = segment or ((guidance.recipe or OFFICIAL) if prompt.needs_regions else None)
        conditioner = prompt.conditioner(self.config, self.device, self.dtype)
        if once and hasattr(conditioner, "prepared"):
            conditioner = conditioner.prepared(self.unet.prepare)
        parts = self.unet, self.config.schedule, conditioner, guidance, self.dtype, segment
        denoiser = Denoiser(*parts, self.config.map_divisor, capture, self.device, self.step)
        if self.config.unet.guidance_dim:
            from .methods import distilled

            return distilled(denoiser, self.unet)
        return denoiser

    def compiled(self, backend: str = "inductor") -> "Diffusion":
        """This model with denoise steps compiled by torch.compile, see scfg.gpu.compiled."""
        from .gpu import compiled

        return compiled(self, backend)

    def spacing(self, sampler: str | Sampler) -> Spacing:
        """The noise levels native to the family, or else usual for the sampler."""
        return self.config.spacing or ("leading" if sampler == "ddim" else "linspace")

    def sigmas(self, steps: int, sampler: str | Sampler = "dpmpp_2m", spacing: Spacing | None = None) -> list[float]:
        """The steps + 1 noise levels of a run, as is usual for the sampler; spacing: in place of the native one."""
        sampler = sampler if isinstance(sampler, str) else getattr(getattr(sampler, "func", sampler), "__name__", "")
        multistep, ddim, schedule = sampler in MULTISTEP, sampler == "ddim", self.config.schedule
        to_zero = schedule.ddim_to_zero if ddim else True
        levels = schedule.spaced(spacing or self.spacing(sampler), steps, multistep or ddim, multistep, to_zero)
        if ddim and schedule.terminal_alpha and math.isclose(levels[0], schedule.sigmas[-1]):
            levels[0] = 1e10  # noise alone, which DDIM's step can start from
        if levels[0] < schedule.sigmas[-1] / 5:
            what = f"{steps} such steps start at sigma {levels[0]:.2g}, far from pure noise"
            warnings.warn(f"{what}: take more, or trailing", stacklevel=2)
        return levels

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Noise:
        """Unit normal noise for latents of pictures of (width, height) pixels; each depends on its seed alone."""
        numbers = [whole_number("a seed", seed, 0, 2**64 - 1) for seed in listed("seeds", seeds)]
        shape, generators = self.latent_shape(size), [torch.Generator("cpu").manual_seed(seed) for seed in numbers]

        def noise() -> Tensor:
            drawn = torch.stack(
                [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
            )
            cuda = self.device.type == "cuda"  # which reads pinned memory by itself
            return (drawn.pin_memory() if cuda else drawn).to(self.device, non_blocking=cuda)

        return noise

    def sample(
        self,
        prompt: PromptLike | Texts,
        guidance: Guidance | Rule | None = None,
        *,
        sampler: str | Sampler = "dpmpp_2m",
        steps: int = 30,
        size: tuple[int, int] | None = None,
        seeds: int | Sequence[int] = 0,
        sigmas: Sequence[float] | None = None,
        latent: Tensor | None = None,
    ) -> Generator[Step, Tensor | None, None]:
        """Denoise from noise to picture, one Step at a time; the last step's latent is the result.

        prompt, guidance: see `denoiser`. sampler: a name or a function. size: (width, height) in pixels, by default
        the family's. seeds: one for each picture, or that of the first (the others count on). sigmas: noise levels in
        place of the native ones. latent: starting noise (b c h w) of unit variance in place of the seeds' first.
        """
        from .checks import check_memory, falling, seeds_of, start_of

        prompt = self.encoded(prompt)
        latent, size = start_of(latent, size, self.config)
        seeds = seeds_of(seeds, prompt.pictures if latent is None else len(latent), latent is not None)
        noise, denoiser = self.noise(seeds, size), self.denoiser(prompt, guidance, once=True)
        check_memory(denoiser, len(seeds), size, self.config.vae.factor)
        sigmas = falling(self.sigmas(steps, sampler, None) if sigmas is None else sigmas)
        first = noise()  # also if latent is given: that may be this very draw, which must not come again
        start = first if latent is None else latent.to(self.device, torch.float32)
        x = start * math.sqrt(sigmas[0] ** 2 + 1)
        return run(denoiser, sampler, x, sigmas, noise)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a picture of (width, height) pixels."""
        from .checks import sides_of

        width, height = sides_of(size, self.config.vae.factor)
        return self.config.vae.latent_channels, height // self.config.vae.factor, width // self.config.vae.factor

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latent (b c h w) -> pictures (b 3 H W) in [0, 1].

        As many at once as memory has room for; larger ones in bands, which take less.
        """
        from .checks import pictures_or_latents

        latent = pictures_or_latents("latent", latent, self.config.vae.latent_channels)
        if not latent.isfinite().all():
            raise FloatingPointError("the latent is not finite, so that there is no picture")
        image = self.decoded(self.vae, latent)
        if self.vae.quant_conv.weight.dtype == torch.float16 and not image.isfinite().all():
            warnings.warn("the VAE overflows in float16: it decodes in float32", stacklevel=3)
            image = self.decoded(copy.deepcopy(self.vae).float(), latent)
        if not image.isfinite().all():
            raise FloatingPointError("decoding is not finite: try another file's VAE")
        return (image / 2 + 0.5).clamp(0, 1)

    def decoded(self, vae: VAE, latent: Tensor) -> Tensor:
        """A VAE's own pictures, (b 3 H W) about [-1, 1] in float32."""
        from .memory import decode

        with exact(self.device):
            latent = (latent / self.config.latent_scale).to(self.device, vae.quant_conv.weight.dtype)
            return decode(vae, latent).float()

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Pictures (b 3 H W) in [0, 1], sides multiples of the VAE's factor -> the mean latent (b c h w)."""
        from .checks import pictures_of

        image = pictures_of(image)
        self.latent_shape((image.shape[3], image.shape[2]))
        image = (image * 2 - 1).to(self.device, self.vae.quant_conv.weight.dtype)
        with exact(self.device):
            return self.vae.encode(image)[0].float() * self.config.latent_scale


def embedded_checkpoint() -> Path:
    """In the package when installed, beside it in a source tree."""
    inside, beside = (folder / "weights" / "flatland.safetensors" for folder in Path(__file__).parents[:2])
    return inside if inside.exists() else beside


def load(
    path: str | Path | Sequence[str | Path] | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    prediction: Prediction | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = False,
    offload: bool = False,
) -> Diffusion:
    """Load a checkpoint, by default the embedded one. Raises BadInput with one line that says what is wrong.

    path: a file or a diffusers folder; of several, the later ones replace or complete parts of the first. dtype:
    unless given, float32 on CPUs and Apple's GPUs (mps), float16 elsewhere. prediction: overrides what the file says
    and what the network seems to predict. vae: another file's in place of the checkpoint's own. tokenizer: a
    transformers folder or bpe_simple_vocab_16e6.txt.gz. ema: the averaged weights of the U-Net. offload: keep the text
    towers off the device except while encoding.
    """
    from .checks import check_load, paths_of, predicted

    check_load(device, dtype, prediction)
    dtype = dtype or (torch.float32 if torch.device(device).type in ("cpu", "mps") else torch.float16)
    files = paths_of([embedded_checkpoint()] if path is None else [path] if isinstance(path, str | Path) else path)
    (own_vae,), (own_tokenizer,) = (paths_of([one]) if one is not None else [None] for one in (vae, tokenizer))
    config, unet, first_stage, text, known = load_parts(files, own_vae, own_tokenizer, ema, dtype)
    text = text if offload or text is None else text.to(device)
    model = Diffusion(config, unet.to(device), first_stage.to(device), text)
    if config.vae.overflows and dtype == torch.float16:
        warnings.warn("SDXL's VAE overflows in float16: it runs in float32", stacklevel=2)
    return predicted(model, prediction, known)
