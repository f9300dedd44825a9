import json

import numpy as np
import pytest
import torch
from planted import planted_rows

from gradientspace.clustering.rank import estimate_rank
from gradientspace.clustering.svd import gradient_svd
from gradientspace.clustering.unit_rows import IdenticalRowsError, RowsError, RowSource


def unit_rows(rows, center):
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if center:
        unit = unit - unit.mean(dim=0)
        unit = unit / torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    return unit


@pytest.mark.parametrize("center", [True, False])
def test_agrees_with_the_full_svd(center):
    rows = planted_rows(60, 3000, 3, 0.3, common=0.2)[0].double()
    expected = torch.linalg.svd(unit_rows(rows, center), full_matrices=False)
    found = gradient_svd(rows, 5, center=center)
    assert torch.allclose(found.singular_values, expected.S[: len(found.singular_values)], atol=1e-8)
    overlap = (found.components @ expected.Vh[:5].T).abs()
    assert torch.allclose(overlap, torch.eye(5, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.coordinates, unit_rows(rows, center) @ found.components.T, atol=1e-8)


def test_float32_basis_is_orthonormal():
    found = gradient_svd(planted_rows(128, 20_000, 4, 0.2, common=0.5)[0], 64)
    assert torch.allclose(found.components @ found.components.T, torch.eye(64), atol=2e-5)


def test_bfloat16_rows_are_read_without_a_float32_copy():
    rows = planted_rows(64, 4000, 3, 0.4)[0]
    exact, rounded = gradient_svd(rows, 3), gradient_svd(rows.bfloat16(), 3)
    assert torch.allclose(exact.singular_values[:3], rounded.singular_values[:3], rtol=1e-2)


def test_row_lengths_do_not_matter_however_extreme():
    rows = planted_rows(40, 500, 3, 0.3)[0]
    scaled = rows * torch.logspace(-30, 30, 40)[:, None]
    assert torch.allclose(gradient_svd(rows, 4).singular_values, gradient_svd(scaled, 4).singular_values, atol=1e-4)


def test_rows_without_a_direction_are_left_out():
    rows = planted_rows(20, 300, 2, 0.3)[0]
    broken = rows.clone()
    broken[3], broken[7, 5], broken[11, 0] = 0.0, float("nan"), float("inf")
    found = gradient_svd(broken, 4)
    kept = [i for i in range(20) if i not in (3, 7, 11)]
    assert found.index.tolist() == kept
    assert torch.allclose(found.singular_values, gradient_svd(rows[kept], 4).singular_values)
    assert torch.isfinite(found.components).all()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("columns", [7, 100, 300])
def test_rows_made_again_block_by_block_give_the_same_decomposition(center, columns):
    rows = planted_rows(40, 300, 3, 0.3, common=0.2)[0].double()
    rows[3], rows[7, 5] = 0.0, float("nan")
    passes = []

    def batches():
        passes.append(1)
        for index in torch.randperm(40, generator=torch.Generator().manual_seed(1)).split(9):
            yield index, rows[index]

    source = RowSource(batches, (40, 300), columns, torch.device("cpu"))
    whole, blocks = gradient_svd(rows, 4, center=center), gradient_svd(source, 4, center=center)
    assert blocks.index.tolist() == whole.index.tolist()
    assert torch.allclose(blocks.singular_values, whole.singular_values)
    assert torch.allclose(blocks.components, whole.components, atol=1e-8)
    assert torch.allclose(blocks.coordinates, whole.coordinates, atol=1e-8)
    assert len(passes) == -(-300 // columns) + 1  # one a block, one to lift V


def test_an_empty_source_is_one_clear_error():
    with pytest.raises(RowsError, match="source of validation rows is empty"):
        gradient_svd(RowSource(list, (4, 30), 10, torch.device("cpu")), 2)


def test_no_usable_row_is_one_clear_error():
    with pytest.raises(RowsError, match="all 3 validation rows are zero or non-finite"):
        gradient_svd(torch.zeros(3, 10), 2)
    with pytest.raises(IdenticalRowsError, match="point the same way"):
        gradient_svd(torch.ones(5, 10) * torch.arange(1, 6)[:, None], 2)


def test_sign_flips_keep_lengths_and_destroy_shared_directions():
    rows = planted_rows(64, 5000, 2, 0.5)[0]
    found = gradient_svd(rows, 2, n_draws=40, generator=torch.Generator().manual_seed(0))
    null = found.null_grams
    assert torch.allclose(null.diagonal(dim1=1, dim2=2), torch.ones(40, 64), atol=1e-4)
    off = null[:, ~torch.eye(64, dtype=torch.bool)]
    # An off-diagonal entry is a sum of D signs times products of about 1 / D: standard deviation D^-1/2.
    assert off.mean().abs() < 1e-3
    assert 0.8 < off.std() * 5000**0.5 < 1.25
    # Draws are independent of each other, the ones that share a random word and the ones that do not.
    flat = off - off.mean()
    correlation = torch.corrcoef(flat) - torch.eye(40)
    assert correlation.abs().max() < 0.12


@pytest.mark.parametrize("n_clusters", [2, 5, 16])
@pytest.mark.parametrize("common", [0.0, 0.4])
def test_planted_clusters_are_counted(n_clusters, common):
    rows, _ = planted_rows(256, 4000, n_clusters, 0.25, common=common, seed=n_clusters)
    generator = torch.Generator().manual_seed(0)
    estimate = estimate_rank(gradient_svd(rows, 4, n_draws=20, generator=generator), generator=generator)
    assert estimate.n_clusters == n_clusters
    assert estimate.confidence >= 0.9
    assert estimate.criteria["parallel"]["directions"] == n_clusters - 1
    assert json.loads(json.dumps(estimate.to_dict()))["n_clusters"] == n_clusters


def test_a_tight_rare_cluster_does_not_make_the_rest_look_structured():
    """Its rows hold little noise, those of the large cluster much: the null has to know."""
    for seed in range(3):
        rows, _ = planted_rows(256, 4000, 2, 0.5, weights=[20.0, 1.0], common=0.2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        svd = gradient_svd(rows, 4, n_draws=20, generator=generator)
        assert estimate_rank(svd, generator=generator).n_clusters == 2


@pytest.mark.parametrize("common", [0.0, 0.5])
def test_no_structure_is_one_cluster(common):
    answers = []
    for seed in range(20):
        rows, _ = planted_rows(64, 1000, 1, 1e-9, common=common, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        svd = gradient_svd(rows, 4, n_draws=20, generator=generator)
        answers.append(estimate_rank(svd, generator=generator).n_clusters)
    assert answers.count(1) >= 19


def test_saturation_is_undetermined_and_not_a_number():
    rows, _ = planted_rows(256, 4000, 12, 0.3)
    generator = torch.Generator().manual_seed(0)
    svd = gradient_svd(rows, 4, n_draws=20, generator=generator)
    estimate = estimate_rank(svd, k_max=6, generator=generator)
    assert estimate.n_clusters is None
    assert "undetermined" in estimate.reason


def test_uncentred_rows_count_one_direction_a_cluster():
    rows, _ = planted_rows(200, 3000, 4, 0.3)
    generator = torch.Generator().manual_seed(0)
    svd = gradient_svd(rows, 4, center=False, n_draws=20, generator=generator)
    assert estimate_rank(svd, generator=generator).n_clusters == 4


def test_k_min_bounds_the_answer():
    rows = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    svd = gradient_svd(rows, 4, n_draws=20, generator=torch.Generator().manual_seed(0))
    assert estimate_rank(svd, k_min=3).n_clusters == 3


def test_an_estimate_needs_draws():
    with pytest.raises(RowsError, match="n_draws"):
        estimate_rank(gradient_svd(torch.randn(10, 50), 2))


def test_two_rows_are_enough():
    rows = torch.tensor(np.eye(2, 7, dtype=np.float32))
    svd = gradient_svd(rows, 5, n_draws=20, generator=torch.Generator().manual_seed(0))
    assert svd.components.shape == (1, 7)
    estimate = estimate_rank(svd)
    assert estimate.n_clusters is None  # of two rows, no cosine below one would show
    assert estimate.criteria["parallel"]["directions"] == 0


def test_one_cluster_is_no_answer_where_two_would_not_show():
    """A few directions of strong noise hide clusters of a cosine of 0.1, which isotropic noise does not."""
    scale = (1.0 + torch.arange(2000)) ** -0.6
    rows = torch.randn(256, 2000, generator=torch.Generator().manual_seed(0)) * scale
    generator = torch.Generator().manual_seed(0)
    estimate = estimate_rank(gradient_svd(rows, 4, n_draws=20, generator=generator), generator=generator)
    assert estimate.n_clusters is None
    assert estimate.criteria["parallel"]["visible_cosine"] > 0.1
    assert "undetermined" in estimate.reason
