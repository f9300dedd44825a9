"""The singular value decomposition of a validation gradient matrix G (M, D), M in the hundreds, D in the
millions.

It never forms a D x D matrix: eigenvalues and right singular vectors come from the M x M Gram matrix
(float64 eigh). The Gram matrices of sign-flipped copies, which the rank estimate compares with, are made in
the same pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from gradientspace.clustering.unit_rows import IdenticalRowsError, RowsError, RowSource, UnitRows, no_direction_below

SIGN_BIT = -(2**31)
DRAWS_PER_WORD = 32


@dataclass
class GradientSVD:
    """Singular value decomposition of the (centred) unit rows of G.

    `singular_values` (r,) float64, descending, every one above rounding; `components` V (q, D), orthonormal
    rows; `coordinates` z = V u (m, q) of the m valid rows; `explained_energy` (r,) cumulative share of the
    squared singular values; `mean` (D,) or None; `index` (m,) the valid rows; `gram` (m, m) float64 and
    `null_grams` (draws, m, m) float32, what the rank criteria are computed from.
    """

    singular_values: Tensor
    components: Tensor
    coordinates: Tensor
    explained_energy: Tensor
    mean: Tensor | None
    index: Tensor
    gram: Tensor
    null_grams: Tensor

    @property
    def centred(self) -> bool:
        return self.mean is not None


def gradient_svd(
    rows: Tensor | RowSource,
    n_components: int,
    *,
    center: bool = True,
    n_draws: int = 0,
    generator: torch.Generator | None = None,
) -> GradientSVD:
    """SVD of the unit rows of `rows` (M, D), centred by their mean where `center` is true.

    Rows that do not fit in memory come as a `RowSource`; the result is the same up to rounding.

    `n_components` is an upper bound for q: no component is made for a singular value that is zero up to
    rounding. `n_draws` sign-flipped copies are taken for parallel analysis (see `_gram_matrices`). Cost
    O(M^2 D) for the Gram matrix, the same again for each draw. Memory beyond `rows`: q D. Raises RowsError
    when no row has a direction (all zero, non-finite, or identical).
    """
    unit = UnitRows(rows, center=center)
    if len(unit.index) == 0:
        raise RowsError(f"all {rows.shape[0]} validation rows are zero or non-finite: check losses and labels")
    gram, null_grams, inverse = _gram_matrices(unit, n_draws, generator)
    with threadpool_limits(1):
        values, vectors = (torch.from_numpy(part).to(gram.device) for part in np.linalg.eigh(gram.cpu().numpy()))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # Rounding in float32 products leaves eigenvalues of about eps * sqrt(M) * the largest.
    floor = max(float(values[0]), 1.0) * torch.finfo(unit.dtype).eps * 4 * len(gram) ** 0.5
    rank = int((values > floor).sum())
    if rank == 0:
        raise IdenticalRowsError(f"all {len(unit.index)} validation rows point the same way: centring leaves nothing")
    values, vectors = values[:rank], vectors[:, :rank]
    # An eigenvector's sign is arbitrary; the largest entry positive makes it the same on every machine.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    q = min(n_components, rank)
    singular = values.sqrt()
    return GradientSVD(
        singular_values=singular,
        components=unit.lift((vectors[:, :q] / singular[:q]).T * inverse),
        coordinates=(vectors[:, :q] * singular[:q]).to(unit.dtype),
        explained_energy=values.cumsum(0) / values.sum(),
        mean=unit.mean,
        index=unit.index,
        gram=gram,
        null_grams=null_grams,
    )


def _gram_matrices(unit: UnitRows, n_draws: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix (m, m) float64 of the final unit rows, those of `n_draws` copies with random signs, entry by
    entry, and the inverse length (m,) of the centred rows: 0 for rows without a direction, which so drop out.

    Flipping the sign of every entry of G on its own keeps each entry's size, so row lengths, heavy tails and
    the energy of every column survive, but no direction is shared between rows any more (Hong, Sheng,
    Dobriban 2020). Each block of columns is flipped in place for all draws: one random 32-bit word an entry
    serves 32 draws. The result is exact; nothing is subsampled.
    """
    m, device = unit.shape[0], unit.device
    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    null = torch.zeros(n_draws, m, m, dtype=torch.float32, device=device)
    for _, block in unit.blocks():
        gram += (block @ block.T).double()
        for draw, flipped in enumerate(_sign_flips(block.float(), n_draws, generator)):
            null[draw].addmm_(flipped, flipped.T)
    lengths = gram.diagonal().sqrt()
    inverse = torch.where(lengths > no_direction_below(unit.dtype), 1.0 / lengths, torch.zeros_like(lengths))
    outer = inverse[:, None] * inverse[None, :]
    return gram * outer, null * outer.float(), inverse


def _sign_flips(block: Tensor, n_draws: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """`n_draws` copies of a float32 block with independent random signs; the buffer is reused between
    draws."""
    bits, flipped = block.contiguous().view(torch.int32), torch.empty_like(block)
    buffer = flipped.view(torch.int32)
    word = torch.empty_like(bits)
    for draw in range(n_draws):
        if draw % DRAWS_PER_WORD == 0:
            word.random_(-(2**31), 2**31 - 1, generator=generator)
        torch.bitwise_and(word, SIGN_BIT, out=buffer)
        buffer.bitwise_xor_(bits)
        word.bitwise_left_shift_(1)
        yield flipped
