"""What must hold of the clusterer for any input of a kind, by random search."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_rows
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.clustering.kmeans import merge_small_clusters, spherical_kmeans
from gradientspace.clustering.unit_rows import RowsError

few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


@few
@given(order=seeds, size=st.integers(1, 90), update=st.sampled_from(["svd", "mean", "running"]))
def test_any_order_of_the_stream_gives_the_same_clusters_on_separable_data(order, size, update):
    rows, truth = planted_rows(160, 200, 4, 0.5, common=0.2)
    clusterer = OnlineSVDClusterer(4, 0, update=update, cache_size=8).initialize(rows[:60])
    shuffled = rows[torch.randperm(160, generator=torch.Generator().manual_seed(order))]
    for batch in shuffled.split(size):
        clusterer.partial_fit(batch)
    assert adjusted_rand_score(truth, clusterer.finalize().predict(rows)) == 1.0


@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=seeds)
def test_length_predicts_a_cluster_no_better_than_with_random_batches(seed):
    """Batches of similar length in shuffled order, where short rows are noisier; sorted would drag the centroids."""
    rows, truth = planted_rows(600, 300, 3, 0.3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(600, generator=generator)
    rows = rows + (1 - lengths[:, None]) * torch.randn(rows.shape, generator=generator) / 300**0.5
    chunks = lengths.argsort().split(30)
    by_length = torch.cat([chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()])
    information = []
    for order in (by_length, torch.randperm(600, generator=generator)):
        clusterer = OnlineSVDClusterer(3, 0, cache_size=8).initialize(rows[:200])
        labels = torch.empty(600, dtype=torch.int64)
        for batch in order.split(30):
            labels[batch] = clusterer.partial_fit(rows[batch]).labels_
        information.append(normalized_mutual_info_score((lengths * 5).long(), labels))
        assert adjusted_rand_score(truth, labels) > 0.9
    assert information[0] <= information[1] + 0.02


@few
@given(power=st.integers(-25, 25), seed=seeds)
def test_row_lengths_never_matter(power, seed):
    rows, _ = planted_rows(60, 100, 3, 0.4, seed=seed)
    scale = 10.0 ** (power * torch.rand(60, 1, generator=torch.Generator().manual_seed(seed)))
    one, two = (OnlineSVDClusterer(3, 0).initialize(part).partial_fit(part) for part in (rows, rows * scale))
    assert torch.equal(one.labels_, two.labels_)
    assert torch.allclose(one.cluster_centers_, two.cluster_centers_, atol=1e-4)


@few
@given(
    n=st.integers(1, 12),
    dim=st.integers(1, 9),
    k=st.integers(1, 5),
    seed=seeds,
    bad=st.sets(st.integers(0, 11)),
    center=st.booleans(),
)
def test_small_and_broken_input_gives_a_clear_error_or_valid_labels(n, dim, k, seed, bad, center):
    """Fewer rows than components, one sample a cluster, K > N, zero and NaN rows, duplicates, a constant
    column."""
    rows = np.random.default_rng(seed).integers(-1, 2, size=(n, dim)).astype(np.float64)
    for row in bad:
        if row < n:
            rows[row] = [0.0, np.nan, np.inf][row % 3]
    usable = np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)
    clusterer = OnlineSVDClusterer(k, 0, center=center, cache_size=2)
    try:
        clusterer.initialize(rows).partial_fit(rows).finalize()
    except RowsError:
        assert usable.sum() < k
        return
    labels = clusterer.labels_
    assert np.all(labels[~usable] == -1)
    assert np.all((labels >= -1) & (labels < k))
    assert np.isfinite(clusterer.cluster_centers_).all()
    assert np.allclose(np.linalg.norm(clusterer.cluster_centers_, axis=1), 1)
    assert np.isfinite(clusterer.transform(rows)).all()
    # A duplicate of a row is in that row's cluster.
    assert np.array_equal(clusterer.predict(rows), clusterer.predict(rows.copy()))


@few
@given(seed=seeds, split=st.integers(0, 99))
def test_a_snapshot_at_any_point_changes_nothing(seed, split, tmp_path_factory):
    rows, _ = planted_rows(100, 60, 3, 0.3, seed=seed)
    whole = OnlineSVDClusterer(3, seed, cache_size=5, n_init=2).initialize(rows)
    if split:
        whole.partial_fit(rows[:split])
    folder = tmp_path_factory.mktemp("snapshot")
    whole.save(folder)
    resumed = OnlineSVDClusterer.load(folder)
    for clusterer in (whole, resumed):
        clusterer.partial_fit(rows[split:]).finalize()
    assert torch.equal(whole.cluster_centers_, resumed.cluster_centers_)
    assert torch.equal(whole.labels_, resumed.labels_)


@few
@given(n=st.integers(1, 40), k=st.integers(1, 6), seed=seeds, normalise=st.booleans())
def test_spherical_kmeans_assigns_to_the_nearest_centre_and_fills_its_clusters(n, k, seed, normalise):
    rows = np.random.default_rng(seed).standard_normal((n, 4))
    if k > n:
        return
    labels, centres, objective = spherical_kmeans(rows, k, 2, seed, normalise=normalise)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert len(set(labels.tolist())) == k
    cosine = unit @ centres.T
    assert np.allclose(cosine[np.arange(n), labels], cosine.max(axis=1))
    weighted = (unit if normalise else rows) * centres[labels]
    assert np.isclose(objective, weighted.sum())


@few
@given(seed=seeds, k=st.integers(1, 8), least=st.integers(1, 60))
def test_merging_leaves_no_gap_and_no_small_cluster(seed, k, least):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, k, size=50)
    centres = rng.standard_normal((k, 5))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    merged, kept, mapping = merge_small_clusters(labels, centres, least)
    assert np.array_equal(merged == -1, labels == -1)
    assert np.array_equal(merged[labels >= 0], mapping[labels[labels >= 0]])
    sizes = np.bincount(merged[merged >= 0], minlength=len(kept))
    assert len(kept) == 1 or sizes.min() >= least
    assert np.allclose(np.linalg.norm(kept, axis=1), 1)
