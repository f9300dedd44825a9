"""Cluster a finished run again, for another K or seed, from the coordinates it kept: seconds, and never the model.

What is clustered is what the run's own clusters were made of: the coordinates of its gradients, or, with
`clustering.target: routable`, the part of them that the prompt predicts. The new centroids lie in the subspace, so
the held-out rows' clusters follow from their coordinates exactly as from their gradients.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradientspace.assignments import Assignments
from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.clustering.kmeans import merge_small_clusters, spherical_kmeans
from gradientspace.clustering.settle import coordinate_energy, coordinate_labels
from gradientspace.clustering.stability import SweepRow, kmeans_stability, sweep
from gradientspace.conflict import FILE as GRAM_FILE
from gradientspace.errors import InputError, RunFolderError
from gradientspace.files import write_json, write_text
from gradientspace.grouping import Groups
from gradientspace.progress import say
from gradientspace.routable import RoutableMap
from gradientspace.run_folder import Run
from gradientspace.tables import render

LARGEST_SWEEP = 256


def recluster(run: Run, n_clusters: int | None = None, seed: int | None = None) -> Groups:
    """Replace the run's clusters by those of its coordinates for another K or seed, and return them.

    Everything that was made from the old clusters (experts, router, evaluation) is removed; the next `run` makes it
    again. Raises `RunFolderError` without a gradient clustering and `InputError` for a K that the rows do not allow.
    """
    folder, fit = _open(run)
    points = fit.clustered
    groups = Groups.read(folder)
    k = n_clusters or groups.n_clusters
    seed = run.config.seed if seed is None else seed
    _check_k(k, points)
    labels, centres, _ = spherical_kmeans(points, k, run.config.clustering.n_init, seed, normalise=fit.by_direction)
    merged, kept, _ = merge_small_clusters(np.asarray(labels), centres, run.config.clustering.min_cluster_size)
    new = np.asarray(kept)
    held = Assignments.read(folder / "held_out.parquet")
    held.relabel(coordinate_labels(held.coordinates, new), new)
    fit.relabel(merged, new)
    reruns = kmeans_stability(points, merged, normalise=fit.by_direction, random_state=seed)
    facts = {
        **{name: groups.facts[name] for name in ("dimension", "spectrum")},
        "stability": fit.judge_stability(reruns),
        "reclustered": {
            "n_clusters": k,
            "seed": seed,
            "space": "routable" if fit.predicted is not None else "coordinates",
            "energy_of_coordinates": coordinate_energy(fit.coordinates),
        },
    }
    found = Groups(fit.cluster, held.cluster, len(new), facts)

    def make(partial: Path) -> None:
        clusterer = OnlineSVDClusterer.load(folder)
        lifted = torch.as_tensor(new, dtype=torch.float32) @ torch.as_tensor(clusterer.components_)
        clusterer.replace_centers(torch.nn.functional.normalize(lifted)).save(partial)
        if fit.predicted is not None:
            routable = RoutableMap.load(folder / "routable")
            routable.n_clusters, routable.centres_ = len(new), torch.as_tensor(new, dtype=torch.float64)
            routable.save(partial / "routable")
        if (folder / GRAM_FILE).is_file():
            shutil.copy(folder / GRAM_FILE, partial)
        fit.write(partial / "assignments.parquet")
        held.write(partial / "held_out.parquet")
        found.write_facts(partial)

    inputs = tuple(run.manifest()["stages"]["clustering"]["inputs"])
    run.stage("clustering", make, inputs=inputs, again=True)
    stale = run.discard_made_from("clustering")
    if stale:
        say(f"removed what the old clusters had made: {', '.join(stale)}")
    return found


def sweep_run(run: Run, n_clusters: range, seed: int | None = None) -> list[SweepRow]:
    """Quality and stability of the run's coordinates for every K; changes nothing."""
    fit = _open(run)[1]
    _check_k(max(n_clusters), fit.clustered)
    seed = run.config.seed if seed is None else seed
    return sweep(fit.clustered, n_clusters, normalise=fit.by_direction, random_state=seed)


def command(options: argparse.Namespace) -> None:
    """`gradientspace cluster RUN --k 6 | --seed 1 | --sweep 2..16`."""
    run = Run.open(options.run)
    if options.sweep is not None:
        if options.k is not None:
            raise InputError("--k and --sweep do not go together: --sweep looks, --k decides")
        _show_sweep(sweep_run(run, parse_range(options.sweep), options.seed), options)
        return
    with run.lock():
        groups = recluster(run, options.k, options.seed)
    stability, energy = groups.facts["stability"], groups.facts["reclustered"]["energy_of_coordinates"]
    print(
        f"K = {groups.n_clusters}, sizes {', '.join(map(str, groups.sizes))}; agreement of reruns "
        f"{stability['mean']:.2f}, {100 * stability['near_boundary']:.0f} % of the samples near a boundary\n"
        f"A clustering of coordinates, which hold {100 * energy:.0f} % of the gradients' energy.\n"
        f"Next: gradientspace eval {run.path} makes experts, router and evaluation anew"
    )


def parse_range(text: str) -> range:
    """ "2..16" -> range(2, 17). Raises `InputError`."""
    first, dots, last = text.partition("..")
    if not dots or not first.strip().isdigit() or not last.strip().isdigit():
        raise InputError(f"--sweep is {text!r}: give two numbers of clusters, as in 2..16")
    low, high = int(first), int(last)
    if not 1 <= low <= high <= LARGEST_SWEEP:
        raise InputError(f"--sweep is {text!r}: it must rise, from 1 or more to at most {LARGEST_SWEEP}")
    return range(low, high + 1)


def _open(run: Run) -> tuple[Path, Assignments]:
    """The clustering's folder and the assignments of `fit`. Raises `RunFolderError` where nothing was kept."""
    folder = run.require("clustering", f"cluster {run.path}")
    if run.config.clustering.method != "gradient":
        raise RunFolderError(f"{run.path} was clustered by {run.config.clustering.method}: it kept no coordinates")
    fit = Assignments.read(folder / "assignments.parquet")
    if (folder / "routable").is_dir() and fit.predicted is None:
        raise RunFolderError(f"{run.path} kept no predicted coordinates: run `gradientspace cluster {run.path} --redo`")
    return folder, fit


def _check_k(k: int, points: np.ndarray) -> None:
    usable = int((points != 0).any(axis=1).sum())
    if not 1 <= k <= usable:
        raise InputError(f"K is {k}; the run has {usable} samples with coordinates: give a number from 1 to that")


def _show_sweep(rows: list[SweepRow], options: argparse.Namespace) -> None:
    head = ["K", "between share", "stability", "95 % of pairs", "smallest cluster"]
    print(
        render(
            head,
            [
                [
                    str(row.n_clusters),
                    f"{row.between:.4f}",
                    f"{row.stability.mean:.3f}",
                    f"{row.stability.low:.3f} to {row.stability.high:.3f}",
                    str(row.sizes[-1]),
                ]
                for row in rows
            ],
        )
    )
    records: list[dict[str, Any]] = [asdict(row) for row in rows]
    if options.json:
        write_json(options.json, {"schema": 1, "run": str(options.run), "rows": records})
    if options.csv:
        write_text(options.csv, _as_csv(rows))


def _as_csv(rows: list[SweepRow]) -> str:
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["n_clusters", "between", "stability", "stability_low", "stability_high", "smallest_cluster"])
    for row in rows:
        stability = row.stability
        writer.writerow([row.n_clusters, row.between, stability.mean, stability.low, stability.high, row.sizes[-1]])
    return text.getvalue()
