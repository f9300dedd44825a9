"""The spectrum of a validation gradient matrix and the number of clusters that it shows.

`gradient_svd` takes G (M, D) with M in the hundreds and D in the hundreds of thousands to millions. It never
forms a D x D matrix: eigenvalues and right singular vectors come from the M x M Gram matrix (float64 eigh).
`estimate_rank` reads three criteria off the spectrum and combines them into one answer, or says that the data
do not give one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from gradientspace.unit_rows import IdenticalRowsError, RowsError, UnitRows

SIGN_BIT = -(2**31)
DRAWS_PER_WORD = 32
PERCENTILE = 95.0
STANDARD_DEVIATIONS = 3.0
N_REPLICATES = 20
REPLICATE_SHARE = 0.8
# An eigengap overrules a saturated parallel analysis only where nobody would argue with it.
DECISIVE_RATIO = 2.0
DECISIVE_AGREEMENT = 0.9


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


@dataclass(frozen=True)
class RankEstimate:
    """How many clusters the spectrum shows, and why.

    `n_clusters`: None when undetermined, 1 when there is no structure. `confidence`: the share of 20 random
    80 % subsamples of the rows that give the same answer. `criteria`: for each of `parallel`, `eigengap` and
    `energy` its own `n_clusters` (None where it saturates at `k_max`) and its evidence. `spectrum`: leading
    eigenvalues of the Gram matrix of unit rows (their sum over all is the number of rows).
    """

    n_clusters: int | None
    confidence: float
    reason: str
    criteria: dict[str, dict]
    spectrum: list[float]
    n_rows: int
    centred: bool
    k_min: int
    k_max: int
    null_spectrum: list[float] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain types only: goes into JSON as it is."""
        return asdict(self)


def gradient_svd(
    rows: Tensor,
    n_components: int,
    *,
    center: bool = True,
    n_draws: int = 0,
    generator: torch.Generator | None = None,
) -> GradientSVD:
    """SVD of the unit rows of `rows` (M, D), centred by their mean where `center` is true.

    `n_components` is an upper bound for q: no component is made for a singular value that is zero up to
    rounding. `n_draws` sign-flipped copies are taken for parallel analysis (see `_gram_matrices`). Cost
    O(M^2 D) for the Gram matrix, the same again for each draw. Memory beyond `rows`: q D. Raises RowsError
    when no row has a direction (all zero, non-finite, or identical).
    """
    unit = UnitRows(rows, center=center)
    if len(unit.index) == 0:
        raise RowsError(f"all {len(rows)} validation rows are zero or non-finite: check losses and labels")
    gram, null_grams = _gram_matrices(unit, n_draws, generator)
    with threadpool_limits(1):
        values, vectors = (
            torch.from_numpy(part).to(gram.device) for part in np.linalg.eigh(gram.cpu().numpy())
        )
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # Rounding in float32 products leaves eigenvalues of about eps * sqrt(M) * the largest.
    floor = max(float(values[0]), 1.0) * torch.finfo(unit.dtype).eps * 4 * len(gram) ** 0.5
    rank = int((values > floor).sum())
    if rank == 0:
        raise IdenticalRowsError(
            f"the {len(unit.index)} validation rows all point the same way: nothing is left"
        )
    values, vectors = values[:rank], vectors[:, :rank]
    # An eigenvector's sign is arbitrary; the largest entry positive makes it the same on every machine.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    q = min(n_components, rank)
    singular = values.sqrt()
    return GradientSVD(
        singular_values=singular,
        components=unit.lift((vectors[:, :q] / singular[:q]).T),
        coordinates=(vectors[:, :q] * singular[:q]).to(unit.dtype),
        explained_energy=values.cumsum(0) / values.sum(),
        mean=unit.mean,
        index=unit.index,
        gram=gram,
        null_grams=null_grams,
    )


def _gram_matrices(unit: UnitRows, n_draws: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Gram matrix (m, m) float64 of the final unit rows, and of `n_draws` copies with random signs, entry by
    entry.

    Flipping the sign of every entry of G on its own keeps each entry's size, so row lengths, heavy tails and
    the energy of every column survive, but no direction is shared between rows any more (Hong, Sheng,
    Dobriban 2020). Each block of columns is flipped in place for all draws: one random 32-bit word an entry
    serves 32 draws. The result is exact; nothing is subsampled.
    """
    m, device = unit.shape[0], unit.norms.device
    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    null = torch.zeros(n_draws, m, m, dtype=torch.float32, device=device)
    for _, block in unit.blocks():
        gram += (block @ block.T).double()
        for draw, flipped in enumerate(_sign_flips(block.float(), n_draws, generator)):
            null[draw].addmm_(flipped, flipped.T)
    inverse = unit.inverse_norms()
    outer = inverse[:, None] * inverse[None, :]
    return gram * outer, null * outer.float()


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


def estimate_rank(
    svd: GradientSVD,
    *,
    k_min: int = 1,
    k_max: int = 16,
    energy: float = 0.9,
    generator: torch.Generator | None = None,
) -> RankEstimate:
    """Number of clusters from the spectrum of `svd`, which must hold sign-flipped draws.

    Parallel analysis decides: direction k counts while its eigenvalue exceeds what sign-flipped rows of the
    same remaining energy reach. r directions make r + 1 clusters when centred (K means around their mean span
    K - 1 directions), else max(1, r). More than `k_max` clusters: undetermined, unless the eigengap is
    decisive. Eigengap and cumulative energy are reported beside it. Raises RowsError without draws.
    """
    if len(svd.null_grams) < 2:
        raise RowsError("the rank estimate needs sign-flipped draws: call gradient_svd with n_draws >= 2")
    centred = svd.centred
    spectrum = _descending(svd.gram)
    null_spectra = _descending(svd.null_grams)
    parallel = _parallel_analysis(spectrum, null_spectra, centred, k_max)
    eigengap = _eigengap(spectrum, null_spectra, centred, k_max)
    cumulative = _cumulative_energy(svd.explained_energy, energy, centred, k_max)
    replicates = _replicate_spectra(svd, generator)
    spread = parallel["threshold"] - parallel["null_median"]
    answer, reason, agreeing = parallel["n_clusters"], _reason(parallel, k_max), 0
    for rows, null_top in replicates:
        again, _ = _significant(rows, null_top + spread, k_max)
        agreeing += _clusters(again, centred, k_max) == answer
    if answer is None and eigengap["ratio"] >= DECISIVE_RATIO and eigengap["n_clusters"] is not None:
        same = [_gap_position(rows, centred, k_max) == eigengap["position"] for rows, _ in replicates]
        if sum(same) >= DECISIVE_AGREEMENT * len(same):
            answer, agreeing = eigengap["n_clusters"], sum(same)
            reason += f"; but eigenvalue {eigengap['position']} is {eigengap['ratio']:.1f} times the next"
    if answer is not None and answer < k_min:
        answer, reason = k_min, f"{reason}; raised to k_min = {k_min}"
    return RankEstimate(
        n_clusters=answer,
        confidence=agreeing / len(replicates),
        reason=reason,
        criteria={"parallel": parallel, "eigengap": eigengap, "energy": cumulative},
        spectrum=[float(v) for v in spectrum[: 2 * k_max]],
        null_spectrum=[float(v) for v in np.median(null_spectra, axis=0)[: 2 * k_max]],
        n_rows=len(svd.gram),
        centred=centred,
        k_min=k_min,
        k_max=k_max,
    )


def _descending(grams: Tensor) -> np.ndarray:
    """Eigenvalues (..., m) of Gram matrices (..., m, m), largest first.

    On one core: at a few hundred rows it takes 10 ms, and LAPACK's threads wait for each other for seconds on
    a machine that is busy with something else.
    """
    with threadpool_limits(1):
        return np.linalg.eigvalsh(grams.double().cpu().numpy())[..., ::-1].clip(min=0)


def _clusters(rank: int, centred: bool, k_max: int) -> int | None:
    n_clusters = rank + 1 if centred else max(1, rank)
    return n_clusters if n_clusters <= k_max else None


def _usable(spectrum: np.ndarray) -> int:
    """Dimensions that the rows fill: eigenvalues above the rounding of float32 products."""
    return max(1, int((spectrum > spectrum[0] * 1e-5).sum()))


def _significant(spectrum: np.ndarray, threshold: float, k_max: int) -> tuple[int, list[float]]:
    """Number of significant directions, and the thresholds met, the first failed one included.

    `threshold` is the largest eigenvalue that pure noise reaches, as a multiple of its mean eigenvalue; for
    direction k it is scaled by the energy that a dimension has left once the k - 1 directions above are taken
    out. Without that, signal would inflate its own yardstick (Dobriban and Owen 2019 deflate for the same
    reason), and comparing with the k-th null eigenvalue would let noise through.
    """
    usable, remaining = _usable(spectrum), float(spectrum.sum())
    thresholds: list[float] = []
    for k in range(min(k_max + 1, usable)):
        thresholds.append(threshold * remaining / (usable - k))
        if spectrum[k] <= thresholds[-1]:
            return k, thresholds
        remaining -= float(spectrum[k])
    return len(thresholds), thresholds


def _relative_top(null_spectra: np.ndarray) -> np.ndarray:
    """Largest null eigenvalue of each draw as a multiple of the mean one."""
    usable = max(_usable(spectrum) for spectrum in null_spectra)
    return null_spectra[:, 0] * usable / null_spectra.sum(axis=1)


def _parallel_analysis(spectrum: np.ndarray, null_spectra: np.ndarray, centred: bool, k_max: int) -> dict:
    """Directions above the null.

    The 19th of 20 draws is exceeded by chance in 2 cases of 21, too often for "there is structure". So a
    direction must pass both the 95th percentile of the draws and their mean plus three standard deviations.
    """
    top = _relative_top(null_spectra)
    percentile, strict = np.percentile(top, PERCENTILE), top.mean() + STANDARD_DEVIATIONS * top.std(ddof=1)
    threshold = float(max(percentile, strict))
    directions, thresholds = _significant(spectrum, threshold, k_max)
    return {
        "n_clusters": _clusters(directions, centred, k_max),
        "directions": directions,
        "eigenvalues": [float(v) for v in spectrum[: len(thresholds)]],
        "thresholds": thresholds,
        "threshold": threshold,
        "null_percentile": float(percentile),
        "null_median": float(np.median(top)),
        "draws": len(top),
    }


def _gap_position(spectrum: np.ndarray, centred: bool, k_max: int) -> int:
    """k of the largest ratio of eigenvalue k to eigenvalue k + 1, for k that make at most `k_max`
    clusters."""
    return 1 + int(np.argmax(_gap_ratios(spectrum, centred, k_max)))


def _gap_ratios(spectrum: np.ndarray, centred: bool, k_max: int) -> np.ndarray:
    last = max(1, min(k_max - centred, _usable(spectrum) - 1))
    floor = max(float(spectrum[0]), 1.0) * 1e-12
    return spectrum[..., :last] / np.maximum(spectrum[..., 1 : last + 1], floor)


def _eigengap(spectrum: np.ndarray, null_spectra: np.ndarray, centred: bool, k_max: int) -> dict:
    if len(spectrum) < 2:
        return {"n_clusters": 1, "position": 0, "ratio": 1.0, "null_ratio": 1.0}
    ratios = _gap_ratios(spectrum, centred, k_max)
    position = 1 + int(np.argmax(ratios))
    null = [float(_gap_ratios(row, centred, k_max).max()) for row in null_spectra]
    null_ratio = float(np.percentile(null, PERCENTILE))
    ratio = float(ratios[position - 1])
    found = ratio > null_ratio
    return {
        "n_clusters": _clusters(position, centred, k_max) if found else 1,
        "position": position,
        "ratio": ratio,
        "null_ratio": null_ratio,
    }


def _cumulative_energy(explained: Tensor, energy: float, centred: bool, k_max: int) -> dict:
    reached = int((explained < energy).sum()) + 1
    return {
        "n_clusters": _clusters(reached, centred, k_max),
        "directions": reached,
        "energy": energy,
        "energy_at_k_max": float(explained[min(k_max, len(explained)) - 1]),
    }


def _replicate_spectra(svd: GradientSVD, generator: torch.Generator | None) -> list[tuple[np.ndarray, float]]:
    """Spectra of random subsamples of the rows, each with the top null eigenvalue of one sign-flipped
    draw."""
    m, draws = len(svd.gram), len(svd.null_grams)
    size = max(1, round(REPLICATE_SHARE * m))
    device = generator.device if generator is not None else torch.device("cpu")
    pairs = []
    for replicate in range(N_REPLICATES):
        chosen = torch.randperm(m, generator=generator, device=device)[:size].to(svd.gram.device)
        null = svd.null_grams[replicate % draws][chosen][:, chosen]
        null_top = _relative_top(_descending(null)[None])[0]
        pairs.append((_descending(svd.gram[chosen][:, chosen]), float(null_top)))
    return pairs


def _reason(parallel: dict, k_max: int) -> str:
    directions = parallel["directions"]
    if parallel["n_clusters"] is None:
        return f"directions for more than k_max = {k_max} clusters stand above noise: undetermined"
    if directions == 0:
        return "no direction stands above sign-flipped noise: no structure, one cluster"
    return f"{directions} direction{'s' if directions > 1 else ''} above sign-flipped noise"
