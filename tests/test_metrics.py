"""Matching against all permutations, counts against scikit-learn, and hand-computed cases."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.metrics import confusion_matrix

from tsp_utils import clustering_metrics, confusion, match_clusters

RNG = np.random.default_rng(0)


def test_matching_is_the_best_of_all_permutations_and_counts_are_scikit_learns():
    for _ in range(20):
        labels, clusters = RNG.integers(5, size=(2, 60))
        best = max(np.mean(np.array(p)[clusters] == labels) for p in permutations(range(5)))
        assert clustering_metrics(labels, clusters)["acc"] == pytest.approx(best)
        np.testing.assert_array_equal(confusion(labels, clusters),
                                      confusion_matrix(labels, clusters))


def test_nmi_and_ari_are_their_definitions():
    labels, clusters = RNG.integers(5, size=(2, 60))
    clusters[:30] = labels[:30]
    alike, together = (np.equal.outer(x, x)[np.triu_indices(60, 1)] for x in (labels, clusters))
    chance = alike.sum() * together.sum() / len(alike)
    most = (alike.sum() + together.sum()) / 2
    table = confusion(labels, clusters)
    apart = entropy(table.sum(0)), entropy(table.sum(1))
    found = clustering_metrics(labels, clusters)
    assert found["ari"] == pytest.approx(((alike & together).sum() - chance) / (most - chance))
    assert found["nmi"] == pytest.approx(2 - 2 * entropy(table.ravel()) / sum(apart))


@pytest.mark.parametrize("labels, clusters, matches, acc", [
    ([0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 2, 2], [[0, -1, 1]], 5 / 6),  # more clusters than classes
    ([0, 0, 0, 1, 1, 1], [0] * 6, [[0], [1]], 1 / 2),  # and fewer
    ([0, 0, 5, 5, 9], [4, 4, 0, 0, 2], [[5, -1, 9, -1, 0]], 1)])  # with gaps
def test_matching_by_hand(labels, clusters, matches, acc):
    assert match_clusters(labels, clusters).tolist() in matches
    assert clustering_metrics(labels, clusters)["acc"] == pytest.approx(acc)


@pytest.mark.parametrize("names", [[3, 1, 7, 2], [10**9, 4, 10**12, 6]])
def test_scores_know_no_names_and_labels_with_gaps_are_as_many_classes_as_there_are(names):
    plain, clusters = RNG.integers(4, size=80), RNG.integers(6, size=80)
    labels, order = np.array(names)[plain], np.argsort(names)
    np.testing.assert_array_equal(confusion(labels, clusters), confusion(plain, clusters)[order])
    assert sorted(match_clusters(labels, clusters)) == [-1, -1, *sorted(names)]  # six clusters
    assert clustering_metrics(labels, clusters) == pytest.approx(
        clustering_metrics(plain, clusters))
    assert clustering_metrics(labels, RNG.permutation(4)[plain]) == pytest.approx(
        {"acc": 1, "nmi": 1, "ari": 1})


@pytest.mark.parametrize("labels, clusters, sentence", [
    *((odd, [0, 1], "whole numbers, and these are of the types")
      for odd in (["cat", "dog"], [0.5, 1.0], [True, False])),
    ([0, 0, 0], [0, 0, 0, 0], "equally long"), ([-1, 0], [0, 1], "numbered from 0")])
def test_bad_input_is_refused(labels, clusters, sentence):
    for score in (confusion, clustering_metrics):
        with pytest.raises(ValueError, match=sentence):
            score(labels, clusters)
