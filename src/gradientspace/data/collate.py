"""Samples -> padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from gradientspace.data.sample import IGNORE_INDEX
from gradientspace.memory import repeated_size

if TYPE_CHECKING:
    import torch


class TokenisedSample(Protocol):
    """Anything with token ids and labels of the same length (labels un-shifted, -100 where masked)."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def labels(self) -> Sequence[int]: ...


def pad_batch(
    samples: Sequence[TokenisedSample], pad_token_id: int, *, longest: int | None = None
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (b, width) int64, padded on the right.

    Padding has label -100 and mask 0. The width is that of the longest sample. Who makes many batches gives the
    `longest` length of them all: widths are then rounded up to repeat (see `repeated_size`), never beyond it.
    """
    import torch

    width = max(len(sample.input_ids) for sample in samples)
    if longest is not None:
        width = min(repeated_size(width), max(width, longest))
    shape = (len(samples), width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for i, sample in enumerate(samples):
        n = len(sample.input_ids)
        input_ids[i, :n] = torch.tensor(sample.input_ids, dtype=torch.int64)
        attention_mask[i, :n] = 1
        labels[i, :n] = torch.tensor(sample.labels, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
