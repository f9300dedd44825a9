"""Ten million simulated gradients through the clusterer: does memory stay flat, and the agreement with the truth?

    python benchmarks/simulated_stream.py --json benchmarks/results/simulated-stream.json

The rows are those of `planted_stream.Planted`, `sqrt(c) t_k + sqrt(s) t_0 + sqrt(1 - c - s) e`, but drawing twenty
billion normal numbers would take most of the time. So the noise e comes from a pool of 4,096 normal rows: a batch takes
two blocks of it, each at a random place, its columns turned round by a random number of places and its rows signed at
random, and adds them. There are 8 million pool rows with their turn, and so 7e13 sums; two rows of the stream that
share one of their halves have noise of cosine 0.5 (one pair in two million). Nothing that grows with the stream is
kept: of the labels only how often each cluster met each truth.

At each mark (100,000 rows, …): the agreement (adjusted Rand) of the labels given online since the mark before; what
ten states of the centroids, spread over the last tenth of the way, say of 20,000 rows that are in no stream; the cosine
of the centroids with the planted directions; the largest resident set since the mark before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gradients import memory
from machine import describe
from planted_stream import COLUMN_BLOCK, Planted
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gradientspace.clustering import OnlineSVDClusterer

POOL, BATCH, N_VALIDATION, HELD_OUT = 4096, 256, 512, 20_000
MARKS = (100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000)
SNAPSHOTS = 10


@dataclass(frozen=True)
class Pooled(Planted):
    """Planted clusters with noise from a pool: any number of rows for the price of a few passes over each."""

    @cached_property
    def pool(self) -> Tensor:
        """(4096, D) noise rows, so long that two of them make the noise of a row."""
        assert self.dim <= COLUMN_BLOCK
        share = (1.0 - self.cosine - self.common) / 2
        return torch.randn(POOL, self.dim, generator=self._generator(10)).mul_((share / self.dim) ** 0.5)

    @cached_property
    def directions(self) -> Tensor:
        """(K + 1, D) of the clusters, the common one last."""
        return self._directions(0, self.dim, 0)

    def batches(self, n: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels (b,) and rows (b, D) of n rows of a stream of its own; equal seeds give equal rows."""
        means = self.cosine**0.5 * self.directions[:-1] + self.common**0.5 * self.directions[-1]
        generator = self._generator(11, seed)
        for start in range(0, n, BATCH):
            b = min(BATCH, n - start)
            labels = torch.multinomial(self.shares, b, replacement=True, generator=generator)
            rows = means[labels]
            for _ in range(2):
                first, turn = (int(torch.randint(high, (), generator=generator)) for high in (POOL - b, self.dim))
                signs = torch.randint(2, (b, 1), generator=generator) * 2.0 - 1.0
                block = self.pool[first : first + b]
                rows[:, turn:].addcmul_(block[:, : self.dim - turn], signs)
                rows[:, :turn].addcmul_(block[:, self.dim - turn :], signs)
            yield labels, rows


def agreement(counts: Tensor) -> float:
    """Adjusted Rand index from how often each label (rows) met each truth (columns)."""

    def pairs(sizes: Tensor) -> float:
        return float((sizes.double() * (sizes.double() - 1) / 2).sum())

    both, labels, truth = pairs(counts), pairs(counts.sum(dim=1)), pairs(counts.sum(dim=0))
    chance = labels * truth / pairs(counts.sum())
    return (both - chance) / ((labels + truth) / 2 - chance)


def met(labels: Tensor, truth: Tensor, k: int) -> Tensor:
    """(K, K) how often each label met each truth."""
    return torch.bincount(labels * k + truth, minlength=k * k).view(k, k)


def snapshots(marks: list[int]) -> dict[int, list[int]]:
    """Row counts at which the centroids are judged, for each mark: the last tenth of the way to it, evenly."""
    return {mark: [round(mark * (0.9 + 0.1 * (i + 1) / SNAPSHOTS)) for i in range(SNAPSHOTS)] for mark in marks}


def stream(planted: Pooled, marks: list[int], held_out: int) -> dict[str, Any]:
    """One pass over as many rows as the last mark says."""
    k = planted.n_clusters
    validation = torch.cat([rows for _, rows in planted.batches(N_VALIDATION, seed=1)])
    clusterer = OnlineSVDClusterer(k, 0).initialize(validation)
    found: dict[str, Any] = {"before": judged(planted, clusterer, held_out)}
    since, done, seconds = torch.zeros(k, k, dtype=torch.int64), 0, {"generating": 0.0, "clustering": 0.0}
    stream = planted.batches(marks[-1], seed=3)
    for mark, points in snapshots(marks).items():
        seen: list[dict[str, float]] = []
        memory("cpu", reset=True)
        while done < mark:
            start = time.perf_counter()
            truth, rows = next(stream)
            made = time.perf_counter()
            since += met(torch.as_tensor(clusterer.partial_fit(rows).labels_), truth, k)
            done += len(rows)
            seconds["generating"] += made - start
            seconds["clustering"] += time.perf_counter() - made
            if points and done >= points[0]:
                points.pop(0)
                seen.append(judged(planted, clusterer, held_out))
        found[str(mark)] = {
            "ari_online": agreement(since),
            "ari_held_out": statistics.fmean(one["ari_held_out"] for one in seen),
            "ari_held_out_deviation": statistics.stdev(one["ari_held_out"] for one in seen),
            "centroid_cosine": statistics.fmean(one["centroid_cosine"] for one in seen),
            "peak_mb": memory("cpu"),
            **{f"{name}_seconds": round(value, 1) for name, value in seconds.items()},
        }
        print(mark, json.dumps(found[str(mark)]), flush=True)
        since.zero_()
    return found


def judged(planted: Pooled, clusterer: OnlineSVDClusterer, held_out: int) -> dict[str, float]:
    """Agreement on rows apart, and the mean cosine of the centroids with the clusters' directions, best pairing.

    Centring takes the mean over clusters away from every direction, and so it is taken away here.
    """
    k = planted.n_clusters
    counts = torch.zeros(k, k, dtype=torch.int64)
    for truth, rows in planted.batches(held_out, seed=2):
        counts += met(torch.as_tensor(clusterer.predict(rows)), truth, k)
    own = planted.directions[:-1]
    own = torch.nn.functional.normalize(own - planted.shares.float() @ own)
    cosines = torch.as_tensor(clusterer.cluster_centers_) @ own.T
    pairing = linear_sum_assignment(-cosines.numpy())
    return {"ari_held_out": agreement(counts), "centroid_cosine": float(cosines[pairing].mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument(
        "--cosines", type=float, nargs="*", default=[0.01, 0.005], help="inside a cluster, one pass each"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke size, some seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, dim, k, held_out = options.rows, 2048, 8, HELD_OUT
    marks = [mark for mark in MARKS if mark < n] + [n]
    if options.quick:
        n, dim, k, held_out, marks, options.cosines = 8_000, 512, 4, 2_000, [4_000, 8_000], [0.05]
    streams: dict[str, Any] = {}
    for cosine in options.cosines:
        planted = Pooled(n=n, dim=dim, n_clusters=k, cosine=cosine)
        streams[f"cosine {cosine}"] = {"planted": asdict(planted), "marks": stream(planted, list(marks), held_out)}
        result = {"batch": BATCH, "pool": POOL, "held_out": held_out, "streams": streams}
        if options.json:
            options.json.write_text(json.dumps(result | {"machine": describe("gradientspace")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
