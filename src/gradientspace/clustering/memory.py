"""What a clustering pass will hold in memory, worked out before it starts."""

import math
from dataclasses import dataclass

import torch

from gradientspace.errors import ConfigError

SMALLEST_CACHE = 8
# Every block of validation gradients costs one more pass over the validation sample.
MOST_BLOCKS = 64


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by name. `initialise` is alive while the validation sample is worked on, `stream` during the
    pass.

    `cache_size`, `cache_dtype` and `columns`, the columns of the validation gradients held at a time, are those
    that fit the budget. `peak` is the larger of the two phases.
    """

    dim: int
    n_clusters: int
    cache_size: int
    cache_dtype: str
    columns: int
    device: str
    initialise: dict[str, int]
    stream: dict[str, int]

    @property
    def peak(self) -> int:
        return max(sum(self.initialise.values()), sum(self.stream.values()))

    @property
    def passes(self) -> int:
        """Gradient passes over the validation sample: one where it fits, else one a block and one to lift V."""
        blocks = -(-self.dim // self.columns)
        return 1 if blocks == 1 else blocks + 1

    def table(self) -> str:
        """The plan as lines of text."""
        cache = f"cache {self.cache_size} x {self.cache_dtype}"
        lines = [f"Memory plan: D = {self.dim:,}, K = {self.n_clusters}, {cache}, on {self.device}"]
        for title, entries in (("validation sample", self.initialise), ("stream", self.stream)):
            lines.append(f"  {title}")
            lines += [f"    {name:<36}{format_bytes(size):>12}" for name, size in entries.items()]
            lines.append(f"    {'total':<36}{format_bytes(sum(entries.values())):>12}")
        if self.passes > 1:
            lines.append(f"  the validation gradients do not fit: {self.passes} passes over them, block by block")
        return "\n".join(lines)


def plan_memory(
    dim: int,
    n_clusters: int,
    *,
    n_validation: int = 512,
    n_components: int = 64,
    cache_size: int = 32,
    batch_size: int = 32,
    update: str = "svd",
    cache_dtype: str = "float32",
    n_draws: int = 20,
    dtype: str = "float32",
    device: str = "cpu",
    budget: int | None = None,
) -> MemoryPlan:
    """Memory of `OnlineSVDClusterer` with these settings, in bytes; it does not depend on the number of
    samples.

    With a `budget` in bytes, the caches first move to bfloat16, then shrink, and the validation gradients are made
    again block by block, until the plan fits. Raises ConfigError when even caches of 8 rows and 64 blocks do not.
    """
    number = torch.finfo(getattr(torch, dtype)).bits // 8
    held = {
        "basis V (q x D) and mean": (n_components + 1) * dim * number,
        "centroids": n_clusters * dim * number,
    }
    batch = {"batch (b x D)": batch_size * dim * number}

    def initialise(columns: int) -> dict[str, int]:
        rows = {"validation gradients (M x D)": n_validation * columns * number}
        if columns < dim:
            rows = {f"validation gradients ({n_validation} x {columns:,})": n_validation * columns * number} | batch
        # V and the first centroids, and the one matrix of both that the stream works with.
        copy = {"V and centroids, put together": sum(held.values())}
        return rows | {"Gram matrices": n_validation**2 * (8 + 4 * n_draws)} | held | copy

    def stream(size: int, kind: str) -> dict[str, int]:
        if update == "svd":
            width = torch.finfo(getattr(torch, kind)).bits // 8
            caches = {"caches (K x n x D)": n_clusters * size * dim * width}
            if width < number:
                caches["one cache, while its direction is found"] = size * dim * number
        else:
            caches = {"sums (K x D)": n_clusters * dim * number}
        return held | caches | batch | {"rows of one cluster in a batch": batch_size * dim * number}

    columns = [dim] + [-(-dim // blocks) for blocks in range(2, MOST_BLOCKS + 1)]
    caches = [(cache_size, cache_dtype)]
    if update == "svd":
        halved = [cache_size >> shift for shift in range(16)]
        caches += [(size, "bfloat16") for size in halved if size >= SMALLEST_CACHE]
    limit = math.inf if budget is None else budget
    width = next((w for w in columns if sum(initialise(w).values()) <= limit), columns[-1])
    cache = next((c for c in caches if sum(stream(*c).values()) <= limit), caches[-1])
    plan = MemoryPlan(dim, n_clusters, *cache, width, device, initialise(width), stream(*cache))
    if plan.peak > limit:
        raise ConfigError(
            f"clustering needs at least {format_bytes(plan.peak)} at D = {dim:,}, K = {n_clusters}, "
            f"q = {n_components}; the budget is {format_bytes(limit)}: raise it, or lower n_components, K or the batch"
        )
    return plan


def format_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
