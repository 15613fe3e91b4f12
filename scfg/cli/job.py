"""From arguments to what a run needs."""

import argparse
import inspect
import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .. import cpu
from ..denoise import Denoiser
from ..diffusion import Diffusion, embedded_checkpoint
from ..diffusion import load as load_model
from ..edit import check_refiner, hand_over, handover_time
from ..errors import BadInput
from ..formats import check_prediction, with_zero_terminal_snr
from ..gpu import Compiled
from ..guidance import CFG, RULES, SCFG, Guidance, Perturb, Rule, named_rule
from ..large import check_maps
from ..methods import PAG, SEG, Interval, Ramp, Rescale, euler_cfg_pp, lcm
from ..prompting import ComposedPrompt, encode
from ..regional import ByRegion, Part, RegionalPrompt
from ..regional.area import find_phrase
from ..report.record import finding, middle_third, watch
from ..samplers import SAMPLERS, Denoise, Sampler, Steps
from ..text import Prompt
from .arguments import DIRECTIONS, SAMPLER_NAMES
from .files import scale_of

CFG_PP_SCALE = 0.6  # what CFG++ (2406.08070) takes for SD 1.5


RunPrompt = Prompt | ComposedPrompt | RegionalPrompt


class Job(NamedTuple):
    """What is the same for all batches of a run."""

    prompt: RunPrompt
    denoise: Denoise
    sampler: Sampler
    sigmas: list[float]


def load(path: Path | None, args: argparse.Namespace, main: bool = True) -> Diffusion:
    """The model of a file; what completes or overrides it is for the main one only."""
    if args.verbose:
        logging.basicConfig(format="%(message)s", level=logging.INFO)
    own = {"prediction": args.prediction, "vae": args.vae, "ema": args.ema} if main else {}
    path = path or embedded_checkpoint()
    files = [path, *args.text] if main else [path]
    dtype = args.dtype and getattr(torch, args.dtype)
    model = load_model(files, device=args.device, dtype=dtype, tokenizer=args.tokenizer, offload=args.offload, **own)
    if main and args.prediction:
        check_prediction(model, args.prediction)
    if main and args.zero_terminal_snr:
        model = with_zero_terminal_snr(model)
    if args.compile:
        return model.compiled()
    cpu.pack(model)
    return model


def spent(model: Diffusion, load: float, sampling: float, writing: float) -> str:
    """Where the time went, in seconds."""
    compiling = f" (compiling {model.step.seconds:.1f} s)" if isinstance(model.step, Compiled) else ""
    return f"load {load:.1f} s, sampling {sampling:.1f} s{compiling}, decoding and writing {writing:.1f} s"


def prompt_of(model: Diffusion, args: argparse.Namespace, sigmas: Sequence[float]) -> RunPrompt:
    """The prompt, its negative and the regions' own prompts, encoded; an area's word that is not there is an error."""

    def encoded(text: str, negative: str | None) -> Prompt | ComposedPrompt:
        return encode(model, text, negative, args.clip_skip, sigmas, args.emphasis, args.literal)

    prompt = encoded(args.prompt, args.negative)
    regions = getattr(args.guidance.scale, "regions", ()) if isinstance(args.guidance, Guidance) else ()
    for area in [one.area for one in (*args.region, *regions)]:
        for phrase in area.phrases:
            find_phrase(prompt.words[0], phrase)
    asked = [option for option in args.region if option.prompt]
    parts = [Part(one.area, encoded(one.prompt, None), one.base, one.start, one.end) for one in asked]
    return RegionalPrompt(prompt, tuple(parts)) if parts else prompt


def guidance_of(args: argparse.Namespace, model: Diffusion) -> Guidance:
    """A guidance that is given as a whole, or by a rule's name at the native scale, with what the options change."""
    if isinstance(args.guidance, Guidance):
        own = (
            args.guidance
            if args.scale is None
            else replace(args.guidance, scale=scaled(args.guidance.scale, args.scale))
        )
    else:
        native = CFG_PP_SCALE if args.sampler == "euler_cfg_pp" else model.config.scale
        own = Guidance(scale=named_rule(args.guidance, native if args.scale is None else args.scale, model.config))
    scale, regions = own.scale, tuple(option.region for option in args.region if option.region)
    if regions and isinstance(scale, ByRegion):
        regions, scale = (*scale.regions, *regions), scale.base
    return Guidance(
        perturb=perturb_of(args, own),
        direction=DIRECTIONS.get(args.direction, own.direction),
        scale=ByRegion(scale, regions) if regions else scale,
        rescale=own.rescale if args.rescale is None else Rescale(args.rescale) if args.rescale else None,
        when=Interval(*args.interval) if args.interval else Ramp(shape=args.ramp) if args.ramp else own.when,
    )


def perturb_of(args: argparse.Namespace, own: Guidance) -> Perturb | None:
    """An option fills the slot, or with 0 empties it."""
    if args.pag is None and args.seg is None:
        return own.perturb
    return PAG(args.pag) if args.pag else SEG(args.seg) if args.seg else None


def scaled(rule: Rule, scale: float) -> Rule:
    """A rule with another scale; raises BadInput for one that is built around none."""
    for field in ("base", "first"):
        if hasattr(rule, field):
            return replace(rule, **{field: scaled(getattr(rule, field), scale)})  # type: ignore[type-var]
    if not hasattr(rule, "gamma"):
        raise BadInput(f"--scale does not act on {rule}: change it there, or give --guidance a name")
    return replace(rule, gamma=scale)  # type: ignore[type-var]


def sampler_of(args: argparse.Namespace) -> Sampler:
    sampler: Callable[..., Steps] = {**SAMPLERS, "euler_cfg_pp": euler_cfg_pp, "lcm": lcm}[args.sampler]
    if args.eta is None:
        return sampler
    if "eta" not in inspect.signature(sampler).parameters:
        raise BadInput(f"eta is the share of fresh noise; {args.sampler} adds none")
    return partial(sampler, eta=args.eta)


def plan(model: Diffusion, args: argparse.Namespace) -> Job:
    """The prompt, the denoise step, with a refiner where one is given, and its noise levels.

    Fills in the arguments that are the family's own.
    """
    args.guidance = guidance = guidance_of(args, model)
    args.size = args.size or model.config.size
    args.spacing = args.spacing or model.spacing(args.sampler)
    model.latent_shape(args.size)  # a size that cannot be, said before any work
    sampler, sigmas = sampler_of(args), model.sigmas(args.steps, args.sampler, args.spacing)
    shown = {sigmas[i] for i in middle_third(args.steps)}
    prompt = prompt_of(model, args, sigmas)
    denoise = watched(model, model.denoiser(prompt, guidance, once=True), args, shown)
    if args.refiner:
        args.refiner_from = 0.8 if args.refiner_from is None else args.refiner_from
        refiner, schedule = load(args.refiner, args, main=False), model.config.schedule
        check_refiner(model.config, refiner.config)
        if schedule.time(sigmas[-2]) >= handover_time(schedule, args.refiner_from):
            what = f"none of the {args.steps} steps lies in its share of the timesteps"
            warnings.warn(f"the refiner never takes over: {what}", stacklevel=2)
        late = watched(refiner, refiner.denoiser(prompt_of(refiner, args, sigmas), guidance, once=True), args, shown)
        denoise = hand_over(late, schedule, args.refiner_from)(denoise)
    for line in [*unusual(args, model, guidance), *idle(args, model, guidance, sigmas[:-1])]:
        warnings.warn(line, stacklevel=2)
    return Job(prompt, denoise, sampler, sigmas)


def watched(model: Diffusion, denoiser: Denoiser, args: argparse.Namespace, shown: Collection[float]) -> Denoise:
    """The denoise step, which finds regions at the noise levels where they are shown; their maps must fit."""
    pictures, factor = min(args.batch, args.count), model.config.vae.factor
    check_maps(denoiser, model.device, pictures, args.size, factor)
    if args.no_regions:
        return denoiser
    remedy = ", or leave the picture of the regions out with --no-regions"
    check_maps(finding(denoiser), model.device, pictures, args.size, factor, remedy)
    return watch(denoiser, shown)


def unusual(args: argparse.Namespace, model: Diffusion, guidance: Guidance) -> list[str]:
    """What is hardly meant."""
    found = []
    if args.offload and model.device.type == "cpu":
        found.append("--offload does nothing on a CPU, where all parts are in one memory")
    if model.config.aesthetic_scores and not args.refiner:
        what = f"the {model.config.name} finishes what SDXL began and is poor at starting from noise"
        found.append(f"{what}: give it as --refiner, beside an SDXL --checkpoint")
    if args.sampler == "euler_cfg_pp" and (scale_of(guidance.scale) or 0) > 1:
        found.append("the scale of CFG++ lies between 0 and 1: try 0.6")
    if model.config.unet.guidance_dim and args.negative:
        found.append("negative prompts do not act: the network of an LCM guides itself")
    if args.sampler == "lcm" and not model.config.unet.guidance_dim:
        found.append("the sampler lcm is for latent consistency models, and this is none")
    if model.config.unet.guidance_dim and args.sampler != "lcm":
        found.append("this is an LCM: try --sampler lcm --steps 4")
    return found


def idle(args: argparse.Namespace, model: Diffusion, guidance: Guidance, sigmas: list[float]) -> list[str]:
    """What was asked for and never acts, since no step of the run lies in its time."""
    moments = [model.config.schedule.moment(sigma) for sigma in sigmas]
    guided = [moment for moment in moments if guidance.strength(moment)]
    never = [] if guided else ["guidance"]
    for region in getattr(guidance.scale, "regions", ()):
        if not any(map(region.acts, guided)):
            never.append(repr(str(region)))
    for option in args.region:
        times = moments[1:] if option.area.needs_regions else moments  # the first step is what finds a word
        if option.prompt and not any(option.start <= moment.progress <= option.end for moment in times):
            never.append(repr(option.text))
    return [f"{what} never acts: none of the {args.steps} steps lies in its time" for what in dict.fromkeys(never)]


def in_short(args: argparse.Namespace) -> str:
    """Which guidance, for a line or a title."""
    guidance: Guidance = args.guidance
    slots = [guidance.direction, guidance.perturb, guidance.rescale, guidance.when]
    regions = [repr(region) for region in getattr(guidance.scale, "regions", ())]
    regions += [f"{option.area}: {option.prompt!r}" for option in args.region if option.prompt]
    return ", ".join([rule_in_short(guidance.scale), *(str(slot) for slot in slots if slot), *regions])


def rule_in_short(rule: Rule) -> str:
    """A named rule by its name and scale, whatever its fallback; others as they print."""
    rule = rule.base if isinstance(rule, ByRegion) else rule
    if isinstance(rule, CFG | SCFG):
        plain = replace(rule, min_contrast=0.0) if isinstance(rule, SCFG) else rule
        for name, make in RULES.items():
            if make(rule.gamma) == plain:
                return f"{name} at scale {rule.gamma:g}"
    return str(rule)


def summary(args: argparse.Namespace, model: Diffusion) -> str:
    """What will be run, in a line."""
    refined = f", refined by {args.refiner.stem} from {args.refiner_from:g} on" if args.refiner else ""
    return (
        f"{model.config.name}: {args.size[0]}x{args.size[1]}, {in_short(args)}, {args.steps} steps of "
        f"{SAMPLER_NAMES[args.sampler]} over {args.spacing} noise levels, {args.count} from seed {args.seed}{refined}"
    )
