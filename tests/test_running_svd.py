import pytest
import torch
from planted import planted_rows

from gradientspace.clustering.running_svd import RunningSVD, largest_angle
from gradientspace.clustering.svd import gradient_svd
from gradientspace.clustering.unit_rows import RowsError


def test_without_truncation_it_is_the_full_svd():
    rows = torch.randn(40, 300, dtype=torch.float64)
    running = RunningSVD(40)
    for batch in rows.split(7):
        running.update(batch)
    assert torch.allclose(running.singular_values, torch.linalg.svdvals(rows))
    assert torch.allclose(running.components @ running.components.T, torch.eye(40, dtype=torch.float64))
    assert running.n_rows == 40
    assert running.dropped_energy == pytest.approx(0, abs=1e-9)


def test_it_nears_the_offline_subspace_where_the_frozen_one_does_not():
    rows, _ = planted_rows(1200, 3000, 5, 0.1)
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    offline = gradient_svd(rows, 5, center=False).components
    first = gradient_svd(rows[:128], 24, center=False)
    running = RunningSVD(24, first.components, first.singular_values)
    for batch in unit[128:].split(32):
        running.update(batch)
    assert largest_angle(running.components[:5], offline) < 5
    assert largest_angle(first.components[:5], offline) > 20
    kept, total = running.singular_values.square().sum(), running.dropped_energy
    assert float(kept) + total == pytest.approx(1200 - 128 + float(first.singular_values[:24].square().sum()))


def test_duplicates_do_not_make_directions():
    running = RunningSVD(8).update(torch.ones(5, 30)).update(2 * torch.ones(3, 30))
    assert running.components.shape == (1, 30)


def test_angles():
    basis = torch.eye(3, 6, dtype=torch.float64)
    assert largest_angle(basis, basis.flip(0)) == pytest.approx(0, abs=1e-6)
    assert largest_angle(basis, torch.eye(6, dtype=torch.float64)[3:]) == pytest.approx(90)
    turned = torch.tensor([[3**0.5 / 2, 0.5, 0]], dtype=torch.float64)
    assert largest_angle(turned, torch.eye(1, 3, dtype=torch.float64)) == pytest.approx(30)
    with pytest.raises(RowsError, match="come together"):
        RunningSVD(3, components=basis)
