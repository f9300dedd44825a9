"""Unit rows of a tall-thin gradient matrix, seen through column blocks instead of copied.

The method works on unit vectors u_i = g_i / |g_i|, optionally centred: (u_i - mean) / |u_i - mean|.
`UnitRows` holds the raw (M, D) rows and the scalars that turn them into those vectors, and makes them one
block of columns at a time, so an (M, D) matrix is never held twice.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


class RowsTypeError(RowsError, TypeError):
    """What should be an array of numbers is of another type."""


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


@dataclass(frozen=True)
class RowSource:
    """Rows of a matrix too large to hold, made again at every pass with `columns` of its columns held at a time.

    `batches()` yields (indices (b,), rows (b, D)), every row of `shape` (M, D) once, the same bits on every call.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    shape: tuple[int, int]
    columns: int
    device: torch.device


class UnitRows:
    """The valid rows of `rows` (M, D) as unit vectors, minus their mean where `center` is true.

    Attributes: `index` (m,) of the valid rows in the input; `mean` (D,) of the uncentred unit rows, or None, complete
    after the first walk over `blocks`. A RowSource is walked once for every block of columns, and once for `lift`.
    """

    def __init__(self, rows: Tensor | RowSource, *, center: bool):
        self._source = rows if isinstance(rows, RowSource) else None
        if isinstance(rows, RowSource):
            held, self.index = self._fetch(rows, slice(0, rows.columns))
        else:
            held, norms, valid = with_norms(rows)
            self.index = valid.nonzero().squeeze(1)
            if len(self.index) < len(rows):
                held, norms = held[valid], norms[valid]
            self._scale = 1.0 / norms
        # All rows; of a RowSource their first block of columns, until it was used.
        self._held: Tensor | None = held
        self.device, self.dtype = held.device, compute_dtype(held.dtype)
        self.shape = (len(self.index), rows.shape[1])
        self.mean: Tensor | None = None
        if center and self.shape[0]:
            self.mean = torch.zeros(self.shape[1], dtype=self.dtype, device=self.device)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Column blocks (columns, (m, w)) of the unit rows minus their mean."""
        for columns, block in self._unit_blocks():
            if self.mean is not None:
                self.mean[columns] = block.mean(dim=0)
                block -= self.mean[columns]
            yield columns, block

    def lift(self, weights: Tensor) -> Tensor:
        """weights (q, m) times the rows of `blocks`: (q, D). One pass over the rows."""
        weights = weights.to(self.dtype)
        out = torch.zeros(len(weights), self.shape[1], dtype=self.dtype, device=self.device)
        if self._source is None:
            for columns, block in self._unit_blocks():
                out[:, columns] = weights @ (block if self.mean is None else block.sub_(self.mean[columns]))
            return out
        position = torch.full((self._source.shape[0],), -1, dtype=torch.int64, device=self.device)
        position[self.index] = torch.arange(len(self.index), device=self.device)
        for index, rows in self._source.batches():
            rows, norms, valid = with_norms(rows)
            unit = (rows[valid] / norms[valid, None]).to(self.dtype)
            if self.mean is not None:
                unit -= self.mean
            out += weights[:, position[index[valid]]] @ unit
        return out

    def _unit_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        m, dim = self.shape
        width = max(64, BLOCK_ENTRIES // max(m, 1)) if self._source is None else self._source.columns
        for start in range(0, dim, width):
            columns = slice(start, min(start + width, dim))
            if self._source is None:
                assert self._held is not None
                yield columns, self._held[:, columns].to(self.dtype) * self._scale[:, None]
                continue
            block, self._held = self._held if start == 0 else None, None
            yield columns, self._fetch(self._source, columns)[0] if block is None else block

    @staticmethod
    def _fetch(source: RowSource, columns: slice) -> tuple[Tensor, Tensor]:
        """Unit rows (m, w) of a block of columns, and their index (m,) among all rows; one pass."""
        valid = torch.zeros(source.shape[0], dtype=torch.bool, device=source.device)
        block: Tensor | None = None
        for index, rows in source.batches():
            rows, norms, usable = with_norms(rows)
            part = rows[:, columns].to(compute_dtype(rows.dtype)) / norms[:, None]
            if block is None:
                block = part.new_zeros(source.shape[0], part.shape[1])
            block[index], valid[index] = part, usable
        if block is None:
            raise RowsError("the source of validation rows is empty: nothing to cluster")
        found = valid.nonzero().squeeze(1)
        return block if len(found) == len(block) else block[found], found


def is_stream(X) -> bool:
    """An iterable of 2-dimensional batches, rather than one (N, D) array."""
    if isinstance(X, Tensor) or hasattr(X, "__array__") or hasattr(X, "shape"):
        return False
    if isinstance(X, list | tuple):
        return len(X) > 0 and getattr(X[0], "ndim", 0) == 2
    return isinstance(X, Iterable)
