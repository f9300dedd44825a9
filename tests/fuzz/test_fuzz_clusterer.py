"""Arrays, streams and parameters that nobody should give the clusterer: clusters, or one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import case, search
from hypothesis import given
from hypothesis import strategies as st

from gradientspace.clustering import OnlineSVDClusterer

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.usefixtures("in_tmp_path"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e-45, 1e-320, 1e38, 1e300, -1e300, 2.0**-149]
ODD = st.sampled_from(
    [
        None,
        "x",
        "",
        3,
        -1,
        0,
        2.5,
        float("nan"),
        [],
        {},
        [[]],
        [[1, "a"]],
        [[{}]],
        object(),
        [[1, 2], [3]],
        "abc",
        b"ab",
        np.zeros((2, 2, 2)),
        np.zeros(3),
        np.zeros((0, 3)),
        np.zeros((3, 0)),
        np.array([["a", "b"]]),
        np.zeros((2, 2), complex),
        np.array([[1, None]], dtype=object),
        torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.complex64),
        torch.zeros(0, 2),
        torch.eye(3).to_sparse(),
        torch.ones(3, 2, dtype=torch.bool),
        torch.ones(3, 2, dtype=torch.int8),
        iter([]),
        np.array(5),
        np.datetime64("2020-01-01"),
        True,
    ]
)
WRONG = st.sampled_from([None, "x", -1, 0, 2.5, float("nan"), float("inf"), [], True, 10**30, "3", "svd"])


@st.composite
def arrays(draw: st.DrawFn, width: int | None = None) -> Any:
    """(n, D) of one of many types, with special values in it."""
    n, d = draw(st.integers(1, 14)), width or draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    rows = rng.standard_normal((n, d)) * 10.0 ** draw(st.sampled_from([0, 0, 0, -30, 30, -160, 150]))
    for _ in range(draw(st.integers(0, 4))):
        rows[draw(st.integers(0, n - 1)), draw(st.integers(0, d - 1))] = draw(st.sampled_from(SPECIAL))
    if draw(st.booleans()):
        rows[draw(st.integers(0, n - 1))] = rows[0]
    kind = draw(
        st.sampled_from(["float64", "float32", "float16", "int64", "bool", "list", "F", "readonly", "t64", "t32", "tb"])
    )
    with np.errstate(all="ignore"):
        if kind.startswith("t"):
            dtype = {"t64": torch.float64, "t32": torch.float32, "tb": torch.bfloat16}[kind]
            return torch.as_tensor(rows).to(dtype)
        if kind == "list":
            return rows.tolist()
        if kind == "F":
            return np.asfortranarray(rows)
        if kind == "readonly":
            rows.setflags(write=False)
            return rows
        return rows.astype(kind)


@st.composite
def clusterers(draw: st.DrawFn) -> OnlineSVDClusterer:
    options: dict[str, Any] = {
        "n_clusters": draw(st.integers(1, 4) | st.just("auto")),
        "random_state": draw(st.integers(0, 3)),
        "n_components": draw(st.integers(1, 6)),
        "center": draw(st.booleans()),
        "update": draw(st.sampled_from(["svd", "mean", "running"])),
        "momentum": draw(st.sampled_from([0.1, 1.0, 1, 1e-9])),
        "cache_size": draw(st.integers(1, 4)),
        "cache_dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "k_min": 1,
        "k_max": draw(st.integers(1, 4)),
        "n_draws": 2,
        "n_init": draw(st.integers(1, 2)),
        "n_validation": draw(st.integers(1, 12)),
        "batch_size": draw(st.integers(1, 8)),
    }
    if draw(st.integers(0, 2)) == 0:
        wrong = draw(WRONG)
        name = draw(st.sampled_from(list(options)))
        # Restarts and draws beyond counting are asked for, and done.
        options[name] = 1 if wrong == 10**30 and name in ("n_init", "n_draws", "cache_size") else wrong
    return OnlineSVDClusterer(**options)


def check(labels: Any, k: int) -> None:
    values = torch.as_tensor(labels)
    assert values.ndim == 1
    assert bool(((values >= -1) & (values < k)).all())


@search("clusterer-stream", 0.5)
@given(clusterer=clusterers(), first=arrays() | ODD, later=st.lists(arrays() | ODD, max_size=2), same=st.booleans())
def test_any_stream_is_clustered_or_refused(
    clusterer: Any, first: Any, later: list[Any], same: bool, tmp_path: Any
) -> None:
    with case("clusterer-stream", tmp_path):
        clusterer.initialize(first)
        for rows in [first, first] if same else [first, *later]:
            check(clusterer.partial_fit(rows).labels_, clusterer.n_clusters_)
        clusterer.finalize()
        check(clusterer.predict(first), clusterer.n_clusters_)
        centres = torch.as_tensor(clusterer.cluster_centers_).double()
        assert bool(torch.isfinite(centres).all())
        assert bool(torch.isfinite(torch.as_tensor(clusterer.transform(first)).double()).all())


@search("clusterer-stream", 0.5)
@given(
    clusterer=clusterers(),
    rows=arrays() | ODD | st.lists(arrays(width=3), max_size=4) | st.lists(arrays() | ODD, max_size=3).map(iter),
)
def test_any_fit_is_clustered_or_refused(clusterer: Any, rows: Any, tmp_path: Any) -> None:
    with case("clusterer-stream", tmp_path):
        check(clusterer.fit(rows).labels_, clusterer.n_clusters_)
        assert bool(torch.isfinite(torch.as_tensor(clusterer.cluster_centers_).double()).all())
