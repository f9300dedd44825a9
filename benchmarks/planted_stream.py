"""Planted clusters with known truth, as a stream of rows: the (N, D) matrix never has to exist.

Entries come from generators seeded by (seed, row block, column block), so any part can be made again. Row i is
`sqrt(c) t_k + sqrt(s) t_0 + sqrt(1 - c - s) e`, with unit t_k of its cluster, unit t_0 shared by all, and noise e of
about unit length: two rows of a cluster have cosine c + s, rows of two clusters s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROW_BLOCK, COLUMN_BLOCK = 128, 8192


@dataclass(frozen=True)
class Planted:
    """What is planted. `imbalance`: size of the largest cluster over the smallest, sizes geometric between
    them. `noise_decay` a: column j of the noise has a standard deviation proportional to (1 + j)^-a before
    rescaling, so that it fills few effective dimensions as gradients do; 0 is isotropic. `drift`: angle in
    degrees by which every cluster direction turns from the first row to the last. `outliers`: share of rows
    that are a different single direction each, ten times as long."""

    n: int = 4096
    dim: int = 100_000
    n_clusters: int = 8
    cosine: float = 0.1
    imbalance: float = 1.0
    common: float = 0.1
    noise_decay: float = 0.0
    drift: float = 0.0
    outliers: float = 0.0
    seed: int = 0

    @property
    def shares(self) -> Tensor:
        """(K,) expected share of every cluster."""
        sizes = torch.logspace(0, 1, self.n_clusters, base=self.imbalance, dtype=torch.float64)
        return sizes / sizes.sum()

    def labels(self) -> Tensor:
        """(N,) the truth; -1 for outliers."""
        labels = torch.multinomial(self.shares, self.n, replacement=True, generator=self._generator(1))
        outlier = torch.rand(self.n, generator=self._generator(2)) < self.outliers
        return torch.where(outlier, -1, labels)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Row blocks (b, D) of the stream, in order, from row `start` to `stop` (multiples of 128)."""
        for block in range(start // ROW_BLOCK, -(-(stop or self.n) // ROW_BLOCK)):
            yield torch.cat([self._cell(block, c) for c in range(-(-self.dim // COLUMN_BLOCK))], dim=1)

    def _generator(self, *key: int) -> torch.Generator:
        mixed = self.seed
        for part in key:
            mixed = (mixed * 1_000_003 + part + 1) % 2**61
        return torch.Generator().manual_seed(mixed)

    def _directions(self, column: int, width: int, kind: int) -> Tensor:
        """(K + 1, w) of the cluster directions, the common one last; unit length and orthogonal up to
        D^-1/2."""
        generator = self._generator(3, column, kind)
        return torch.randn(self.n_clusters + 1, width, generator=generator) / self.dim**0.5

    def _noise_scale(self, start: int, width: int) -> Tensor | float:
        if not self.noise_decay:
            return self.dim**-0.5
        everything = (1.0 + torch.arange(self.dim, dtype=torch.float64)) ** -self.noise_decay
        return (everything[start : start + width] / torch.linalg.vector_norm(everything)).float()

    def _cell(self, row_block: int, column: int) -> Tensor:
        first, start = row_block * ROW_BLOCK, column * COLUMN_BLOCK
        b, width = min(ROW_BLOCK, self.n - first), min(COLUMN_BLOCK, self.dim - start)
        labels = self.labels()[first : first + b]
        noise = torch.randn(b, width, generator=self._generator(4, row_block, column))
        noise *= self._noise_scale(start, width)
        signal = self._directions(column, width, 0)
        if self.drift:
            angle = torch.deg2rad(torch.tensor(self.drift) * (first + torch.arange(b)) / self.n)[:, None]
            turned = self._directions(column, width, 1)
            of_row = angle.cos() * signal[labels] + angle.sin() * turned[labels]
        else:
            of_row = signal[labels]
        cell = self.cosine**0.5 * of_row + self.common**0.5 * signal[-1]
        cell += (1.0 - self.cosine - self.common) ** 0.5 * noise
        alone = torch.randn(b, width, generator=self._generator(5, row_block, column)) * 10 / self.dim**0.5
        return torch.where(labels[:, None] < 0, alone, cell)
