"""How many clusters a spectrum shows: three criteria, each with its evidence, combined into one answer or
none."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from gradientspace.clustering.svd import GradientSVD
from gradientspace.clustering.unit_rows import RowsError

PERCENTILE = 95.0
STANDARD_DEVIATIONS = 3.0
# Draws that the null of the second and later directions is averaged over; its spread is that of all draws.
DEFLATED_DRAWS = 3
N_REPLICATES = 20
REPLICATE_SHARE = 0.8
# An eigengap overrules a saturated parallel analysis only where nobody would argue with it.
DECISIVE_RATIO = 2.0
DECISIVE_AGREEMENT = 0.9
# "No structure" is an answer only where two equal clusters of this cosine would have shown.
VISIBLE_COSINE = 0.1


@dataclass(frozen=True)
class RankEstimate:
    """How many clusters the spectrum shows, and why.

    `n_clusters`: None when undetermined, 1 when there is no structure. `confidence`: the share of 20 random
    80 % subsamples of the rows that give the same answer. `criteria`: for each of `parallel`, `eigengap` and
    `energy` its own `n_clusters` (None where it saturates at `k_max`) and its evidence. `spectrum`: leading
    eigenvalues of the Gram matrix of unit rows (their sum over all is the number of rows); `null_spectrum`:
    the same of sign-flipped rows, median over draws.
    """

    n_clusters: int | None
    confidence: float
    reason: str
    criteria: dict[str, dict]
    spectrum: list[float]
    null_spectrum: list[float]
    n_rows: int
    centred: bool
    k_min: int
    k_max: int

    def to_dict(self) -> dict:
        """Plain types only: goes into JSON as it is."""
        return asdict(self)


@threadpool_limits.wrap(limits=1)
def estimate_rank(
    svd: GradientSVD,
    *,
    k_min: int = 1,
    k_max: int = 16,
    energy: float = 0.9,
    generator: torch.Generator | None = None,
) -> RankEstimate:
    """Number of clusters from the spectrum of `svd`, which must hold sign-flipped draws.

    Parallel analysis decides: direction k counts while its eigenvalue exceeds what sign-flipped rows reach. r
    directions make r + 1 clusters when centred (K means around their mean span K - 1 directions), else max(1,
    r). More than `k_max` clusters: undetermined, unless the eigengap is decisive (the largest eigenvalue
    ratio is at least 2, and at the same place in 90 % of the subsamples). No direction: one cluster, unless noise is
    so strong in a few directions that two equal clusters of cosine 0.1 would not show either: undetermined.
    Cumulative energy is only reported: on gradients it saturates. Raises RowsError without draws.
    """
    if len(svd.null_grams) < 2:
        raise RowsError("the rank estimate needs sign-flipped draws: call gradient_svd with n_draws >= 2")
    spectrum, null = _Spectrum(svd.gram.cpu().numpy()), svd.null_grams.double().cpu().numpy()
    null_spectra = np.linalg.eigvalsh(null)[:, ::-1].clip(min=0)
    limit = k_max + 1 - svd.centred  # as many directions make more than k_max clusters
    parallel = _parallel_analysis(spectrum, null, null_spectra, limit)
    eigengap = _eigengap(spectrum, null_spectra, limit)
    for evidence in (parallel, eigengap):
        evidence["n_clusters"] = _clusters(evidence["directions"], svd.centred, k_max)
    answer, reason = parallel["n_clusters"], _reason(parallel["directions"], limit, k_max)
    replicates = _replicates(svd.gram.cpu().numpy(), null, generator)
    agreeing = sum(_same_rank(*pair, parallel["directions"], parallel["margin"], limit) for pair in replicates)
    if answer is None and eigengap["ratio"] >= DECISIVE_RATIO:
        same = sum(_gap_position(part, limit) == eigengap["position"] for part, _ in replicates)
        if same >= DECISIVE_AGREEMENT * N_REPLICATES:
            answer, agreeing = eigengap["n_clusters"], same
            reason += f"; but eigenvalue {eigengap['position']} is {eigengap['ratio']:.1f} times the next"
    if parallel["directions"] == 0 and parallel["visible_cosine"] > VISIBLE_COSINE:
        answer = None
        reason = (
            "no direction stands above sign-flipped noise, but two clusters would only show from a cosine of "
            f"{parallel['visible_cosine']:.2f}: undetermined"
        )
    if answer is not None and answer < k_min:
        answer, reason = k_min, f"{reason}; raised to k_min = {k_min}"
    return RankEstimate(
        n_clusters=answer,
        confidence=agreeing / N_REPLICATES,
        reason=reason,
        criteria={
            "parallel": parallel,
            "eigengap": eigengap,
            "energy": _cumulative_energy(spectrum, energy, svd.centred, k_max),
        },
        spectrum=spectrum.values[: 2 * k_max].tolist(),
        null_spectrum=np.median(null_spectra, axis=0)[: 2 * k_max].tolist(),
        n_rows=len(svd.gram),
        centred=svd.centred,
        k_min=k_min,
        k_max=k_max,
    )


class _Spectrum:
    """Eigenvalues of a Gram matrix, largest first, and what its rows have left without the leading
    directions."""

    def __init__(self, gram: np.ndarray):
        values, vectors = np.linalg.eigh(gram)
        self.values, self._vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        self._energies = np.diagonal(gram)
        # Dimensions that the rows fill: eigenvalues above the rounding of float32 products.
        self.usable = max(1, int((self.values > self.values[0] * 1e-5).sum()))

    def residual_lengths(self, k: int) -> np.ndarray:
        """Length (m,) of every row outside the leading k directions."""
        taken = self._vectors[:, :k] ** 2 @ self.values[:k]
        return np.sqrt((self._energies - taken).clip(min=0))


def _noise_level(spectrum: _Spectrum, k: int, null: np.ndarray) -> float:
    """Largest eigenvalue of sign-flipped rows (draws, m, m) that are as long as the real ones are without
    their leading k directions, averaged over the draws.

    Deflating matters twice: with the signal left in, it would inflate its own yardstick (Dobriban and Owen
    2019), and rows of a large or tight cluster have another share of noise than the rest.
    """
    lengths = spectrum.residual_lengths(k)
    top = [float(np.linalg.eigvalsh(gram * np.outer(lengths, lengths))[-1]) for gram in null]
    # The residual rows fill fewer dimensions than the flipped ones, with the same energy.
    return float(np.mean(top)) * min(len(lengths), spectrum.usable + 1) / max(1, spectrum.usable - k)


def _parallel_analysis(spectrum: _Spectrum, null: np.ndarray, null_spectra: np.ndarray, limit: int) -> dict:
    """Directions above the null, up to `limit`.

    The 19th of 20 draws is exceeded by chance in 2 cases of 21, too often for "there is structure". So a
    direction must pass both the 95th percentile of the draws and their mean plus three standard deviations.
    That margin is found once, from all draws, as a multiple of their mean.
    """
    top = null_spectra[:, 0]
    percentile = float(np.percentile(top, PERCENTILE))
    margin = max(percentile, float(top.mean() + STANDARD_DEVIATIONS * top.std(ddof=1))) / float(top.mean())
    directions, thresholds = 0, []
    while directions < min(limit, spectrum.usable):
        draws = null if directions == 0 else null[:DEFLATED_DRAWS]
        thresholds.append(margin * _noise_level(spectrum, directions, draws))
        if spectrum.values[directions] <= thresholds[-1]:
            break
        directions += 1
    return {
        "directions": directions,
        "eigenvalues": spectrum.values[: len(thresholds)].tolist(),
        "thresholds": thresholds,
        "margin": margin,
        # Two equal clusters of cosine c have an eigenvalue of m c / 2.
        "visible_cosine": 2 * thresholds[0] / len(null_spectra[0]),
        "null_percentile": percentile,
        "null_mean": float(top.mean()),
        "draws": len(top),
    }


def _same_rank(spectrum: _Spectrum, null: np.ndarray, directions: int, margin: float, limit: int) -> bool:
    """Whether a subsample of the rows shows the same number of directions."""

    def significant(k: int) -> bool:
        return k < spectrum.usable and spectrum.values[k] > margin * _noise_level(spectrum, k, null)

    enough = directions == 0 or significant(directions - 1)
    return bool(enough and (directions >= limit or not significant(directions)))


def _replicates(
    gram: np.ndarray, null: np.ndarray, generator: torch.Generator | None
) -> list[tuple[_Spectrum, np.ndarray]]:
    """Random subsamples of the rows, each with one sign-flipped draw (1, m', m') of the same rows."""
    m = len(gram)
    device = generator.device if generator is not None else "cpu"
    pairs = []
    for replicate in range(N_REPLICATES):
        order = torch.randperm(m, generator=generator, device=device)
        chosen = np.ix_(*2 * [order[: max(1, round(REPLICATE_SHARE * m))].sort().values.cpu().numpy()])
        pairs.append((_Spectrum(gram[chosen]), null[replicate % len(null)][chosen][None]))
    return pairs


def _clusters(directions: int, centred: bool, k_max: int) -> int | None:
    n_clusters = directions + 1 if centred else max(1, directions)
    return n_clusters if n_clusters <= k_max else None


def _gap_ratios(values: np.ndarray, usable: int, limit: int) -> np.ndarray:
    """Eigenvalue k over eigenvalue k + 1, for every k below `limit`."""
    last = max(1, min(limit - 1, usable - 1))
    return values[:last] / np.maximum(values[1 : last + 1], values[0] * 1e-12)


def _gap_position(spectrum: _Spectrum, limit: int) -> int:
    return 1 + int(np.argmax(_gap_ratios(spectrum.values, spectrum.usable, limit)))


def _eigengap(spectrum: _Spectrum, null_spectra: np.ndarray, limit: int) -> dict:
    """Where the largest ratio of neighbouring eigenvalues lies, beside what noise alone gives. `directions`
    is 0 where noise does as well."""
    if spectrum.usable < 2:
        return {"directions": 0, "position": 0, "ratio": 1.0, "null_ratio": 1.0}
    position = _gap_position(spectrum, limit)
    ratio = float(_gap_ratios(spectrum.values, spectrum.usable, limit)[position - 1])
    null = [float(_gap_ratios(values, spectrum.usable, limit).max()) for values in null_spectra]
    null_ratio = float(np.percentile(null, PERCENTILE))
    directions = position if ratio > null_ratio else 0
    return {"directions": directions, "position": position, "ratio": ratio, "null_ratio": null_ratio}


def _cumulative_energy(spectrum: _Spectrum, energy: float, centred: bool, k_max: int) -> dict:
    share = spectrum.values.cumsum() / spectrum.values.sum()
    reached = int((share < energy).sum()) + 1
    return {
        "n_clusters": _clusters(reached, centred, k_max),
        "directions": reached,
        "energy": energy,
        "energy_at_k_max": float(share[min(k_max, len(share)) - 1]),
    }


def _reason(directions: int, limit: int, k_max: int) -> str:
    if directions >= limit:
        return f"directions for more than k_max = {k_max} clusters stand above noise: undetermined"
    if directions == 0:
        return "no direction stands above sign-flipped noise: no structure, one cluster"
    return f"{directions} direction{'s' if directions > 1 else ''} above sign-flipped noise"
