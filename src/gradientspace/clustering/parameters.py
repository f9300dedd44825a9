"""The clusterer's parameters and their limits."""

from numbers import Integral, Real
from typing import Any

from gradientspace.clustering.unit_rows import RowsError

UPDATES = ("svd", "mean", "running")
CACHE_DTYPES = ("float32", "bfloat16")


def check_parameters(clusterer) -> None:
    """Raise RowsError, naming value and limit, for the first parameter out of range."""
    for name in ("n_components", "cache_size", "k_min", "k_max", "n_init", "n_validation", "batch_size", "n_draws"):
        _check_whole(name, getattr(clusterer, name))
    _check_whole("fallback_n_clusters", clusterer.fallback_n_clusters)
    if isinstance(clusterer.n_clusters, str):
        if clusterer.n_clusters != "auto":
            raise RowsError(f'n_clusters is "{clusterer.n_clusters}": give a number from 1, or "auto"')
    else:
        _check_whole("n_clusters", clusterer.n_clusters, 'or "auto"')
    if clusterer.update not in UPDATES:
        raise RowsError(f'update is "{clusterer.update}": choose one of {", ".join(UPDATES)}')
    if not _is_share(clusterer.momentum):
        raise RowsError(f"momentum is {clusterer.momentum}: it is the weight of the new direction, in (0, 1]")
    if clusterer.cache_dtype not in CACHE_DTYPES:
        raise RowsError(f'cache_dtype is "{clusterer.cache_dtype}": choose one of {", ".join(CACHE_DTYPES)}')
    if not _is_share(clusterer.energy):
        raise RowsError(f"energy is {clusterer.energy}: it is a share, in (0, 1]")
    if clusterer.k_min > clusterer.k_max:
        raise RowsError(f"k_min is {clusterer.k_min}, above k_max = {clusterer.k_max}: swap them")


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) <= 1


def _check_whole(name: str, value: Any, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < (0 if name == "n_draws" else 1):
        least = "0" if name == "n_draws" else "1"
        raise RowsError(f"{name} is {value!r}: give a whole number from {least}{alternative and ', ' + alternative}")
