"""Samples -> padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradientspace.data.sample import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    import torch


def pad_batch(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (b, longest) int64, padded on the right.

    Padding has label -100 and mask 0. `samples` is anything with `input_ids` and `labels`.
    """
    import torch

    shape = (len(samples), max(len(sample.input_ids) for sample in samples))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for i, sample in enumerate(samples):
        n = len(sample.input_ids)
        input_ids[i, :n] = torch.tensor(sample.input_ids, dtype=torch.int64)
        attention_mask[i, :n] = 1
        labels[i, :n] = torch.tensor(sample.labels, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
