"""The denoise step compiled by torch.compile, as one graph for every set of rows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from ..denoise import Asked, Denoised, Denoiser, step
from ..diffusion import Diffusion
from ..errors import BadInput, one_line
from ..guidance import SCFG
from ..schedule import Moment

MOST_GRAPHS = 32  # torch's own 8 are few for regions, intervals and prompts that change; past the limit a step raises


@dataclass(frozen=True)
class Strength:
    """A moment's strength of guidance, as the `when` slot of a Guidance."""

    value: Tensor

    def __call__(self, moment: Moment) -> Any:
        return self.value


class Compiled:
    """`denoise.step`, compiled when it is first needed: what a Denoiser computes with.

    The numbers of a moment become tensors on the device, so that all noise levels share a graph. There is one for each
    set of rows, of acting regions and of shapes; and one for each guidance, whose numbers are constants in it.
    """

    def __init__(self, backend: Any = "inductor"):
        self.step = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
        self.backend, self.seconds = backend, 0.0  # that went into calls that compiled something

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without what was compiled, which another process compiles again."""
        return Compiled, (self.backend,)

    def __call__(self, denoiser: Denoiser, x: Tensor, now: Moment, calls: Sequence[Asked], state: Any) -> Denoised:
        """As `step`; raises BadInput for what cannot be compiled, here or at all."""
        exact = torch.float32 if x.device.type == "mps" else torch.float64  # which Apple's GPUs lack
        numbers: Any = [x.new_full((), number, dtype=exact) for number in now]
        strength, when = float(denoiser.guidance.strength(now)), None
        if strength not in (0, 1):  # with 0 there is no unconditional row to guide by
            when = Strength(x.new_full((), strength))
        denoiser, words = replace(denoiser, guidance=replace(denoiser.guidance, when=when)), None
        if not reads_words(denoiser.guidance.scale):  # else every prompt would be a graph of its own
            words = calls[-1].layout.words
            calls = [call._replace(layout=call.layout._replace(words=())) for call in calls]
        started, graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                denoised: Denoised = self.step(denoiser, x, Moment(*numbers), calls, state)
        except TorchDynamoException as error:
            raise BadInput(f"this step cannot be compiled, do without: {one_line(str(error))}") from error
        if counters["stats"]["unique_graphs"] > graphs:
            self.seconds += time.perf_counter() - started
        if denoised.regions is None or words is None:
            return denoised
        return denoised._replace(regions=denoised.regions._replace(words=words))


def reads_words(rule: Any) -> bool:
    """Whether a rule may look at the words of a prompt."""
    if isinstance(rule, SCFG) or getattr(rule, "recipe", None) is None:  # without a recipe its regions are None
        return False
    inner = [getattr(rule, name) for name in ("base", "first", "second") if hasattr(rule, name)]
    phrases = any(region.area.phrases for region in getattr(rule, "regions", ()))
    return phrases or not inner or any(map(reads_words, inner))


def compiled(model: Diffusion, backend: Any = "inductor") -> Diffusion:
    """A model whose denoise steps are compiled: faster after a first step that takes a minute or more.

    The weights of its U-Net, which it shares with the model, are laid out channels last, in place. Results differ by
    rounding. backend: torch.compile's. A step that cannot become one graph raises BadInput, such as one with a rule
    that asks for numbers of tensors; so does a machine without a C++ compiler.
    """
    model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return replace(model, step=Compiled(backend))
