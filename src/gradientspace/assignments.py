"""What a pass over the gradients records of each sample, and the Parquet file it is kept in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gradientspace.clustering import Assignment
from gradientspace.clustering.stability import Reruns
from gradientspace.damage import reading, require
from gradientspace.data import Sample
from gradientspace.gradients import GradientBatch

BOUNDARY_SUPPORT = 0.8
"""A sample is near a boundary when fewer than this share of the reruns leave it in its cluster."""


@dataclass
class Assignments:
    """Arrays of length n. `coordinates` (n, q); for routable clusters also `predicted` (n, q), the coordinates that
    the prompt predicts, out of fold. `online_cluster` is the label of the pass itself, `support` the share of reruns
    that leave a sample in its cluster."""

    ids: list[str]
    cluster: np.ndarray
    cosine: np.ndarray
    margin: np.ndarray
    norm: np.ndarray
    loss: np.ndarray
    coordinates: np.ndarray
    online_cluster: np.ndarray | None = None
    support: np.ndarray | None = None
    predicted: np.ndarray | None = None

    @classmethod
    def empty(cls, samples: Sequence[Sample], q: int) -> Assignments:
        n = len(samples)
        cosine, margin, norm, loss = (np.zeros(n, dtype=np.float32) for _ in range(4))
        coordinates = np.zeros((n, q), dtype=np.float32)
        return cls([s.id for s in samples], np.full(n, -1), cosine, margin, norm, loss, coordinates)

    def fill(self, batch: GradientBatch, assignment: Assignment) -> None:
        rows = batch.indices.numpy()
        for name in ("cluster", "cosine", "margin", "coordinates"):
            values = assignment.labels if name == "cluster" else getattr(assignment, name)
            getattr(self, name)[rows] = torch.as_tensor(values).cpu().numpy()
        self.norm[rows], self.loss[rows] = batch.norms.cpu().numpy(), batch.losses.cpu().numpy()

    def relabel(self, labels: np.ndarray, centres: np.ndarray) -> None:
        """Other clusters, whose centroids lie in the subspace: (K, q) unit rows. The margin may be negative."""
        cosines = self.coordinates @ centres.T.astype(np.float32)
        rows = np.arange(len(labels))
        self.cluster, self.cosine = labels, np.where(labels >= 0, cosines[rows, labels], 0)
        self.margin = np.where(labels >= 0, np.float32(2), np.float32(0))  # the largest possible, where K is 1
        if cosines.shape[1] > 1:
            cosines[rows, labels] = -2
            self.margin = np.where(labels >= 0, self.cosine - cosines.max(axis=1), 0)

    @property
    def clustered(self) -> np.ndarray:
        """(n, q): what the clusters were made of."""
        return self.coordinates if self.predicted is None else self.predicted

    @property
    def by_direction(self) -> bool:
        """Coordinates count by direction alone; long predictions, where the prompt says much, pull harder."""
        return self.predicted is None

    def judge_stability(self, reruns: Reruns) -> dict[str, Any]:
        """Keep how far each sample's cluster depends on chance; returns what `clustering.json` says of it."""
        self.support = reruns.support
        return {**reruns.to_dict(), "near_boundary": float(self.near_boundary.mean())}

    @property
    def near_boundary(self) -> np.ndarray:
        """(n,) bool: samples that more than a few reruns put into another cluster."""
        assert self.support is not None
        return (self.cluster >= 0) & (self.support < BOUNDARY_SUPPORT)

    def write(self, path: Path) -> None:
        columns: dict[str, Any] = {"id": self.ids}
        columns |= {name: getattr(self, name) for name in ("cluster", "cosine", "margin", "norm", "loss")}
        columns["coordinates"] = _lists(self.coordinates)
        if self.online_cluster is not None:
            columns["online_cluster"] = self.online_cluster
        if self.support is not None:
            columns |= {"support": self.support, "near_boundary": self.near_boundary}
        if self.predicted is not None:
            columns["predicted"] = _lists(self.predicted)
        pq.write_table(pa.table(columns), path)

    @classmethod
    def read(cls, path: Path) -> Assignments:
        with reading(path, "cluster the run again"):
            return cls._of_table(pq.read_table(path))

    @classmethod
    def _of_table(cls, table: pa.Table) -> Assignments:
        # Copies: what Arrow lends is read-only, and a pass that goes on fills these arrays.
        flat = {name: table[name].to_numpy().copy() for name in ("cluster", "cosine", "margin", "norm", "loss")}
        more = {name: table[name].to_numpy() for name in ("online_cluster", "support") if name in table.column_names}
        more |= {name: _matrix(table, name) for name in ("coordinates", "predicted") if name in table.column_names}
        for name, values in {**flat, **more}.items():
            require(values.dtype.kind in ("iu" if name.endswith("cluster") else "f"), f"column {name} is no number")
        require("coordinates" in more and flat["cluster"].min(initial=0) >= -1, "columns are missing or out of range")
        return cls(table["id"].to_pylist(), **flat, **more)


def _lists(matrix: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(matrix, dtype=np.float32).ravel(), matrix.shape[1])


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    column = table[name].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size).copy()
