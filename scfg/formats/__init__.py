"""Files in other layouts -> tensors by original name; what files say of themselves, or their networks answer."""

from .prediction import ask_prediction, check_prediction, predicts, with_zero_terminal_snr
from .reading import read
from .save import save
from .tokenizer import default_tokenizer, read_tokenizer, vocabulary

__all__ = ["ask_prediction", "check_prediction", "default_tokenizer", "predicts", "read"]
__all__ += ["read_tokenizer", "save", "vocabulary", "with_zero_terminal_snr"]
