"""The prompt language: weights, BREAK, texts that change by step, AND, and prompts of any length."""

from .chunks import tokenize
from .composed import ComposedPrompt
from .encode import encode
from .language import schedule, sub_prompts
from .weights import parse_weights

__all__ = ["ComposedPrompt", "encode", "parse_weights", "schedule", "sub_prompts", "tokenize"]
