"""A truncated singular value decomposition that follows a stream of rows, in one pass and constant memory."""

import math

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from gradientspace.clustering.unit_rows import RowsError


class RunningSVD:
    """Leading `n_components` singular directions of all rows seen so far (Brand 2002, without a mean).

    Every `update` decomposes the kept factor S V together with the new rows through their (r + b) x (r + b)
    Gram matrix, and keeps the leading r directions: O((r + b)^2 D) time, (r + b) D memory. What a truncation
    drops is gone, so r should exceed the rank that matters; `dropped_energy` is the sum of squared singular
    values dropped.

    `singular_values` (r,) float64, descending; `components` (r, D), orthonormal rows; `n_rows` seen. Start
    from a validation sample with `RunningSVD(q, svd.components, svd.singular_values)`, or empty.
    """

    def __init__(self, n_components: int, components: Tensor | None = None, singular_values: Tensor | None = None):
        if (components is None) != (singular_values is None):
            raise RowsError("components and singular_values come together")
        self.n_components = n_components
        self.n_rows = 0
        self.dropped_energy = 0.0
        self.components: Tensor | None = None
        self.singular_values = torch.zeros(0, dtype=torch.float64)
        if components is not None and singular_values is not None:
            self.components = components[:n_components].clone()
            self.singular_values = singular_values[: len(self.components)].double().cpu()

    def update(self, rows: Tensor) -> "RunningSVD":
        """Take in rows (b, D), used as they come: make them unit and centred before, if that is wanted."""
        self.n_rows += len(rows)
        if self.components is None:
            self.components = rows.new_zeros(0, rows.shape[1])
        old, kept = self.components, len(self.components)
        scale = self.singular_values.to(rows)
        gram = torch.zeros(kept + len(rows), kept + len(rows), dtype=torch.float64)
        gram[:kept, :kept] = self.singular_values.square().diag()
        gram[kept:, kept:] = (rows @ rows.T).double().cpu()
        gram[kept:, :kept] = ((rows @ old.T) * scale).double().cpu()
        gram[:kept, kept:] = gram[kept:, :kept].T
        with threadpool_limits(1):
            values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        floor = float(values[0]) * torch.finfo(rows.dtype).eps * math.sqrt(len(values))
        r = min(self.n_components, int((values > floor).sum()))
        self.dropped_energy += float(values[r:].sum())
        self.singular_values = values[:r].sqrt()
        weights = (vectors[:, :r] / self.singular_values).T.to(rows)
        self.components = (weights[:, :kept] * scale) @ old + weights[:, kept:] @ rows
        return self


def largest_angle(one: Tensor, two: Tensor) -> float:
    """Largest principal angle in degrees between the row spaces of two orthonormal bases (r, D) of equal
    rank.

    From its sine, the norm of what `two` does not see of `one`: exact for small angles, where a cosine is
    not.
    """
    outside = one - (one @ two.T) @ two
    sine = float(torch.linalg.matrix_norm(outside.double(), ord=2))
    return math.degrees(math.asin(min(1.0, sine)))
