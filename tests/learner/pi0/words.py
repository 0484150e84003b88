"""Tokenizers for tests: one token a byte, called like any transformers tokenizer, and a real one."""

from pathlib import Path

import torch


class ByteTokenizer:
    def __init__(self, vocabulary: int = 300):
        self.vocabulary = vocabulary

    def __call__(self, text, max_length, padding, padding_side, truncation, return_tensors):
        assert (padding, padding_side, truncation, return_tensors) == ("max_length", "right", True, "pt")
        ids = torch.zeros(len(text), max_length, dtype=torch.int64)
        mask = torch.zeros(len(text), max_length, dtype=torch.int64)
        for row, words in enumerate(text):
            codes = [2, *(code % self.vocabulary for code in words.encode())][:max_length]
            ids[row, : len(codes)] = torch.tensor(codes)
            mask[row, : len(codes)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def write_tokenizer(folder: Path) -> Path:
    """A real transformers tokenizer as a folder, one token a character: stands where PaliGemma's would be."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(256))])
    }
    rules = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder
