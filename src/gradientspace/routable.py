"""Routable gradients: the part of a gradient that the prompt predicts, and what routing on prompts gains.

At inference only the prompt is known. `RoutableMap` regresses the coordinates z = V u of every sample's
gradient on its prompt's embedding (ridge), clusters the out-of-fold predictions, and is itself a router:
predict, then take the nearest centroid. `RoutedAlignment` prices any grouping together with its router,
before an expert is trained, by the first-order gain that unseen samples get from a step along the mean
gradient of the cluster they are sent to.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.utils import check_random_state
from torch import Tensor

from gradientspace.clustering.kmeans import merge_small_clusters, spherical_kmeans
from gradientspace.clustering.unit_rows import Rows, RowsError, with_norms
from gradientspace.damage import reading, require
from gradientspace.errors import RunFolderError
from gradientspace.tensor_files import read_aligned

MAP_FILE, RECORD_FILE = "routable.safetensors", "routable.json"
BLOCK_ROWS = 8192
ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Penalties that `alpha="auto"` tries: for embeddings of unit length, from next to none to next to no prompt."""


class RidgeStatistics:
    """Sufficient statistics of ridge regressions of targets (N, q) on inputs (N, e), kept for each fold.

    Feed it any number of blocks: memory is folds * (e + 1) * (e + 1 + q) numbers, independent of N. All sums
    are float64; the intercept is not penalised.
    """

    def __init__(self, n_inputs: int, n_targets: int, n_folds: int):
        self.squares = torch.zeros(n_folds, n_inputs + 1, n_inputs + 1, dtype=torch.float64)
        self.products = torch.zeros(n_folds, n_inputs + 1, n_targets, dtype=torch.float64)

    def update(self, inputs: Tensor, targets: Tensor, folds: Tensor) -> None:
        """Add rows (b, e), (b, q) with their fold numbers (b,)."""
        design, targets = _with_intercept(inputs), targets.double()
        for fold in folds.unique().tolist():
            rows = folds == fold
            self.squares[fold] += design[rows].T @ design[rows]
            self.products[fold] += design[rows].T @ targets[rows]

    def solve(self, alpha: float, without: int | None = None) -> Tensor:
        """Coefficients (e + 1, q), the intercept last, from all folds or all but one."""
        squares, products = self.squares.sum(0), self.products.sum(0)
        if without is not None:
            squares, products = squares - self.squares[without], products - self.products[without]
        penalty = torch.full((len(squares),), float(alpha), dtype=torch.float64)
        # A fold without rows must not make the intercept's equation singular.
        penalty[-1] = 1e-10
        return torch.linalg.solve(squares + torch.diag(penalty), products)


@dataclass
class RoutedPrediction:
    """For a batch of b prompts: `labels` (b,), `similarity` (b,) cosine of the predicted coordinates to the
    chosen centre, `margin` (b,) over the runner-up (2 when K = 1), `coordinates` (b, q) predicted."""

    labels: Rows
    similarity: Rows
    margin: Rows
    coordinates: Rows


class RoutableMap:
    """Prompt embedding -> predicted gradient coordinates -> cluster.

    Parameters: `n_clusters` K; `alpha` ridge penalty, embeddings taken as they come, or "auto" (the default): of
    `ALPHAS` the one whose out-of-fold predictions explain most; `n_folds` for the out-of-fold predictions; `n_init`
    k-means restarts; `random_state`.

    After `fit`: `labels_` (N,) from out-of-fold predictions (-1 where the row was not usable), `predictions_`
    (N, q) out of fold, `coefficients_` (e + 1, q) from all rows, `centres_` (K, q) unit length, `explained_`
    the share of the coordinates' variance that out-of-fold predictions explain (0 or less: nothing is
    routable), `alpha_` the penalty used.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        alpha: float | Literal["auto"] = "auto",
        n_folds: int = 5,
        n_init: int = 10,
        min_cluster_size: int = 1,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.alpha = alpha
        self.n_folds = n_folds
        self.n_init = n_init
        self.min_cluster_size = min_cluster_size
        self.random_state = random_state

    def fit(self, embeddings: Rows, coordinates: Rows, *, groups: Rows | None = None) -> "RoutableMap":
        """Fit on embeddings (N, e) and coordinates (N, q) in the same row order.

        Folds are random; rows of one group in `groups` (N,), say near-duplicate prompts, stay in one fold.
        Rows with a non-finite entry on either side, or with all-zero coordinates (excluded samples), get
        label -1. Raises RowsError when fewer usable rows than clusters or folds are left.
        """
        x, z = _tensor(embeddings), _tensor(coordinates)
        if x.ndim != 2 or z.ndim != 2 or len(x) != len(z):
            raise RowsError(f"embeddings {tuple(x.shape)} and coordinates {tuple(z.shape)} need the same rows")
        usable = torch.isfinite(x).all(1) & torch.isfinite(z).all(1) & (z != 0).any(1)
        n_usable = int(usable.sum())
        if n_usable < max(self.n_clusters, self.n_folds):
            raise RowsError(
                f"{n_usable} usable rows for {self.n_clusters} clusters and {self.n_folds} folds: lower n_clusters"
            )
        random = check_random_state(self.random_state)
        folds = _fold_numbers(len(x), self.n_folds, random, None if groups is None else _tensor(groups))
        statistics = RidgeStatistics(x.shape[1], z.shape[1], self.n_folds)
        index = usable.nonzero().squeeze(1)
        for rows in index.split(BLOCK_ROWS):
            statistics.update(x[rows], z[rows], folds[rows])
        target = z[index].double()
        variance = float((target - target.mean(0)).square().sum())

        def explained(predictions: Tensor) -> float:
            return 1.0 - float((target - predictions[index]).square().sum()) / variance if variance > 0 else 0.0

        best = None
        for alpha in (self.alpha,) if isinstance(self.alpha, int | float) else ALPHAS:
            predictions = _out_of_fold(statistics, x, folds, index, alpha)
            if best is None or explained(predictions) > best[0]:
                best = explained(predictions), alpha, predictions
        assert best is not None
        self.explained_, self.alpha_, predictions = best
        seed = int(random.randint(2**31 - 1))
        # Long predictions, where the prompt says much, pull harder on the centres (normalise=False).
        found, centres, _ = spherical_kmeans(predictions[index], self.n_clusters, self.n_init, seed, normalise=False)
        merged, centres, _ = merge_small_clusters(np.asarray(found), centres, self.min_cluster_size)
        labels = torch.full((len(x),), -1, dtype=torch.int64)
        labels[index] = torch.as_tensor(merged)
        self.centres_ = torch.as_tensor(centres).double()
        self.coefficients_ = statistics.solve(self.alpha_).contiguous()  # the layout that a saved map comes back with
        self._torch_out = isinstance(embeddings, Tensor)
        self.labels_ = self._out(labels, self._torch_out)
        self.predictions_ = self._out(predictions, self._torch_out)
        return self

    def predict(self, embeddings: Rows) -> RoutedPrediction:
        """Route embeddings (b, e) to clusters. A non-finite row gets label -1 and zeros."""
        x = _tensor(embeddings)
        if x.ndim != 2 or x.shape[1] != len(self.coefficients_) - 1:
            raise RowsError(f"embeddings are {tuple(x.shape)}, fitted with (N, {len(self.coefficients_) - 1})")
        z = _with_intercept(x) @ self.coefficients_
        z, norms, valid = with_norms(z)
        cosine = (z / norms[:, None]) @ self.centres_.T
        cosine = torch.where(valid[:, None], cosine, torch.zeros_like(cosine))
        similarity, labels = cosine.max(dim=1)
        if len(self.centres_) > 1:
            margin = similarity - cosine.scatter(1, labels[:, None], -2.0).max(dim=1).values
        else:
            margin = torch.full_like(similarity, 2.0)
        labels = torch.where(valid, labels, -1)
        margin = torch.where(valid, margin, torch.zeros_like(margin))
        z = torch.where(valid[:, None], z, torch.zeros_like(z))
        return RoutedPrediction(
            *(self._out(p, isinstance(embeddings, Tensor)) for p in (labels, similarity, margin, z))
        )

    def lift(self, components: Rows) -> Rows:
        """Centroids in full dimension, c_k = normalise(V^T m_k): (K, D) for V (q, D)."""
        v = components if isinstance(components, Tensor) else torch.as_tensor(components)
        lifted = self.centres_.to(v.dtype) @ v
        lifted = lifted / torch.linalg.vector_norm(lifted, dim=1, keepdim=True)
        return self._out(lifted, isinstance(components, Tensor))

    def save(self, folder: str | Path) -> None:
        """Write what `predict` needs, as safetensors and JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"coefficients": self.coefficients_, "centres": self.centres_}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / MAP_FILE)
        record = {
            "n_clusters": self.n_clusters,
            "alpha": self.alpha,
            "n_folds": self.n_folds,
            "n_init": self.n_init,
            "min_cluster_size": self.min_cluster_size,
            "random_state": self.random_state if isinstance(self.random_state, int) else None,
            "explained": self.explained_,
            "chosen_alpha": self.alpha_,
        }
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "RoutableMap":
        """The map that `save` wrote, ready to `predict`."""
        folder = Path(folder)
        for name in (MAP_FILE, RECORD_FILE):
            if not (folder / name).is_file():
                raise RunFolderError(f"no routable map in {folder}: {name} is missing")
        with reading(folder, "cluster the run again"):
            record, tensors = json.loads((folder / RECORD_FILE).read_text()), read_aligned(folder / MAP_FILE)
            explained = float(record.pop("explained"))
            alpha = record.pop("chosen_alpha", record["alpha"])  # a run made before there was a choice has none
            self = cls(record.pop("n_clusters"), **record)
            self.explained_, self.alpha_ = explained, alpha
            self.coefficients_, self.centres_ = tensors["coefficients"].double(), tensors["centres"].double()
            for tensor in (self.coefficients_, self.centres_):
                require(tensor.ndim == 2 and tensor.numel() and torch.isfinite(tensor).all(), "no finite matrix")
            require(self.coefficients_.shape[1] == self.centres_.shape[1], "coefficients and centres differ in width")
        return self

    @staticmethod
    def _out(values: Tensor, as_torch: bool) -> Rows:
        return values if as_torch else values.numpy()


@dataclass
class AlignmentResult:
    """Held-out routed alignment. `first_order` mean <u_j, m_k> over probe samples j routed to k, with m_k the
    mean unit gradient of cluster k in the reference half; `unit_step` mean <u_j, m_k / |m_k|>; both per
    sample in `samples` (n, 2), in the order they were added. `by_cluster` (K, 3): probe rows, first order,
    unit step."""

    first_order: float
    unit_step: float
    n_reference: int
    n_probe: int
    samples: np.ndarray
    by_cluster: np.ndarray


class RoutedAlignment:
    """Price a grouping and its router on *uncentred* gradients, streamed.

    First the reference half with its cluster labels, then the probe half with the labels it is *routed* to.
    With `normalise` rows are used as unit vectors u; without, as they come (raw g). Sums are float64. Memory:
    K D numbers. Compare groupings at equal K only: it rises with K almost by itself.
    """

    def __init__(self, n_clusters: int, *, normalise: bool = True):
        self.n_clusters = n_clusters
        self.normalise = normalise
        self._sums: Tensor | None = None
        self._counts = torch.zeros(n_clusters, dtype=torch.int64)
        self._probes: list[tuple[Tensor, Tensor]] = []

    def add_reference(self, gradients: Rows, labels: Rows) -> "RoutedAlignment":
        """Rows (b, D) and their clusters (b,); label -1 and rows without a direction are left out."""
        if self._probes:
            raise RowsError("all reference rows come before the first probe row")
        rows, scale, labels = self._usable(gradients, labels)
        if self._sums is None:
            self._sums = torch.zeros(self.n_clusters, rows.shape[1], dtype=torch.float64, device=rows.device)
        for cluster in labels[labels >= 0].unique().tolist():
            index = (labels == cluster).nonzero().squeeze(1)
            self._sums[cluster] += scale[index] @ rows[index].double()
            self._counts[cluster] += len(index)
        return self

    def add_probe(self, gradients: Rows, routed: Rows) -> "RoutedAlignment":
        """Rows (b, D) of the held-out half and the clusters (b,) they are routed to."""
        if self._sums is None:
            raise RowsError("no reference rows yet: add_reference comes first")
        rows, scale, labels = self._usable(gradients, routed)
        gains = torch.zeros(len(rows), 2, dtype=torch.float64)
        for cluster in labels[labels >= 0].unique().tolist():
            index = (labels == cluster).nonzero().squeeze(1)
            # A cluster without reference rows has no mean to step along: its gain is 0.
            mean = self._sums[cluster] / max(int(self._counts[cluster]), 1)
            gain = scale[index] * (rows[index].double() @ mean)
            length = torch.linalg.vector_norm(mean)
            step = gain / length if length > 0 else torch.zeros_like(gain)
            gains[index.cpu()] = torch.stack([gain, step], dim=1).cpu()
        labels = labels.cpu()
        self._probes.append((labels[labels >= 0], gains[labels >= 0]))
        return self

    def result(self) -> AlignmentResult:
        """Means over all probe rows. Raises RowsError without any."""
        if not sum(len(labels) for labels, _ in self._probes):
            raise RowsError("no probe row with a direction was added")
        labels = torch.cat([part[0] for part in self._probes])
        samples = torch.cat([part[1] for part in self._probes])
        counts = torch.bincount(labels, minlength=self.n_clusters).double()
        sums = torch.zeros(self.n_clusters, 2, dtype=torch.float64).index_add_(0, labels, samples)
        by_cluster = torch.cat([counts[:, None], sums / counts.clamp(min=1)[:, None]], dim=1)
        first_order, unit_step = samples.mean(0).tolist()
        return AlignmentResult(
            first_order, unit_step, int(self._counts.sum()), len(labels), samples.numpy(), by_cluster.numpy()
        )

    def _usable(self, gradients: Rows, labels: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, the float64 factor that makes each one unit (or 1), and labels with -1 for unusable rows."""
        rows = gradients if isinstance(gradients, Tensor) else torch.as_tensor(gradients)
        labels = torch.as_tensor(labels, device=rows.device).long()
        if rows.ndim != 2 or len(labels) != len(rows):
            raise RowsError(f"{len(labels)} labels for rows of shape {tuple(rows.shape)}")
        if len(labels) and int(labels.max()) >= self.n_clusters:
            raise RowsError(f"label {int(labels.max())} with n_clusters = {self.n_clusters}: labels run from 0")
        if not self.normalise:
            valid = torch.isfinite(rows).all(dim=1)
            return (
                rows,
                torch.ones(len(rows), dtype=torch.float64, device=rows.device),
                torch.where(valid, labels, -1),
            )
        rows, norms, valid = with_norms(rows)
        return rows, 1.0 / norms.double(), torch.where(valid, labels, -1)


def _tensor(values: Rows) -> Tensor:
    return values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))


def _with_intercept(inputs: Tensor) -> Tensor:
    return torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)


def _out_of_fold(statistics: RidgeStatistics, x: Tensor, folds: Tensor, index: Tensor, alpha: float) -> Tensor:
    """(N, q) predictions of the rows in `index`, each from the folds that it is not in; zeros elsewhere."""
    predictions = torch.zeros(len(x), statistics.products.shape[2], dtype=torch.float64)
    for fold in range(len(statistics.products)):
        coefficients = statistics.solve(alpha, without=fold)
        for rows in index[folds[index] == fold].split(BLOCK_ROWS):
            predictions[rows] = _with_intercept(x[rows]) @ coefficients
    return predictions


def _fold_numbers(n: int, n_folds: int, random: np.random.RandomState, groups: Tensor | None) -> Tensor:
    """Fold of each row: groups (or rows) in random order are dealt out in turn."""
    owner = torch.arange(n) if groups is None else groups.unique(return_inverse=True)[1]
    n_owners = int(owner.max()) + 1 if n else 0
    dealt = torch.as_tensor(random.permutation(n_owners)) % n_folds
    return dealt[owner]
