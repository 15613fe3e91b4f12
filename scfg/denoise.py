"""One denoise step: the method on one screen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import BadInput, shown
from .guidance import COND, Guidance, Outputs, Row
from .schedule import Moment, Schedule
from .segment import Recipe, Regions, Tokens
from .text import Conditioner
from .unet import Capture, Maps, exact

Network = Callable[..., tuple[Tensor, dict[str, Any]]]  # UNet.forward's signature; a wing may wrap it
ZEROS = "the unconditional context is all zeros: the foreground is the conditional row's"


class Evaluated(NamedTuple):
    """What the network computed for the rows of a step."""

    out: dict[str, Tensor]  # by row, (b c h w)
    completed: dict[str, list[Tensor]]  # by row, the completed maps (b t h w) of the blocks that regions are read from
    maps: dict[str, Maps]  # by block, of the rows with the default attention, one after the other
    flags: dict[str, Tensor]  # of the conditioning: message -> (b)
    layout: Tokens  # of the tokens that the maps describe


class Denoised(NamedTuple):
    """Everything that one evaluation computed, for b pictures with latents of h x w."""

    x0: Tensor  # (b c h w) the clean latent expected
    outputs: Outputs  # of the network
    scale: Tensor  # (b 1 h w) the guidance scale at every pixel
    regions: Regions | None  # of the conditional row, where maps were read
    maps: dict[str, Maps]  # by block, of the rows uncond and cond one after the other; where Denoiser.capture is set
    state: Any  # guidance's own, for the next evaluation
    flags: dict[str, Tensor]  # messages for the user -> (b|1) in how many evaluations so far each was true


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
        out, completed, maps, flags, layout = self.evaluate(x, now, rows, previous, recipe)
        cond, uncond, perturbed = out["cond"], out.get("uncond"), out.get("perturbed")

        regions, zeros = None, layout.zero_uncond
        if recipe:
            regions = recipe.assign(completed["cond"], completed.get("uncond"), layout)
            if recipe.foreground == "uncond" and uncond is not None and zeros is not None:
                flags[ZEROS] = zeros

        difference = None if uncond is None else cond - uncond
        x0 = now.to_x0(x, cond)
        outputs = Outputs(x, cond, uncond, perturbed, difference, x0, now.dx0_dout)  # type: ignore[arg-type]
        guided = self.guidance.combine(outputs, regions, now, previous.state if previous else None)

        counts = dict(previous.flags) if previous else {}
        for name, where in (flags | guided.flags).items():
            counts[name] = counts.get(name, 0) + where.long()
        return Denoised(now.to_x0(x, guided.out), outputs, guided.scale, regions, maps, guided.state, counts)

    def evaluate(
        self, x: Tensor, now: Moment, rows: Sequence[Row], previous: Denoised | None, recipe: Recipe | None
    ) -> Evaluated:
        """What the network computes for the rows; those of one attention function share a call."""
        scaled, t = (x / math.sqrt(now.sigma**2 + 1)).to(self.dtype), x.new_full((len(x),), now.t)
        pixels = math.prod(math.ceil(side / self.map_divisor) for side in x.shape[-2:]) if recipe else 0
        completed, maps, layout = {}, {}, self.prompt.layout
        out, flags = dict[str, Tensor](), dict[str, Tensor]()
        for attend in dict.fromkeys(row.attend for row in rows):
            group = [row for row in rows if row.attend == attend]
            conditioning = self.prompt.condition(group, now, previous, x.shape)
            evaluated, layout = conditioning.rows or group, conditioning.layout or layout
            capture, read = None if attend else self.wanted(recipe, pixels), evaluated
            if capture and recipe and evaluated is group and self.reads_cond_alone(recipe, layout):
                first, read = len(x) * group.index(COND), [COND]
                capture = capture._replace(entries=slice(first, first + len(x)))
            output, captured = self.network(scaled, t, conditioning, capture=capture, attend=attend)
            flags |= conditioning.flags
            if self.capture and not attend:
                maps = {name: self.capture.make(block) for name, block in captured.items()}
                small = {name: block for name, block in captured.items() if math.prod(block.size) <= pixels}
                captured = {name: recipe.complete(block) for name, block in small.items()} if recipe else {}
            out |= {row.name: of_row.to(x.dtype) for row, of_row in zip(evaluated, output.chunk(len(evaluated)))}
            for i, row in enumerate(read):
                completed[row.name] = [block.chunk(len(read))[i] for block in captured.values()]
        return conditioning.merge(Evaluated(out, completed, maps, flags, layout), rows)

    def reads_cond_alone(self, recipe: Recipe, layout: Tokens) -> bool:
        """Whether nothing reads the unconditional row's maps, so that they need not be computed."""
        return not self.capture and (recipe.foreground != "uncond" or layout.all_zero)

    def wanted(self, recipe: Recipe | None, pixels: int) -> Capture | None:
        """What the network captures: raw maps if the caller asked for maps, else the recipe's completed maps."""
        if self.capture:
            return Capture(max(self.capture.pixels, pixels), self.capture.blocks, self.capture.heads)
        return Capture(pixels, make=recipe.complete) if recipe else None
