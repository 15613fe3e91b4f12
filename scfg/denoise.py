"""One denoise step: the method on one screen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import BadInput, shown
from .guidance import COND, Guidance, Outputs, Row
from .schedule import Moment, Schedule
from .segment import Recipe, Regions, Tokens
from .text import Conditioner
from .unet import Capture, Conditioning, Maps, exact

Network = Callable[..., tuple[Tensor, dict[str, Any]]]  # UNet.forward's signature; a wing may wrap it
ZEROS = "the unconditional context is all zeros: the foreground is the conditional row's"


class Asked(NamedTuple):
    """One call of the network, of the rows that share an attention function."""

    rows: Sequence[Row]  # those that guidance asked for
    evaluated: Sequence[Row]  # those that the network evaluates for them, in the order of its batch
    read: Sequence[Row]  # of these, those whose maps are read
    conditioning: Conditioning
    layout: Tokens  # of the tokens that its maps describe
    capture: Capture | None
    pixels: int  # regions are read from blocks of at most so many


class Evaluated(NamedTuple):
    """What the network computed for the rows of a step."""

    out: dict[str, Tensor]  # by row, (b c h w)
    completed: dict[str, list[Tensor]]  # by row, the completed maps (b t h w) of the blocks that regions are read from


class Denoised(NamedTuple):
    """Everything that one evaluation computed, for b pictures with latents of h x w."""

    x0: Tensor  # (b c h w) the clean latent expected
    outputs: Outputs  # of the network
    scale: Tensor  # (b 1 h w) the guidance scale at every pixel
    regions: Regions | None  # of the conditional row, where maps were read
    maps: dict[str, Maps]  # by block, of the rows uncond and cond one after the other; where Denoiser.capture is set
    state: Any  # guidance's own, for the next evaluation
    flags: dict[str, Tensor]  # messages for the user -> (b|1) in how many evaluations so far each was true


def step(denoiser: "Denoiser", x: Tensor, now: Moment, calls: Sequence[Asked], state: Any) -> Denoised:
    """The step itself: what is computed once the host has decided what to ask of the network.

    Nothing in it depends on numbers in tensors, so that no device is waited for and it compiles as one graph, for which
    the numbers of `now` may be tensors. Denoised.flags are those of the rule at this step.
    """
    recipe, evaluated, maps = denoiser.segment, Evaluated({}, {}), {}
    scaled, t = (x / (now.sigma**2 + 1) ** 0.5).to(denoiser.dtype), x.new_ones(len(x)) * now.t
    for call in calls:
        attend, count = call.rows[0].attend, len(call.evaluated)
        output, captured = denoiser.network(scaled, t, call.conditioning, capture=call.capture, attend=attend)
        if denoiser.capture and not attend:
            maps = {name: denoiser.capture.make(block) for name, block in captured.items()}
            small = [name for name, block in captured.items() if block.size[0] * block.size[1] <= call.pixels]
            captured = {name: recipe.complete(captured[name]) for name in small} if recipe else {}
        for row, of_row in zip(call.evaluated, output.chunk(count)):
            evaluated.out[row.name] = of_row.to(x.dtype)
        for i, row in enumerate(call.read):
            evaluated.completed[row.name] = [block.chunk(len(call.read))[i] for block in captured.values()]
    out, completed = calls[-1].conditioning.merge(evaluated, [row for call in calls for row in call.rows])
    cond, uncond, perturbed = out["cond"], out.get("uncond"), out.get("perturbed")

    regions = recipe.assign(completed["cond"], completed.get("uncond"), calls[-1].layout) if recipe else None
    difference = None if uncond is None else cond - uncond
    x0 = now.to_x0(x, cond)
    outputs = Outputs(x, cond, uncond, perturbed, difference, x0, now.dx0_dout)  # type: ignore[arg-type]
    guided = denoiser.guidance.combine(outputs, regions, now, state)
    return Denoised(now.to_x0(x, guided.out), outputs, guided.scale, regions, maps, guided.state, guided.flags)


@dataclass(frozen=True)
class Denoiser:
    """The denoise step of a run: a differentiable function of values."""

    network: Network
    schedule: Schedule
    prompt: Conditioner  # or a wing's: whatever has its layout and its condition()
    guidance: Guidance
    dtype: torch.dtype = torch.float32  # the network's
    segment: Recipe | None = None  # reads regions at every step; None: the rule's recipe does, on guided steps
    map_divisor: int = 4  # regions are read from blocks of at most ceil(h/d) * ceil(w/d) pixels
    capture: Capture | None = None  # extra maps to return
    device: torch.device | None = None  # the network's, to which x is moved; None: x is there
    compute: Callable[..., Denoised] = step  # or the same, compiled

    def __call__(self, x: Tensor, sigma: float, previous: Denoised | None = None) -> Denoised:
        """x (b c h w) at noise level sigma, one for all pictures; previous: the previous evaluation's result.

        A caller's autocast does not act: it would round what is exact here.
        """
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            raise BadInput(f"x is a floating tensor (b c h w), not {shown(x)}")
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            with exact(x.device):
                return self(x, sigma, previous)
        x, now = x.to(self.device or x.device), self.schedule.moment(sigma)
        rows = self.guidance.rows(now)
        recipe = self.segment or (self.guidance.recipe if len(rows) > 1 else None)
        acting, calls = replace(self, guidance=self.guidance.at(now), segment=recipe), []
        for attend in dict.fromkeys([row.attend for row in rows]):
            calls.append(acting.asked([row for row in rows if row.attend == attend], x, now, previous))
        denoised = self.compute(acting, x, now, calls, previous.state if previous else None)

        flags = {name: where for call in calls for name, where in call.conditioning.flags.items()}
        zeros = calls[-1].layout.zero_uncond
        if recipe and recipe.foreground == "uncond" and len(rows) > 1 and zeros is not None:
            flags[ZEROS] = zeros
        counts = dict(previous.flags) if previous else {}
        for name, where in (flags | denoised.flags).items():
            counts[name] = counts.get(name, 0) + where.long()
        return denoised._replace(flags=counts)

    def asked(self, rows: Sequence[Row], x: Tensor, now: Moment, previous: Denoised | None) -> Asked:
        """The call of the network for rows of one attention function; maps are read of the network's own."""
        conditioning, recipe = self.prompt.condition(rows, now, previous, x.shape), self.segment
        evaluated, layout = conditioning.rows or rows, conditioning.layout or self.prompt.layout
        pixels = math.prod(math.ceil(side / self.map_divisor) for side in x.shape[-2:]) if recipe else 0
        capture, read = None, evaluated
        if self.capture and not rows[0].attend:
            capture = Capture(max(self.capture.pixels, pixels), self.capture.blocks, self.capture.heads)
        elif recipe and not rows[0].attend:
            capture = Capture(pixels, make=recipe.complete)
            if evaluated is rows and (recipe.foreground != "uncond" or layout.all_zero):  # nothing reads uncond's maps
                first, read = len(x) * rows.index(COND), [COND]
                capture = capture._replace(entries=slice(first, first + len(x)))
        return Asked(rows, evaluated, read, conditioning, layout, capture, pixels)
