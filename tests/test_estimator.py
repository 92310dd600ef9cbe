"""The estimator: scikit-learn's own checks, the library's heads, held-out images, bad input."""

import pickle
import warnings

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from tsp_utils import (
    TSPClustering,
    init_heads,
    load_dataset,
    nearest_neighbors,
    scale_features,
    train_heads,
)
from tsp_utils import estimator as estimator_module
from tsp_utils.metrics import confusion
from tsp_utils.study.feature_sets import load_vectors

X, CLASSES = make_blobs(400, 8, centers=4, random_state=0)
QUICK = dict(n_init=3, max_epochs=20, min_steps=200, random_state=0)


@pytest.fixture(scope="module", autouse=True)
def _threads(one_thread):
    pass


def agreement(a, b) -> float:
    """Share of samples on which two clusterings agree after the best matching."""
    table = confusion(a, b)
    return table[linear_sum_assignment(-table)].sum() / len(a)


@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks_all_of_them():
    check_estimator(TSPClustering(n_init=2, max_epochs=10, min_steps=200))  # a tenth of the time


def test_it_is_the_librarys_code():
    fitted = TSPClustering(4, **QUICK).fit(X)
    features = scale_features(X)
    seeds = np.random.RandomState(0).randint(2**31 - 1, size=3).tolist()
    heads = init_heads(features, 4, seeds)
    curves = train_heads(heads, features, nearest_neighbors(features, 20), max_epochs=20,
                         min_steps=200, batch_size=50, progress=False).arrays()
    best = curves["loss"][-1].argmin()
    assert fitted.losses_ == pytest.approx(curves["loss"][-1])
    np.testing.assert_array_equal(fitted.labels_, heads.predict(features)[best])
    np.testing.assert_allclose(fitted.history_["loss"], curves["loss"][:, best])
    with np.errstate(all="raise"):
        np.testing.assert_allclose(fitted.predict_proba(X), heads.predict_proba(features)[best],
                                   atol=1e-5)


def test_blobs_are_found_and_predict_is_labels_on_every_row():
    fitted = TSPClustering(4, **QUICK).fit(X)
    assert adjusted_rand_score(CLASSES, fitted.labels_) > 0.95
    np.testing.assert_array_equal(fitted.predict(X), fitted.labels_)
    np.testing.assert_array_equal(clone(fitted).fit_predict(X), fitted.labels_)
    assert fitted.transform(X) == pytest.approx(X @ fitted.coef_.T + fitted.intercept_)
    assert fitted.predict_proba(X).sum(1) == pytest.approx(1)
    assert np.linalg.norm(fitted.scale_ * X, axis=1).mean() == pytest.approx(np.sqrt(8), rel=1e-5)
    assert fitted.get_feature_names_out()[0] == "tspclustering0"


def test_a_factor_on_the_features_changes_nothing():
    np.testing.assert_array_equal(TSPClustering(4, **QUICK).fit_predict(X),
                                  TSPClustering(4, **QUICK).fit_predict(1e4 * X))


def test_pipeline_pickle_and_names():
    pipeline = make_pipeline(PCA(5, random_state=0), TSPClustering(4, **QUICK)).fit(X)
    again = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(again.predict(X), pipeline.predict(X))
    assert again[-1].n_features_in_ == 5


def test_what_was_fitted_stays_so_when_parameters_or_curves_change():
    fitted = TSPClustering(4, **QUICK).fit(X)
    names, proba, labels = fitted.get_feature_names_out(), fitted.predict_proba(X), fitted.labels_
    loss, losses = fitted.history_["loss"].copy(), fitted.losses_.copy()
    fitted.set_params(n_clusters=7, n_neighbors=3, metric="inner", init="random", random_state=5)
    assert fitted.get_feature_names_out().tolist() == names.tolist() and len(names) == 4
    np.testing.assert_array_equal(fitted.predict_proba(X), proba)
    np.testing.assert_array_equal(fitted.predict(X), labels)
    assert fitted.set_output(transform="pandas").transform(X).shape == (400, 4)
    fitted.losses_[:] = 0
    np.testing.assert_array_equal(fitted.history_["loss"], loss)
    fitted.history_["loss"][:] = 1
    assert (fitted.losses_ == 0).all() and np.isfinite(losses).all()


def test_a_head_whose_loss_is_no_number_is_never_kept(monkeypatch):
    def spoiled(heads, *arguments, **settings):
        history = train_heads(heads, *arguments, **settings)
        history.arrays()["loss"][-1, lost] = np.nan
        return history

    monkeypatch.setattr(estimator_module, "train_heads", spoiled)
    lost = [0, 1]
    fitted = TSPClustering(4, **QUICK).fit(X)
    assert np.isfinite(fitted.history_["loss"]).all()
    assert fitted.losses_[2] == fitted.history_["loss"][-1]
    lost = [0, 1, 2]
    with pytest.raises(ValueError, match="loss of every head"):
        TSPClustering(4, **QUICK).fit(X)


@pytest.mark.parametrize("factor", [1e-150, 1e-30, 1e20, 1e37])
def test_a_factor_far_from_one_changes_no_cluster(factor):
    fitted, scaled = TSPClustering(4, **QUICK).fit(X), TSPClustering(4, **QUICK).fit(factor * X)
    np.testing.assert_array_equal(fitted.labels_, scaled.labels_)
    np.testing.assert_array_equal(scaled.predict(factor * X), scaled.labels_)
    assert scaled.scale_ * factor == pytest.approx(fitted.scale_)


def test_random_starts_and_uniform_labels_dtype():
    fitted = TSPClustering(4, init="random", **QUICK).fit(X.astype(np.float32))
    assert fitted.labels_.dtype == np.int64 and fitted.predict(X).dtype == np.int64


def test_few_samples_lower_the_neighbours_with_a_warning():
    with pytest.warns(UserWarning, match="n_neighbors is 20 and there are only 12 samples; 11"):
        fitted = TSPClustering(2, **QUICK).fit(X[:12])
    assert set(fitted.labels_) <= {0, 1}


def test_only_the_kept_heads_collapse_is_told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = TSPClustering(4, entropy_weight=0.0, learning_rate=0.1, **QUICK).fit(X)
    told = [str(w.message) for w in caught if "Collapse" in str(w.message)]
    assert len(told) == (fitted.history_["n_nonempty"][-1] < 4)


def test_a_collapse_is_one_of_the_finished_head_on_all_samples():
    """While it moves, on the batches of an epoch, a head may leave out clusters that it has."""
    moving = []
    for seed in range(12):
        few = np.random.default_rng(seed).standard_normal((60, 5))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = TSPClustering(20, **QUICK | {"random_state": seed}).fit(few)
        sizes = np.bincount(fitted.labels_)
        assert fitted.history_["n_nonempty"][-1] == (sizes > 0).sum()
        assert fitted.history_["largest_share"][-1] == pytest.approx(sizes.max() / 60)
        assert not [w for w in caught if "Collapse" in str(w.message)] and (sizes > 0).all()
        moving.append(fitted.history_["n_nonempty"][-2])  # an epoch as training counts it
    assert min(moving) < 20


@pytest.mark.parametrize("make, sentence", [
    (lambda: TSPClustering(4).fit(np.zeros((50, 3))), "All features are 0"),
    (lambda: TSPClustering(10).fit(X[:8]), "8 samples cannot make 10 clusters; pass at most 8"),
    (lambda: TSPClustering(4).fit(np.repeat(X[:2], 20, 0)), "only 2 distinct feature vectors"),
    (lambda: TSPClustering(2).fit(X[:1]), "1 sample"),
    (lambda: TSPClustering(2).fit(X[:3]), "a minimum of 4 is required"),
    (lambda: TSPClustering(2.5).fit(X), "n_clusters is 2.5; pass a whole number of at least 1"),
    (lambda: TSPClustering(4, entropy_weight=-1).fit(X), "entropy_weight is -1; pass 0 or more"),
    (lambda: TSPClustering(4).fit(np.zeros((9, 8, 8, 3))), "TSPClustering takes features"),
    (lambda: TSPClustering(4).fit(load_dataset("fashion-mnist")), "pass cached_features"),
    (lambda: TSPClustering(4, n_init=0).fit(X), "n_init is 0; pass a whole number"),
    (lambda: TSPClustering(4, n_init=2.0).fit(X), "n_init is 2.0; pass a whole number"),
    (lambda: TSPClustering(4, entropy_weight=np.inf).fit(X), "entropy_weight is inf; pass 0 or"),
    (lambda: TSPClustering(4, entropy_weight=np.nan).fit(X), "entropy_weight is nan; pass 0 or"),
    (lambda: TSPClustering(4, entropy_weight="3").fit(X), "entropy_weight is '3'; pass a number"),
    (lambda: TSPClustering(4, learning_rate=-1e-4).fit(X), "learning_rate is -0.0001; pass"),
    (lambda: TSPClustering(4, learning_rate=np.nan).fit(X), "learning_rate is nan; pass"),
    (lambda: TSPClustering(4, learning_rate=None).fit(X), "learning_rate is None; pass a number"),
    (lambda: TSPClustering(4, max_epochs=0, min_steps=0).fit(X), "nothing is trained; pass"),
    (lambda: TSPClustering(4, max_epochs=-1).fit(X), "max_epochs is -1; pass a whole number of at"),
    (lambda: TSPClustering(4, max_epochs=1.5).fit(X), "max_epochs is 1.5; pass a whole number"),
    (lambda: TSPClustering(4, min_steps=np.inf).fit(X), "min_steps is inf; pass a whole number"),
    (lambda: TSPClustering(4, batch_size=0).fit(X), "batch_size is 0; pass a whole number"),
    (lambda: TSPClustering(4, n_neighbors=2).fit(X), "n_neighbors is 2, and Eq. 4"),
    (lambda: TSPClustering(4, device="gpu").fit(X), "device 'gpu' is not there; pass auto, cpu"),
    (lambda: TSPClustering(4, device=None).fit(X), "device 'None' is not there; pass auto, cpu"),
    (lambda: TSPClustering(4, device="cuda:99").fit(X), "device 'cuda:99' is not there"),
    (lambda: TSPClustering(4, init="zeros").fit(X), "pass k-means or random"),
    (lambda: TSPClustering(4, metric="manhattan").fit(X), "pass one of cosine"),
    (lambda: TSPClustering(4).fit(np.full((50, 3), np.nan)), "NaN"),
])
def test_bad_input_is_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_four_fifths_of_cifar10_cluster_the_rest_alike():
    found = load_vectors("cifar10", "patch_kmeans")
    order = np.random.default_rng(0).permutation(len(found.labels))
    fitted, held_out = order[:8000], order[8000:]
    settings = dict(n_clusters=10, max_epochs=100, random_state=0)
    all_of_it = TSPClustering(**settings).fit(found.features)
    most_of_it = TSPClustering(**settings).fit(found.features[fitted])
    reached = agreement(all_of_it.predict(found.features[held_out]),
                        most_of_it.predict(found.features[held_out]))
    print(f"agreement on held-out rows: {100 * reached:.1f} %")
    assert reached > 0.5
