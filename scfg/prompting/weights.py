"""Weights of words in a prompt."""

import re
import warnings
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from ..config import Emphasis

PIECE = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Pieces of a text and their weights, by the WebUI's rules.

    (this) counts 1.1 times, (this:1.3) 1.3 times, [this] 1 / 1.1 times; brackets nest, those never closed reach to the
    end, and a backslash makes one an ordinary letter.
    """
    pieces: list[str] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    closed: list[tuple[int, int, float]] = []  # from which piece to which, and by how much, inner ones first

    def close(bracket: str, factor: float) -> None:
        closed.append((opened[bracket].pop(), len(pieces), factor))

    for found in PIECE.finditer(text):
        piece = found[0]
        if piece in opened:
            opened[piece].append(len(pieces))
        elif opened["("] and (piece == ")" or found[1]):
            close("(", float(found[1] or 1.1))
        elif opened["["] and piece == "]":
            close("[", 1 / 1.1)
        else:
            pieces.append(piece.removeprefix("\\"))
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)
    weights = np.ones(len(pieces))  # thousands of brackets within one another take no minutes
    for first, end, factor in closed:
        weights[first:end] *= factor
    runs = groupby(zip(pieces, weights.tolist()), key=itemgetter(1))
    return [("".join(piece for piece, _ in run), weight) for weight, run in runs]


def emphasised(states: Tensor, weights: Tensor, emphasis: Emphasis) -> Tensor:
    """States (b t d) times their tokens' weights (b t).

    original: brought back to the mean that each text's had, which is a division by a number that may be near 0;
    warns where that changes a text more than twofold. no-norm: as they are. Exact where all weights are one.
    """
    plain, heavier = (weights == 1).all(1), states * weights[..., None]
    if emphasis == "original":
        factor = states.mean((1, 2)) / heavier.mean((1, 2))
        heavier = heavier * factor[:, None, None]
        far = factor[~plain & ~((factor >= 0.5) & (factor <= 2))].tolist()
        if far:
            what = f"bringing back the mean multiplies this prompt's encoding by {far[0]:.2g}"
            warnings.warn(f"{what}: try emphasis no-norm (--emphasis)", stacklevel=5)
    return torch.where(plain[:, None, None], states, heavier)
