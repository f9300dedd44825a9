"""Unit rows of a tall-thin gradient matrix, seen through column blocks instead of copied.

The method works on unit vectors u_i = g_i / |g_i|, optionally centred: (u_i - mean) / |u_i - mean|.
`UnitRows` holds the raw (M, D) rows and the scalars that turn them into those vectors, and makes them one
block of columns at a time, so an (M, D) matrix is never held twice.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from gradientspace.errors import DataError

# About 4 MB of float32 a block: large enough for the matrix product, small enough for a core's cache.
BLOCK_ENTRIES = 2**20

Rows: TypeAlias = np.ndarray | Tensor


class RowsError(DataError, ValueError):
    """An array does not suit the clusterer. Also a ValueError, as scikit-learn's callers expect."""


class IdenticalRowsError(RowsError):
    """Every row is the same direction, so centring leaves nothing."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else (float32, bfloat16, float16, integers) is computed in
    float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_direction_below(dtype: torch.dtype) -> float:
    """A centred unit row shorter than this is rounding error, not a direction (1e-5 in float32)."""
    return torch.finfo(dtype).eps ** 0.7


def with_norms(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row norms that neither overflow nor vanish: (rows, norms (b,), valid (b,)).

    `rows` come back as they are, except that rows whose squares leave the floating-point range are divided by
    their largest entry (in a copy). A zero row or one with a non-finite entry is not valid, and its norm
    reads 1.
    """
    dtype = compute_dtype(rows.dtype)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    comfortable = torch.isfinite(norms) & (norms > torch.finfo(dtype).tiny ** 0.3)
    if not bool(comfortable.all()):
        odd = (~comfortable).nonzero().squeeze(1)
        peak = rows[odd].abs().amax(dim=1)
        usable = torch.isfinite(peak) & (peak > 0)
        odd, peak = odd[usable], peak[usable]
        if len(odd):
            rows = rows.clone()
            rows[odd] = rows[odd] / peak[:, None]
            norms[odd] = torch.linalg.vector_norm(rows[odd], dim=1, dtype=dtype)
        comfortable[odd] = True
        norms[~comfortable] = 1.0
    return rows, norms, comfortable


class UnitRows:
    """The valid rows of `rows` (M, D) as unit vectors, minus their mean and rescaled where `center` is true.

    Attributes: `index` (m,) of the valid rows in the input; `mean` (D,) of the uncentred unit rows, or None;
    `norms` (m,) float64 lengths of the centred rows before rescaling (0 where only rounding is left).
    """

    def __init__(self, rows: Tensor, *, center: bool):
        rows, norms, valid = with_norms(rows)
        self.index = valid.nonzero().squeeze(1)
        if len(self.index) < len(rows):
            rows, norms = rows[valid], norms[valid]
        self._rows = rows
        self._scale = 1.0 / norms
        self.dtype = compute_dtype(rows.dtype)
        self.shape = (rows.shape[0], rows.shape[1])
        self.mean = self._mean() if center and len(rows) else None
        self.norms = self._norms()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Column blocks (columns, (m, w)) of the centred unit rows, before the rescaling by `norms`."""
        return self._blocks(self.mean)

    def inverse_norms(self) -> Tensor:
        """1 / norms, and 0 for the rows without a direction: they drop out of every sum."""
        return torch.where(self.norms > 0, 1.0 / self.norms, torch.zeros_like(self.norms))

    def lift(self, weights: Tensor) -> Tensor:
        """weights (q, m) times the final unit rows: (q, D). One pass over the rows."""
        scaled = (weights * self.inverse_norms()).to(self.dtype)
        out = torch.empty(len(weights), self.shape[1], dtype=self.dtype, device=self._rows.device)
        for columns, block in self.blocks():
            out[:, columns] = scaled @ block
        return out

    def _blocks(self, mean: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        m, dim = self.shape
        width = max(64, BLOCK_ENTRIES // max(m, 1))
        for start in range(0, dim, width):
            columns = slice(start, min(start + width, dim))
            block = self._rows[:, columns].to(self.dtype) * self._scale[:, None]
            if mean is not None:
                block -= mean[columns]
            yield columns, block

    def _mean(self) -> Tensor:
        mean = torch.empty(self.shape[1], dtype=self.dtype, device=self._rows.device)
        for columns, block in self._blocks(None):
            mean[columns] = block.mean(dim=0)
        return mean

    def _norms(self) -> Tensor:
        squares = torch.zeros(self.shape[0], dtype=torch.float64, device=self._rows.device)
        for _, block in self.blocks():
            squares += block.square().sum(dim=1)
        norms = squares.sqrt()
        return torch.where(norms > no_direction_below(self.dtype), norms, torch.zeros_like(norms))


def is_stream(X) -> bool:
    """An iterable of 2-dimensional batches, rather than one (N, D) array."""
    if isinstance(X, Tensor) or hasattr(X, "__array__") or hasattr(X, "shape"):
        return False
    if isinstance(X, list | tuple):
        return len(X) > 0 and getattr(X[0], "ndim", 0) == 2
    return isinstance(X, Iterable)
