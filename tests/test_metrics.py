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


def test_bad_input():
    with pytest.raises(ValueError, match="equally long"):
        clustering_metrics(np.zeros(3, int), np.zeros(4, int))
    with pytest.raises(ValueError, match="numbered from 0"):
        clustering_metrics(np.array([-1, 0]), np.array([0, 1]))
