"""From arguments to what a run needs."""

import argparse
import inspect
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ..diffusion import Diffusion, load as load_model
from ..edit import check_refiner, hand_over, handover_time
from ..errors import BadInput
from ..guidance import Guidance, named_rule
from ..methods import PAG, Interval, Ramp, Rescale
from ..prompting import encode
from ..regional import ByRegion, Part, RegionalPrompt
from ..regional.area import find_phrase
from ..report.record import middle_third, watch
from ..samplers import SAMPLERS, Denoise, Sampler
from ..text import Prompt
from .arguments import DIRECTIONS, SAMPLER_NAMES


class Job(NamedTuple):
    """What is the same for all batches of a run."""

    denoise: Denoise
    sampler: Sampler
    sigmas: list[float]


def load(path: Path | None, args: argparse.Namespace, main: bool = True) -> Diffusion:
    """The model of a file; --vae and --prediction are for the main one only."""
    own = {"prediction": args.prediction, "vae": args.vae} if main else {}
    dtype = args.dtype and getattr(torch, args.dtype)
    return load_model(path, device=args.device, dtype=dtype, tokenizer=args.tokenizer, offload=args.offload, **own)


def prompt_of(model: Diffusion, args: argparse.Namespace) -> Prompt | RegionalPrompt:
    """The prompt, its negative and the regions' own prompts, encoded; an area's word that is not there is an error."""
    prompt = encode(model, args.prompt, args.negative, args.clip_skip)
    for option in args.region:
        for phrase in option.area.phrases:
            find_phrase(prompt.words[0], phrase)
    parts = [
        Part(
            option.area,
            encode(model, option.prompt, layer_from_end=args.clip_skip),
            option.base,
            option.start,
            option.end,
        )
        for option in args.region
        if option.prompt
    ]
    return RegionalPrompt(prompt, tuple(parts)) if parts else prompt


def guidance_of(args: argparse.Namespace, model: Diffusion) -> Guidance:
    scale = named_rule(args.guidance, args.scale, model.config)
    regions = tuple(option.region for option in args.region if option.region)
    return Guidance(
        perturb=PAG(args.pag) if args.pag else None,
        direction=DIRECTIONS.get(args.direction),
        scale=ByRegion(scale, regions) if regions else scale,
        rescale=Rescale(args.rescale) if args.rescale else None,
        when=Interval(*args.interval) if args.interval else Ramp(shape=args.ramp) if args.ramp else None,
    )


def sampler_of(args: argparse.Namespace) -> Sampler:
    sampler = SAMPLERS[args.sampler]
    if args.eta is None:
        return sampler
    if "eta" not in inspect.signature(sampler).parameters:
        raise BadInput(f"eta is the share of fresh noise; {args.sampler} adds none")
    return partial(sampler, eta=args.eta)


def plan(model: Diffusion, prompt: Prompt | RegionalPrompt, args: argparse.Namespace) -> Job:
    """The denoise step, with a refiner where one is given, and its noise levels; fills in what is the family's own."""
    args.scale = model.config.scale if args.scale is None else args.scale
    args.size = args.size or model.config.size
    args.spacing = args.spacing or model.spacing(args.sampler)
    model.latent_shape(args.size)  # a size that cannot be, said before any work
    sampler, sigmas = sampler_of(args), model.sigmas(args.steps, args.sampler, args.spacing)
    shown = {sigmas[i] for i in middle_third(args.steps)}
    guidance = guidance_of(args, model)
    denoise = watch(model.denoiser(prompt, guidance), shown)
    if args.refiner:
        args.refiner_from = 0.8 if args.refiner_from is None else args.refiner_from
        refiner, schedule = load(args.refiner, args, main=False), model.config.schedule
        check_refiner(model.config, refiner.config)
        if schedule.time(sigmas[-2]) >= handover_time(schedule, args.refiner_from):
            what = f"none of the {args.steps} steps lies in its share of the timesteps"
            warnings.warn(f"the refiner never takes over: {what}", stacklevel=2)
        late = watch(refiner.denoiser(prompt_of(refiner, args), guidance), shown)
        denoise = hand_over(late, schedule, args.refiner_from)(denoise)
    elif model.config.aesthetic_scores:
        what = f"the {model.config.name} finishes what SDXL began and is poor at starting from noise"
        warnings.warn(f"{what}: give it as --refiner, beside an SDXL --checkpoint", stacklevel=2)
    for line in idle(args, model, guidance, sigmas[:-1]):
        warnings.warn(line, stacklevel=2)
    return Job(denoise, sampler, sigmas)


def idle(args: argparse.Namespace, model: Diffusion, guidance: Guidance, sigmas: list[float]) -> list[str]:
    """What was asked for and never acts, since no step of the run lies in its time."""
    moments = [model.config.schedule.moment(sigma) for sigma in sigmas]
    guided = [moment for moment in moments if guidance.strength(moment)]
    never = [] if guided else ["guidance"]
    for option in args.region:
        prompted = moments[1:] if option.area.needs_regions else moments  # the first step is what finds a word
        for given, times in ((option.region, guided), (option.prompt, prompted)):
            if given and not any(option.start <= moment.progress <= option.end for moment in times):
                never.append(repr(option.text))
    return [f"{what} never acts: none of the {args.steps} steps lies in its time" for what in dict.fromkeys(never)]


def in_short(args: argparse.Namespace) -> str:
    """Which guidance, for a line or a title."""
    slots = [
        DIRECTIONS.get(args.direction),
        PAG(args.pag) if args.pag else None,
        Rescale(args.rescale) if args.rescale else None,
        Interval(*args.interval) if args.interval else Ramp(shape=args.ramp) if args.ramp else None,
    ]
    regions = [repr(option.text) for option in args.region]
    return ", ".join([f"{args.guidance} at scale {args.scale:g}", *(str(slot) for slot in slots if slot), *regions])


def summary(args: argparse.Namespace, model: Diffusion) -> str:
    """What will be run, in a line."""
    refined = f", refined by {args.refiner.stem} from {args.refiner_from:g} on" if args.refiner else ""
    return (
        f"{model.config.name}: {args.size[0]}x{args.size[1]}, {in_short(args)}, {args.steps} steps of "
        f"{SAMPLER_NAMES[args.sampler]} over {args.spacing} noise levels, {args.count} from seed {args.seed}{refined}"
    )
