"""Who pulls against whom: inner products of a sample of unit gradients, and what they say of groups.

The Gram matrix of M uncentred unit gradients is M x M numbers whatever their dimension, so every question of the kind
"does source A pull against source B" is answered later, from a file, for any grouping. Uncentred, because centring
makes groups point apart by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradientspace.damage import reading, require

if TYPE_CHECKING:
    from torch import Tensor

    from gradientspace.clustering import RowSource

FILE = "validation.parquet"


def unit_gram(gradients: Tensor | RowSource) -> np.ndarray:
    """Inner products (M, M) float64 of the rows (M, D) as unit vectors; NaN for a row without a direction."""
    import torch

    from gradientspace.clustering.unit_rows import UnitRows

    unit = UnitRows(gradients, center=False)
    gram = torch.zeros(len(unit.index), len(unit.index), dtype=torch.float64)
    for _, block in unit.blocks():
        gram += (block @ block.T).double().cpu()
    full = np.full((gradients.shape[0], gradients.shape[0]), np.nan)
    kept = unit.index.cpu().numpy()
    full[np.ix_(kept, kept)] = gram.numpy()
    return full


def write_gram(path: Path, ids: Sequence[str], gram: np.ndarray) -> None:
    """`id` and `inner_products`, a list of M float32, one row a validation sample."""
    values = pa.FixedSizeListArray.from_arrays(gram.astype(np.float32).ravel(), len(gram))
    pq.write_table(pa.table({"id": list(ids), "inner_products": values}), path)


def read_gram(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids and Gram matrix (M, M) that `write_gram` wrote."""
    with reading(path, "cluster the run again"):
        table = pq.read_table(path)
        gram = np.stack(table["inner_products"].to_numpy()).astype(np.float64)
        require(gram.shape == (len(table), len(table)), f"a Gram matrix of shape {gram.shape}")
        return table["id"].to_pylist(), gram


def group_inner_products(gram: np.ndarray, labels: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean inner product (S, S) of two different samples, one of each group; NaN where there is no such pair.

    Leaving out a sample's product with itself makes the diagonal an unbiased estimate of |mean gradient|^2.
    """
    usable = np.isfinite(gram).any(axis=1) & (labels >= 0)
    member = (labels[:, None] == np.arange(n_groups)) & usable[:, None]
    sizes = member.sum(axis=0).astype(float)
    clean = np.where(np.isfinite(gram), gram, 0.0)
    sums = member.T.astype(float) @ clean @ member.astype(float)
    pairs = np.outer(sizes, sizes)
    own = np.arange(n_groups)
    sums[own, own] -= member.T.astype(float) @ np.diagonal(clean)
    pairs[own, own] -= sizes
    return np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)


def group_cosines(gram: np.ndarray, labels: np.ndarray, n_groups: int) -> np.ndarray:
    """Cosine (S, S) between the groups' mean gradients, from unbiased estimates, kept within -1 and 1.

    NaN where a group's mean cannot be told from zero (its estimated squared length is not positive).
    """
    products = group_inner_products(gram, labels, n_groups)
    squares = np.diagonal(products)
    lengths = np.sqrt(np.where(squares > 0, squares, np.nan))
    return np.clip(products / np.outer(lengths, lengths), -1.0, 1.0)


def negative_share(gram: np.ndarray) -> float:
    """Share of the pairs of different samples whose gradients point apart (inner product below zero)."""
    upper = gram[np.triu_indices(len(gram), k=1)]
    upper = upper[np.isfinite(upper)]
    return float((upper < 0).mean()) if len(upper) else float("nan")
