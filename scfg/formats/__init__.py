"""Files in other layouts than the original .safetensors: pickled checkpoints, VAEs of other files, tokenizers."""

from .pickled import read
from .tokenizer import default_tokenizer, read_tokenizer, vocabulary
from .vae import with_vae

__all__ = ["default_tokenizer", "read", "read_tokenizer", "vocabulary", "with_vae"]
