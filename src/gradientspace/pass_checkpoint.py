"""Where a gradient pass stands, on disk from time to time: a killed pass goes on from there to the same bits."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch

from gradientspace.assignments import Assignments
from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.files import is_sealed, seal, write_json
from gradientspace.progress import say
from gradientspace.projection import ProjectedRows

INTERVAL = 60.0
"""Seconds between two snapshots."""
LARGEST_SHARE = 0.05
"""Snapshots of a large state are rarer, so that writing them takes at most this share of the time."""
_PREFIX = "pass-"


class PassCheckpoint:
    """Snapshots `pass-BATCHES` of one online pass in `folder`; an older one goes when the newer is complete.

    `belongs_to` names what the pass depends on (weights, samples, settings); a snapshot of another is ignored, and a
    damaged one named. The
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

    @property
    def newest(self) -> Path | None:
        """Folder of the newest snapshot, which holds the clusterer's own files too."""
        snapshots = {int(p.name.removeprefix(_PREFIX)): p for p in self.folder.glob(f"{_PREFIX}*") if not p.suffix}
        return snapshots[max(snapshots)] if snapshots else None

    def load(self, device: torch.device) -> tuple[OnlineSVDClusterer, Assignments, int] | None:
        """Clusterer, assignments so far, and the number of batches behind them; None where there is no snapshot."""
        newest = self.newest
        if newest is None:
            return None
        if not is_sealed(newest):
            say("  the snapshot of the online pass is damaged (its hash differs); the pass starts anew")
            return None
        record = json.loads((newest / "pass.json").read_text())
        if record["belongs_to"] != self.belongs_to:
            return None
        shutil.copy(newest / self.keep.name, self.keep)
        if self.projected:
            self.projected.load(newest / "projected.safetensors")
        table = Assignments.read(newest / "assignments.parquet")
        return OnlineSVDClusterer.load(newest, str(device)), table, record["batches"]

    def due(self) -> bool:
        """Whether it is time for the next snapshot."""
        return time.monotonic() - self._last >= self.interval

    def write(self, clusterer: OnlineSVDClusterer, table: Assignments, batches: int) -> None:
        """Write a snapshot. It is complete or not there at any instant."""
        start = time.monotonic()
        snapshot = self.folder / f"{_PREFIX}{batches}"
        partial = snapshot.with_suffix(".partial")
        for stale in (partial, snapshot):
            shutil.rmtree(stale, ignore_errors=True)
        clusterer.save(partial)
        shutil.copy(self.keep, partial)
        table.write(partial / "assignments.parquet")
        if self.projected:
            self.projected.save(partial / "projected.safetensors")
        write_json(partial / "pass.json", {"belongs_to": self.belongs_to, "batches": batches})
        seal(partial)
        partial.rename(snapshot)
        for older in self.folder.iterdir():
            if older != snapshot:
                shutil.rmtree(older, ignore_errors=True)
        self._last = time.monotonic()
        self.interval = max(self.interval, (self._last - start) / LARGEST_SHARE)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
