"""A tokenizer for tests: one token a byte, called like any transformers tokenizer."""

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
