"""The prompt language: weights, BREAK and prompts longer than what a text tower reads at once."""

from .chunks import encode, tokenize
from .weights import parse_weights

__all__ = ["encode", "parse_weights", "tokenize"]
