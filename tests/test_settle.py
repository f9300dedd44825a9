import numpy as np
import pytest
import torch
from planted import planted_rows

from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.clustering.kmeans import merge_small_clusters
from gradientspace.clustering.settle import coordinate_labels, moved_share, settle_by_coordinates
from gradientspace.clustering.unit_rows import RowsError


@pytest.fixture(scope="module")
def clustered():
    rows, truth = planted_rows(500, 1000, 4, 0.2, common=0.2)
    clusterer = OnlineSVDClusterer(4, 0, n_components=12).initialize(rows[:200].numpy())
    return clusterer, clusterer.assign(rows.numpy()), truth.numpy()


def test_settling_moves_stale_labels_to_where_full_dimension_puts_them(clustered):
    clusterer, assignment, _ = clustered
    stale = assignment.labels.copy()
    stale[:50], stale[50] = (stale[:50] + 1) % 4, -1
    settled = settle_by_coordinates(
        stale, assignment.coordinates, clusterer.cluster_centers_, clusterer.components_,
        checked_coordinates=assignment.coordinates[400:], checked_labels=assignment.labels[400:],
    )  # fmt: skip
    assert not settled.refused
    assert settled.agreement >= 0.99
    assert settled.labels[50] == -1
    assert np.mean(settled.labels[:50] == assignment.labels[:50]) >= 0.99
    assert settled.moved == pytest.approx(50 / 499, abs=0.005)


def test_settling_is_refused_where_coordinates_do_not_show_the_clusters(clustered):
    clusterer, assignment, _ = clustered
    blind = np.random.default_rng(0).standard_normal(assignment.coordinates.shape)
    settled = settle_by_coordinates(
        assignment.labels, blind, clusterer.cluster_centers_, clusterer.components_,
        checked_coordinates=blind, checked_labels=assignment.labels,
    )  # fmt: skip
    assert settled.refused
    assert np.array_equal(settled.labels, assignment.labels)
    with pytest.raises(RowsError, match="no checked row"):
        settle_by_coordinates(
            assignment.labels, blind, clusterer.cluster_centers_, clusterer.components_,
            checked_coordinates=blind, checked_labels=np.full(500, -1),
        )  # fmt: skip


def test_coordinates_of_excluded_rows_give_no_cluster(clustered):
    clusterer, assignment, _ = clustered
    z = assignment.coordinates.copy()
    z[0], z[1, 2] = 0, np.nan
    labels = coordinate_labels(z, clusterer.cluster_centers_ @ clusterer.components_.T)
    assert labels[:2].tolist() == [-1, -1]
    assert moved_share(np.array([-1, 0, 1, 1]), np.array([-1, 0, 0, 1])) == pytest.approx(1 / 3)
    assert moved_share(np.array([-1]), np.array([-1])) == 0.0


def test_small_clusters_merge_into_their_nearest_neighbour():
    centres = np.array([[1.0, 0, 0], [0, 1, 0], [0.1, 0.99, 0], [0, 0, 1]])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    labels = np.array([0] * 30 + [1] * 20 + [2] * 3 + [-1])
    merged, kept, mapping = merge_small_clusters(labels, centres, 10)
    assert mapping.tolist() == [0, 1, 1, 0]  # the empty fourth is as far from all: the first takes it
    assert merged.tolist() == [0] * 30 + [1] * 23 + [-1]
    expected = 20 * centres[1] + 3 * centres[2]
    assert np.allclose(kept[1], expected / np.linalg.norm(expected))
    assert np.allclose(kept[0], centres[0])
    one, kept, _ = merge_small_clusters(labels, torch.tensor(centres), 10_000)
    assert set(one.tolist()) == {0, -1}
    assert isinstance(kept, torch.Tensor)
    _, _, mapping = merge_small_clusters(labels[labels != 2], centres[[0, 1]], 1)
    assert mapping.tolist() == [0, 1]
