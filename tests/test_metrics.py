"""Matching against all permutations, counts against scikit-learn, and hand-computed cases."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from tsp_utils import clustering_metrics, confusion, match_clusters

RNG = np.random.default_rng(0)


def test_matching_is_the_best_of_all_permutations():
    for _ in range(20):
        labels, clusters = RNG.integers(5, size=(2, 60))
        best = max(np.mean(np.array(p)[clusters] == labels) for p in permutations(range(5)))
        assert clustering_metrics(labels, clusters)["acc"] == pytest.approx(best)


def test_more_clusters_than_classes_and_fewer():
    labels = np.array([0, 0, 0, 1, 1, 1])
    over = np.array([0, 0, 1, 2, 2, 2])
    assert match_clusters(labels, over).tolist() == [0, -1, 1]
    assert clustering_metrics(labels, over)["acc"] == pytest.approx(5 / 6)
    under = np.zeros(6, int)
    assert match_clusters(labels, under).tolist() in ([0], [1])
    assert clustering_metrics(labels, under)["acc"] == pytest.approx(0.5)


def test_perfect_clusters_under_any_numbering():
    labels = RNG.integers(10, size=200)
    renamed = RNG.permutation(10)[labels]
    assert clustering_metrics(labels, renamed) == pytest.approx({"acc": 1, "nmi": 1, "ari": 1})


def test_confusion_equals_scikit_learn():
    labels, clusters = RNG.integers(6, size=(2, 100))
    np.testing.assert_array_equal(confusion(labels, clusters), confusion_matrix(labels, clusters))


@pytest.mark.parametrize("names", [[0, 5, 10, 15], [3, 1, 7, 2], [10**9, 4, 10**12, 6]])
def test_labels_with_gaps_are_as_many_classes_as_there_are(names):
    plain, clusters = RNG.integers(4, size=80), RNG.integers(6, size=80)
    labels, order = np.array(names)[plain], np.argsort(names)
    np.testing.assert_array_equal(confusion(labels, clusters), confusion(plain, clusters)[order])
    class_of = match_clusters(labels, clusters)
    assert sorted(class_of) == [-1, -1, *sorted(names)]  # six clusters, four classes
    assert clustering_metrics(labels, clusters) == pytest.approx(
        clustering_metrics(plain, clusters))


def test_clusters_with_gaps_keep_their_numbers():
    labels, clusters = np.array([0, 0, 5, 5, 9]), np.array([4, 4, 0, 0, 2])
    assert match_clusters(labels, clusters).tolist() == [5, -1, 9, -1, 0]
    assert confusion(labels, clusters)[:, [4, 0, 2]].tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert clustering_metrics(labels, clusters)["acc"] == 1


def test_lists_are_taken_as_arrays_are():
    labels, clusters = RNG.integers(4, size=(2, 50))
    assert clustering_metrics(labels.tolist(), clusters.tolist()) == clustering_metrics(
        labels, clusters)


def test_bad_input():
    for odd in (["cat", "dog"], [0.5, 1.0], [True, False]):
        with pytest.raises(ValueError, match="whole numbers, and these are of the types"):
            confusion(odd, [0, 1])
    with pytest.raises(ValueError, match="equally long"):
        clustering_metrics(np.zeros(3, int), np.zeros(4, int))
    with pytest.raises(ValueError, match="numbered from 0"):
        clustering_metrics(np.array([-1, 0]), np.array([0, 1]))
