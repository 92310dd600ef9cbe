"""Other clusterers: scikit-learn's own results, the cache, and data on which each must win."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from toys import made_of

from tsp_utils.metrics import clustering_metrics
from tsp_utils.scaling import scale_features
from tsp_utils.study.baselines import KMEANS, MIXTURE, REDUCED, SPECTRAL, run_baseline
from tsp_utils.study.profile import load_study

STUDY = replace(load_study("tiny"), n_seeds=2)
RNG = np.random.default_rng(0)
LABELS = np.arange(400) % 2
# Two long, thin clusters that cross: round cells cut both, full covariances follow each.
STRIPES = made_of(RNG.normal(0, 1, (400, 2)) * np.float32([[6, 0.3], [0.3, 6]])[LABELS], LABELS)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, own_folders):
    """Workers take twenty seconds to import; tests/test_heads_compared.py runs them."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)


def test_a_mixture_follows_stretched_clusters_and_kmeans_is_scikit_learns_best_of_its_starts():
    assert run_baseline(STUDY, STRIPES, STRIPES, MIXTURE)["acc"].max() > 90
    for method, starts in ((KMEANS[0], 1), (KMEANS[1], 20)):
        table = run_baseline(STUDY, STRIPES, STRIPES, method)
        for seed, acc in zip(table["seed"], table["acc"], strict=True):
            run = KMeans(2, n_init=starts, random_state=seed).fit(scale_features(STRIPES.features))
            assert acc == pytest.approx(100 * clustering_metrics(LABELS, run.labels_)["acc"])
            assert acc < 75


def test_a_mixture_is_fitted_where_float32_is_too_coarse():
    """256 axes that span five dimensions: rounding alone decides whether Cholesky goes through."""
    flat = made_of(RNG.normal(0, 1, (400, 5)) @ RNG.normal(0, 1, (5, 256)), LABELS)
    with pytest.raises(ValueError, match="covariance"):
        GaussianMixture(2, random_state=0).fit(scale_features(flat.features))
    assert len(run_baseline(STUDY, flat, flat, MIXTURE)) == STUDY.n_seeds


@pytest.mark.parametrize("method", [*KMEANS, MIXTURE, *REDUCED, SPECTRAL])
def test_every_method_finds_separate_blobs_and_is_cached(method, monkeypatch):
    blobs = made_of(np.eye(2, 40)[LABELS] * 9 + RNG.normal(0, 0.5, (400, 40)), LABELS)
    table = run_baseline(STUDY, blobs, blobs, method)
    assert table["acc"].tolist() == [100.0, 100.0] and set(table["method"]) == {method}
    assert list(table["seed"]) == [0, 1] and set(table["scored"]) == {"test"}
    monkeypatch.setattr("tsp_utils.study.baselines.joblib.Parallel", None)  # any run would fail
    assert run_baseline(STUDY, blobs, blobs, method).equals(table)


def test_other_images_than_fitted_are_scored_but_not_by_spectral_clustering():
    score = made_of(STRIPES.features[:100] + 0.01, LABELS[:100])
    table = run_baseline(STUDY, STRIPES, score, KMEANS[3])
    assert len(table) == 2 and table["acc"].between(50, 100).all()
    with pytest.raises(ValueError, match="only clusters the images that it is fitted on"):
        run_baseline(STUDY, STRIPES, score, SPECTRAL)
    with pytest.raises(ValueError, match="'DBSCAN' is not known; pass one of K-means, one start"):
        run_baseline(STUDY, STRIPES, STRIPES, "DBSCAN")
