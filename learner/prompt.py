"""Instructions as numbers without a vocabulary file: each word is hashed into a fixed table of embeddings."""

import re
import zlib

import torch
from torch import Tensor

PADDING = 0


def hashed_words(texts: list[str], table_size: int, max_words: int) -> Tensor:
    """int64 [B, max_words]: 1 .. table_size - 1 for a word, PADDING after the last.

    Lower case, punctuation dropped; longer instructions are refused (ValueError), not cut.
    """
    out = torch.full((len(texts), max_words), PADDING, dtype=torch.int64)
    for row, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        if len(words) > max_words:
            raise ValueError(f"instruction {text!r} has {len(words)} words; this policy reads at most {max_words}")
        for column, word in enumerate(words):
            out[row, column] = 1 + zlib.crc32(word.encode()) % (table_size - 1)
    return out
