"""Text in, token ids out, and back.  Nothing here needs torch."""

from pyrosome.chat.detokenize import Detokenizer
from pyrosome.chat.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
