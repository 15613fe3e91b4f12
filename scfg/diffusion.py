"""A loaded model: prompt, denoise, sample, encode, decode."""
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import load_parts
from .config import SD2_V, BadInput, Config
from .guidance import SCFG, Guidance, ScaleRule
from .noise import Prediction, Spacing, spaced_sigmas, time_of, to_x0
from .samplers import Denoise, ddim, dpmpp_2m
from .segment import OFFICIAL, Regions
from .text import Prompt, Text, read_tokenizer
from .unet import Maps, UNet, all_of_it
from .vae import VAE

SAMPLERS: dict[str, Callable] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}
NATIVE_SPACING: dict[str, Spacing] = {"ddim": "leading", "dpmpp_2m": "linspace"}


class Denoised(NamedTuple):
    """Everything that one evaluation computed, for b pictures with latents of h x w."""
    x0: Tensor                                        # (b c h w) the clean latent expected
    out: dict[str, Tensor]                            # the network's outputs by row, each (b c h w)
    scale: Tensor                                     # (b 1 h w) the guidance scale at every pixel
    regions: Regions | None                           # of the conditional rows, where maps were captured
    maps: list[Maps]                                  # every captured block's, on request
    state: Any                                        # guidance's own, for the next step
    notes: tuple[str, ...]                            # what a reader of the result should know


class Step(NamedTuple):
    index: int                                        # 0 .. count - 1
    count: int
    sigma: float                                      # the noise level it started from
    latent: Tensor                                    # (b c h w) after the step, variance preserving: x / sqrt(sigma^2 + 1)
    denoised: Denoised


@dataclass(frozen=True)
class Diffusion:
    config: Config
    unet: UNet
    vae: VAE
    text: Text | None

    @property
    def device(self) -> torch.device:
        return self.unet.out[2].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.out[2].weight.dtype

    @torch.no_grad()
    def prompt(self, text: str | Sequence[str], negative: str | Sequence[str] | None = None) -> Prompt:
        """Encode one text a picture, with one negative for all or one each (default: the empty text)."""
        if self.text is None:
            raise BadInput(f"this {self.config.name} checkpoint has no text tower that can be read: give Prompt(context=...) instead")
        texts = [text] if isinstance(text, str) else list(text)
        negatives = [negative or ""] * len(texts) if negative is None or isinstance(negative, str) else list(negative)
        if len(negatives) != len(texts):
            raise BadInput(f"{len(texts)} prompts but {len(negatives)} negatives: give one negative, or one for each")
        return self.text.prompt(texts, negatives)

    def denoiser(self, prompt: Prompt, guidance: Guidance | ScaleRule, watched: Callable[[float], bool] = lambda sigma: False,
                 maps: bool = False) -> Denoise:
        """The method itself, as a function (x, sigma, previous Denoised or None) -> Denoised; differentiable.

        At sigmas where `watched` holds, regions are found even if the guidance does without; `maps` also returns all maps.
        """
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(scale=guidance)

        def denoise(x: Tensor, sigma: float, previous: Denoised | None) -> Denoised:
            rows = guidance.rows(sigma)
            recipe = guidance.segmentation(sigma) or (OFFICIAL if watched(sigma) and "uncond" in rows else None)
            pixels = math.prod(math.ceil(side / self.config.map_divisor) for side in x.shape[-2:])
            out, kept = self.unet(
                (x / math.sqrt(sigma ** 2 + 1)).to(self.dtype), x.new_full((len(x),), time_of(sigma)),
                torch.cat([prompt.context[row] for row in rows]),
                torch.cat([prompt.vector[row] for row in rows]) if prompt.vector else None,
                map_pixels=pixels if recipe or maps else 0, keep=all_of_it if maps else recipe and recipe.complete)
            by_row = dict(zip(rows, out.float().chunk(len(rows))))
            completed = [recipe.complete(block) for block in kept] if recipe and maps else kept
            regions = recipe.assign(completed) if recipe else None
            guided = guidance.combine(by_row, regions, sigma, previous and previous.state)
            x0 = to_x0(x, sigma, guided.out, self.config.prediction)
            return Denoised(x0, by_row, guided.scale, regions, kept if maps else [], guided.state, guided.notes)
        return denoise

    def sample(self, prompt: Prompt, guidance: Guidance | ScaleRule = SCFG(), sampler: str = "dpmpp_2m",
               spacing: Spacing | None = None, steps: int = 30, size: tuple[int, int] | None = None,
               seeds: int | Sequence[int] = 0, latent: Tensor | None = None, eta: float = 0.0,
               watch: range = range(0), maps: bool = False) -> Iterator[Step]:
        """Denoise from noise to picture, one Step at a time; the last step's latent is the result.

        size: (width, height) in pixels. seeds: one for each picture, or that of the first (the others count on); picture i's
        noise depends on its seed alone. latent: starting noise (b c h w) of unit variance instead. eta: ddim's share of fresh noise.
        watch: steps whose regions are wanted even if the guidance does without. A prompt of one picture serves any number of seeds.
        """
        if sampler not in SAMPLERS:
            raise BadInput(f"no sampler {sampler!r}: there is {', '.join(SAMPLERS)}")
        if eta and "eta" not in inspect.signature(SAMPLERS[sampler]).parameters:
            raise BadInput(f"eta is a parameter of ddim; {sampler} adds no noise")
        if not 0 <= eta <= 1:
            raise BadInput(f"eta is a share from 0 to 1, not {eta}")
        sigmas = spaced_sigmas(spacing or NATIVE_SPACING[sampler], steps, drop_lowest=sampler == "dpmpp_2m")
        batch = len(prompt.context["cond"])
        seeds = [seeds + i for i in range(batch if latent is None else len(latent))] if isinstance(seeds, int) else list(seeds)
        if not seeds or batch not in (1, len(seeds)) or latent is not None and len(latent) != len(seeds):
            raise BadInput(f"{batch} prompts for {len(seeds)} pictures: give one prompt, or one for each")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = self.latent_shape(size or self.config.size) if latent is None else latent.shape[1:]

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        x = (noise() if latent is None else latent.to(self.device, torch.float32)) * math.sqrt(sigmas[0] ** 2 + 1)
        prompt = replace(prompt, **{name: {row: t.to(self.device, self.dtype).expand(len(seeds), *t.shape[1:])
                                           for row, t in getattr(prompt, name).items()} for name in ("context", "vector")})
        watched = {sigmas[i] for i in watch if i < steps}
        denoise = self.denoiser(prompt, guidance, watched.__contains__, maps)
        run = SAMPLERS[sampler](denoise, x, sigmas, noise, **({"eta": eta} if eta else {}))
        for i in range(steps):
            with torch.no_grad():                     # never across a yield: it would leak into the caller's loop
                x, denoised = next(run)
            if not x.isfinite().all():
                raise FloatingPointError(f"step {i + 1} of {steps} gave numbers that are not finite in {self.dtype}: "
                                         "try --dtype float32, or another checkpoint if that is what it ran in")
            yield Step(i, steps, sigmas[i], x / math.sqrt(sigmas[i + 1] ** 2 + 1), denoised)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a picture of (width, height) pixels."""
        factor = self.config.vae.factor
        for side in size:
            if side < factor or side % factor:
                below = max(side // factor, 1) * factor
                raise BadInput(f"{side} pixels are no multiple of {factor}: the nearest sizes are {below} and {below + factor}")
        return self.config.vae.latent_channels, size[1] // factor, size[0] // factor

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latent (b c h w) -> pictures (b 3 H W) in [0, 1]."""
        image = self.vae.decode((latent / self.config.latent_scale).to(self.dtype)).float()
        if not image.isfinite().all():
            raise FloatingPointError(f"decoding gave numbers that are not finite in {self.dtype}: try --dtype float32 or bfloat16")
        return (image / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Pictures (b 3 H W) in [0, 1] -> the mean latent (b c h w)."""
        return self.vae.encode((image * 2 - 1).to(self.device, self.dtype))[0].float() * self.config.latent_scale


def embedded_checkpoint() -> Path:
    """Beside the code when installed, beside the package in a source tree."""
    package = Path(__file__).parent
    inside = package / "weights" / "flatland.safetensors"
    return inside if inside.exists() else package.parent / "weights" / "flatland.safetensors"


def load(path: str | Path | None = None, *, device: str = "cpu", dtype: torch.dtype | None = None,
         prediction: Prediction | None = None, tokenizer: str | Path | None = None) -> Diffusion:
    """Load a checkpoint, by default the embedded one. Raises BadInput with one line that says what is wrong.

    dtype: float32 on the CPU and float16 elsewhere unless given. prediction: overrides what the family usually predicts.
    tokenizer: a transformers folder or bpe_simple_vocab_16e6.txt.gz.
    """
    try:
        torch.zeros(1, device=device).item()          # also refuses devices that hold no numbers
    except (RuntimeError, AssertionError, ImportError):
        raise BadInput(f"device {device!r} is not available here: try --device cpu") from None
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    config, unet, vae, text = load_parts(Path(path or embedded_checkpoint()), dtype, read_tokenizer(tokenizer) if tokenizer else None)
    if config == replace(SD2_V, text=config.text, unet=config.unet, vae=config.vae) and not prediction:
        warnings.warn("an SD 2.x file does not say what it predicts: taken as v; base models need prediction eps", stacklevel=2)
    config = replace(config, prediction=prediction or config.prediction)
    if config.prediction not in ("eps", "v"):
        raise BadInput(f"prediction is eps or v, not {config.prediction!r}")
    return Diffusion(config, unet.to(device), vae.to(device), text and text.to(device))
