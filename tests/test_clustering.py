import numpy as np
import pytest
import torch
from planted import planted_rows
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import check_estimator

from gradientspace.clustering import OnlineSVDClusterer, RowSource, plan_memory, spherical_kmeans
from gradientspace.clustering.centroids import dominant_direction
from gradientspace.clustering.unit_rows import RowsError
from gradientspace.errors import ConfigError, RunFolderError

UPDATES = ["svd", "mean", "running"]


def stream(clusterer, rows, size=32):
    for batch in torch.split(rows, size):
        clusterer.partial_fit(batch)
    return clusterer.finalize()


@pytest.mark.parametrize("update", UPDATES)
def test_one_pass_finds_planted_clusters(update):
    rows, truth = planted_rows(768, 3000, 5, 0.15, common=0.3)
    clusterer = OnlineSVDClusterer(random_state=0, update=update).initialize(rows[:256])
    assert clusterer.n_clusters_ == 5
    stream(clusterer, rows)
    assert adjusted_rand_score(truth, clusterer.predict(rows)) > 0.97
    centres = clusterer.cluster_centers_
    assert torch.allclose(torch.linalg.vector_norm(centres, dim=1), torch.ones(5), atol=1e-5)
    assert clusterer.counts_.sum() == 768


@pytest.mark.parametrize("center", [True, False])
def test_assignment_is_what_the_formulas_say(center):
    rows, _ = planted_rows(200, 500, 4, 0.2, common=0.3)
    rows = rows.double()
    clusterer = OnlineSVDClusterer(4, 0, n_components=6, center=center).initialize(rows[:100])
    found = clusterer.assign(rows)
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if center:
        validation = unit[:100].mean(dim=0)
        assert torch.allclose(clusterer.mean_, validation)
        unit = unit - validation
        unit = unit / torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    cosine = (unit @ clusterer.cluster_centers_.T).sort(dim=1, descending=True)
    assert torch.equal(found.labels, cosine.indices[:, 0])
    assert torch.allclose(found.cosine, cosine.values[:, 0])
    assert torch.allclose(found.margin, cosine.values[:, 0] - cosine.values[:, 1])
    assert torch.allclose(found.coordinates, unit @ clusterer.components_.T)


def test_first_centroids_are_lifted_from_the_subspace():
    rows, _ = planted_rows(200, 500, 4, 0.2)
    clusterer = OnlineSVDClusterer(4, 0, n_components=6).initialize(rows)
    inside = clusterer.cluster_centers_ @ clusterer.components_.T @ clusterer.components_
    assert torch.allclose(inside, clusterer.cluster_centers_, atol=1e-5)


def test_a_full_cache_moves_its_centroid_by_the_momentum_of_the_new_direction():
    rows, _ = planted_rows(60, 400, 1, 0.3)
    clusterer = OnlineSVDClusterer(1, 0, center=False, momentum=0.3, cache_size=10).initialize(rows[:50])
    before = clusterer.cluster_centers_.clone()[0]
    clusterer.partial_fit(rows[50:59])
    assert torch.equal(before, clusterer.cluster_centers_[0])  # 9 of 10: nothing moves
    clusterer.partial_fit(rows[59:60])
    cached = rows[50:60] / torch.linalg.vector_norm(rows[50:60], dim=1, keepdim=True)
    v = torch.linalg.svd(cached).Vh[0]
    v = v * (v @ cached.mean(dim=0)).sign()
    expected = 0.7 * before + 0.3 * v
    assert torch.allclose(clusterer.cluster_centers_[0], expected / expected.norm(), atol=1e-5)


def test_a_partial_cache_counts_for_its_share_at_the_end():
    rows, _ = planted_rows(54, 400, 1, 0.3)
    clusterer = OnlineSVDClusterer(1, 0, center=False, momentum=0.5, cache_size=10).initialize(rows[:50])
    before = clusterer.cluster_centers_.clone()[0]
    clusterer.partial_fit(rows[50:]).finalize()
    cached = rows[50:] / torch.linalg.vector_norm(rows[50:], dim=1, keepdim=True)
    expected = 0.8 * before + 0.2 * dominant_direction(cached, before)
    assert torch.allclose(clusterer.cluster_centers_[0], expected / expected.norm(), atol=1e-5)
    after = clusterer.cluster_centers_.clone()
    assert torch.equal(after, clusterer.finalize().cluster_centers_)  # nothing is used twice


def test_centroids_stay_put_within_a_batch():
    rows, _ = planted_rows(400, 800, 3, 0.2)
    clusterer = OnlineSVDClusterer(3, 0, cache_size=4, momentum=0.9).initialize(rows[:200])
    expected = clusterer.predict(rows)
    assert torch.equal(clusterer.partial_fit(rows).labels_, expected)
    assert torch.equal(clusterer.assignment_.labels, expected)


def test_running_update_is_the_direction_of_the_sum_of_all_rows():
    rows, _ = planted_rows(300, 600, 1, 0.3)
    rows = rows.double()
    clusterer = OnlineSVDClusterer(1, 0, center=False, update="running").initialize(rows[:100])
    total = clusterer.cluster_centers_[0] * clusterer._state.strengths[0]
    for batch in torch.split(rows[100:], 17):
        clusterer.partial_fit(batch)
    unit = rows[100:] / torch.linalg.vector_norm(rows[100:], dim=1, keepdim=True)
    total = total + unit.sum(dim=0)
    assert torch.allclose(clusterer.cluster_centers_[0], total / total.norm())


def test_dominant_direction_and_its_sign():
    rows = torch.randn(12, 300, dtype=torch.float64) + 0.3
    v = dominant_direction(rows, torch.zeros(300, dtype=torch.float64))
    expected = torch.linalg.svd(rows).Vh[0]
    assert torch.allclose(v.abs(), expected.abs(), atol=1e-8)
    assert v @ rows.mean(dim=0) > 0
    # The mean of two opposite rows is zero: the centroid decides.
    opposite = torch.stack([expected, -expected])
    assert torch.allclose(dominant_direction(opposite, -expected), -expected, atol=1e-8)


def test_rows_without_a_direction_get_minus_one_and_touch_nothing():
    rows, _ = planted_rows(300, 400, 3, 0.3)
    broken = rows[200:232].clone()
    broken[0], broken[1, 3], broken[2, 0] = 0.0, float("nan"), float("-inf")
    kept = broken[3:]
    one = OnlineSVDClusterer(3, 0, cache_size=4).initialize(rows[:200])
    two = OnlineSVDClusterer(3, 0, cache_size=4).initialize(rows[:200])
    one.partial_fit(broken)
    two.partial_fit(kept)
    assert one.labels_[:3].tolist() == [-1, -1, -1]
    assert one.assignment_.cosine[:3].tolist() == [0, 0, 0]
    assert torch.isfinite(one.transform(broken)).all()
    assert torch.allclose(one.cluster_centers_, two.cluster_centers_, atol=1e-6)


def test_centring_survives_rows_that_nearly_equal_the_mean():
    """|u - mean|^2 from float32 inner products would lose every digit here."""
    rows, _ = planted_rows(200, 300, 3, 5e-6, common=1 - 1e-5)
    single, double = (OnlineSVDClusterer(3, 0).initialize(rows.to(t)) for t in (torch.float32, torch.float64))
    found, expected = single.assign(rows), double.assign(rows.double())
    assert adjusted_rand_score(expected.labels, found.labels) > 0.95
    assert torch.allclose(found.cosine.double(), expected.cosine, atol=0.02)


def test_a_row_equal_to_the_mean_has_no_direction():
    clusterer = OnlineSVDClusterer(2, 0).initialize(torch.eye(4)[[0, 1] * 10])
    clusterer._state.matrix[-1] = torch.tensor([0.6, 0.8, 0, 0])
    assert clusterer.predict(torch.tensor([[0.6, 0.8, 0, 0], [1, 0, 0, 0]]))[0] == -1


def test_constant_data_is_one_cluster():
    rows = torch.ones(30, 50) * torch.rand(30, 1)
    clusterer = OnlineSVDClusterer(random_state=0).initialize(rows)
    assert clusterer.n_clusters_ == 1
    assert clusterer.partial_fit(rows).labels_.tolist() == [0] * 30
    assert clusterer.assignment_.margin.tolist() == [2.0] * 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 11}, "n_clusters is 11, but only 10 samples have a direction"),
        ({"n_clusters": 0}, "n_clusters is 0"),
        ({"n_clusters": "many"}, 'n_clusters is "many"'),
        ({"momentum": 0.0}, "momentum is 0.0"),
        ({"update": "median"}, 'update is "median"'),
        ({"cache_dtype": "int8"}, 'cache_dtype is "int8"'),
        ({"cache_size": 0}, "cache_size is 0"),
        ({"n_validation": None}, "n_validation is None"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"random_state": "x"}, "random_state is 'x'"),
        ({"k_min": 9, "k_max": 3}, "k_min is 9"),
    ],
)
def test_bad_settings_are_one_clear_line(options, message):
    with pytest.raises(RowsError, match=message) as caught:
        OnlineSVDClusterer(**options).initialize(torch.randn(10, 20))
    assert "\n" not in str(caught.value)
    for rows in (torch.randn(10, 20), iter([torch.randn(10, 20)])):
        with pytest.raises(RowsError, match=message):
            OnlineSVDClusterer(**options).fit(rows)


def test_fewer_rows_than_components():
    rows, _ = planted_rows(10, 100, 2, 0.5)
    clusterer = OnlineSVDClusterer(2, 0, n_components=64).initialize(rows)
    assert clusterer.transform(rows).shape == (10, len(clusterer.components_))
    assert len(clusterer.components_) <= 9


def test_wrong_width_is_refused():
    clusterer = OnlineSVDClusterer(2, 0).initialize(torch.randn(20, 30))
    with pytest.raises(RowsError, match="X has 31 features"):
        clusterer.partial_fit(torch.randn(4, 31))


def test_numpy_in_numpy_out_and_the_same_numbers():
    rows, _ = planted_rows(200, 300, 3, 0.3)
    a = OnlineSVDClusterer(3, 0).initialize(rows)
    b = OnlineSVDClusterer(3, 0).initialize(rows.numpy())
    assert isinstance(b.cluster_centers_, np.ndarray)
    assert isinstance(b.partial_fit(rows.numpy()).labels_, np.ndarray)
    assert isinstance(b.predict(rows), torch.Tensor)
    a.partial_fit(rows)
    assert np.array_equal(a.cluster_centers_.numpy(), b.cluster_centers_)


def test_bfloat16_stream():
    rows, truth = planted_rows(400, 2000, 3, 0.2)
    clusterer = OnlineSVDClusterer(3, 0, cache_dtype="bfloat16").initialize(rows[:200].bfloat16())
    stream(clusterer, rows.bfloat16())
    assert adjusted_rand_score(truth, clusterer.predict(rows.bfloat16())) > 0.97
    assert clusterer.cluster_centers_.dtype == torch.float32


@pytest.mark.parametrize("as_batches", [False, True])
def test_fit_takes_an_array_or_a_stream(as_batches):
    rows, truth = planted_rows(400, 1000, 3, 0.3)
    source = iter(rows.split(50)) if as_batches else rows
    clusterer = OnlineSVDClusterer(random_state=0, n_validation=150, batch_size=64).fit(source)
    assert clusterer.labels_.shape == (400,)
    assert adjusted_rand_score(truth, clusterer.labels_) > 0.97


@pytest.mark.parametrize("update", UPDATES)
def test_a_saved_pass_goes_on_to_the_same_bits(update, tmp_path):
    rows, _ = planted_rows(500, 700, 4, 0.2)
    whole = OnlineSVDClusterer(random_state=3, update=update, cache_size=6).initialize(rows[:200])
    whole.partial_fit(rows[200:290])
    whole.save(tmp_path / "state")
    resumed = OnlineSVDClusterer.load(tmp_path / "state")
    for clusterer in (whole, resumed):
        clusterer.partial_fit(rows[290:400]).partial_fit(rows[400:]).finalize()
    assert torch.equal(whole.cluster_centers_, resumed.cluster_centers_)
    assert torch.equal(whole.counts_, resumed.counts_)
    assert whole.rank_estimate_ == resumed.rank_estimate_
    assert whole.get_params() == resumed.get_params()
    assert torch.equal(whole.assign(rows).coordinates, resumed.assign(rows).coordinates)
    assert torch.equal(whole.explained_energy_, resumed.explained_energy_)


def test_loading_from_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(RunFolderError, match=r"clusterer\.safetensors is missing"):
        OnlineSVDClusterer.load(tmp_path)


def test_replaced_centroids_decide_and_keep_moving():
    rows, _ = planted_rows(200, 300, 3, 0.3)
    clusterer = OnlineSVDClusterer(3, 0, cache_size=4).initialize(rows)
    clusterer.replace_centers(clusterer.cluster_centers_[:2].flip(0).numpy())
    assert clusterer.n_clusters_ == 2
    assert set(clusterer.partial_fit(rows).labels_.tolist()) == {0, 1}
    assert clusterer.counts_.sum() == 200
    with pytest.raises(RowsError, match="expected \\(K, 300\\)"):
        clusterer.replace_centers(torch.ones(2, 7))


def test_keeps_scikit_learns_rules():
    check_estimator(OnlineSVDClusterer(), on_skip=None)


def test_memory_plan_is_named():
    plan = plan_memory(312_320, 8)
    assert plan.stream["caches (K x n x D)"] == 8 * 32 * 312_320 * 4
    assert plan.initialise["validation gradients (M x D)"] == 512 * 312_320 * 4
    assert plan.passes == 1
    assert "caches (K x n x D)" in plan.table()


def test_a_budget_shrinks_the_caches_and_the_validation_blocks():
    plan = plan_memory(312_320, 64, budget=600 * 2**20)
    assert plan.peak <= 600 * 2**20
    assert plan.cache_dtype == "bfloat16"
    assert plan.cache_size < 32
    assert plan.passes > 2
    assert f"{plan.passes} passes over them" in plan.table()
    roomy = plan_memory(312_320, 64, budget=2**40)
    assert (roomy.cache_size, roomy.cache_dtype, roomy.passes) == (32, "float32", 1)


def test_an_impossible_budget_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"clustering needs at least .* the budget is 1\.0 MiB: raise it") as caught:
        plan_memory(312_320, 8, budget=2**20)
    assert "\n" not in str(caught.value)


def test_initialising_from_a_source_is_initialising_from_the_rows():
    rows, _ = planted_rows(120, 500, 3, 0.3)
    source = RowSource(lambda: [(torch.arange(120), rows)], (120, 500), 64, rows.device)
    one, two = (OnlineSVDClusterer(random_state=0).initialize(part) for part in (rows, source))
    assert one.n_clusters_ == two.n_clusters_
    assert torch.equal(one.labels_, two.labels_)
    assert torch.allclose(one.cluster_centers_, two.cluster_centers_, atol=1e-5)


def test_a_snapshot_keeps_only_what_is_in_the_caches(tmp_path):
    rows, _ = planted_rows(200, 500, 3, 0.3)
    clusterer = stream(OnlineSVDClusterer(3, 0).initialize(rows), rows)
    clusterer.save(tmp_path)
    numbers = clusterer._state.matrix.numel() + 1000
    assert (tmp_path / "clusterer.safetensors").stat().st_size < 4 * numbers + 10_000


def test_first_centroids_are_found_beside_stronger_directions_that_are_no_clusters():
    """K - 1 dimensions would be taken up by them: twelve directions along which rows only vary."""
    rows, truth = planted_rows(600, 3000, 4, 0.1)
    generator = torch.Generator().manual_seed(1)
    spread = torch.linalg.qr(torch.randn(3000, 12, generator=generator)).Q.T
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows + 0.17 * torch.randn(600, 12, generator=generator) @ spread
    clusterer = OnlineSVDClusterer(4, 0).initialize(rows[:300])
    assert adjusted_rand_score(truth, clusterer.predict(rows)) > 0.9


def test_spherical_kmeans_recovers_directions():
    rows, truth = planted_rows(300, 20, 4, 0.9)
    labels, centres, objective = spherical_kmeans(rows.numpy(), 4, 5, 0)
    assert adjusted_rand_score(truth, labels) > 0.99
    assert np.allclose(np.linalg.norm(centres, axis=1), 1)
    unit = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    assert objective == pytest.approx((unit * centres[labels]).sum(), rel=1e-5)


def test_spherical_kmeans_edge_cases():
    rows = np.array([[1.0, 0], [0, 0], [0, 1], [np.nan, 1], [2, 0]])
    labels, centres, _ = spherical_kmeans(rows, 2, random_state=0)
    assert labels[1] == labels[3] == -1
    assert labels[0] == labels[4] != labels[2]
    assert np.isfinite(centres).all()
    with pytest.raises(RowsError, match="n_clusters is 4, but there are 3 rows"):
        spherical_kmeans(rows, 4)
    same = spherical_kmeans(np.ones((6, 3)), 3, random_state=0)
    assert np.isfinite(same[1]).all()


def test_double_rows_beyond_float32_have_a_direction_all_the_same():
    """A clusterer that began with float32 rows goes on with float64 ones of any length."""
    rows, _ = planted_rows(60, 40, 3, 0.3)
    clusterer = OnlineSVDClusterer(3, 0).initialize(rows)
    wanted = clusterer.predict(rows).tolist()
    for scale in (1e300, 1e-300):
        assert clusterer.predict(rows.double() * scale).tolist() == wanted
        assert clusterer.partial_fit(rows.double() * scale).labels_.tolist() == wanted
        assert bool(torch.isfinite(clusterer.finalize().cluster_centers_).all())
        wanted = clusterer.predict(rows).tolist()


def test_a_stream_that_changes_its_kind_is_refused():
    rows = torch.randn(10, 20)
    for second in (rows.numpy(), rows[:, :5], rows[0], "rows"):
        with pytest.raises(RowsError):
            OnlineSVDClusterer(2, 0, n_validation=4).fit(iter([rows, second]))
