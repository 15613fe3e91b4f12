"""Guidance as a value: how the rows of one step become one prediction. CFG and S-CFG are rules that fill its scale."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Config
from .errors import BadInput
from .schedule import Moment
from .segment import CONDITIONAL, OFFICIAL, PAPER, Recipe, Regions, blur
from .unet import Attend, Site


class Outputs(NamedTuple):
    """The network's outputs, and what follows from them."""

    x: Tensor  # (b c h w) the noisy latent
    cond: Tensor  # (b c h w) the conditional row's output
    uncond: Tensor | None  # (b c h w); None where this step is not guided
    perturbed: Tensor | None  # (b c h w) the output under the perturb slot's attention, where there is one
    # for rules, what the direction slot makes of it
    difference: Tensor  # (b c h w) cond - uncond; None on an unguided step, of which no rule is asked
    x0: Tensor  # (b c h w) the clean latent that cond stands for
    dx0_dout: float  # d x0 / d output, a number


class Row(NamedTuple):
    """One output that a guided step needs; rows of one attention function share a call of the network."""

    name: str
    text: str  # "uncond" or "cond", or a further text of a wing's prompt
    attend: Attend | None = None


UNCOND, COND = Row("uncond", "uncond"), Row("cond", "cond")


class Guided(NamedTuple):
    out: Tensor  # (b c h w) the guided prediction
    scale: Tensor  # (b 1 h w) the scale that acted at every pixel
    state: Any  # for the next evaluation's direction
    flags: dict[str, Tensor]  # messages for the user -> (b|1) the pictures that they are true of


# A rule: (outputs, regions, moment) -> scale map (b 1 h w) or a number. Four attributes are optional: `recipe`, by
# which its regions are read (without it they are None); `flags(regions, moment) -> {message: (b|1) bool}`;
# `on(device)`, the rule with its fixed tensors there; `at(moment)`, the rule without what does not act at that moment.
Rule = Callable[[Outputs, Any, Moment], Tensor | float]  # Any: Regions, or None for a rule without a recipe


@dataclass(frozen=True)
class CFG:
    """One scale everywhere (Ho & Salimans 2022, 2207.12598)."""

    gamma: float

    def __call__(self, outputs: Outputs, regions: Regions | None, moment: Moment) -> float:
        return self.gamma


@dataclass(frozen=True)
class SCFG:
    """Semantic-aware guidance (arXiv 2404.05384): every region's share of the difference is brought to one level.

    SCFG(7.5) is what the authors' program computes, SCFG.paper(7.5) what their paper says, SCFG.mean(7.5) the former
    with the whole picture as benchmark, SCFG.conditional(7.5) with the conditional row's foreground.
    """

    gamma: float
    recipe: Recipe = OFFICIAL
    benchmark: Literal["foreground", "image"] = "foreground"  # whose mean difference every region is brought to
    rate_range: tuple[float, float] | None = (0.8, 3.0)  # clamps the rate
    max_scale: float | None = 15.0  # then caps gamma * rate
    smooth: bool = True  # blur the rate at latent size
    min_contrast: float = 0.0  # pictures whose Regions.contrast is below it are guided by plain CFG

    @classmethod
    def paper(cls, gamma: float) -> "SCFG":
        return cls(gamma, PAPER, rate_range=None, max_scale=None, smooth=False)

    @classmethod
    def conditional(cls, gamma: float) -> "SCFG":
        return cls(gamma, CONDITIONAL)

    @classmethod
    def mean(cls, gamma: float) -> "SCFG":
        return cls(gamma, benchmark="image")

    def __call__(self, outputs: Outputs, regions: Regions, moment: Moment) -> Tensor:
        """Scale map (b 1 h w): gamma * U / D_i in region i (eq. 13), clamped, capped and blurred as the fields say."""
        size = outputs.difference.shape[-2:]
        norm = outputs.difference.norm(dim=1, keepdim=True)
        tokens = F.interpolate(regions.tokens, size=size, mode="nearest")
        foreground = F.interpolate(regions.foreground, size=size, mode="nearest")
        level = masked_mean(norm, foreground if self.benchmark == "foreground" else torch.ones_like(foreground))  # U
        means = masked_mean(norm, tokens)  # D_i, (b t 1 1)
        rates = torch.where(means > 0, level / (means + 1e-8), 0)
        rate = (rates * tokens).sum(1, keepdim=True)
        if self.rate_range:
            rate = rate.clamp(*self.rate_range)
        else:  # an empty foreground gives level 0 and would give scale 0: it is plain CFG instead
            rate = torch.where(level > 0, rate, 1)
        if self.max_scale and self.gamma > 0:
            rate = rate.clamp_max(self.max_scale / self.gamma)
        rate = 1 + blur(rate - 1) if self.smooth else rate  # a rate of one stays exactly one
        if self.min_contrast:
            rate = torch.where(regions.contrast() < self.min_contrast, 1, rate)
        return self.gamma * rate

    def flags(self, regions: Regions, moment: Moment) -> dict[str, Tensor]:
        """By reason, the pictures (b) that fell back to something else."""
        flags: dict[str, Tensor] = {}
        clear: Tensor | bool = True
        if self.min_contrast:
            clear = regions.contrast().flatten() >= self.min_contrast
            flags["attention shows no regions: plain CFG there"] = ~clear
        if self.benchmark == "foreground":
            instead = f"rate {self.rate_range[0]:g} there" if self.rate_range else "plain CFG there"
            flags[f"no foreground found: {instead}"] = (regions.foreground.sum((1, 2, 3)) == 0) & clear
        return flags


def masked_mean(values: Tensor, masks: Tensor) -> Tensor:
    """Mean of values (b 1 h w) over every mask (b m h w), (b m 1 1); 0 for an empty one."""
    return (values * masks).sum((-2, -1), keepdim=True) / (masks.sum((-2, -1), keepdim=True) + 1e-8)


RULES: dict[str, Callable[[float], CFG | SCFG]] = {"scfg": SCFG, "scfg-paper": SCFG.paper}
RULES |= {"scfg-mean": SCFG.mean, "scfg-cond": SCFG.conditional, "cfg": CFG}


def named_rule(name: str, scale: float, config: Config) -> CFG | SCFG:
    """A rule by its name, with the fallback for flat attention that the config asks for."""
    rule = RULES[name](scale)
    if isinstance(rule, SCFG):
        official, paper = config.min_contrast
        rule = replace(rule, min_contrast=paper if rule.recipe == PAPER else official)
    return rule


class Perturb(Protocol):
    """An extra row: the conditional text under another attention function; guidance pushes away from it."""

    @property
    def scale(self) -> float: ...

    @property
    # where it acts: names of transformer blocks or of what they are in, "middle_block"
    def layers(self) -> tuple[str, ...]: ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Named slots that act on the network's outputs.

    With d the difference, guided = cond + strength * ((scale - 1) * d + perturb.scale * (cond - perturbed)), rescaled.
    direction(outputs, moment, state) -> (d, state) takes the place of cond - uncond; scale is a rule, which is given d;
    rescale(guided, cond) comes last; when(moment) is the strength: where it is 0 only the conditional row is evaluated.
    """

    perturb: Perturb | None = None
    direction: Callable[[Outputs, Moment, Any], tuple[Tensor, Any]] | None = None
    scale: Rule
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None
    when: Callable[[Moment], float] | None = None

    def __post_init__(self) -> None:
        from .checks import check_slots

        check_slots(self)

    @property
    def recipe(self) -> Recipe | None:
        """How the rule wants maps to be read; None where it needs none."""
        return getattr(self.scale, "recipe", None)

    def strength(self, moment: Moment) -> float | Tensor:
        """How much of the guidance acts at this moment; a tensor within a compiled step."""
        strength = 1.0 if self.when is None else self.when(moment)
        return strength if isinstance(strength, Tensor) else float(strength)

    def rows(self, moment: Moment) -> tuple[Row, ...]:
        """The rows that the network must evaluate at this moment, in the order of its batch."""
        if not self.strength(moment):
            return (COND,)
        return (UNCOND, COND, *([Row("perturbed", "cond", self.perturb.attend)] if self.perturb else []))

    def at(self, moment: Moment) -> "Guidance":
        """This guidance without the parts that do not act at this moment."""
        return replace(self, scale=self.scale.at(moment)) if hasattr(self.scale, "at") else self

    def combine(self, outputs: Outputs, regions: Regions | None, moment: Moment, state: Any = None) -> Guided:
        """The network's outputs -> the guided one; state is what the step before left."""
        cond, one, strength = outputs.cond, torch.ones_like(outputs.cond[:, :1]), self.strength(moment)
        if outputs.uncond is None or (isinstance(strength, float) and not strength):
            return Guided(cond, one, None, {})  # the direction's state restarts after an unguided step
        if self.direction:
            difference, state = self.direction(outputs, moment, state)
            outputs = outputs._replace(difference=difference)
        scale = torch.lerp(one, one * checked(self.scale(outputs, regions, moment), one), strength)
        guided = cond + (scale - 1) * outputs.difference
        if self.perturb and outputs.perturbed is not None:
            guided = guided + strength * self.perturb.scale * (cond - outputs.perturbed)
        if self.rescale:
            guided = self.rescale(guided, cond)
        flags = self.scale.flags(regions, moment) if hasattr(self.scale, "flags") else {}
        return Guided(guided, scale, state, flags)

    def __str__(self) -> str:
        """The slots that are filled, and the rows of a step."""
        slots = ("direction", "scale", "perturb", "rescale", "when")
        acting = [f"{name}: {getattr(self, name)}" for name in slots if getattr(self, name)]
        rows = ("uncond", "cond") + ("perturbed",) * bool(self.perturb)
        alone = "; 1 (cond) where `when` is 0" if self.when else ""
        return "\n".join([*acting, f"rows a step: {len(rows)} ({', '.join(rows)}){alone}"])


def checked(scale: Tensor | float, one: Tensor) -> Tensor | float:
    """Return a rule's scale; raise BadInput unless it is a number or a map that fits `one` (b 1 h w)."""
    shape = tuple(scale.shape) if isinstance(scale, Tensor) else None
    is_map = shape is not None and len(shape) in (0, 4) and all(n in (1, m) for n, m in zip(shape, one.shape))
    if isinstance(scale, Real) or is_map:
        return scale
    raise BadInput(f"a rule gives a number or a scale map of {tuple(one.shape)}, not {shape or repr(scale)}")
