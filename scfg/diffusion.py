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
from torch.nn import functional as F

from .area import elapsed, too_small
from .checkpoint import load_parts
from .config import SD2_BASE, SD2_V, BadInput, Config
from .guidance import NOTHING, SCFG, Guidance, Note, ScaleRule, noted
from .noise import SIGMAS, Prediction, Spacing, gain, spaced_sigmas, time_of, to_x0
from .samplers import Denoise, ddim, dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral, heun, unipc
from .segment import OFFICIAL, Regions
from .text import Part, Prompt, Text, read_tokenizer
from .unet import Maps, UNet, all_of_it, timestep_embedding
from .vae import VAE

SAMPLERS: dict[str, Callable] = {run.__name__: run for run in (ddim, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc)}
WHOLE = 128 * 128                                     # latent pixels that are decoded at once
MULTISTEP = {"dpmpp_2m", "dpmpp_2m_sde", "unipc"}     # of linspace noise levels they leave the lowest out


class Denoised(NamedTuple):
    """Everything that one evaluation computed, for b pictures with latents of h x w."""
    x0: Tensor                                        # (b c h w) the clean latent expected
    out: dict[str, Tensor]                            # the network's outputs by row, each (b c h w)
    scale: Tensor                                     # (b 1 h w) the guidance scale at every pixel
    regions: Regions | None                           # of the conditional rows, where maps were captured
    maps: list[Maps]                                  # every captured block's, on request
    state: Any                                        # guidance's own, for the next step
    notes: tuple[Note, ...]


class Step(NamedTuple):
    index: int                                        # 0 .. count - 1
    count: int
    sigma: float                                      # the noise level it started from
    latent: Tensor                                    # (b c h w) after the step, variance preserving: x / sqrt(sigma^2 + 1)
    denoised: Denoised


def handover(start: float) -> int:
    """The timestep below which a refiner acts that leaves the share `start` of the training's to another."""
    return round(1000 * (1 - start))


def handed_over(early: Denoise, late: Denoise, start: float) -> Denoise:
    """The early one for a share `start` of the training's timesteps, counted from the noise, then the late one."""
    return lambda x, sigma, previous: (early if time_of(sigma) >= handover(start) else late)(x, sigma, previous)


class Told(NamedTuple):
    """What the attention of all rows is told, row by row for the whole batch."""
    context: Tensor                                   # (r*b k*t d) of k texts
    shares: Tensor | None                             # (r*b k h w) how much each counts at a pixel; None where it is one text
    counted: Tensor | None                            # (r*b k*t) the tokens that are not filling; None: all


def areas_of(told: Prompt, sigma: float, regions: Regions | None, size: tuple[int, int]) -> tuple[dict[int, Tensor], tuple[Note, ...]]:
    """The areas (b 1 h w) of the parts that have a say: not of one outside its time, nearly nowhere, or of a word not segmented yet."""
    like, areas, notes = told.context["cond"], {}, ()
    for i, part in enumerate(told.parts):
        if part.start <= elapsed(sigma) <= part.end and (regions or not part.area.needs_regions):
            area = part.area(regions, size).to(like.device, torch.float32)
            if len(area) not in (1, len(like)):
                raise BadInput(f"{part.area.said} is of {len(area)} pictures, not of {len(like)}")
            small = too_small(area)
            notes += noted(f"{part.area.said} is nowhere, or nearly", small.flatten(), NOTHING)
            if not small.all():
                areas[i] = torch.where(small, 0, area).expand(len(like), 1, *size)
    return areas, notes


def joined(told: Prompt, halves: Sequence[str], areas: dict[int, Tensor], size: tuple[int, int]) -> Told:
    """The texts of all rows side by side, as far as they have a say. The unconditional row has one text everywhere."""
    names, pictures, device = [f"part {i}" for i in areas], len(told.context["cond"]), told.context["cond"].device
    texts = {"cond": ["cond", *names], "uncond": ["uncond"] * (1 + len(names))}
    most = max(told.context[text].shape[1] for half in halves for text in texts[half])
    lengths = {text: told.lengths.get(text, (told.context[text].shape[1],) * pictures) for half in halves for text in texts[half]}

    def rows(of: Callable[[str], Tensor]) -> Tensor:
        return torch.cat([torch.cat([of(text) for text in texts[half]], 1) for half in halves])

    def counted(text: str) -> Tensor:
        return torch.arange(most, device=device) < torch.tensor(lengths[text], device=device)[:, None]

    context = rows(lambda text: F.pad(told.context[text], (0, 0, 0, most - told.context[text].shape[1])))
    filled = any(length < most for own in lengths.values() for length in own)
    shares = None
    if areas:
        everywhere = torch.ones(pictures, 1, *size, device=device)
        base = (everywhere - sum(area * (1 - told.parts[i].base) for i, area in areas.items())).clamp_min(0)
        of_half = {"cond": torch.cat([base, *areas.values()], 1), "uncond": torch.cat([everywhere, *[0 * base] * len(areas)], 1)}
        shares = torch.cat([of_half[half] for half in halves])
    return Told(context, shares, rows(counted) if filled else None)


class Refiner(NamedTuple):
    """A second model that takes a run over, with its own encoding of the text; the sampler goes on with what it remembers."""
    model: "Diffusion"
    prompt: Prompt
    start: float = 0.8                                # the share of the training's timesteps that is not its own


@dataclass(frozen=True)
class Diffusion:
    config: Config
    unet: UNet
    vae: VAE
    text: Text | None                                 # where it is not on the device, its towers visit it one by one

    @property
    def device(self) -> torch.device:
        return self.unet.out[2].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.out[2].weight.dtype

    @torch.no_grad()
    def prompt(self, text: str | Sequence[str], negative: str | Sequence[str] | None = None, clip_skip: int | None = None,
               parts: Sequence[Part] = ()) -> Prompt:
        """Encode one text a picture, with one negative for all or one each (default: the empty text; for SDXL zeros).

        clip_skip: the text towers' layer, counted from the last, in place of the family's own. parts: areas with a text of their own.
        """
        if self.text is None:
            raise BadInput(f"this {self.config.name} checkpoint has no text tower: use one that has, or Prompt(context=...) in Python")
        texts = [text] if isinstance(text, str) else list(text)
        if negative is None and not self.config.zero_negative:
            negative = ""
        negatives = [negative] * len(texts) if isinstance(negative, str) else negative
        if negatives is not None and len(negatives) != len(texts):
            raise BadInput(f"{len(texts)} prompts but {len(negatives)} negatives: give one negative, or one for each")
        return self.text.prompt(texts, negatives, self.device, clip_skip, parts)

    def placed(self, prompt: Prompt, count: int) -> Prompt:
        """The prompt for `count` pictures, which it must be of unless it is of one, where and as the network wants it."""
        def place(rows: dict[str, Tensor]) -> dict[str, Tensor]:
            for state in rows.values():
                if len(state) not in (1, count):
                    raise BadInput(f"{len(state)} prompts for {count} pictures: give one prompt, or one for each")
            return {row: state.to(self.device, self.dtype).expand(count, *state.shape[1:]) for row, state in rows.items()}
        words = prompt.words * count if len(prompt.words) == 1 else prompt.words
        lengths = {row: own * count if len(own) == 1 else own for row, own in prompt.lengths.items()}
        return replace(prompt, context=place(prompt.context), pooled=place(prompt.pooled), words=words, lengths=lengths)

    def vector(self, prompt: Prompt, rows: Sequence[str], height: int, width: int) -> Tensor | None:
        """What XL is told of the whole picture, (r*b v) for r rows; None for the others (Podell et al. 2023, 2307.01952, section 2.2).

        After the pooled text come sinusoids of the original height and width, the crop's top and left, and the target's height and
        width, in pixels; for the refiner an aesthetic score in place of the last two.
        """
        if not self.config.unet.vector_dim:
            return None
        if not prompt.pooled:
            raise BadInput(f"{self.config.name} is told the pooled text too: give Prompt(context=..., pooled=...)")
        told = []
        for row in rows:
            aim = (height, width) if self.config.aesthetic is None else (self.config.aesthetic[row != "uncond"],)
            sinusoids = timestep_embedding(torch.tensor((height, width, 0, 0, *aim), device=self.device), 256).flatten()
            told.append(torch.cat([prompt.pooled[row], sinusoids.to(self.dtype).expand(len(prompt.pooled[row]), -1)], dim=1))
        return torch.cat(told)

    def denoiser(self, prompt: Prompt, guidance: Guidance | ScaleRule, watched: Callable[[float], bool] = lambda sigma: False,
                 maps: bool = False) -> Denoise:
        """The method itself, as a function (x, sigma, previous Denoised or None) -> Denoised; differentiable.

        A prompt of one picture serves any number. At sigmas where `watched` holds, regions are found even if the guidance does
        without; `maps` also returns all maps.
        """
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(scale=guidance)
        factor, layers = self.config.vae.factor, guidance.perturb.layers if guidance.perturb else ()
        always = any(part.area.needs_regions for part in prompt.parts)

        def denoise(x: Tensor, sigma: float, previous: Denoised | None) -> Denoised:
            rows, told, known = guidance.rows(sigma), self.placed(prompt, len(x)), previous and previous.regions
            halves = ["uncond" if row == "uncond" else "cond" for row in rows]
            silent = (told.context[halves[0]] == 0).flatten(1).all(1) if "uncond" in rows else x.new_ones(len(x), dtype=torch.bool)
            recipe = guidance.segmentation(sigma) or (OFFICIAL if always or watched(sigma) else None)
            pixels = math.prod(math.ceil(side / self.config.map_divisor) for side in x.shape[-2:])
            areas, notes = areas_of(told, sigma, known, x.shape[-2:])
            context, shares, counted = joined(told, halves, areas, x.shape[-2:])
            out, kept = self.unet(
                (x / math.sqrt(sigma ** 2 + 1)).to(self.dtype), x.new_full((len(x),), time_of(sigma)), context,
                self.vector(told, halves, factor * x.shape[2], factor * x.shape[3]), shares=shares, counted=counted,
                map_pixels=pixels if recipe or maps else 0, keep=all_of_it if maps else recipe and recipe.complete,
                perturbed=rows.count("perturbed") * len(x), layers=layers)
            by_row = dict(zip(rows, out.float().chunk(len(rows))))
            completed = [recipe.complete(block) for block in kept] if recipe and maps else kept
            completed = completed if "uncond" in rows else [torch.cat([block, block]) for block in completed]
            regions = recipe.assign(completed, silent, told.chunk)._replace(words=told.words) if recipe else None
            expected = to_x0(x, sigma, by_row["cond"], self.config.prediction)
            guided = guidance.combine(by_row, regions, sigma, previous and previous.state, expected, gain(sigma, self.config.prediction))
            x0 = to_x0(x, sigma, guided.out, self.config.prediction)
            if recipe and recipe.foreground == "uncond" and "uncond" in rows:
                notes += noted("the unconditional context is all zeros", silent, "the foreground is the conditional half's")
            return Denoised(x0, by_row, guided.scale, regions, kept if maps else [], guided.state, guided.notes + notes)
        return denoise

    def spacing(self, sampler: str) -> Spacing:
        """The noise levels native to the family, or else usual for the sampler."""
        return self.config.spacing or ("leading" if sampler == "ddim" else "linspace")

    def sigmas(self, sampler: str, spacing: Spacing | None, steps: int, refiner: Refiner | None = None) -> list[float]:
        """The noise levels of a run, with a warning where they start far from noise or leave a refiner nothing to do."""
        levels = spaced_sigmas(spacing or self.spacing(sampler), steps, drop_lowest=sampler in MULTISTEP)
        if levels[0] < SIGMAS[-1] / 5:
            warnings.warn(f"{steps} such steps start at sigma {levels[0]:.2g}, far from pure noise: take more, or trailing", stacklevel=3)
        if refiner and time_of(levels[-2]) >= handover(refiner.start):
            warnings.warn(f"the refiner never takes over: none of the {steps} steps lies in its share of the timesteps", stacklevel=3)
        return levels

    def sample(self, prompt: Prompt | str | Sequence[str], guidance: Guidance | ScaleRule = SCFG(), sampler: str = "dpmpp_2m",
               spacing: Spacing | None = None, steps: int = 30, size: tuple[int, int] | None = None,
               seeds: int | Sequence[int] = 0, latent: Tensor | None = None, eta: float | None = None,
               refiner: Refiner | None = None, watch: range = range(0), maps: bool = False) -> Iterator[Step]:
        """Denoise from noise to picture, one Step at a time; the last step's latent is the result.

        prompt: encoded, or texts as they are; of one picture it serves any number of seeds. size: (width, height) in pixels.
        seeds: one for each picture, or that of the first (the others count on); picture i's noise depends on its seed alone.
        latent: starting noise (b c h w) of unit variance instead. eta: share of fresh noise, for samplers that have it (default:
        the sampler's own). watch: steps whose regions are wanted even if the guidance does without.
        """
        prompt = prompt if isinstance(prompt, Prompt) else self.prompt(prompt)
        self.check(sampler, steps, eta, refiner)
        if self.config.aesthetic and latent is None:
            warnings.warn(f"the {self.config.name} finishes what SDXL began and is poor at starting from noise: "
                          "give it as --refiner, beside an SDXL --checkpoint", stacklevel=2)
        sigmas = self.sigmas(sampler, spacing, steps, refiner)
        batch = len(prompt.context["cond"] if latent is None else latent)
        seeds = [seeds + i for i in range(batch)] if isinstance(seeds, int) else list(seeds)
        if not seeds or batch != len(seeds) and (batch > 1 or latent is not None):
            raise BadInput(f"{batch} {'prompts' if latent is None else 'latents'} for {len(seeds)} pictures: give one for each")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = self.latent_shape(size or self.config.size) if latent is None else latent.shape[1:]

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        x = (noise() if latent is None else latent.to(self.device, torch.float32)) * math.sqrt(sigmas[0] ** 2 + 1)
        watched = {sigmas[i] for i in watch if i < steps}.__contains__
        denoise = self.denoiser(self.placed(prompt, len(seeds)), guidance, watched, maps)
        if refiner:
            finish = refiner.model.denoiser(refiner.model.placed(refiner.prompt, len(seeds)), guidance, watched, maps)
            denoise = handed_over(denoise, finish, refiner.start)
        run = SAMPLERS[sampler](denoise, x, sigmas, noise, **({} if eta is None else {"eta": eta}))
        for i in range(steps):
            with torch.no_grad():                     # never across a yield: it would leak into the caller's loop
                x, denoised = next(run)
            if not x.isfinite().all():
                raise FloatingPointError(f"step {i + 1} of {steps} is not finite in {self.dtype}: try --dtype float32, lower prompt weights, another file")
            yield Step(i, steps, sigmas[i], x / math.sqrt(sigmas[i + 1] ** 2 + 1), denoised)

    def check(self, sampler: str, steps: int, eta: float | None, refiner: Refiner | None) -> None:
        """Refuse what cannot be, and say what is unusual."""
        if sampler not in SAMPLERS:
            raise BadInput(f"no sampler {sampler!r}: there is {', '.join(SAMPLERS)}")
        if not 1 <= steps <= 1000:
            raise BadInput(f"steps are 1 to 1000, as many as the training's, not {steps}")
        if eta is not None and "eta" not in inspect.signature(SAMPLERS[sampler]).parameters:
            raise BadInput(f"eta is the share of fresh noise; {sampler} adds none")
        if eta is not None and not 0 <= eta <= 1:
            raise BadInput(f"eta is a share from 0 to 1, not {eta}")
        other = refiner and refiner.model.config
        if refiner and (other.latent_scale, other.vae.latent_channels) != (self.config.latent_scale, self.config.vae.latent_channels):
            raise BadInput(f"{other.name} cannot refine what {self.config.name} began: their latents are not the same")
        if refiner and not other.aesthetic:
            warnings.warn(f"{other.name} is no refiner: it is used as one all the same", stacklevel=3)

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
        """Latent (b c h w) -> pictures (b 3 H W) in [0, 1]; one by one beyond WHOLE latent pixels, larger ones in bands: less memory."""
        dtype = self.vae.quant_conv.weight.dtype
        latent, pixels = (latent / self.config.latent_scale).to(dtype), latent.shape[2] * latent.shape[3]
        several = latent.split(max(1, WHOLE // pixels))
        image = torch.cat([self.vae.decode(some, 32 if pixels > WHOLE else None) for some in several]).float()
        if not image.isfinite().all():
            raise FloatingPointError(f"decoding gave numbers that are not finite in {dtype}: try --dtype float32 or bfloat16")
        return (image / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Pictures (b 3 H W) in [0, 1] -> the mean latent (b c h w)."""
        return self.vae.encode((image * 2 - 1).to(self.device, self.vae.quant_conv.weight.dtype))[0].float() * self.config.latent_scale


def embedded_checkpoint() -> Path:
    """Beside the code when installed, beside the package in a source tree."""
    inside, beside = (folder / "weights" / "flatland.safetensors" for folder in Path(__file__).parents[:2])
    return inside if inside.exists() else beside


@torch.no_grad()
def seems_to_predict(unet: UNet) -> Prediction:
    """What the network's output means, by its answer to pure noise.

    Where there is nothing but noise, eps is the input itself, and v is minus an expected picture, which knows nothing of the input.
    """
    x = torch.randn(1, unet.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0)).to(unet.out[2].weight)
    out, _ = unet(x, x.new_full((1,), 999), x.new_zeros(1, 77, unet.config.context_dim))
    return "eps" if F.cosine_similarity(x.float().flatten(), out.float().flatten(), dim=0) > 0.5 else "v"


def load(path: str | Path | None = None, *, device: str = "cpu", dtype: torch.dtype | None = None,
         prediction: Prediction | None = None, vae: str | Path | None = None, tokenizer: str | Path | None = None,
         offload: bool = False) -> Diffusion:
    """Load a checkpoint, by default the embedded one. Raises BadInput with one line that says what is wrong.

    dtype: float32 on the CPU and float16 elsewhere unless given. prediction: overrides what the family usually predicts.
    vae: another file's in place of the checkpoint's own. tokenizer: a transformers folder or bpe_simple_vocab_16e6.txt.gz.
    offload: keep the text towers off the device but while they encode.
    """
    try:
        torch.zeros(1, device=device).item()          # also refuses devices that hold no numbers
    except (RuntimeError, AssertionError, ImportError):
        raise BadInput(f"device {device!r} is not available here: try --device cpu") from None
    if prediction not in (None, "eps", "v"):
        raise BadInput(f"prediction is eps or v, not {prediction!r}")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    config, unet, first_stage, text = load_parts(
        Path(path or embedded_checkpoint()), dtype, read_tokenizer(tokenizer) if tokenizer else None, vae and Path(vae))
    unet, first_stage, text = unet.to(device), first_stage.to(device), text if offload or text is None else text.to(device)
    if config.vae.overflows and dtype == torch.float16:
        warnings.warn("SDXL's VAE overflows in float16: it runs in float32", stacklevel=2)
    if config.name == SD2_V.name:
        found = seems_to_predict(unet)
        if not prediction:
            warnings.warn(f"an SD 2.x file does not say what it predicts: taken as {found}, by its answer to pure noise; "
                          "--prediction says otherwise", stacklevel=2)
        elif found != prediction:
            warnings.warn(f"prediction {prediction} was asked for, but this network answers pure noise as one of {found}", stacklevel=2)
        prediction = prediction or found
        config = replace(config, name=SD2_BASE.name, size=SD2_BASE.size) if prediction == "eps" else config
    return Diffusion(replace(config, prediction=prediction or config.prediction), unet, first_stage, text)
