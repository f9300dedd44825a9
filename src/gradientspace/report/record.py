"""What a run folder holds, read once. What is not there, or not recorded as finished, is None: never zero."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradientspace.conflict import FILE as GRAM_FILE
from gradientspace.conflict import read_gram
from gradientspace.rows import FILE as ROWS_FILE
from gradientspace.run_folder import Run

_FIT_COLUMNS = ["id", "source", "domain", "tokens", "prompt", "messages"]


@dataclass
class RunRecord:
    """Everything of one run that can be shown. Knows nothing of torch."""

    run: Run
    manifest: dict[str, Any]
    costs: dict[str, Any] | None
    versions: dict[str, str] | None
    accounting: dict[str, Any] | None
    clustering: dict[str, Any] | None
    """`clustering.json`: sizes, spectrum, stability, variance."""
    rank_estimate: dict[str, Any] | None
    sweep: list[dict[str, Any]] | None
    """From `gradientspace cluster RUN --sweep 2..16 --json RUN/sweep.json`. One entry a K: `n_clusters`, `between`
    (share of energy), `stability` {mean, low, high}, `sizes`."""
    results: dict[str, Any] | None
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> its training.json, in the order the stages were made."""

    @classmethod
    def read(cls, run: Run) -> RunRecord:
        """Read the small files; the tables are read when asked for. Raises `RunFolderError` where damaged."""
        stages = run.manifest()["stages"]
        run.check("data", "rows", "clustering", "evaluation")
        clusterer = _json(run.path / "clustering/clusterer.json") if run.has("clustering") else None
        return cls(
            run=run,
            manifest=run.manifest(),
            costs=run.costs(),
            versions=_json(run.path / "versions.json"),
            accounting=_json(run.path / "data/accounting.json") if run.has("data") else None,
            clustering=_json(run.path / "clustering/clustering.json") if run.has("clustering") else None,
            rank_estimate=(clusterer or {}).get("rank_estimate"),
            sweep=(_json(run.path / "sweep.json") or {}).get("rows"),
            results=_json(run.path / "evaluation/results.json") if run.has("evaluation") else None,
            training={s: t for s in stages if (t := _json(run.path / s / "training.json")) is not None},
        )

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def n_clusters(self) -> int:
        return self.clustering["n_clusters"] if self.clustering else 0

    @cached_property
    def assignments(self) -> pa.Table | None:
        """One row a sample of `fit`: cluster, and where gradients were taken cosine, margin, loss, coordinates."""
        path = self.run.path / "clustering/assignments.parquet"
        return pq.read_table(path) if self.clustering is not None and path.is_file() else None

    @cached_property
    def clusters(self) -> np.ndarray:
        """(N,) cluster of every sample of `fit`, -1 where it has none."""
        return self.column("cluster")

    def column(self, name: str) -> np.ndarray:
        """A column of `assignments` as an array; raises KeyError where it is absent."""
        assert self.assignments is not None
        return self.assignments[name].to_numpy()

    def has_column(self, name: str) -> bool:
        return self.assignments is not None and name in self.assignments.column_names

    @cached_property
    def fit(self) -> pa.Table | None:
        """Texts and labels of `fit`, row by row as in `assignments`; None for a run from before they were kept."""
        path = self.run.path / "rows" / ROWS_FILE
        if self.assignments is None or not self.run.has("rows"):
            return None
        table = pq.read_table(path, columns=_FIT_COLUMNS, filters=[("split", "=", "fit")])
        return table if table["id"].equals(self.assignments["id"]) else None

    @cached_property
    def sources(self) -> list[str] | None:
        """Source of every sample of `fit`, "" where it has none; None where the run does not say."""
        return None if self.fit is None else [s or "" for s in self.fit["source"].to_pylist()]

    @cached_property
    def samples(self) -> pa.Table | None:
        """One row an evaluated sample: labels, route, loss under each method."""
        if self.results is None:
            return None
        return pq.read_table(self.run.path / "evaluation/samples.parquet")

    @cached_property
    def gram(self) -> tuple[list[str], np.ndarray] | None:
        """Ids of the validation samples and the inner products of their unit gradients."""
        path = self.run.path / "clustering" / GRAM_FILE
        return read_gram(path) if self.clustering is not None and path.is_file() else None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
