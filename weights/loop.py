"""The loop of a training: an optimiser batched by shape, an average of the parameters, saved and resumed."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

SAVE_EVERY = 200
READ_EVERY = 20  # steps after which the loss is read, for which the host waits


class How(NamedTuple):
    """Where and how a training computes."""

    device: str = "cpu"
    bfloat16: bool = False  # products, by autocast
    compile: bool = False
    minutes: float = float("inf")  # after which it is saved and left


def orthogonalised(matrices: Tensor) -> Tensor:
    """Nearly U V^T of every matrix U S V^T (... m n), by five steps of a quintic Newton-Schulz iteration."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al. 2024), scaled as in 2502.16982; kernels are matrices.

    Matrices of one shape are updated together, so that a step is few operations.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.flatten(1).shape].append(parameter)
            for shape, alike in by_shape.items():
                gradient = torch.stack([parameter.grad.flatten(1) for parameter in alike])
                kept = [self.state[parameter]["momentum"] for parameter in alike]
                torch._foreach_lerp_(kept, [one.view_as(own) for one, own in zip(gradient, kept)], 0.05)
                momentum = torch.stack([own.flatten(1) for own in kept])
                size = 0.2 * max(shape) ** 0.5 * group["lr"]
                updates = -size * orthogonalised(gradient.lerp(momentum, 0.95))
                torch._foreach_add_(alike, [one.view_as(own) for one, own in zip(updates, alike)])


class Average:
    """Exponential moving average of a model's parameters: what is kept of a training."""

    def __init__(self, model: nn.Module):
        self.values = {k: v.clone() for k, v in model.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(0.999, (1 + self.updates) / (20 + self.updates))
        pairs = [(self.values[name], value) for name, value in model.state_dict().items()]
        own, new = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        torch._foreach_lerp_(list(own), list(new), 1 - decay)
        for counted, value in (pair for pair in pairs if not pair[0].is_floating_point()):
            counted.copy_(value)


def optimizers_of(model: nn.Module, rate: float, how: How) -> list[torch.optim.Optimizer]:
    """Muon for what multiplies, AdamW for the rest."""
    is_matrix = {name: p.ndim > 1 and "embedding" not in name for name, p in model.named_parameters()}
    matrices, others = ([p for name, p in model.named_parameters() if is_matrix[name] == so] for so in (True, False))
    fused = torch.device(how.device).type == "cuda"
    return [Muon(matrices, rate), torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=0, fused=fused)]


def save(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average, done: int
) -> None:
    kept = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    torch.save(kept | {"average": average.values, "step": done}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def resume(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average, device: str
) -> int:
    """How many steps were done. A state without optimisers begins with fresh ones."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(kept)
    average.values, average.updates = state["average"], state["step"]
    return int(state["step"])


def train(
    path: Path,
    model: nn.Module,
    loss_of: Callable[[np.random.Generator, float], Tensor],
    steps: int,
    rate: float,
    how: How,
) -> None:
    """Minimise loss_of(random generator, share done); keeps an average of the parameters, saved at path and resumed.

    The rate falls in the last quarter of the steps only, so that a training can be made longer before it gets there.
    Raises SystemExit, which is status 1, where how.minutes are over before its end.
    """
    optimizers, average = optimizers_of(model, rate, how), Average(model)
    first, started = resume(path, model, optimizers, average, how.device), time.monotonic()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # which resuming replaces
    since = [group.setdefault("since", first) for group in groups][0]  # the optimisers know no step before it
    progress, smooth = trange(first, steps, initial=first, total=steps, desc=path.stem), None
    for step in progress:
        for group in groups:
            group["lr"] = rate * min(1, (step + 1 - since) / 100, (steps - step) / (steps / 4))
        torch.manual_seed(step)  # a training that was interrupted goes on with the same numbers
        with torch.autocast(torch.device(how.device).type, torch.bfloat16, enabled=how.bfloat16):
            loss = loss_of(np.random.default_rng([1, step]), step / steps)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(groups[1]["params"], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update(model)
        smooth = loss.detach() if smooth is None else smooth.lerp(loss.detach(), 0.02)
        if step % READ_EVERY == 0:
            progress.set_postfix(loss=f"{smooth.item():.4f}", refresh=False)
        over = time.monotonic() - started > 60 * how.minutes and step + 1 < steps
        if over or step + 1 == steps or (step + 1) % SAVE_EVERY == 0:
            save(path, model, optimizers, average, step + 1)
        if over:
            raise SystemExit(
                f"{how.minutes:g} minutes are over after step {step + 1} of {steps}: the same command goes on"
            )
