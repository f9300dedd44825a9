"""Random projection of gradients, for the baselines that need one; GradientSpace itself projects nothing.

A sparse Johnson-Lindenstrauss transform (Kane and Nelson 2014): every coordinate is added, with a random sign, to one
random number in each of `SIGNS` equal blocks of the result. It is drawn from a seed, takes 36 D bytes (9 a sign; a
dense matrix to 8,192 numbers would take 32,768 D) and keeps inner products up to 1 / sqrt(width).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from gradientspace.errors import ConfigError

SIGNS = 4
ROWS = "rows"


class SparseProjection:
    """(b, dim) -> (b, width) float32. `width` is a multiple of `SIGNS`."""

    def __init__(self, dim: int, width: int, seed: int) -> None:
        if width < SIGNS or width % SIGNS:
            raise ConfigError(f"a projection has {width} numbers; it must be a multiple of {SIGNS}")
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        block = width // SIGNS
        self.bins = [torch.randint(block, (dim,), generator=generator) + i * block for i in range(SIGNS)]
        self.signs = [(torch.randint(2, (dim,), generator=generator) * 2 - 1).to(torch.int8) for _ in range(SIGNS)]

    def __call__(self, gradients: Tensor) -> Tensor:
        result = torch.zeros(len(gradients), self.width, dtype=torch.float32, device=gradients.device)
        for bins, signs in zip(self.bins, self.signs, strict=True):
            result.index_add_(1, bins.to(gradients.device), gradients * signs.to(gradients.device))
        return result / SIGNS**0.5


def fold(rows: np.ndarray, width: int) -> np.ndarray:
    """(n, p) projected rows -> (n, width): sums of neighbours, which is what projecting to `width` at once gives.

    `width` divides p and is a multiple of `SIGNS`, so that no sum crosses a block.
    """
    if rows.shape[1] % width or width % SIGNS:
        raise ConfigError(f"rows of {rows.shape[1]} numbers do not fold to {width}: it must divide them, and be 4 n")
    return rows.reshape(len(rows), width, -1).sum(axis=2)


class ProjectedRows:
    """The projections of n gradients as unit rows, collected batch by batch; a row without a direction stays zero.

    Kept as 16-bit floats, (n, width): their rounding is far below the projection's own error.
    """

    def __init__(self, n: int, dim: int, width: int, seed: int) -> None:
        self.project = SparseProjection(dim, width, seed)
        self.rows = np.zeros((n, width), dtype=np.float16)

    def add(self, indices: Tensor, gradients: Tensor) -> None:
        """Take over a batch: sample numbers (b,) and their gradients (b, D)."""
        self.put(indices, self.rows_of(gradients))

    def rows_of(self, gradients: Tensor) -> np.ndarray:
        """The unit projections (b, width) of gradients (b, D), as they are kept."""
        return unit(self.project(gradients).cpu().numpy()).astype(np.float16)

    def put(self, indices: Tensor, rows: np.ndarray) -> None:
        """Take over projections (b, width) that `rows_of` made, maybe in another process."""
        self.rows[indices.numpy()] = rows

    def save(self, path: Path) -> None:
        save_file({ROWS: self.rows}, path)

    def load(self, path: Path) -> None:
        """Go on from rows that `save` wrote."""
        self.rows = load_file(path)[ROWS]


def load_rows(path: Path) -> np.ndarray:
    """(n, width) float32 unit rows that `ProjectedRows.save` wrote."""
    return load_file(path)[ROWS].astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; zero and non-finite rows become zero."""
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
