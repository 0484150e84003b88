"""Pictures, words and numbers as pi0 and pi0.5 were trained to see them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from learner.vision import pad_resize

Tokenizer = Callable[..., Mapping[str, Tensor]]
"""tokenizer(texts, max_length=, padding="max_length", padding_side="right", truncation=True, return_tensors="pt") ->
{"input_ids": int64 [B, max_length], "attention_mask": [B, max_length]}: any transformers tokenizer."""

PALIGEMMA = "google/paligemma-3b-pt-224"


def load_tokenizer(source: str | Path = PALIGEMMA) -> Tokenizer:
    """The PaliGemma tokenizer from a folder, or from the local Hugging Face cache under its name.

    Raises ValueError when it is not there: its licence is accepted by a person, so nothing is downloaded here.
    """
    from transformers import AutoTokenizer

    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(str(source), local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no PaliGemma tokenizer at {str(source)!r}. Accept its licence at huggingface.co/{PALIGEMMA}, run "
            f"`hf download {PALIGEMMA} --include 'tokenizer*'`, or set `tokenizer` to a folder that holds it."
        ) from error


def prepare_images(pictures: Tensor, size: int, device: torch.device | str) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, size, size] in [-1, 1]: undistorted, centred on black (-1)."""
    x = pictures.to(device).permute(0, 3, 1, 2).float() / 255.0
    return pad_resize(x, (size, size)) * 2.0 - 1.0


def prompts(variant: str, instructions: list[str], state: Tensor | None) -> list[str]:
    """The text of each sample. `state` float32 [B, D], normalised, is written out in 256 bins (pi0.5); None leaves it
    out, as models trained without it want."""
    if variant == "pi0":
        return [text if text.endswith("\n") else f"{text}\n" for text in instructions]
    cleaned = [text.strip().replace("_", " ").replace("\n", " ") for text in instructions]
    if state is None:
        return [f"{text}\n" for text in cleaned]
    bins = np.digitize(state.cpu().numpy(), bins=np.linspace(-1, 1, 256 + 1)[:-1]) - 1
    numbers = [" ".join(map(str, row)) for row in bins]
    return [f"Task: {text}, State: {row};\nAction: " for text, row in zip(cleaned, numbers, strict=True)]


def tokenize(tokenizer: Tokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """int64 [B, length] padded on the right (longer prompts are cut), and which tokens are real, bool [B, length]."""
    options: dict[str, Any] = dict(max_length=length, padding="max_length", padding_side="right", truncation=True)
    out = tokenizer(texts, return_tensors="pt", **options)
    return out["input_ids"].long(), out["attention_mask"].bool()


def pad_width(x: Tensor, width: int) -> Tensor:
    """Zeros after the last dim's own numbers."""
    return F.pad(x, (0, width - x.shape[-1]))
