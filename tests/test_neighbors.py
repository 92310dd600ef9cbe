"""Neighbours against brute force, Eq. 4 against a float64 loop, kNN against scikit-learn."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from tsp_utils import (
    knn_accuracy,
    label_consistency,
    nearest_neighbors,
    neighbor_perplexity,
    neighbor_weights,
)
from tsp_utils.neighbors import METRICS, Neighbors

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((300, 12)).astype(np.float32) + 0.5
LABELS = (FEATURES[:, 0] + 0.3 * RNG.standard_normal(300) > 0.5).astype(int)
FOUND = nearest_neighbors(FEATURES, 7)


def brute_force(features, k, metric):
    x = features.astype(np.float64)
    unit = x / np.abs(x).max(1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    order_by = {"euclidean": cdist(x, x), "cosine": cdist(unit, unit), "inner": -x @ x.T}[metric]
    np.fill_diagonal(order_by, np.inf)
    indices = order_by.argsort(1, kind="stable")[:, :k]
    return indices, np.take_along_axis(cdist(*[unit if metric == "cosine" else x] * 2), indices, 1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype, factor", [
    (np.float32, 1), (np.float32, 1e36), (np.float32, 1e-30), (np.float64, 1e290),
    (np.float64, 1e-290)])
def test_search_and_eq_4_equal_brute_force_at_any_factor(metric, dtype, factor):
    found = nearest_neighbors(FEATURES.astype(dtype) * dtype(factor), 7, metric)
    indices, distances = brute_force(FEATURES, 7, metric)
    assert (found.indices == indices).mean() > 0.999  # ties in float32 may swap
    np.testing.assert_allclose(found.distances, distances * (1 if metric == "cosine" else factor),
                               rtol=2e-5)
    assert (found.first(3).indices == found.indices[:, :3]).all()
    weights = np.exp(-(distances**2) / (2 * (distances[:, 2:3] / 2) ** 2))
    weights /= weights.sum(1, keepdims=True)
    np.testing.assert_allclose(neighbor_weights(found), weights, rtol=1e-4)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("scales", [(1, 1e12), (1e-25, 1e3), (1e-30, 1), (1e-60, 1e60)])
def test_small_and_large_vectors_side_by_side(metric, scales):
    """Half of the vectors so small that their squares vanish beside those of the other half."""
    features = FEATURES.astype(np.float64) * np.repeat(scales, 150)[:, None]
    indices, distances = brute_force(features, 7, metric)
    for dtype in (np.float32, np.float64)[scales[1] > 1e38:]:
        found = nearest_neighbors(features.astype(dtype), 7, metric)
        rows = slice(150) if metric == "euclidean" else slice(None)  # from the large ones, all of
        assert (found.indices == indices)[rows].mean() > 0.999  # the small are equally far
        np.testing.assert_allclose(found.distances, distances, rtol=1e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [100, 1e4, 1e7])
def test_vectors_far_from_the_origin_are_told_apart(metric, offset):
    features = FEATURES.astype(np.float64) + offset
    indices, distances = brute_force(features, 7, metric)
    found = nearest_neighbors(features, 7, metric)
    assert (found.indices == indices).mean() > 0.999
    np.testing.assert_allclose(found.distances, distances, rtol=1e-3)


def test_a_sparse_inner_product_is_that_of_brute_force_and_a_sum_may_be_infinite():
    """Large vectors that point away from all: the nearest are tiny, and their products vanish."""
    features = np.abs(FEATURES).astype(np.float64)
    assert np.isfinite(nearest_neighbors(features * 4e307, 5).distances).all()
    features[::2] *= -1e25
    features[1::2] *= 1e-20
    found = nearest_neighbors(features.astype(np.float32), 5, "inner")
    assert (found.indices == brute_force(features, 5, "inner")[0])[1::2].mean() > 0.99


def test_self_is_left_out_by_index_even_among_duplicates_and_beyond_one_block_of_the_search():
    features = np.repeat(FEATURES[:10], 8, 0)  # 8 copies each: the sample may not come first
    found = nearest_neighbors(features, 5, "euclidean")
    assert not (found.indices == np.arange(80)[:, None]).any()
    assert (found.distances == 0).all()
    assert (found.indices // 8 == (np.arange(80) // 8)[:, None]).all()
    many = nearest_neighbors(RNG.standard_normal((5000, 4)).astype(np.float32), 3)
    assert not (many.indices == np.arange(5000)[:, None]).any()


def test_weights_of_duplicates_are_uniform_over_distance_zero_and_perplexity_by_hand():
    distances = np.array([[0, 0, 0, 0, 1.0], [0, 0, 1, 2, 3]], np.float32)
    weights = neighbor_weights(Neighbors(np.zeros((2, 5), int), distances, "euclidean"))
    np.testing.assert_allclose(weights[0], [0.25, 0.25, 0.25, 0.25, 0])
    np.testing.assert_allclose(weights[1], softmax([0, 0, -2, -8, -18]), rtol=1e-5)
    weights = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]], np.float32)
    np.testing.assert_allclose(neighbor_perplexity(weights), [4, 1, 2], rtol=1e-6)


def test_label_consistency_by_hand_of_arrays_lists_and_names():
    indices = np.array([[1, 2, 3], [0, 3, 2], [3, 0, 1], [2, 0, 1]])
    found = Neighbors(indices, np.zeros((4, 3), np.float32), "cosine")
    for labels in (np.array([0, 0, 1, 1]), ["no", "no", "yes", "yes"]):
        np.testing.assert_allclose(label_consistency(found, labels), [1, 0.5, 1 / 3])


@pytest.mark.parametrize("dtype, factor, names", [
    (np.float32, 1, [0, 1]), (np.float32, 1e20, [7, -1]), (np.float32, 1e-30, [10**9, 5]),
    (np.float64, 1e200, ["no", "yes"])])
def test_knn_accuracy_is_scikit_learns_whatever_the_scale_and_the_names(dtype, factor, names):
    unit = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    voters = KNeighborsClassifier(20, algorithm="brute",
                                  weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))
    left_out = cross_val_score(voters, unit[:60], LABELS[:60], cv=LeaveOneOut())
    voters.fit(unit[:200], LABELS[:200])
    x, named = FEATURES.astype(dtype) * dtype(factor), np.array(names)[LABELS].tolist()
    assert knn_accuracy(x[:200], named[:200], x[200:], named[200:]) == pytest.approx(
        voters.score(unit[200:], LABELS[200:]))
    assert knn_accuracy(x[:60], named[:60]) == pytest.approx(left_out.mean())
    assert knn_accuracy(x, named, k=1) == pytest.approx(label_consistency(FOUND, LABELS)[0])


@pytest.mark.parametrize("ask, sentence", [
    (lambda: label_consistency(FOUND, LABELS[:-1].tolist()), "labels of the shape"),
    (lambda: knn_accuracy(FEATURES, LABELS[:-1]), "300 samples, and labels of the shape"),
    (lambda: knn_accuracy(FEATURES, LABELS, FEATURES, LABELS[:, None]), "labels of the shape"),
    (lambda: knn_accuracy(FEATURES, LABELS, FEATURES), "one of them is missing; pass both"),
    (lambda: knn_accuracy(FEATURES, LABELS, FEATURES[:, :5], LABELS),
     "12 columns and test features 5"),
    (lambda: knn_accuracy(FEATURES, LABELS, k=0), "k is 0; pass a whole number of at least 1"),
    (lambda: knn_accuracy(FEATURES, LABELS, k=300), "pass at most 299"),
    (lambda: nearest_neighbors(FEATURES, 2), "third nearest neighbour"),
    (lambda: nearest_neighbors(FEATURES, 4.5), "is 4.5, .* a whole number of at least 3"),
    (lambda: nearest_neighbors(FEATURES, 300), "at most 299"),
    (lambda: nearest_neighbors(FEATURES, 5, "manhattan"), "cosine, euclidean, inner"),
    *((lambda bad=bad: nearest_neighbors(np.where(FEATURES[17, 3] == FEATURES, bad, FEATURES), 5),
       "row 17") for bad in (np.nan, np.inf)),
    (lambda: nearest_neighbors(np.sign(FEATURES).astype(float) * 1.7e308, 5, "euclidean"),
     "divide the features by a constant"),
    *((lambda k=k: FOUND.first(k), "7 neighbours were searched") for k in (0, -1, 8, 2.5)),
    (lambda: neighbor_weights(FOUND.first(2)), "2 neighbours here, and Eq"),
    (lambda: Neighbors(FOUND.indices, FOUND.distances[:, :2], "cosine"), r"two tables \[N, K\]"),
])
def test_bad_requests_are_refused_in_one_sentence(ask, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        ask()
    assert "\n" not in str(refused.value)
