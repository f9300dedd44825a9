"""Where a gradient pass stands, on disk from time to time: a killed pass goes on from there to the same bits."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch

from gradientspace.assignments import Assignments
from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.projection import ProjectedRows
from gradientspace.run_folder import write_json

INTERVAL = 60.0
"""Seconds between two snapshots."""
LARGEST_SHARE = 0.05
"""Snapshots of a large state are rarer, so that writing them takes at most this share of the time."""


class PassCheckpoint:
    """Snapshots of one online pass in `folder`, the newest only.

    `belongs_to` names what the pass depends on (weights, samples, settings); a snapshot of another is ignored. The
    file `keep`, written before the pass, is kept with the snapshots and put back by `load`, and so are the rows of
    `projected`.
    """

    def __init__(
        self,
        folder: Path,
        belongs_to: str,
        *,
        keep: Path,
        projected: ProjectedRows | None = None,
        interval: float | None = None,
    ) -> None:
        self.folder, self.belongs_to, self.keep, self.projected = folder, belongs_to, keep, projected
        self.interval = INTERVAL if interval is None else interval
        self._last = time.monotonic()

    def load(self, device: torch.device) -> tuple[OnlineSVDClusterer, Assignments, int] | None:
        """Clusterer, assignments so far, and the number of batches behind them; None where there is no snapshot."""
        if not (self.folder / "pass.json").is_file():
            return None
        record = json.loads((self.folder / "pass.json").read_text())
        if record["belongs_to"] != self.belongs_to:
            return None
        shutil.copy(self.folder / self.keep.name, self.keep)
        if self.projected:
            self.projected.load(self.folder / "projected.safetensors")
        table = Assignments.read(self.folder / "assignments.parquet")
        return OnlineSVDClusterer.load(self.folder, str(device)), table, record["batches"]

    def due(self) -> bool:
        """Whether it is time for the next snapshot."""
        return time.monotonic() - self._last >= self.interval

    def write(self, clusterer: OnlineSVDClusterer, table: Assignments, batches: int) -> None:
        """Write a snapshot. It is complete or not there at any instant."""
        start = time.monotonic()
        partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        clusterer.save(partial)
        shutil.copy(self.keep, partial)
        table.write(partial / "assignments.parquet")
        if self.projected:
            self.projected.save(partial / "projected.safetensors")
        write_json(partial / "pass.json", {"belongs_to": self.belongs_to, "batches": batches})
        self.remove()
        partial.rename(self.folder)
        self._last = time.monotonic()
        self.interval = max(self.interval, (self._last - start) / LARGEST_SHARE)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
