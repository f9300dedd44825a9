import numpy as np
import pytest
import torch
from planted import planted_rows
from sklearn.linear_model import Ridge
from sklearn.metrics import adjusted_rand_score

from gradientspace.clustering.unit_rows import RowsError
from gradientspace.errors import RunFolderError
from gradientspace.routable import ALPHAS, RidgeStatistics, RoutableMap, RoutedAlignment


@pytest.fixture
def prompts():
    """Embeddings that show the cluster, coordinates that hide it in noise."""
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=900)
    embeddings = rng.standard_normal((3, 8))[truth] + 0.1 * rng.standard_normal((900, 8))
    coordinates = 0.5 * rng.standard_normal((3, 5))[truth] + rng.standard_normal((900, 5))
    return embeddings, coordinates, truth


def test_ridge_statistics_stream_to_the_same_answer_as_scikit_learn(prompts):
    x, z, _ = prompts
    statistics = RidgeStatistics(8, 5, 4)
    folds = torch.arange(900) % 4
    for rows in torch.arange(900).split(100):
        statistics.update(torch.tensor(x)[rows], torch.tensor(z)[rows], folds[rows])
    for without in (None, 2):
        kept = slice(None) if without is None else (folds != without).numpy()
        expected = Ridge(alpha=0.7).fit(x[kept], z[kept])
        found = statistics.solve(0.7, without=without)
        assert np.allclose(found[:-1].numpy().T, expected.coef_, atol=1e-8)
        assert np.allclose(found[-1].numpy(), expected.intercept_, atol=1e-8)


def test_a_map_finds_what_the_prompt_predicts(prompts):
    x, z, truth = prompts
    routable = RoutableMap(3, random_state=0).fit(x, z)
    assert adjusted_rand_score(truth, routable.labels_) > 0.95
    assert 0.05 < routable.explained_ < 0.6
    routed = routable.predict(x)
    assert np.mean(routed.labels == routable.labels_) > 0.95
    assert np.all(routed.margin >= 0)


def test_small_clusters_merge_and_the_map_routes_to_what_is_left(prompts):
    x, z, _ = prompts
    routable = RoutableMap(6, min_cluster_size=100, random_state=0).fit(x, z)
    sizes = np.bincount(routable.labels_)
    assert sizes.min() >= 100
    assert len(routable.centres_) == len(sizes) < 6
    assert routable.predict(x).labels.max() < len(sizes)


def test_predictions_are_out_of_fold():
    wide = np.random.default_rng(1).standard_normal((60, 50))
    noise = np.random.default_rng(2).standard_normal((60, 4))
    routable = RoutableMap(2, alpha=1e-3, random_state=0).fit(wide, noise)
    # In sample, 50 inputs explain most of 60 rows of pure noise; out of fold they explain none of it.
    assert routable.explained_ < 0


def test_the_penalty_can_be_chosen_by_what_it_explains_out_of_fold(prompts, tmp_path):
    x, z, _ = prompts
    noisy = z + 3 * np.random.default_rng(3).standard_normal(z.shape)
    chosen = RoutableMap(3, alpha="auto", random_state=0).fit(x, noisy)
    explained = {alpha: RoutableMap(3, alpha=alpha, random_state=0).fit(x, noisy).explained_ for alpha in ALPHAS}
    assert chosen.alpha_ == max(explained, key=lambda alpha: explained[alpha])
    assert chosen.explained_ == explained[chosen.alpha_]
    fixed = RoutableMap(3, alpha=chosen.alpha_, random_state=0).fit(x, noisy)
    assert np.array_equal(chosen.labels_, fixed.labels_)
    chosen.save(tmp_path)
    assert RoutableMap.load(tmp_path).alpha_ == chosen.alpha_


def test_groups_share_a_fold():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 8)
    embeddings = rng.standard_normal((50, 120))[groups]
    coordinates = rng.standard_normal((50, 3))[groups]
    leaking = RoutableMap(2, random_state=0).fit(embeddings, coordinates)
    honest = RoutableMap(2, random_state=0).fit(embeddings, coordinates, groups=groups)
    assert leaking.explained_ > 0.9
    assert honest.explained_ < 0.1


def test_unusable_rows_get_minus_one(prompts):
    x, z, _ = (part.copy() for part in prompts)
    x[0, 0], z[1, 0], z[2] = np.nan, np.inf, 0
    routable = RoutableMap(3, random_state=0).fit(x, z)
    assert routable.labels_[:3].tolist() == [-1, -1, -1]
    assert np.isfinite(routable.predictions_).all()
    routed = routable.predict(x[:1])
    assert routed.labels.tolist() == [-1]
    assert np.isfinite(routed.similarity).all()


def test_lifted_centroids_are_unit_and_in_the_span(prompts):
    x, z, _ = prompts
    routable = RoutableMap(3, random_state=0).fit(torch.tensor(x), torch.tensor(z))
    v = torch.linalg.qr(torch.randn(200, 5, dtype=torch.float64)).Q.T
    lifted = routable.lift(v)
    assert torch.allclose(torch.linalg.vector_norm(lifted, dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(lifted @ v.T, routable.centres_)


def test_saved_map_predicts_the_same(prompts, tmp_path):
    x, z, _ = prompts
    routable = RoutableMap(3, random_state=0).fit(x, z)
    routable.save(tmp_path / "map")
    loaded = RoutableMap.load(tmp_path / "map")
    assert np.array_equal(loaded.predict(x).similarity, routable.predict(x).similarity)
    assert loaded.explained_ == routable.explained_
    with pytest.raises(RunFolderError, match="missing"):
        RoutableMap.load(tmp_path)


def test_too_little_data_and_wrong_shapes_are_clear():
    with pytest.raises(RowsError, match="3 usable rows for 8 clusters"):
        RoutableMap(8).fit(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(RowsError, match="need the same rows"):
        RoutableMap(2).fit(np.ones((3, 2)), np.ones((4, 2)))


def test_alignment_is_what_the_formulas_say():
    rows, labels = planted_rows(300, 400, 3, 0.3, common=0.1)
    a, b = rows[:150].double(), rows[150:].double()
    routed = labels[150:].clone()
    routed[:20] = (routed[:20] + 1) % 3  # the router is wrong here
    alignment = RoutedAlignment(3)
    for part in torch.arange(150).split(40):
        alignment.add_reference(a[part], labels[part])
    for part in torch.arange(150).split(40):
        alignment.add_probe(b[part], routed[part])
    found = alignment.result()
    unit = [x / torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (a, b)]
    means = torch.stack([unit[0][labels[:150] == k].mean(dim=0) for k in range(3)])
    first = (unit[1] * means[routed]).sum(dim=1)
    step = first / torch.linalg.vector_norm(means, dim=1)[routed]
    assert found.first_order == pytest.approx(float(first.mean()))
    assert found.unit_step == pytest.approx(float(step.mean()))
    assert np.allclose(found.samples[:, 0], first.numpy())
    assert found.by_cluster[:, 0].sum() == 150
    assert (found.n_reference, found.n_probe) == (150, 150)


def test_alignment_ranks_truth_above_chance_and_above_one_cluster():
    rows, labels = planted_rows(600, 800, 4, 0.2)
    scores = {}
    for name, k, groups in (
        ("truth", 4, labels),
        ("chance", 4, labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]),
        ("one", 1, torch.zeros(600, dtype=torch.int64)),
    ):
        alignment = RoutedAlignment(k).add_reference(rows[:300], groups[:300])
        scores[name] = alignment.add_probe(rows[300:], groups[300:]).result().first_order
    assert scores["truth"] > 2 * scores["chance"]
    assert scores["truth"] > 2 * scores["one"]


def test_alignment_leaves_out_rows_without_cluster_or_direction():
    rows, labels = planted_rows(100, 50, 2, 0.3)
    rows[0], labels[1] = 0.0, -1
    alignment = RoutedAlignment(3).add_reference(rows, labels).add_probe(rows, labels)
    found = alignment.result()
    assert found.n_reference == found.n_probe == 98
    # Cluster 2 has no reference rows: routing there gains nothing.
    empty = RoutedAlignment(3).add_reference(rows, labels).add_probe(rows[2:5], torch.tensor([2, 2, 2]))
    assert empty.result().first_order == 0.0
    with pytest.raises(RowsError, match="labels run from 0"):
        RoutedAlignment(1).add_reference(rows, labels)
    with pytest.raises(RowsError, match="no probe row"):
        RoutedAlignment(2).add_reference(rows, labels).result()
