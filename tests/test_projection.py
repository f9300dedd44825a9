"""Random projection: what it keeps, that it repeats, and that folding equals projecting to fewer numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gradientspace.errors import ConfigError
from gradientspace.projection import ProjectedRows, SparseProjection, fold, load_rows, unit


def test_inner_products_survive_up_to_the_width() -> None:
    rows = torch.nn.functional.normalize(torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)), dim=1)
    rows[1] = 0.8 * rows[0] + 0.6 * rows[1]
    for width in (512, 8192):
        found = SparseProjection(5000, width, seed=3)(rows)
        assert (found @ found.T - rows @ rows.T).abs().max() < 4.5 / width**0.5


def test_it_is_linear_and_repeats_exactly() -> None:
    rows = torch.randn(3, 100)
    first, again, other = (SparseProjection(100, 64, seed=s)(rows) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    torch.testing.assert_close(SparseProjection(100, 64, seed=1)(rows[:1] + rows[1:2]), first[:1] + first[1:2])


def test_folding_adds_neighbours_inside_a_block() -> None:
    project = SparseProjection(300, 64, seed=0)
    rows = torch.randn(5, 300)
    folded = fold(project(rows).numpy(), 16)
    for block in range(4):  # every coordinate still has one sign in each of the four blocks
        bins = project.bins[block] // 4
        assert bins.min() >= 4 * block
        assert bins.max() < 4 * block + 4
    project.bins = [bins // 4 for bins in project.bins]
    project.width = 16
    np.testing.assert_allclose(folded, project(rows).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0, 3, 10])
def test_a_width_that_does_not_divide_is_refused(width: int) -> None:
    with pytest.raises(ConfigError):
        SparseProjection(10, width, seed=0)
    with pytest.raises(ConfigError):
        fold(np.ones((1, 64)), width or 48)


def test_collected_rows_are_unit_and_survive_the_disk(tmp_path: Path) -> None:
    kept = ProjectedRows(3, 50, 32, seed=0)
    gradients = torch.randn(2, 50)
    kept.add(torch.tensor([2, 0]), gradients)
    kept.save(tmp_path / "rows.safetensors")
    rows = load_rows(tmp_path / "rows.safetensors")
    expected = unit(SparseProjection(50, 32, seed=0)(gradients).numpy())
    np.testing.assert_allclose(rows[[2, 0]], expected, atol=1e-3)
    assert not rows[1].any()


def test_rows_without_a_direction_become_zero() -> None:
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0]])).tolist() == [[0.6, 0.8], [0, 0], [0, 0]]
