"""Contenders timed in turns, and the ratios of their times."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import trange


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def alternated(contenders: dict[str, Callable[[], Any]], rounds: int, warm: bool = False) -> dict[str, list[float]]:
    """Seconds of every contender, once a round, each round beginning with another.

    Unless they are warm, one round before is not counted.
    """
    names, seconds = list(contenders), {name: [] for name in contenders}
    for turn in trange(0 if warm else -1, rounds, desc="rounds", leave=False):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = timed(contenders[name])
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and the lowest and the highest."""
    ratios = [a / b for a, b in zip(over, under)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
