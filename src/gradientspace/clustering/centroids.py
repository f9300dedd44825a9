"""The moving part of the clusterer: centroids, basis and mean in one matrix, and the caches that move
centroids."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradientspace.clustering.unit_rows import compute_dtype, no_direction_below, with_norms

# Below this, |u - mean|^2 from inner products has lost too many digits: it is computed from the rows instead.
CANCELLATION = 1e-3
# An inner product this close to zero does not give a dominant singular vector its sign.
SIGN_TOLERANCE = 1e-6


@dataclass
class Projection:
    """A batch seen by the centroids. `rows` (b, D) raw, `scale` (b,) 1 / |x|, `length` (b,) of the centred
    unit row, `valid` (b,), `cosine` (b, K) and `coordinates` (b, q) of the final unit rows, 0 where not
    valid."""

    rows: Tensor
    scale: Tensor
    length: Tensor
    valid: Tensor
    cosine: Tensor
    coordinates: Tensor


class Centroids:
    """State of one online pass.

    `matrix` (K + q + 1, D) holds centroids, basis and mean, so that everything a batch needs is one matrix
    product. `caches` (K, n, D) hold unit rows ("svd"), or (K, D) their sums ("mean", "running"); `filled`
    (K,) rows in each. `strengths` (K,) is the length of the sum behind each centroid, which only "running"
    uses. `counts` (K,) rows streamed. `moved` holds the centroids that moved since the last `sync`.
    """

    def __init__(
        self,
        centres: Tensor,
        components: Tensor,
        mean: Tensor | None,
        strengths: Tensor,
        *,
        update: str,
        momentum: float,
        cache_size: int,
        cache_dtype: torch.dtype,
    ):
        self.n_clusters, self.n_components = len(centres), len(components)
        self.centred = mean is not None
        self.update, self.momentum, self.cache_size = update, momentum, cache_size
        tail = torch.zeros_like(centres[:1]) if mean is None else mean[None]
        self.matrix = torch.cat([centres, components, tail])
        if update == "svd":
            self._cache = (self.n_clusters, cache_size, centres.shape[1]), cache_dtype
        else:
            self._cache = centres.shape, centres.dtype
        self.filled = torch.zeros(self.n_clusters, dtype=torch.int64)
        self.counts = torch.zeros(self.n_clusters, dtype=torch.int64)
        self.strengths = strengths.double().cpu()
        self.moved: dict[int, Tensor] = {}

    @cached_property
    def caches(self) -> Tensor:
        """Made with the first rows of the stream: before, the validation rows may still fill the memory."""
        shape, dtype = self._cache
        return torch.zeros(shape, dtype=dtype, device=self.matrix.device)

    @property
    def centres(self) -> Tensor:
        return self.matrix[: self.n_clusters]

    @property
    def components(self) -> Tensor:
        return self.matrix[self.n_clusters : -1]

    @property
    def mean(self) -> Tensor:
        return self.matrix[-1]

    def project(self, rows: Tensor) -> Projection:
        """One (b, D) x (D, K + q + 1) product; the (b, D) rows are neither copied nor changed."""
        rows, norms, valid = with_norms(rows)
        dtype = compute_dtype(self.matrix.dtype)
        if rows.dtype == torch.float64 and dtype != torch.float64:
            # float32 may hold neither the entries nor the length of such a row.
            rows, norms = rows / norms[:, None], torch.ones_like(norms)
        scale = (1.0 / norms).to(dtype)
        if rows.dtype != dtype:
            rows = rows.to(dtype)
        values = (rows @ self.matrix.T) * scale[:, None]
        length = torch.ones_like(scale)
        if self.centred:
            values, length = self._centre(rows, scale, values, valid)
            valid = valid & (length > 0)
        values = torch.where(valid[:, None], values[:, :-1], values.new_zeros(()))
        return Projection(rows, scale, length, valid, values[:, : self.n_clusters], values[:, self.n_clusters :])

    def _centre(self, rows: Tensor, scale: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products of (u - mean) / |u - mean| from those of u."""
        shift = self.matrix @ self.mean
        squares = 1.0 - 2.0 * values[:, -1] + shift[-1]
        values = values - shift
        close = ((squares < CANCELLATION) & valid).nonzero().squeeze(1)
        if len(close):
            centred = rows[close] * scale[close, None] - self.mean
            squares[close] = centred.square().sum(dim=1)
            values[close] = centred @ self.matrix.T
        length = squares.clamp(min=0).sqrt()
        length = torch.where(length > no_direction_below(length.dtype), length, torch.zeros_like(length))
        return values / torch.where(length > 0, length, torch.ones_like(length))[:, None], length

    def push(self, batch: Projection, labels: Tensor) -> None:
        """Put the batch's unit rows into the caches of their clusters; every full cache moves its centroid, from the
        next `sync` on."""
        labels = labels.cpu()  # so that a GPU is waited for once, not once a cluster
        for cluster in range(self.n_clusters):
            index = (labels == cluster).nonzero().squeeze(1)
            if len(index):
                self.take(cluster, self.unit_rows(batch, index))

    def unit_rows(self, batch: Projection, index: Tensor) -> Tensor:
        """The (centred) unit rows of a projected batch at `index`, as a cache takes them: (len(index), D)."""
        unit = batch.rows[index]
        unit *= batch.scale[index, None]
        if self.centred:
            unit -= self.mean
            unit /= batch.length[index, None]
        return unit.to(self.caches.dtype)

    def take(self, cluster: int, units: Tensor) -> None:
        """Put unit rows (b, D) into the cache of one cluster, in their order."""
        self.counts[cluster] += len(units)
        while len(units):
            fill = int(self.filled[cluster])
            room = len(units) if self.update == "running" else self.cache_size - fill
            if self.update == "svd":
                self.caches[cluster, fill : fill + len(units[:room])] = units[:room]
            else:
                self.caches[cluster] += units[:room].sum(dim=0)
            self.filled[cluster] += len(units[:room])
            units = units[room:]
            if self.filled[cluster] == self.cache_size and self.update != "running":
                self._empty(cluster, self.momentum)

    def flush(self, clusters: Iterable[int] | None = None) -> None:
        """Use the caches, all or those of `clusters`, that hold n' of n rows, with weight m n' / n."""
        for cluster in range(self.n_clusters) if clusters is None else clusters:
            if fill := int(self.filled[cluster]):
                self._empty(cluster, self.momentum * fill / self.cache_size)

    def sync(self) -> None:
        """Let the moves since the last `sync` count: until then `project` sees the centroids as they were."""
        if self.update == "running":
            self.flush()
        for cluster, centre in self.moved.items():
            self.matrix[cluster] = centre
        self.moved.clear()

    def _empty(self, cluster: int, weight: float) -> None:
        fill, self.filled[cluster] = int(self.filled[cluster]), 0
        if self.update == "svd":
            direction = dominant_direction(self.caches[cluster, :fill], self._newest(cluster))
            self._move(cluster, direction, 1.0 - weight, weight)
            return
        total = self.caches[cluster].clone()
        self.caches[cluster].zero_()
        if self.update == "running":
            self._move(cluster, total, float(self.strengths[cluster]), 1.0)
            return
        length = torch.linalg.vector_norm(total)
        if length > 0:
            self._move(cluster, total / length, 1.0 - weight, weight)

    def _move(self, cluster: int, direction: Tensor, keep: float, weight: float) -> None:
        moved = keep * self._newest(cluster) + weight * direction
        length = float(torch.linalg.vector_norm(moved))
        # Two opposite vectors of equal weight leave no direction: the centroid stays.
        if length > no_direction_below(moved.dtype):
            self.moved[cluster] = moved / length
            self.strengths[cluster] = length

    def _newest(self, cluster: int) -> Tensor:
        return self.moved.get(cluster, self.centres[cluster])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `restore` needs; of the caches only the rows that are filled."""
        used = int(self.filled.max())
        return {
            "matrix": self.matrix,
            "caches": self.caches[:, :used] if self.update == "svd" else self.caches,
            "filled": self.filled,
            "counts": self.counts,
            "strengths": self.strengths,
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.matrix = tensors["matrix"]
        caches = tensors["caches"]
        (self.caches[:, : caches.shape[1]] if self.update == "svd" else self.caches).copy_(caches)
        self.filled, self.counts = tensors["filled"].cpu(), tensors["counts"].cpu()
        self.strengths = tensors["strengths"].cpu()


def dominant_direction(rows: Tensor, centre: Tensor) -> Tensor:
    """Dominant right singular vector v (D,) of the unit rows (n, D), through their n x n Gram matrix.

    Signed so that <v, mean row> >= 0; where that is within 1e-6 of zero, so that <v, centre> >= 0.
    """
    rows = rows.to(centre.dtype)
    values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    weights = vectors[:, -1] / values[-1].clamp(min=1e-300).sqrt()
    direction = weights.to(rows.dtype) @ rows
    # <v, mean> = (1/n) sum_i <v, x_i> = (1/n) sqrt(lambda) sum_i w_i for unit-norm eigenvector w.
    agreement = float(vectors[:, -1].sum() * values[-1].sqrt()) / len(rows)
    if abs(agreement) <= SIGN_TOLERANCE:
        agreement = float(direction @ centre)
    return -direction if agreement < 0 else direction
