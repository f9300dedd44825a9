"""What a clustering pass will hold in memory, worked out before it starts."""

from dataclasses import dataclass

import torch

from gradientspace.errors import ConfigError

SMALLEST_CACHE = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by name. `initialise` is alive while the validation sample is worked on, `stream` during the
    pass.

    `cache_size` and `cache_dtype` are those that fit the budget. `peak` is the larger of the two phases.
    """

    dim: int
    n_clusters: int
    cache_size: int
    cache_dtype: str
    device: str
    initialise: dict[str, int]
    stream: dict[str, int]

    @property
    def peak(self) -> int:
        return max(sum(self.initialise.values()), sum(self.stream.values()))

    def table(self) -> str:
        """The plan as lines of text."""
        cache = f"cache {self.cache_size} x {self.cache_dtype}"
        lines = [f"Memory plan: D = {self.dim:,}, K = {self.n_clusters}, {cache}, on {self.device}"]
        for title, entries in (("validation sample", self.initialise), ("stream", self.stream)):
            lines.append(f"  {title}")
            lines += [f"    {name:<36}{format_bytes(size):>12}" for name, size in entries.items()]
            lines.append(f"    {'total':<36}{format_bytes(sum(entries.values())):>12}")
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

    With a `budget` in bytes, the caches first move to bfloat16, then shrink, until the plan fits; ConfigError
    when even caches of 8 rows do not.
    """

    def plan(size: int, kind: str) -> MemoryPlan:
        number = torch.finfo(getattr(torch, dtype)).bits // 8
        held = {
            "basis V (q x D) and mean": (n_components + 1) * dim * number,
            "centroids": n_clusters * dim * number,
        }
        if update == "svd":
            caches = {"caches (K x n x D)": n_clusters * size * dim * torch.finfo(getattr(torch, kind)).bits // 8}
        else:
            caches = {"sums (K x D)": n_clusters * dim * number}
        initialise = {"validation gradients (M x D)": n_validation * dim * number}
        initialise |= {"Gram matrices": n_validation**2 * (8 + 4 * n_draws)} | held
        stream = held | caches | {"batch (b x D)": batch_size * dim * number}
        stream |= {"rows of one cluster in a batch": batch_size * dim * number}
        return MemoryPlan(dim, n_clusters, size, kind, device, initialise, stream)

    chosen = plan(cache_size, cache_dtype)
    if budget is None or chosen.peak <= budget:
        return chosen
    sizes = [size for size in (cache_size >> shift for shift in range(16)) if size >= SMALLEST_CACHE]
    for size in sizes if update == "svd" else []:
        chosen = plan(size, "bfloat16")
        if chosen.peak <= budget:
            return chosen
    need, has = format_bytes(chosen.peak), format_bytes(budget)
    raise ConfigError(
        f"clustering needs {need} at D = {dim:,}, K = {n_clusters}, M = {n_validation}, but the budget is "
        f"{has}: lower n_validation, n_components or batch_size, or raise the budget"
    )


def format_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
