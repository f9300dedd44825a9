"""Which token rows belong to which sample, and the sums over them.

Every layer sees the tokens of a batch as (n, features). A gradient of a (p, q) weight is, for sample i, the
sum over its tokens t of left_t right_t^T. These classes form it for all samples at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor


class TokenRows(Protocol):
    """The owner of each of the n token rows that a layer sees."""

    def fits(self, n: int) -> bool: ...

    def outer(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
        """`out[i]` (p, q) becomes, or grows by, the sum of left_t right_t^T over sample i's rows."""
        ...

    def sum(self, values: Tensor, out: Tensor, *, add: bool) -> None:
        """`out[i]` (p,) becomes, or grows by, the sum of sample i's rows of `values` (n, p)."""
        ...


@dataclass(frozen=True, slots=True)
class ConsecutiveRows:
    """Sample i owns the next `lengths[i]` rows: (T,) * b for a padded batch, whose padding has no gradient."""

    lengths: tuple[int, ...]

    def fits(self, n: int) -> bool:
        return n == sum(self.lengths)

    def outer(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
        first = 0
        for count, own_left, own_right in self._runs(left, right):
            target = out[first : first + count]
            if count == 1 and own_left.dtype == out.dtype:
                target[0].addmm_(own_left[0].t(), own_right[0], beta=float(add))
            else:
                product = _batched_outer(own_left, own_right)
                target.add_(product) if add else target.copy_(product)
            first += count

    def sum(self, values: Tensor, out: Tensor, *, add: bool) -> None:
        first = 0
        for count, own, _ in self._runs(values, values):
            target = out[first : first + count]
            target.add_(own.sum(dim=1)) if add else target.copy_(own.sum(dim=1))
            first += count

    def _runs(self, left: Tensor, right: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Neighbours of equal length together, as (count, length, features)."""
        runs = equal_length_runs(self.lengths)
        sizes = [count * length for count, length in runs]
        for (count, length), own_left, own_right in zip(runs, left.split(sizes), right.split(sizes), strict=True):
            yield count, own_left.reshape(count, length, -1), own_right.reshape(count, length, -1)


@dataclass(frozen=True, slots=True)
class OneSampleRows:
    """Every row, however many, belongs to one sample."""

    sample: int

    def fits(self, n: int) -> bool:
        return True

    def outer(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
        if not add:
            out.zero_()
        out[self.sample].add_(left.t() @ right)

    def sum(self, values: Tensor, out: Tensor, *, add: bool) -> None:
        if not add:
            out.zero_()
        out[self.sample].add_(values.sum(dim=0))


def equal_length_runs(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(count, length) of each run of neighbours of equal length."""
    return [(len(list(run)), length) for length, run in groupby(lengths)]


def _batched_outer(left: Tensor, right: Tensor) -> Tensor:
    """left (b, n, p), right (b, n, q) -> (b, p, q)."""
    if left.shape[2] <= right.shape[2]:
        return torch.bmm(left.transpose(1, 2), right)
    # measured: the wide result is faster to form and then transpose than the tall one
    return torch.bmm(right.transpose(1, 2), left).transpose(1, 2)
