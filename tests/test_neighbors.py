"""Neighbours against brute force, Eq. 4 against a float64 loop, kNN against scikit-learn."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.neighbors import KNeighborsClassifier

from tsp_utils import (
    knn_accuracy,
    label_consistency,
    nearest_neighbors,
    neighbor_perplexity,
    neighbor_weights,
)
from tsp_utils.neighbors import Neighbors

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((300, 12)).astype(np.float32) + 0.5


def brute_force(features, k, metric):
    x = features.astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    order_by = {"euclidean": cdist(x, x), "cosine": cdist(unit, unit), "inner": -x @ x.T}[metric]
    np.fill_diagonal(order_by, np.inf)
    indices = order_by.argsort(1, kind="stable")[:, :k]
    return indices, np.take_along_axis(cdist(*[unit if metric == "cosine" else x] * 2), indices, 1)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "inner"])
def test_search_equals_brute_force(metric):
    found = nearest_neighbors(FEATURES, 7, metric)
    indices, distances = brute_force(FEATURES, 7, metric)
    assert (found.indices == indices).mean() > 0.999  # ties in float32 may swap
    np.testing.assert_allclose(found.distances, distances, atol=1e-5)


def test_self_is_left_out_by_index_even_among_duplicates():
    features = np.repeat(FEATURES[:10], 8, 0)  # 8 copies each: the sample may not come first
    found = nearest_neighbors(features, 5, "euclidean")
    assert not (found.indices == np.arange(80)[:, None]).any()
    assert (found.distances == 0).all()
    assert (found.indices // 8 == (np.arange(80) // 8)[:, None]).all()


def test_self_is_left_out_beyond_one_block_of_the_search():
    features = RNG.standard_normal((5000, 4)).astype(np.float32)
    found = nearest_neighbors(features, 3)
    assert not (found.indices == np.arange(5000)[:, None]).any()


def weights_by_loop(distances):
    rows = []
    for d in distances.astype(np.float64):
        sigma = d[2] / 2
        e = np.array([np.exp(-(x**2) / (2 * sigma**2)) for x in d])
        rows.append(e / e.sum())
    return np.array(rows)


def test_weights_equal_eq_4():
    found = nearest_neighbors(FEATURES, 20)
    weights = neighbor_weights(found)
    np.testing.assert_allclose(weights, weights_by_loop(found.distances), rtol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


def test_weights_of_duplicates_are_uniform_over_distance_zero():
    distances = np.array([[0, 0, 0, 0, 1.0], [0, 0, 1, 2, 3]], np.float32)
    weights = neighbor_weights(Neighbors(np.zeros((2, 5), int), distances, "euclidean"))
    np.testing.assert_allclose(weights[0], [0.25, 0.25, 0.25, 0.25, 0])
    expected = np.exp([0, 0, -2, -8, -18])
    np.testing.assert_allclose(weights[1], expected / expected.sum(), rtol=1e-5)


def test_perplexity_of_uniform_and_of_certain():
    weights = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]], np.float32)
    np.testing.assert_allclose(neighbor_perplexity(weights), [4, 1, 2], rtol=1e-6)


def test_label_consistency_by_hand():
    indices = np.array([[1, 2, 3], [0, 3, 2], [3, 0, 1], [2, 0, 1]])
    labels = np.array([0, 0, 1, 1])
    found = Neighbors(indices, np.zeros((4, 3), np.float32), "cosine")
    np.testing.assert_allclose(label_consistency(found, labels), [1, 0.5, 1 / 3])


def test_knn_accuracy_equals_scikit_learn_with_the_same_votes():
    labels = (FEATURES[:, 0] + 0.3 * RNG.standard_normal(300) > 0.5).astype(int)
    unit = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    reference = KNeighborsClassifier(
        20, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)
    ).fit(unit[:200], labels[:200])
    ours = knn_accuracy(FEATURES[:200], labels[:200], FEATURES[200:], labels[200:])
    assert ours == pytest.approx(reference.score(unit[200:], labels[200:]))
    left_out = [
        KNeighborsClassifier(20, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))
        .fit(np.delete(unit[:60], i, 0), np.delete(labels[:60], i))
        .predict(unit[i : i + 1])[0] == labels[i]
        for i in range(60)
    ]
    assert knn_accuracy(FEATURES[:60], labels[:60]) == pytest.approx(np.mean(left_out))


@pytest.mark.parametrize(("k", "metric", "words"), [
    (2, "cosine", "third nearest neighbour"),
    (300, "cosine", "at most 299"),
    (5, "manhattan", "cosine, euclidean, inner"),
])
def test_bad_requests_are_refused_in_one_sentence(k, metric, words):
    with pytest.raises(ValueError, match=words):
        nearest_neighbors(FEATURES, k, metric)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_name_the_row(bad):
    features = FEATURES.copy()
    features[17, 3] = bad
    with pytest.raises(ValueError, match="row 17"):
        nearest_neighbors(features, 5)
