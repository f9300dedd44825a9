"""Which token rows belong to which sample, and the sums over them.

Every layer sees the tokens of a batch as (n, features). A gradient of a (p, q) weight is, for sample i, the
sum over its tokens t of left_t right_t^T. These classes form it for all samples at once.
"""

from __future__ import annotations

from dataclasses import dataclass
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
class PaddedRows:
    """b samples of T rows each, in order; rows of padding carry zero gradient."""

    n_samples: int
    length: int

    def fits(self, n: int) -> bool:
        return n == self.n_samples * self.length

    def outer(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
        left = left.reshape(self.n_samples, self.length, -1)
        right = right.reshape(self.n_samples, self.length, -1)
        if left.shape[2] <= right.shape[2]:
            product = torch.bmm(left.transpose(1, 2), right)
        else:  # measured: the wide result is faster to form and then transpose than the tall one
            product = torch.bmm(right.transpose(1, 2), left).transpose(1, 2)
        out.add_(product) if add else out.copy_(product)

    def sum(self, values: Tensor, out: Tensor, *, add: bool) -> None:
        total = values.reshape(self.n_samples, self.length, -1).sum(dim=1)
        out.add_(total) if add else out.copy_(total)


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """Sample `samples[j]` owns the consecutive rows of the j-th of `lengths`; samples not named own none."""

    samples: tuple[int, ...]
    lengths: tuple[int, ...]

    def fits(self, n: int) -> bool:
        return n == sum(self.lengths)

    def outer(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
        if not add:
            self._clear_others(out)
        for sample, own_left, own_right in self._segments(left, right):
            product = own_left.t() @ own_right
            out[sample].add_(product) if add else out[sample].copy_(product)

    def sum(self, values: Tensor, out: Tensor, *, add: bool) -> None:
        if not add:
            self._clear_others(out)
        for sample, own, _ in self._segments(values, values):
            out[sample].add_(own.sum(dim=0)) if add else out[sample].copy_(own.sum(dim=0))

    def _segments(self, left: Tensor, right: Tensor):
        return zip(self.samples, left.split(self.lengths), right.split(self.lengths), strict=True)

    def _clear_others(self, out: Tensor) -> None:
        if len(self.samples) < len(out):
            out.zero_()


@dataclass(frozen=True, slots=True)
class OneSampleRows:
    """Every row, however many, belongs to one sample."""

    sample: int

    def fits(self, n: int) -> bool:
        return True

    def outer(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
        SegmentRows((self.sample,), (len(left),)).outer(left, right, out, add=add)

    def sum(self, values: Tensor, out: Tensor, *, add: bool) -> None:
        SegmentRows((self.sample,), (len(values),)).sum(values, out, add=add)
