"""Planted structure with known truth: one online pass against seeing everything, and against projecting
first.

    python benchmarks/clustering.py                                  all sections
    python benchmarks/clustering.py --quick                          a smoke size, under a minute
    python benchmarks/clustering.py --sections quality --json out.json
 quality     adjusted Rand index with the truth of GradientSpace (one pass, each update rule), of spherical
k-means on
            all full rows (the ceiling), of scikit-learn's MiniBatchKMeans (one pass) and of random projection
            to 512 and 8,192 followed by k-means or BIRCH; seconds, and bytes of state beside the batch
n_clusters  how often the spectrum's K is right, on planted and on structureless data
subspace    largest angle to the offline subspace of the validation basis and of the running SVD
cost        seconds and memory a sample at the demo's dimension, for growing N
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from planted_stream import Planted
from sklearn.cluster import Birch, MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from gradientspace.clustering import OnlineSVDClusterer, plan_memory, spherical_kmeans
from gradientspace.clustering.rank import estimate_rank
from gradientspace.clustering.running_svd import RunningSVD, largest_angle
from gradientspace.clustering.svd import gradient_svd

N_VALIDATION = 512
RESTARTS = 10


def unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def validation(planted: Planted) -> Tensor:
    """The first rows of the stream; rows are exchangeable unless they drift."""
    return torch.cat(list(planted.rows(0, min(N_VALIDATION, planted.n))))


def online(planted: Planted, update: str = "svd", momentum: float = 0.1) -> tuple[Tensor, int]:
    """One pass, then `predict` on all rows (they are cheap to make again here): labels, bytes of state."""
    clusterer = OnlineSVDClusterer(planted.n_clusters, 0, update=update, momentum=momentum)
    clusterer.initialize(validation(planted))
    for batch in planted.rows():
        clusterer.partial_fit(batch)
    clusterer.finalize()
    labels = torch.cat([clusterer.predict(batch) for batch in planted.rows()])
    k, n = planted.n_clusters, clusterer.cache_size
    return labels, plan_memory(planted.dim, k, n_validation=N_VALIDATION, cache_size=n, update=update, n_draws=0).peak


def ceiling(planted: Planted) -> tuple[Tensor, int]:
    """Spherical k-means on all centred full rows, through their N x N Gram matrix built over column
    blocks."""
    n = planted.n
    gram = torch.zeros(n, n, dtype=torch.float64)
    for block in planted.columns():
        gram += (block @ block.T).double()
    lengths = gram.diagonal().sqrt()
    gram /= lengths[:, None] * lengths
    gram -= gram.mean(dim=0, keepdim=True) + gram.mean(dim=1, keepdim=True) - gram.mean()
    values, vectors = torch.linalg.eigh(gram)
    labels, _, _ = spherical_kmeans(vectors * values.clamp(min=0).sqrt(), planted.n_clusters, RESTARTS, 0)
    return torch.as_tensor(labels), n * planted.dim * 4


def mini_batch_kmeans(planted: Planted) -> tuple[Tensor, int]:
    model = MiniBatchKMeans(planted.n_clusters, random_state=0, n_init=RESTARTS)
    first = unit(validation(planted)).numpy()
    model.partial_fit(first)
    for batch in planted.rows(N_VALIDATION):
        model.partial_fit(unit(batch).numpy())
    labels = np.concatenate([model.predict(unit(batch).numpy()) for batch in planted.rows()])
    return torch.as_tensor(labels), first.nbytes + 3 * planted.n_clusters * planted.dim * 4


def projected(planted: Planted, width: int, method: str) -> tuple[Tensor, int]:
    """Sparse random projection of unit rows (Kane and Nelson 2014, 4 signs a coordinate), then k-means or
    BIRCH."""
    generator = torch.Generator().manual_seed(planted.seed)
    per_sign = width // 4
    target = torch.zeros(planted.n, width)
    for block in planted.columns():
        for part in range(4):
            bins = torch.randint(per_sign, (block.shape[1],), generator=generator) + part * per_sign
            signs = torch.randint(2, (block.shape[1],), generator=generator) * 2.0 - 1.0
            target.index_add_(1, bins, block * signs)
    rows = unit(target)
    rows = unit(rows - rows.mean(dim=0))
    if method == "kmeans":
        labels = spherical_kmeans(rows, planted.n_clusters, RESTARTS, 0)[0]
    else:
        labels = Birch(n_clusters=planted.n_clusters, threshold=0.7).fit_predict(rows.numpy())
    return torch.as_tensor(labels), rows.numel() * 4


METHODS: dict[str, Callable[[Planted], tuple[Tensor, int]]] = {
    "online svd": online,
    "online mean": lambda planted: online(planted, "mean"),
    "online running": lambda planted: online(planted, "running"),
    "ceiling": ceiling,
    "MiniBatchKMeans": mini_batch_kmeans,
    "projection 8192 + k-means": lambda planted: projected(planted, 8192, "kmeans"),
    "projection 512 + k-means": lambda planted: projected(planted, 512, "kmeans"),
    "projection 512 + BIRCH": lambda planted: projected(planted, 512, "birch"),
}


def quality_cells(quick: bool) -> Iterator[tuple[str, Planted]]:
    if quick:
        yield "base", Planted(n=512, dim=4_000, n_clusters=4)
        return
    base = Planted(n=2048)
    for dim in (10_000, 100_000, 1_000_000):
        yield f"D {dim:,}", replace(base, dim=dim, n=1024 if dim > 100_000 else base.n)
    base = replace(base, dim=20_000)
    for k in (2, 4, 16):
        yield f"K {k}", replace(base, n_clusters=k)
    for cosine in (0.5, 0.05, 0.02):
        yield f"cosine {cosine}", replace(base, cosine=cosine)
    for imbalance in (5.0, 20.0):
        yield f"imbalance {imbalance:g}", replace(base, imbalance=imbalance)
    yield "common 0.5", replace(base, common=0.5)
    for decay in (0.4, 0.5, 0.6):
        for cosine in (0.1, 0.05, 0.02):
            yield f"noise decay {decay}, cosine {cosine}", replace(base, noise_decay=decay, cosine=cosine)
    yield "drift 60 degrees", replace(base, drift=60.0)
    yield "outliers 10 %", replace(base, outliers=0.1)


def quality(quick: bool) -> list[dict[str, Any]]:
    results = []
    for name, planted in quality_cells(quick):
        truth = planted.labels()
        kept = truth >= 0
        rarest = float(planted.shares.min()) * min(N_VALIDATION, planted.n)
        cell = {"cell": name, **asdict(planted), "expected_validation_rows_of_rarest": rarest, "methods": {}}
        for method, run in METHODS.items():
            start = time.perf_counter()
            labels, state = run(planted)
            cell["methods"][method] = {
                "ari": adjusted_rand_score(truth[kept], labels[kept]),
                "seconds": time.perf_counter() - start,
                "state_bytes": state,
            }
        results.append(cell)
        print(f"{name:<36}" + "  ".join(f"{m} {v['ari']:.3f}" for m, v in cell["methods"].items()), flush=True)
    return results


def n_clusters(quick: bool) -> list[dict[str, Any]]:
    base = Planted(n=128 if quick else N_VALIDATION, dim=2_000 if quick else 10_000)
    cells = {"structureless": replace(base, n_clusters=1, cosine=0.0, common=0.0)}
    cells["one common direction"] = replace(base, n_clusters=1, cosine=0.0, common=0.5)
    for k in (4,) if quick else (2, 4, 8, 16):
        for cosine in (0.1, 0.5):
            cells[f"K {k}, cosine {cosine}"] = replace(base, n_clusters=k, cosine=cosine)
            # As unequal as 10 expected rows of the rarest cluster allow, at most 20 : 1.
            worst = max(r for r in range(1, 21) if min(_shares(base, k, r)) * base.n >= 10)
            cells[f"K {k}, cosine {cosine}, {worst} : 1"] = replace(
                base, n_clusters=k, cosine=cosine, imbalance=float(worst)
            )
    if not quick:
        cells["decaying noise, K 4, cosine 0.1"] = replace(base, n_clusters=4, noise_decay=0.6)
    results = []
    for name, planted in cells.items():
        counts: Counter[str] = Counter()
        for seed in range(2 if quick else 50):
            generator = torch.Generator().manual_seed(seed)
            svd = gradient_svd(validation(replace(planted, seed=seed)), 2, n_draws=20, generator=generator)
            counts[str(estimate_rank(svd, generator=generator).n_clusters)] += 1
        right = counts[str(planted.n_clusters)] / sum(counts.values())
        results.append({"cell": name, **asdict(planted), "right": right, "answers": dict(counts)})
        print(f"{name:<36}right {right:.2f}  {dict(counts)}", flush=True)
    return results


def _shares(base: Planted, k: int, imbalance: float) -> list[float]:
    return replace(base, n_clusters=k, imbalance=float(imbalance)).shares.tolist()


def subspace(quick: bool) -> list[dict[str, Any]]:
    """Uncentred unit rows, whose K + 1 planted directions are the rank; the running SVD keeps 64."""
    results = []
    for cosine in (0.1,) if quick else (0.5, 0.2, 0.1, 0.05, 0.02):
        planted = Planted(n=768 if quick else 4096, dim=4_000 if quick else 50_000, cosine=cosine)
        rank = planted.n_clusters + 1
        frozen = gradient_svd(validation(planted), 64, center=False)
        running = RunningSVD(64, frozen.components, frozen.singular_values)
        for batch in planted.rows(N_VALIDATION):
            running.update(unit(batch))
        offline = gradient_svd(torch.cat(list(planted.rows())), rank, center=False).components
        assert running.components is not None
        angles = [largest_angle(basis[:rank], offline) for basis in (frozen.components, running.components)]
        results.append({**asdict(planted), "frozen_degrees": angles[0], "running_degrees": angles[1]})
        print(f"cosine {cosine:<29}frozen {angles[0]:.1f}  running {angles[1]:.1f} degrees", flush=True)
    return results


def cost(quick: bool) -> list[dict[str, Any]]:
    """Time of the clusterer alone (rows are made before the clock starts), and the process's memory
    growth."""
    dim, k, batch = 20_000 if quick else 312_320, 8, 32
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(4 * batch, dim, generator=generator)
    results = []
    for n in (256,) if quick else (512, 4096):
        clusterer = OnlineSVDClusterer(k, 0, n_validation=128).initialize(pool)
        before, start = resident_bytes(), time.perf_counter()
        for step in range(n // batch):
            clusterer.partial_fit(pool[(step % 4) * batch :][:batch])
        seconds = (time.perf_counter() - start) / n
        grown = resident_bytes() - before
        results.append({"dim": dim, "n_clusters": k, "n": n, "seconds_a_sample": seconds, "grown_bytes": grown})
        print(f"D {dim:,}, N {n:<6}{1e3 * seconds:.2f} ms a sample, memory grew by {grown / 2**20:.0f} MiB")
    return results


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


SECTIONS = {"quality": quality, "n_clusters": n_clusters, "subspace": subspace, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--quick", action="store_true", help="a smoke size, under a minute")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of: " + ", ".join(SECTIONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": describe("gradientspace", "scikit-learn"), "quick": options.quick}
    for name in options.sections.split(","):
        print(name)
        results[name] = SECTIONS[name](options.quick)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
