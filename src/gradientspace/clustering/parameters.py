"""The clusterer's parameters and their limits."""

from gradientspace.clustering.unit_rows import RowsError

UPDATES = ("svd", "mean", "running")
CACHE_DTYPES = ("float32", "bfloat16")


def check_parameters(clusterer) -> None:
    """Raise RowsError, naming value and limit, for the first parameter out of range."""
    if isinstance(clusterer.n_clusters, str):
        if clusterer.n_clusters != "auto":
            raise RowsError(f'n_clusters is "{clusterer.n_clusters}": give a number from 1, or "auto"')
    elif clusterer.n_clusters < 1:
        raise RowsError(f'n_clusters is {clusterer.n_clusters}: give a number from 1, or "auto"')
    if clusterer.update not in UPDATES:
        raise RowsError(f'update is "{clusterer.update}": choose one of {", ".join(UPDATES)}')
    if not 0 < clusterer.momentum <= 1:
        raise RowsError(f"momentum is {clusterer.momentum}: it is the weight of the new direction, in (0, 1]")
    if clusterer.cache_dtype not in CACHE_DTYPES:
        raise RowsError(f'cache_dtype is "{clusterer.cache_dtype}": choose one of {", ".join(CACHE_DTYPES)}')
    for name in ("n_components", "cache_size", "k_min", "k_max", "n_init", "n_validation", "batch_size"):
        if getattr(clusterer, name) < 1:
            raise RowsError(f"{name} is {getattr(clusterer, name)}: it must be at least 1")
    if clusterer.k_min > clusterer.k_max:
        raise RowsError(f"k_min is {clusterer.k_min}, above k_max = {clusterer.k_max}: swap them")
