"""Batches of samples of similar length under a token budget, in shuffled order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradientspace.data import TokenisedSample
from gradientspace.errors import DataError
from gradientspace.memory import repeated_size


@dataclass(slots=True)
class GradientBatch:
    """Per-sample gradients of one batch."""

    indices: Tensor
    """(b,) int64, positions in the sequence of samples that was streamed."""
    gradients: Tensor
    """(b, D) float32, one row a sample, in the engine's `layout`."""
    losses: Tensor
    """(b,) float32, the loss each row is the gradient of, in nats."""
    norms: Tensor
    """(b,) float32, Euclidean norms of the rows."""


@dataclass(frozen=True, slots=True)
class ExcludedSample:
    """A sample left out of the stream because its loss or gradient is not finite."""

    index: int
    """Position in the sequence of samples that was streamed."""
    row: int
    """Its row number in its file where it has one, otherwise index + 1."""
    loss: float


def check_samples(samples: Sequence[TokenisedSample]) -> None:
    """Refuse, by row, a sample that has no loss or whose labels do not fit its tokens."""
    for position, sample in enumerate(samples, start=1):
        row = getattr(sample, "row", position)
        if len(sample.input_ids) != len(sample.labels):
            raise DataError(
                f"row {row}: {len(sample.input_ids)} tokens but {len(sample.labels)} labels; they must match"
            )
        if all(label == -100 for label in sample.labels[1:]):
            raise DataError(
                f"row {row}: no supervised token, so no loss and no gradient; give it a completion or drop it"
            )


def plan_batches(
    lengths: Sequence[int], *, max_tokens: int, max_samples: int, seed: int, shuffle: bool = True
) -> list[list[int]]:
    """Group samples so that a padded batch has at most `max_tokens` tokens and `max_samples` rows.

    Samples are sorted by length (ties in random order) and cut greedily; then the *order of the batches* is
    shuffled, because a length-sorted stream would drag an online clusterer from short samples to long ones.
    A sample longer than `max_tokens` is a batch of its own. The plan depends only on the arguments.
    """
    rng = np.random.default_rng(seed)
    ties = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    order = np.lexsort((ties, np.asarray(lengths)))
    batches: list[list[int]] = []
    for index in order.tolist():
        # ascending lengths: the newest sample is the longest of its batch
        fits = batches and len(batches[-1]) < max_samples
        if fits and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    if shuffle:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches


def right_padded(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """input_ids and labels (b, T) with all padding moved to the right, cut to what the longest sample needs; lengths.

    T is the longest sample's length, rounded up to repeat (see `repeated_size`) where the batch is as wide. A causal
    model never looks right, so right-padded rows need no attention mask and positions start at 0 in every row, just as
    for the sample alone. Labels of padding are dropped. Raises DataError, naming the row, for a mask with a hole or a
    row without tokens or without a supervised token.
    """
    input_ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if not input_ids.shape == labels.shape == mask.shape or input_ids.dim() != 2:
        shapes = [tuple(t.shape) for t in (input_ids, mask, labels)]
        raise DataError(f"input_ids, attention_mask and labels must be one (b, T) shape, not {shapes}")
    mask = mask != 0
    count = mask.sum(dim=1)
    first = mask.int().argmax(dim=1)
    last = mask.shape[1] - mask.flip(1).int().argmax(dim=1)
    for row in ((last - first) != count).nonzero().flatten().tolist():
        raise DataError(f"row {row + 1} of the batch: its attention mask is empty or has a hole in it")
    length = min(repeated_size(int(count.max())), mask.shape[1])
    take = first[:, None] + torch.arange(length, device=mask.device)
    inside = torch.arange(length, device=mask.device) < count[:, None]
    take = take.clamp(max=mask.shape[1] - 1)
    input_ids = input_ids.gather(1, take)
    labels = labels.gather(1, take).masked_fill(~inside, -100)
    # any token that the embedding knows will do for padding
    input_ids = torch.where(inside, input_ids, input_ids[:, :1])
    for row in (labels[:, 1:] == -100).all(dim=1).nonzero().flatten().tolist():
        raise DataError(f"row {row + 1} of the batch: no supervised token, so no loss and no gradient")
    return input_ids, labels, count.tolist()
