import numpy as np
import pytest
from planted import planted_rows

from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.clustering.stability import (
    agreement,
    between_share,
    kmeans_stability,
    matched,
    online_stability,
    sweep,
)
from gradientspace.clustering.unit_rows import RowsError


@pytest.fixture(scope="module")
def clustered():
    rows, truth = planted_rows(500, 1000, 4, 0.2, common=0.2)
    clusterer = OnlineSVDClusterer(4, 0, n_components=12, n_validation=200).initialize(rows[:200].numpy())
    return clusterer, clusterer.assign(rows.numpy()), truth.numpy()


def test_agreement_of_clusterings():
    one = np.repeat(np.arange(4), 25)
    same = agreement([one, (one + 1) % 4, one])
    assert (same.mean, same.low, same.high, same.n_clusterings) == (1.0, 1.0, 1.0, 3)
    shuffled = np.random.default_rng(0).permutation(one)
    assert abs(agreement([one, shuffled]).mean) < 0.1
    holed = one.copy()
    holed[::3] = -1
    assert agreement([one, holed]).mean == 1.0
    with pytest.raises(RowsError, match="at least 2"):
        agreement([one])


def test_matching_renames_clusters_and_nothing_else():
    reference = np.array([0, 0, 0, 1, 1, 2, 2, -1])
    renamed = np.array([2, 2, 2, 0, 0, 1, 1, 1])
    assert matched(renamed, reference)[:7].tolist() == reference[:7].tolist()
    assert matched(np.array([-1, 0, 0, 1, 1, 1, 1, 0]), reference)[0] == -1


def test_reruns_of_separable_clusters_agree_and_every_row_is_supported(clustered):
    clusterer, assignment, _ = clustered
    reruns = online_stability(assignment.coordinates, assignment.labels, clusterer, random_state=0)
    assert set(reruns.by_cause) == {"seeds", "orders", "draws", "all"}
    assert min(value.mean for value in reruns.by_cause.values()) > 0.95
    assert np.mean(reruns.support > 0.9) > 0.95
    report = reruns.to_dict()
    assert report["n_clusterings"] == 4
    assert set(report["by_cause"]) == {"seeds", "orders", "draws"}


def test_a_row_between_two_clusters_has_little_support(clustered):
    _, assignment, _ = clustered
    z, labels = assignment.coordinates.copy(), assignment.labels.copy()
    means = [z[labels == k].mean(axis=0) for k in (0, 1)]
    halfway = sum(mean / np.linalg.norm(mean) for mean in means)
    z[labels == 0] += 3 * means[0]  # tight clusters, so that only the row between them is unsure
    z[labels == 1] += 3 * means[1]
    z[7], labels[7] = halfway, 0
    reruns = kmeans_stability(z, labels, random_state=0)
    assert reruns.support[7] < np.median(reruns.support)
    assert np.median(reruns.support) == 1.0


def test_rows_without_coordinates_have_no_support(clustered):
    _, assignment, _ = clustered
    z, labels = assignment.coordinates.copy(), assignment.labels.copy()
    z[:3], labels[:3] = 0, -1
    assert kmeans_stability(z, labels, random_state=0).support[:3].tolist() == [0, 0, 0]


def test_stability_and_sweep_point_at_the_planted_number(clustered):
    _, assignment, _ = clustered
    rows = sweep(assignment.coordinates, (2, 3, 4, 7), random_state=0)
    assert [row.n_clusters for row in rows] == [2, 3, 4, 7]
    shares = [row.between for row in rows]
    assert shares == sorted(shares)
    assert rows[2].stability.mean > 0.95
    assert rows[3].stability.mean < 0.9
    assert all(sum(row.sizes) == 500 for row in rows)


def test_between_share_is_the_share_of_the_means():
    points = np.array([[3.0, 0], [1, 0], [0, 2], [9, 9]])
    assert between_share(points, np.array([0, 0, 1, -1])) == pytest.approx((2 * 4 + 4) / (9 + 1 + 4))
    assert between_share(np.zeros((2, 2)), np.array([0, 0])) == 0.0
