"""Would the rest of the mix learn better without a source whose gradients pull against it? A short training says.

A pull measured at the warm-up adapter is a first-order sign: it says what one step would do, not what a training does.
So each such source (the strongest first, three at most) is left out of the pilot's one adapter, the other rows as often
as before, and both adapters are compared on the `dev` rows of all other sources.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gradientspace.data import Sample
from gradientspace.diagnosis.pilot import CommonStart, common_start, losses, train_single
from gradientspace.diagnosis.words import pulling_against
from gradientspace.evaluation import paired_bootstrap
from gradientspace.files import write_json
from gradientspace.job import Job

_MOST = 3


def leave_out(job: Job, evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """One comparison for each source of `pulling_against`, [] where there is none."""
    names = [row["name"] for row in pulling_against(evidence)[:_MOST]]
    if not names:
        return []
    start = common_start(job)
    single = train_single(job, start)
    return [_left_out(job, start, single, number, name) for number, name in enumerate(names)]


def _left_out(job: Job, start: CommonStart, single: Path, number: int, name: str) -> dict[str, Any]:
    stage = f"left-out/{number}"
    without = start.train(job, stage, [s for s in start.rows if s.source != name])
    trained = tuple(s for s in ("pilot/single", stage) if s in job.run.manifest()["stages"])
    folder = job.run.stage(
        f"{stage}-result", lambda to: _compare(job, name, single, without, to), inputs=("evidence", *trained)
    )
    return json.loads((folder / "left_out.json").read_text())


def _compare(job: Job, name: str, single: Path, without: Path, folder: Path) -> None:
    dev = [*job.data.dev_a, *job.data.dev_b]
    others, own = [s for s in dev if s.source != name], [s for s in dev if s.source == name]
    write_json(folder / "left_out.json", {
        "name": name,
        "others": _difference(job, single, without, others),
        "own": _difference(job, single, without, own),
    })  # fmt: skip


def _difference(job: Job, single: Path, without: Path, samples: list[Sample]) -> dict[str, Any] | None:
    """Loss without the source minus loss with it, paired; None without rows."""
    if not samples:
        return None
    everyone = np.zeros(len(samples), dtype=int)
    one, tokens = losses(job, [single], samples, everyone)
    other, _ = losses(job, [without], samples, everyone)
    strata = [s.domain or s.source or "" for s in samples]
    return {
        "n": len(samples),
        "difference": paired_bootstrap(other - one, strata, seed=job.config.seed),
        "token_difference": float(np.average(other - one, weights=tokens)),
    }
