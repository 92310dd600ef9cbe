"""The estimator: scikit-learn's own checks, the library's heads, held-out images, bad input."""

import copy
import itertools
import warnings

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import check_estimator

from tsp_utils import (
    TSPClustering,
    clustering_metrics,
    estimator,
    init_heads,
    load_dataset,
    nearest_neighbors,
    scale_features,
    train_heads,
)
from tsp_utils.estimator import check_weights, last_fall
from tsp_utils.study.feature_sets import load_vectors

X, CLASSES = make_blobs(400, 8, centers=4, random_state=0)
QUICK = dict(n_init=3, max_epochs=20, min_steps=200, random_state=0)


@pytest.fixture(scope="module")
def fitted():
    return TSPClustering(4, **QUICK).fit(X)


@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks_all_of_them():
    check_estimator(TSPClustering(n_init=2, max_epochs=2, min_steps=50))  # few steps: quicker


def test_the_best_head_alone_is_the_librarys_code():
    alike = TSPClustering(1, keep="best", **QUICK).fit(X)  # one cluster: all heads have one loss
    assert len(set(alike.losses_)) == 1 and alike.votes_.tolist() == [1]
    fitted = TSPClustering(4, keep="best", learning_rate=1e-4, **QUICK).fit(X)
    features = scale_features(X)
    assert fitted.votes_.tolist() == [1] and (fitted.stability_ == 1).all()
    logits = X @ fitted.coef_[0].T + fitted.intercept_[0]
    np.testing.assert_allclose(fitted.transform(X), log_softmax(logits, axis=1), atol=1e-9)
    seeds = np.random.RandomState(0).randint(2**31 - 1, size=3).tolist()
    heads = init_heads(features, 4, seeds)
    curves = train_heads(heads, features, nearest_neighbors(features, 20), max_epochs=20,
                         min_steps=200, batch_size=50, progress=False).curves
    best = curves["loss"][-1].argmin()
    assert fitted.losses_ == pytest.approx(curves["loss"][-1])
    np.testing.assert_array_equal(fitted.labels_, heads.predict(features)[best])
    np.testing.assert_allclose(fitted.history_["loss"], curves["loss"][:, best])
    with np.errstate(all="raise"):
        np.testing.assert_allclose(fitted.predict_proba(X), heads.predict_proba(features)[best],
                                   atol=1e-5)


def test_all_heads_vote_by_hand():
    """Heads that name the clusters otherwise are renumbered; each weighs by its loss."""
    fitted = TSPClustering(4, n_init=3, max_epochs=2, min_steps=1, random_state=0).fit(X[:100])
    gaps = np.sort(fitted.losses_ - fitted.losses_.min())
    wanted = np.exp(-gaps / 0.02)
    assert fitted.votes_ == pytest.approx(wanted[:len(fitted.votes_)] / wanted[
        :len(fitted.votes_)].sum()) and (wanted[len(fitted.votes_):] < 0.01 * wanted.sum()).all()
    each = softmax(X[:100] @ fitted.coef_.transpose(0, 2, 1) + fitted.intercept_[:, None], axis=2)
    mean = sum(vote * proba for vote, proba in zip(fitted.votes_, each, strict=True))  # [N, C]
    assert fitted.predict_proba(X[:100]) == pytest.approx(mean)
    np.testing.assert_array_equal(fitted.labels_, mean.argmax(1))
    agree = [vote * (proba.argmax(1) == fitted.labels_)
             for vote, proba in zip(fitted.votes_, each, strict=True)]
    assert fitted.stability_ == pytest.approx(sum(agree))
    for other in each[1:]:  # no renumbering of a head shares more with the best one
        shared = each[0].T @ other
        assert max(sum(shared[i, order[i]] for i in range(4)) for order in
                   itertools.permutations(range(4))) == pytest.approx(np.trace(shared))


def test_blobs_are_found_and_predict_is_labels_on_every_row(fitted):
    assert adjusted_rand_score(CLASSES, fitted.labels_) > 0.95
    np.testing.assert_array_equal(fitted.predict(X), fitted.labels_)
    np.testing.assert_array_equal(clone(fitted).fit_predict(X), fitted.labels_)
    assert fitted.transform(X) == pytest.approx(np.log(fitted.predict_proba(X)))
    assert fitted.predict_proba(X).sum(1) == pytest.approx(1)
    assert fitted.get_feature_names_out()[0] == "tspclustering0"


def test_what_was_fitted_stays_so_when_parameters_change(fitted):
    changed = copy.deepcopy(fitted).set_params(n_clusters=7, n_neighbors=3, metric="inner",
                                               init="random", random_state=5)
    assert changed.get_feature_names_out().tolist() == fitted.get_feature_names_out().tolist()
    np.testing.assert_array_equal(changed.predict_proba(X), fitted.predict_proba(X))
    assert changed.set_output(transform="pandas").transform(X).shape == (400, 4)
    assert not np.shares_memory(fitted.losses_, fitted.history_["loss"])


def test_a_head_whose_loss_is_no_number_is_never_kept(monkeypatch):
    def spoiled(heads, *arguments, **settings):
        history = train_heads(heads, *arguments, **settings)
        history.curves["loss"][-1, :2] = np.nan
        return history

    monkeypatch.setattr("tsp_utils.estimator.train_heads", spoiled)
    fitted = TSPClustering(4, **QUICK).fit(X)
    assert np.isfinite(fitted.history_["loss"]).all()
    assert fitted.losses_[2] == fitted.history_["loss"][-1]


ROW, CONSTANT = X.copy(), np.full((400, 1), 1.0)
ROW[7] *= 1e8


@pytest.mark.parametrize("x", [
    *(factor * X for factor in (1e-150, 1e18, 1e39, 1e300)),
    np.float32(1e25) * X.astype(np.float32), np.hstack([X, 0 * CONSTANT])])
@pytest.mark.filterwarnings("error")
def test_features_of_any_size_give_the_clusters_of_the_unscaled_ones(fitted, x):
    found = TSPClustering(4, **QUICK).fit(x, np.array(list("abcd"))[CLASSES])  # labels: text
    np.testing.assert_array_equal(found.labels_, fitted.labels_)
    np.testing.assert_array_equal(found.predict(x), found.labels_)
    lengths = np.linalg.norm(found.scale_ * x, axis=1)
    assert lengths.mean() == pytest.approx(np.sqrt(x.shape[1]), rel=1e-5)


@pytest.mark.parametrize("x, sentence", [
    (X + 1e4, r"Column \d of the features .*: its mean is 7e\+02 times"),
    ((X + 1e4).astype(np.float32), r"Column \d of the features .* Subtract each column's mean"),
    (X + 1e8, r"Column \d of the features"), (1e300 * (X + 1e4), r"Column \d of the features"),
    (ROW, r"Row 7 of the features outweighs the rest: it is 1e\+08 times as long"),
    (ROW.astype(np.float32), "Row 7 of the features"), (1e200 * ROW, "Row 7 of the features"),
    (np.where(np.arange(400)[:, None] % 99 == 7, ROW * 1e8 + X * 1e8, X), "Row 7 of the features"),
    (np.hstack([X, 1e6 * CONSTANT]), "Column 8 of the features")])
def test_a_row_or_column_that_outweighs_the_rest_is_named(x, sentence):
    with pytest.raises(ValueError, match=sentence):
        TSPClustering(4, **QUICK).fit(x)


@pytest.mark.parametrize("x, sentence", [
    (np.hstack([X, 1e3 * CONSTANT]), "Column 8 of the features .* mean is 7e"),
    (np.hstack([X, 1e6 * np.arange(400)[:, None]]), "Column 8 .* holds 100.0 % of their variance")])
def test_a_column_that_may_outweigh_the_rest_is_a_warning(x, sentence):
    with pytest.warns(UserWarning, match=sentence):
        check_weights(x)


@pytest.mark.filterwarnings("error")
def test_many_zero_rows_a_long_row_and_one_column_alone_are_ordinary():
    x = X.copy()
    x[:250] = 0
    x[399] *= 100
    check_weights(x)
    check_weights(X[:, :1])


def test_random_starts_on_few_float32_samples_lower_the_neighbours_with_a_warning():
    with pytest.warns(UserWarning, match="n_neighbors is 20 and there are only 12 samples; 11"):
        fitted = TSPClustering(2, init="random", **QUICK).fit(X[:12].astype(np.float32))
    assert fitted.labels_.dtype == fitted.predict(X).dtype == np.int64
    assert set(fitted.labels_) <= {0, 1}


def test_a_collapse_is_one_of_the_kept_head_when_it_is_finished_on_all_samples():
    """While it moves, on the batches of an epoch, a head may leave out clusters that it has."""
    moving, noise = [], np.random.default_rng
    for x, n, settings in [(X, 4, dict(entropy_weight=0.0, learning_rate=0.1)), *(
            (noise(seed).standard_normal((60, 5)), 20, dict(random_state=seed, learning_rate=1e-4))
            for seed in range(6))]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = TSPClustering(n, keep="best", **QUICK | settings).fit(x)
        told = [warning for warning in caught if "Collapse" in str(warning.message)]
        sizes = np.bincount(fitted.labels_)
        assert len(told) == (fitted.history_["n_nonempty"][-1] < n)
        assert fitted.history_["n_nonempty"][-1] == (sizes > 0).sum()
        assert fitted.history_["largest_share"][-1] == pytest.approx(sizes.max() / len(x))
        moving.append(fitted.history_["n_nonempty"][-2])  # an epoch as training counts it
        assert n == 4 or (not told and len(sizes) == 20 and (sizes > 0).all())
    assert min(moving[1:]) < 20


@pytest.mark.parametrize("settings, x, sentence", [
    *(({name: value}, X, f"{name} is {value!r}; {sentence}") for name, value, sentence in [
        ("n_clusters", 2.5, "pass a whole number of at least 1"),
        ("n_init", 0, "pass a whole number of at least 1"),
        ("n_clusters", True, "pass a whole number of at least 1"),
        ("batch_size", 0, "pass a whole number of at least 1"),
        ("max_epochs", 1.5, "pass a whole number of at least 0"),
        ("min_steps", np.inf, "pass a whole number of at least 0"),
        ("entropy_weight", "3", "pass a number"), ("learning_rate", None, "pass a number"),
        ("entropy_weight", np.nan, "pass 0 or more"),
        ("learning_rate", "fast", "pass a number, or auto"),
        ("learning_rate", True, "pass a number, or auto"), ("entropy_weight", False, "pass a num"),
        ("learning_rate", -1e-4, "pass a number above 0")]),
    ({}, np.repeat(X[:2], 20, 0), "only 2 distinct feature vectors"),
    (dict(n_clusters=10), X[:8], "8 samples cannot make 10 clusters; pass at most 8"),
    ({}, X[:3], "a minimum of 4 is required"),
    ({}, np.zeros((9, 8, 8, 3)), "TSPClustering takes features"),
    ({}, load_dataset("fashion-mnist"), "pass cached_features"),
    (dict(max_epochs=0, min_steps=0), X, "nothing is trained; pass"),
    (dict(n_clusters="auto"), X, r"n_clusters is 'auto', .* suggest_n_clusters\(X\)"),
    (dict(n_neighbors=2), X, "n_neighbors is 2, and Eq. 4"),
    (dict(device=None), X, "device 'None' is not there; pass auto, cpu"),
    (dict(keep="some"), X, "keep is 'some'; pass all or best"),
    (dict(init="zeros"), X, "pass k-means or random"),
    (dict(metric="manhattan"), X, "pass one of cosine"),
])
def test_settings_and_input_that_cannot_train_are_refused_in_one_sentence(settings, x, sentence):
    with pytest.raises(ValueError, match=sentence):
        TSPClustering(**dict(n_clusters=4) | settings).fit(x)


@pytest.mark.parametrize("share, rate", [
    (None, 1e-3), (0.05, 1e-4), (0.051, 3e-4), (0.125, 3e-4), (0.126, 1e-3), (np.nan, 1e-4)])
def test_the_share_that_falls_late_chooses_the_rate_for_all_from_the_same_start(
        monkeypatch, share, rate):
    def fitted(rate):
        return TSPClustering(4, learning_rate=rate, n_init=2, max_epochs=0, min_steps=400,
                             random_state=0).fit(X)

    if share is not None:  # else as it is: at 1e-4 these losses fall and fall
        monkeypatch.setattr(estimator, "last_fall", lambda losses: share)
    auto, fixed = fitted("auto"), fitted(rate)
    assert auto.learning_rate_ == fixed.learning_rate_ == rate
    np.testing.assert_array_equal(auto.losses_, fixed.losses_)
    np.testing.assert_array_equal(auto.coef_, fixed.coef_)


def test_the_share_of_the_fall_that_comes_in_the_second_half():
    losses = np.full((100, 1), 99.0)  # what lies between is not looked at
    losses[0], losses[40:50], losses[90:] = 8, 5, 2
    assert last_fall(losses) == pytest.approx(0.5)
    assert last_fall(np.linspace(0, -1, 101)[:, None]) == pytest.approx(0.5, abs=0.05)
    assert last_fall(np.array([[3.0, 1.0], [1.0, 0.0]])) == 1  # mean over the heads
    assert last_fall(np.full((1, 3), 2.0)) == last_fall(np.full((9, 3), 2.0)) == 0
    assert last_fall(np.arange(9.0)[:, None]) < 0  # it rises: no other rate would mend that


def test_four_fifths_of_cifar10_cluster_the_rest_alike():
    features = load_vectors("cifar10", "patch_kmeans").features[::3]
    most = np.random.default_rng(0).permutation(len(features)) < 0.8 * len(features)
    of_all, of_most = (
        TSPClustering(10, n_init=3, max_epochs=1, min_steps=300, random_state=0)
        .fit(fitted).predict(features[~most]) for fitted in (features, features[most]))
    assert clustering_metrics(of_all, of_most)["acc"] > 0.5
