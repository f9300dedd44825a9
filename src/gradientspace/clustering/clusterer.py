"""Online SVD clustering of a stream of very high-dimensional vectors, in scikit-learn's grammar.

    clusterer = OnlineSVDClusterer(n_clusters="auto", random_state=0)
    clusterer.initialize(validation)                # (M, D): mean, basis V, K, first centroids
    for batch in stream:                            # (b, D) each, never all at once
        labels = clusterer.partial_fit(batch).labels_
    clusterer.finalize()                            # caches that are still partly full
    clusterer.predict(rows), clusterer.transform(rows)

Rows are used as unit vectors u = x / |x|, by default minus the mean of the validation sample's unit vectors
and rescaled. Nothing is projected: centroids live in all D dimensions. Cost O((K + q + n) D) a row; memory
max(M, K + K n + q + b) D numbers whatever the length of the stream.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from gradientspace.clustering.assignment import Assignment, nearest_centroid
from gradientspace.clustering.centroids import Centroids, Projection
from gradientspace.clustering.kmeans import spherical_kmeans
from gradientspace.clustering.memory import MemoryPlan, plan_memory
from gradientspace.clustering.parameters import check_parameters
from gradientspace.clustering.rank import RankEstimate, estimate_rank
from gradientspace.clustering.snapshot import read_snapshot, write_snapshot
from gradientspace.clustering.svd import GradientSVD, gradient_svd
from gradientspace.clustering.unit_rows import (
    IdenticalRowsError,
    Rows,
    RowsError,
    RowSource,
    RowsTypeError,
    is_stream,
)
from gradientspace.damage import reading

logger = logging.getLogger(__name__)


class OnlineSVDClusterer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Cluster unit vectors by direction in one pass.

    Parameters
    ----------
    n_clusters : K, or "auto" for the spectrum's answer (`rank_estimate_`).
    random_state : seeds the sign flips, the k-means restarts and the order of rows in `fit`.
    n_components : q, dimensions of the dominant subspace; fewer where the validation sample has fewer.
    center : subtract the mean of the validation sample's unit rows.
    update : how a full cache of n rows moves its centroid. "svd": towards the dominant right singular vector of
        the cache (the paper); "mean": towards its mean; "running": no cache and no momentum, the centroid is the
        direction of the sum of all rows it was ever given.
    momentum : m in (0, 1], the weight of the *new* direction: c <- normalise((1 - m) c + m v).
    cache_size : n, rows of a cluster between two moves of its centroid.
    cache_dtype : "float32" (float64 for float64 rows) or "bfloat16" (half the memory of the largest part).
    k_min, k_max, energy, n_draws : of the rank estimate; ignored when K is given.
    fallback_n_clusters : K where the estimate is undetermined (recorded in `rank_estimate_`, and logged).
    n_init : k-means restarts in the subspace; on M rows of q numbers they cost next to nothing.
    n_validation, batch_size : M and b that `fit` uses on a whole array or on a stream; `initialize` and
        `partial_fit` take what they are given.

    Attributes
    ----------
    n_clusters_, n_features_in_ : K and D.
    labels_ : after `fit` of all rows; after `partial_fit` of that batch, before its centroids moved; `assignment_`
        has the last batch's whole `Assignment`.
    cluster_centers_, components_, mean_ : (K, D) unit rows, V (q, D), (D,) (zeros when not centred).
    singular_values_, explained_energy_ : of the validation sample, the energy cumulative.
    rank_estimate_ : None when K was given.
    counts_ : (K,) rows streamed.
    """

    def __init__(
        self,
        n_clusters: int | str = "auto",
        random_state=None,
        *,
        n_components=64,
        center=True,
        update="svd",
        momentum=0.1,
        cache_size=32,
        cache_dtype="float32",
        k_min=1,
        k_max=16,
        energy=0.9,
        n_draws=20,
        fallback_n_clusters=8,
        n_init=30,
        n_validation=512,
        batch_size=256,
    ):
        self.n_clusters = n_clusters
        self.random_state = random_state
        self.n_components = n_components
        self.center = center
        self.update = update
        self.momentum = momentum
        self.cache_size = cache_size
        self.cache_dtype = cache_dtype
        self.k_min = k_min
        self.k_max = k_max
        self.energy = energy
        self.n_draws = n_draws
        self.fallback_n_clusters = fallback_n_clusters
        self.n_init = n_init
        self.n_validation = n_validation
        self.batch_size = batch_size

    def initialize(self, G: Rows | RowSource) -> "OnlineSVDClusterer":
        """Mean, basis, K and first centroids from validation rows G (M, D); forgets any earlier state.

        A G too large to hold comes as a `RowSource`, and is made again for every block of columns. `labels_` are
        those of the rows of G. Raises RowsError when K exceeds the number of rows with a direction, or when no row
        has one.
        """
        check_parameters(self)
        rows = self._rows(G, reset=True) if not isinstance(G, RowSource) else G
        self.n_features_in_ = rows.shape[1]
        self._torch_out = not isinstance(G, np.ndarray | list | tuple)
        self._device = rows.device
        seed = int(self._random().randint(2**31 - 1))
        generator = torch.Generator(device=rows.device).manual_seed(seed)
        auto = isinstance(self.n_clusters, str)
        svd = self._decompose(rows, self.n_draws if auto else 0, generator)
        self.rank_estimate_: RankEstimate | None = None
        if auto:
            self.rank_estimate_ = estimate_rank(
                svd, k_min=self.k_min, k_max=self.k_max, energy=self.energy, generator=generator
            )
        self.n_clusters_ = self._choose_n_clusters(svd)
        labels, centres, strengths = self._seed_centroids(svd, seed)
        self._singular_values, self._explained_energy = svd.singular_values, svd.explained_energy
        self._n_features_out = len(svd.components)
        self._state = self._new_state(centres, svd.components, svd.mean, strengths)
        full = torch.full((rows.shape[0],), -1, dtype=torch.int64, device=rows.device)
        full[svd.index] = labels
        self.labels_ = self._out(full, self._torch_out)
        return self

    def partial_fit(self, X: Rows, y=None) -> "OnlineSVDClusterer":
        """Assign a batch (b, D), then push it into the caches and move the centroids whose caches filled up.

        `assignment_` and `labels_` are of this batch under the centroids as they were before. Without an
        earlier `initialize`, the first batch is the validation sample as well.
        """
        if not hasattr(self, "_state"):
            self.initialize(X)
        rows = self._rows(X)
        batch = self._state.project(rows)
        labels, assignment = self._assignment(batch, isinstance(X, Tensor))
        self._state.push(batch, labels)
        self._state.sync()
        self.assignment_, self.labels_ = assignment, assignment.labels
        return self

    def finalize(self) -> "OnlineSVDClusterer":
        """End of the stream: a partial cache of n' of n rows moves its centroid with weight m n' / n."""
        check_is_fitted(self, "_state")
        self._state.flush()
        self._state.sync()
        return self

    def fit(self, X: Rows | Iterable[Rows], y=None) -> "OnlineSVDClusterer":
        """One pass over an (N, D) array, or over an iterable of (b, D) batches that is read once.

        An array is streamed in random order after `n_validation` of its rows initialised the state, and
        `labels_` are those of the final centroids. Of an iterable, the first batches up to `n_validation`
        rows initialise; its order is the caller's, and `labels_` are the online ones.
        """
        check_parameters(self)
        if not is_stream(X):
            return self._fit_array(X)  # pyright: ignore[reportArgumentType]
        return self._fit_stream(iter(X))

    def assign(self, X: Rows) -> Assignment:
        """Cluster, cosine, margin and coordinates of each row of X (b, D) under the present centroids."""
        check_is_fitted(self, "_state")
        return self._assignment(self._state.project(self._rows(X)), isinstance(X, Tensor))[1]

    def predict(self, X: Rows) -> Rows:
        """Cluster of each row of X (b, D); -1 for rows without a direction."""
        return self.assign(X).labels

    def transform(self, X: Rows) -> Rows:
        """Coordinates V u (b, q) of each row's unit vector in the dominant subspace."""
        return self.assign(X).coordinates

    def replace_centers(self, centers: Rows) -> "OnlineSVDClusterer":
        """Go on with other unit centroids (K', D), for example those of a clustering of coordinates, lifted
        back.

        Basis and mean stay; caches and counts start empty.
        """
        state = self.state
        centres = torch.as_tensor(centers).to(state.centres)
        if centres.ndim != 2 or centres.shape[1] != state.centres.shape[1]:
            raise RowsError(f"centroids are {tuple(centres.shape)}, expected (K, {state.centres.shape[1]})")
        mean = state.mean if state.centred else None
        self._state = self._new_state(centres, state.components, mean, torch.ones(len(centres)))
        self.n_clusters_ = len(centres)
        return self

    def plan_memory(self, dim: int, budget: int | None = None, device: str = "cpu") -> MemoryPlan:
        """Memory of this clusterer on rows of length `dim`; with n_clusters="auto", for k_max clusters."""
        return plan_memory(
            dim,
            self.k_max if isinstance(self.n_clusters, str) else self.n_clusters,
            n_validation=self.n_validation,
            n_components=self.n_components,
            cache_size=self.cache_size,
            batch_size=self.batch_size,
            update=self.update,
            cache_dtype=self.cache_dtype,
            n_draws=self.n_draws if isinstance(self.n_clusters, str) else 0,
            device=device,
            budget=budget,
        )

    def save(self, folder: str | Path) -> None:
        """Write the whole state, half-full caches included, as safetensors and JSON."""
        check_is_fitted(self, "_state")
        tensors = {"singular_values": self._singular_values, "explained_energy": self._explained_energy}
        record = {
            "n_features_in": self.n_features_in_,
            "n_clusters": self.n_clusters_,
            "torch_out": self._torch_out,
            "rank_estimate": self.rank_estimate_.to_dict() if self.rank_estimate_ else None,
        }
        write_snapshot(Path(folder), self.get_params(), record, self._state, tensors)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "OnlineSVDClusterer":
        """The clusterer that `save` wrote; its next `partial_fit` gives the same bits as the saved one's would."""
        record, tensors = read_snapshot(Path(folder), device)
        with reading(Path(folder), "cluster the run again"):
            return cls._of_snapshot(record, tensors, device)

    @classmethod
    def _of_snapshot(cls, record: dict[str, Any], tensors: dict[str, Tensor], device: str) -> "OnlineSVDClusterer":
        self = cls(**record["parameters"])
        check_parameters(self)
        self.n_features_in_, self.n_clusters_ = record["n_features_in"], record["n_clusters"]
        self._torch_out, self._device = record["torch_out"], torch.device(device)
        self.rank_estimate_ = RankEstimate(**record["rank_estimate"]) if record["rank_estimate"] else None
        self._singular_values, self._explained_energy = tensors["singular_values"], tensors["explained_energy"]
        matrix, k = tensors["matrix"], self.n_clusters_
        mean = matrix[-1] if record["centred"] else None
        self._state = self._new_state(matrix[:k], matrix[k:-1], mean, tensors["strengths"])
        self._state.restore(tensors)
        self._n_features_out = self._state.n_components
        return self

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True  # such rows get label -1
        return tags

    @property
    def state(self) -> Centroids:
        """Centroids, basis and caches, for a pass that takes the steps of `partial_fit` one by one."""
        check_is_fitted(self, "_state")
        return self._state

    @property
    def cluster_centers_(self) -> Rows:
        """(K, D) unit centroids, in the space of the (centred) unit rows."""
        return self._out(self.state.centres, self._torch_out)

    @property
    def components_(self) -> Rows:
        """V (q, D), orthonormal rows."""
        return self._out(self.state.components, self._torch_out)

    @property
    def mean_(self) -> Rows:
        """(D,) mean of the validation sample's unit rows; zeros when not centred."""
        return self._out(self.state.mean, self._torch_out)

    @property
    def counts_(self) -> Rows:
        """(K,) rows streamed into each cluster."""
        return self._out(self.state.counts, self._torch_out)

    @property
    def singular_values_(self) -> Rows:
        """(r,) of the validation sample's (centred) unit rows, descending."""
        check_is_fitted(self, "_state")
        return self._out(self._singular_values, self._torch_out)

    @property
    def explained_energy_(self) -> Rows:
        """(r,) share of the validation sample's energy in the leading directions, cumulative."""
        check_is_fitted(self, "_state")
        return self._out(self._explained_energy, self._torch_out)

    def _fit_array(self, X: Rows) -> "OnlineSVDClusterer":
        rows = self._rows(X, reset=True)
        random = self._random()
        order = torch.as_tensor(random.permutation(len(rows)), device=rows.device)
        chosen = order[: self.n_validation].sort().values
        as_torch = isinstance(X, Tensor)
        self.initialize(rows[chosen] if as_torch else rows[chosen].numpy())
        order = torch.as_tensor(random.permutation(len(rows)), device=rows.device)
        for start in range(0, len(rows), self.batch_size):
            self.partial_fit(rows[order[start : start + self.batch_size]])
        self.finalize()
        parts = [self._state.project(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        labels = torch.cat([self._assignment(part, True)[0] for part in parts])
        self.labels_ = self._out(labels, as_torch)
        return self

    def _fit_stream(self, batches) -> "OnlineSVDClusterer":
        batches = _checked(batches)
        first: list = []
        while sum(len(batch) for batch in first) < self.n_validation and (batch := next(batches, None)) is not None:
            first.append(batch)
        if not first:
            raise RowsError("the stream is empty: nothing to cluster")
        self.initialize(torch.cat(first) if isinstance(first[0], Tensor) else np.concatenate(first))
        labels: list = []
        for batch in itertools.chain(first, batches):
            labels.append(self.partial_fit(batch).labels_)
        self.finalize()
        self.labels_ = torch.cat(labels) if isinstance(labels[0], Tensor) else np.concatenate(labels)
        return self

    def _decompose(self, rows: Tensor | RowSource, n_draws: int, generator: torch.Generator) -> GradientSVD:
        options = {"n_draws": n_draws, "generator": generator}
        if not self.center:
            return gradient_svd(rows, self.n_components, center=False, **options)
        try:
            return gradient_svd(rows, self.n_components, center=True, **options)
        except IdenticalRowsError as error:
            logger.warning("%s; clustering goes on without centring", error)
            return gradient_svd(rows, self.n_components, center=False, **options)

    def _choose_n_clusters(self, svd: GradientSVD) -> int:
        rows = len(svd.index)
        if self.rank_estimate_ is None:
            if int(self.n_clusters) > rows:
                raise RowsError(
                    f"n_clusters is {self.n_clusters}, but only {rows} samples have a direction: "
                    f"set n_clusters to at most {rows}"
                )
            return int(self.n_clusters)
        if self.rank_estimate_.n_clusters is not None:
            return min(self.rank_estimate_.n_clusters, rows)
        logger.warning("%s; using %d clusters", self.rank_estimate_.reason, min(self.fallback_n_clusters, rows))
        return min(self.fallback_n_clusters, rows)

    def _seed_centroids(self, svd: GradientSVD, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (m,), lifted centres (K, D) and the length of the coordinate sum behind each centre (K,).

        All q coordinates, by direction: K - 1 dimensions suffice only where nothing but the clusters is in the
        leading directions, and on real gradients other things are (benchmarks/clustering.py, section options).
        """
        z = svd.coordinates
        labels, centres, _ = spherical_kmeans(z, self.n_clusters_, self.n_init, seed)
        assert isinstance(labels, Tensor)
        assert isinstance(centres, Tensor)
        sums = torch.zeros_like(centres).index_add_(0, labels.clamp(min=0), z * (labels >= 0)[:, None])
        return labels, centres @ svd.components, torch.linalg.vector_norm(sums, dim=1)

    def _new_state(self, centres: Tensor, components: Tensor, mean: Tensor | None, strengths: Tensor) -> Centroids:
        return Centroids(
            centres,
            components,
            mean,
            strengths,
            update=self.update,
            momentum=float(self.momentum),
            cache_size=int(self.cache_size),
            cache_dtype=torch.bfloat16 if self.cache_dtype == "bfloat16" else centres.dtype,
        )

    def _assignment(self, batch: Projection, as_torch: bool) -> tuple[Tensor, Assignment]:
        parts = nearest_centroid(batch)
        return parts[0], Assignment(*(self._out(part, as_torch) for part in parts))

    def _random(self) -> np.random.RandomState:
        try:
            return check_random_state(self.random_state)
        except (ValueError, TypeError) as error:
            raise RowsError(f"random_state is {self.random_state!r}: give a whole number below 2**32") from error

    def _rows(self, X: Rows, *, reset: bool = False) -> Tensor:
        """X as a 2-dimensional floating tensor, on its own device or, for NumPy input, the clusterer's."""
        if not isinstance(X, Tensor):
            kinds = [np.float64, np.float32]
            try:
                array: Any = validate_data(
                    self, cast(Any, X), reset=reset, dtype=kinds, ensure_all_finite=False, order="C"
                )
            except (TypeError, ValueError, OverflowError) as error:
                raise (RowsTypeError if isinstance(error, TypeError) else RowsError)(str(error)) from error
            device = "cpu" if reset else getattr(self, "_device", "cpu")
            # torch cannot wrap memory that it must not write to.
            return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)
        if X.layout != torch.strided or X.is_complex() or X.is_quantized:
            raise RowsTypeError(f"expected dense real rows, got {X.dtype}, {X.layout}")
        if X.ndim != 2 or 0 in X.shape:
            raise RowsError(f"expected rows (b, D), got shape {tuple(X.shape)}")
        if reset:
            self.n_features_in_ = X.shape[1]
        elif X.shape[1] != self.n_features_in_:
            raise RowsError(f"X has {X.shape[1]} features, but {self.n_features_in_} were fitted")
        return X.detach() if X.is_floating_point() else X.to(torch.float32)

    @staticmethod
    def _out(values: Tensor, as_torch: bool) -> Rows:
        return values if as_torch else values.cpu().numpy()


def _checked(batches: Iterable[Any]) -> Iterator[Rows]:
    """The batches of a stream, all of one kind. Raises RowsError for the first that is none, or is of another one."""
    kind: tuple[type, int] | None = None
    for batch in batches:
        if not isinstance(batch, Tensor | np.ndarray):
            raise RowsTypeError(f"a stream is made of arrays or tensors (b, D), got {type(batch).__name__}")
        if batch.ndim != 2:
            raise RowsError(f"expected rows (b, D), got shape {tuple(batch.shape)}")
        kind = kind or (type(batch), batch.shape[1])
        if kind != (type(batch), batch.shape[1]):
            raise RowsError("the batches of the stream differ in kind or in length of their rows")
        yield batch
