"""Planted structure with known truth: one online pass against seeing everything, and against projecting first.

    python benchmarks/clustering.py --json out.json                      all sections
    python benchmarks/clustering.py --json out.json --sections quality   one of them; out.json keeps the others
    python benchmarks/clustering.py --quick                              a smoke size, under a minute

Every cell is written as soon as it is measured, and a cell that the file has already is not measured again.

quality     adjusted Rand index with the truth, seconds and memory of one online pass, of spherical k-means on all full
            rows (the ceiling), of MiniBatchKMeans, and of random projections followed by k-means or BIRCH
options     the same index for every option of the clusterer, on the settings that are hard
preconditioning  real gradients divided by Adam's second moment, against as they are; needs --real
n_clusters  how often the spectrum's K is right, on planted and on structureless data
subspace    largest angle to the offline subspace of the validation basis and of the running SVD
length      whether a row's length predicts its cluster, with batches of similar length in shuffled order
cost        time beside that of computing the gradients, and memory for growing N
recluster   seconds for another K from the coordinates of 100,000 samples
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
from clustering_methods import EXPERIMENTS, METHODS, N_VALIDATION, Cell, online, unit
from gradients import MODEL, QUICK_MODEL, make_model, make_samples
from machine import describe
from planted_stream import Planted
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from gradientspace.clustering import OnlineSVDClusterer, spherical_kmeans
from gradientspace.clustering.rank import estimate_rank
from gradientspace.clustering.running_svd import RunningSVD, largest_angle
from gradientspace.clustering.stability import kmeans_stability
from gradientspace.clustering.svd import gradient_svd
from gradientspace.gradients import PerSampleGradients
from gradientspace.memory import PeakMemory, resident_bytes

# A named setting: what describes it, and what measures it.
Measured = Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]


def score(cell: Cell, labels: Tensor) -> float:
    kept = cell.truth >= 0
    return float(adjusted_rand_score(cell.truth[kept], labels[kept]))


def planted_cell(planted: Planted) -> Cell:
    return Cell(torch.cat(list(planted.rows())), planted.labels(), planted.n_clusters)


def on_real_noise(noise: Tensor, n_clusters: int, cosine: float) -> Cell:
    """Unit gradients (N, d) plus a direction of its own for each cluster, at right angles to all of them, as a random
    direction in hundreds of thousands of dimensions nearly is: two rows of a cluster gain `cosine`."""
    n, d = noise.shape
    truth = torch.randint(n_clusters, (n,), generator=torch.Generator().manual_seed(n_clusters))
    rows = torch.cat([noise * (1.0 - cosine) ** 0.5, torch.zeros(n, n_clusters)], dim=1)
    rows[torch.arange(n), d + truth] = cosine**0.5
    return Cell(rows, truth, n_clusters)


def quality_cells(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], Callable[[], Cell]]]:
    if options.quick:
        small = Planted(n=512, dim=4_000, n_clusters=4)
        yield "base", asdict(small), lambda: planted_cell(small)
        return
    for k in (4, 8):
        for cosine in (0.2, 0.1, 0.05, 0.02):
            described = {"n": 0 if options.noise is None else len(options.noise), "n_clusters": k, "cosine": cosine}
            described |= {"noise": "real gradients", "rarest_in_validation": N_VALIDATION / k}
            name = f"real noise, K {k}, cosine {cosine}"
            yield name, described, lambda k=k, c=cosine: on_real_noise(options.noise, k, c)
    base = Planted(n=1024, dim=20_000)
    settings = {f"D {dim:,}": replace(base, dim=dim) for dim in (10_000, 100_000)}
    settings |= {f"K {k}": replace(base, n_clusters=k) for k in (2, 16)}
    settings |= {f"cosine {c}": replace(base, cosine=c) for c in (0.5, 0.02)}
    settings |= {f"imbalance {r:g}": replace(base, imbalance=r) for r in (5.0, 20.0)}
    settings["common 0.5"] = replace(base, common=0.5)
    for decay, cosine in ((0.4, 0.1), (0.4, 0.05), (0.5, 0.2)):
        settings[f"noise decay {decay}, cosine {cosine}"] = replace(base, noise_decay=decay, cosine=cosine)
    for cosine in (0.005, 0.0025):
        settings[f"D 100,000, cosine {cosine}"] = replace(base, dim=100_000, cosine=cosine)
    settings["drift 60 degrees"] = replace(base, drift=60.0)
    settings["outliers 10 %"] = replace(base, outliers=0.1)
    settings["D 1,000,000"] = replace(base, dim=1_000_000, n=512)
    for name, planted in settings.items():
        rarest = float(planted.shares.min()) * min(N_VALIDATION, planted.n // 2)
        yield name, {**asdict(planted), "rarest_in_validation": rarest}, lambda p=planted: planted_cell(p)


def quality(options: argparse.Namespace) -> Measured:
    for name, described, make in quality_cells(options):

        def measure(make=make) -> dict[str, Any]:
            cell, methods = make(), {}
            for method, run in METHODS.items():
                before, start = resident_bytes(), time.perf_counter()
                with PeakMemory() as memory:
                    found, held = run(cell)
                seconds = time.perf_counter() - start
                methods[method] = {"seconds": seconds, "bytes": held, "peak_bytes": memory.peak_bytes - before}
                methods[method] |= {f"ari {kind}": score(cell, labels) for kind, labels in found.items()}
            return {"methods": methods}

        yield name, described, measure


VARIANTS: dict[str, dict[str, Any]] = {
    "svd, m 0.1 (the paper)": {},
    "svd, m 0.3": {"momentum": 0.3},
    "mean, m 0.1": {"update": "mean"},
    "running": {"update": "running"},
    "running, q 16": {"update": "running", "n_components": 16},
    "running, q 32": {"update": "running", "n_components": 32},
    "running, q 256": {"update": "running", "n_components": 256},
    "running, not centred": {"update": "running", "center": False},
}


def options(options: argparse.Namespace) -> Measured:
    """Real noise needs `--real`; the planted settings have noise that fills few dimensions, and imbalance."""
    made: dict[str, Callable[[int], Cell]] = {}
    for k, cosine in ((4, 0.02), (8, 0.05)) if options.noise is not None else ():
        order = [torch.randperm(len(options.noise), generator=torch.Generator().manual_seed(s)) for s in range(3)]
        name = f"real noise, K {k}, cosine {cosine}"
        made[name] = lambda seed, k=k, c=cosine, order=order: on_real_noise(options.noise[order[seed]], k, c)
    base = Planted(n=512 if options.quick else 1024, dim=2_000 if options.quick else 20_000)
    cells = {"noise decay 0.4, cosine 0.05": replace(base, noise_decay=0.4, cosine=0.05)}
    if not options.quick:
        cells["imbalance 20"] = replace(base, imbalance=20.0)
    made |= {name: lambda seed, p=planted: planted_cell(replace(p, seed=seed)) for name, planted in cells.items()}
    seeds = 1 if options.quick else 3
    for name, make in made.items():

        def measure(make=make) -> dict[str, Any]:
            runs = {v: lambda cell, chosen=chosen: online(cell, **chosen)[0] for v, chosen in VARIANTS.items()}
            runs |= EXPERIMENTS
            found: dict[str, list[dict[str, float]]] = {variant: [] for variant in runs}
            for seed in range(seeds):
                cell = make(seed)
                for variant, run in runs.items():
                    found[variant].append({kind: score(cell, one) for kind, one in run(cell).items()})
            kinds = ("one pass", "final")
            return {"ari": {v: {k: float(np.mean([r[k] for r in rows])) for k in kinds} for v, rows in found.items()}}

        yield name, {"seeds": seeds}, measure


def preconditioning(options: argparse.Namespace) -> Measured:
    """Real gradients as they are, and divided by the root of their second moment: what their subspace holds, and how
    stable plain clusters of them are."""
    for name in ("rows", "adam") if options.real else ():

        def measure(name=name) -> dict[str, Any]:
            rows = torch.from_numpy(np.load(options.real / f"{name}.npy"))
            domains = json.loads((options.real / "domains.json").read_text())
            svd = gradient_svd(rows[:N_VALIDATION], 64)
            assert svd.mean is not None
            points = (unit(unit(rows) - svd.mean) @ svd.components.T).numpy()
            found: dict[str, Any] = {"energy_of_64": float(np.square(points).sum(axis=1).mean())}
            for k in (4, 8):
                labels = np.asarray(spherical_kmeans(points, k, 10, 0)[0])
                stability = kmeans_stability(points, labels, random_state=0).by_cause["all"].mean
                agreement = float(adjusted_rand_score(domains, labels))
                found[f"K {k}"] = {"stability": stability, "ari_with_domain": agreement}
            return found

        yield name, {"n": len(options.noise)}, measure


def n_clusters(options: argparse.Namespace) -> Measured:
    base = Planted(n=128 if options.quick else 256, dim=2_000)
    cells = {
        "structureless": replace(base, n_clusters=1, cosine=0.0, common=0.0),
        "one common direction": replace(base, n_clusters=1, cosine=0.0, common=0.5),
    }
    for k in (4,) if options.quick else (4, 16):
        cells[f"K {k}, cosine 0.1"] = replace(base, n_clusters=k)
        # As unequal as 10 expected rows of the rarest cluster allow, at most 20 : 1.
        worst = max(
            r for r in range(1, 21) if float(replace(base, n_clusters=k, imbalance=r).shares.min()) * base.n >= 10
        )
        cells[f"K {k}, cosine 0.1, {worst} : 1"] = replace(base, n_clusters=k, imbalance=float(worst))
    if not options.quick:
        cells["K 2, cosine 0.1"] = replace(base, n_clusters=2)
        cells["K 4, cosine 0.5"] = replace(base, n_clusters=4, cosine=0.5)
        cells["K 4, cosine 0.1, noise decay 0.6"] = replace(base, n_clusters=4, noise_decay=0.6)
    draws = 2 if options.quick else 50
    for name, planted in cells.items():

        def measure(planted=planted) -> dict[str, Any]:
            counts: Counter[str] = Counter()
            for seed in range(draws):
                generator = torch.Generator().manual_seed(seed)
                rows = torch.cat(list(replace(planted, seed=seed).rows()))
                svd = gradient_svd(rows, 2, n_draws=20, generator=generator)
                counts[str(estimate_rank(svd, generator=generator).n_clusters)] += 1
            return {"draws": draws, "right": counts[str(planted.n_clusters)] / draws, "answers": dict(counts)}

        yield name, asdict(planted), measure


def subspace(options: argparse.Namespace) -> Measured:
    """Uncentred unit rows: what K clusters share is in each of their means, so the planted rank is K. The running SVD
    keeps 64 directions."""
    for cosine in (0.1,) if options.quick else (0.5, 0.2, 0.1, 0.05, 0.02):
        planted = Planted(n=768 if options.quick else 2048, dim=4_000 if options.quick else 20_000, cosine=cosine)

        def measure(planted=planted) -> dict[str, Any]:
            rows, rank = torch.cat(list(planted.rows())), planted.n_clusters
            frozen = gradient_svd(rows[:N_VALIDATION], 64, center=False)
            running = RunningSVD(64, frozen.components, frozen.singular_values)
            for batch in unit(rows[N_VALIDATION:]).split(128):
                running.update(batch)
            offline = gradient_svd(rows, rank, center=False).components
            assert running.components is not None
            bases = {"frozen": frozen.components, "running": running.components}
            return {f"{name} degrees": largest_angle(basis[:rank], offline) for name, basis in bases.items()}

        yield f"cosine {cosine}", asdict(planted), measure


def length(options: argparse.Namespace) -> Measured:
    """Rows whose noise shrinks with their length, as that of long samples does, and which otherwise have 4 clusters."""
    n, dim = (512, 2_000) if options.quick else (2048, 20_000)
    planted = Planted(n=n, dim=dim, n_clusters=4, cosine=0.08, noise_decay=0.4)

    def measure() -> dict[str, Any]:
        rows, truth = torch.cat(list(planted.rows())), planted.labels()
        generator = torch.Generator().manual_seed(0)
        lengths = torch.rand(planted.n, generator=generator)
        rows += (1.0 - lengths[:, None]) * torch.randn(rows.shape, generator=generator) / planted.dim**0.5
        chunks = lengths.argsort().split(64)
        by_length = torch.cat([chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()])
        orders = {"similar lengths, shuffled batches": by_length, "random batches": torch.randperm(planted.n)}
        orders["sorted by length"] = lengths.argsort()
        bins = (lengths * 10).long()
        found = {}
        for name, order in orders.items():
            clusterer = OnlineSVDClusterer(4, 0).initialize(rows[:N_VALIDATION])
            labels = torch.empty(planted.n, dtype=torch.int64)
            for batch in order.split(64):
                labels[batch] = torch.as_tensor(clusterer.partial_fit(rows[batch]).labels_)
            information = float(normalized_mutual_info_score(bins, labels))
            found[name] = {"ari": float(adjusted_rand_score(truth, labels)), "nmi_with_length": information}
        return found

    yield "4 clusters", asdict(planted), measure


def cost(options: argparse.Namespace) -> Measured:
    def measure() -> dict[str, Any]:
        """Gradients of random samples stream into the clusterer; each side on its own clock."""
        model = make_model(QUICK_MODEL if options.quick else MODEL, device="cpu", dtype=torch.float32)
        samples = make_samples(64 if options.quick else 128, 32, 256)
        with PerSampleGradients(model) as engine:
            clusterer = OnlineSVDClusterer(8, 0).initialize(torch.randn(128, engine.dim))
            stream, ours, total = engine.stream(samples, max_tokens=2048, seed=0), 0.0, time.perf_counter()
            for batch in stream:
                start = time.perf_counter()
                clusterer.partial_fit(batch.gradients)
                ours += time.perf_counter() - start
            total = time.perf_counter() - total
            n, dim = len(samples), engine.dim
        result = {"n": n, "dim": dim, "gradient_ms": 1e3 * (total - ours) / n, "clustering_ms": 1e3 * ours / n}
        return result | {"share": ours / (total - ours)}

    yield "time beside the gradients", {"n_clusters": 8, "tokens": "32 to 256"}, measure
    dim, batch = 20_000 if options.quick else 312_320, 32

    def memory() -> dict[str, Any]:
        pool = torch.randn(4 * batch, dim)
        clusterer, grown, step = OnlineSVDClusterer(8, 0).initialize(pool), {}, 0
        for _ in range(8):
            clusterer.partial_fit(pool[:batch])
        before = resident_bytes()
        for n in (256, 512) if options.quick else (512, 1024, 2048, 4096):
            while step < n // batch:
                clusterer.partial_fit(pool[(step % 4) * batch :][:batch])
                step += 1
            grown[str(n)] = resident_bytes() - before
        return {"grown_bytes": grown}

    yield "memory", {"dim": dim, "n_clusters": 8}, memory


def recluster(options: argparse.Namespace) -> Measured:
    n, q, k = 5_000 if options.quick else 100_000, 64, 6

    def measure() -> dict[str, Any]:
        generator = np.random.default_rng(0)
        centres = generator.standard_normal((k, q))
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        noise = (0.3 / q) ** 0.5 * generator.standard_normal((n, q))
        rows = (0.02**0.5 * centres[generator.integers(0, k, n)] + noise).astype(np.float32)
        start = time.perf_counter()
        labels = np.asarray(spherical_kmeans(rows, k, 10, 0)[0])
        clustered = time.perf_counter()
        kmeans_stability(rows, labels, random_state=0)
        return {"seconds": clustered - start, "stability_seconds": time.perf_counter() - clustered}

    yield f"{n:,} samples", {"n": n, "n_components": q, "n_clusters": k}, measure


SECTIONS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "quality": quality,
    "options": options,
    "preconditioning": preconditioning,
    "n_clusters": n_clusters,
    "subspace": subspace,
    "length": length,
    "cost": cost,
    "recluster": recluster,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there, and measure only what is missing")
    parser.add_argument("--quick", action="store_true", help="a smoke size, under a minute")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of: " + ", ".join(SECTIONS))
    parser.add_argument("--real", type=Path, help="folder of real_gradients.py, for what needs real gradients")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.noise = torch.from_numpy(np.load(options.real / "rows.npy")) if options.real else None
    results = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    results["machine"] = describe("gradientspace", "scikit-learn")
    for section in options.sections.split(","):
        done = results.setdefault(section, {})
        for name, described, measure in SECTIONS[section](options):
            if name in done:
                continue
            if name.startswith("real noise") and options.noise is None:
                print(f"{section}: {name}: skipped, it needs --real (see real_gradients.py)")
                continue
            done[name] = {**described, "threads": options.threads, **measure()}
            print(f"{section}: {name}: {json.dumps(done[name])}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
