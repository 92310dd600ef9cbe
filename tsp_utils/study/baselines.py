"""Other clusterers on the same features, by scikit-learn: what claims C3 and C11 compare with."""

import joblib
import numpy as np
import pandas as pd
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from tsp_utils import cache
from tsp_utils.scaling import Scaler, scale_features
from tsp_utils.study.feature_sets import FeatureSet
from tsp_utils.study.training import score_clusters

# C3 wants the strongest of these; one start is what starts the head.
KMEANS = ("K-means, one start", "K-means, 20 starts", "K-means, unit length",
          "K-means, standardised")
MIXTURE = "Gaussian mixture, full covariances"
REDUCED = ("K-means, 32 principal axes", "Gaussian mixture, 32 principal axes")
SPECTRAL = "spectral, 20 neighbours"
METHODS = (*KMEANS, MIXTURE, *REDUCED, SPECTRAL)


def run_baseline(study, fit: FeatureSet, score: FeatureSet, method: str) -> pd.DataFrame:
    """Clusters of `score` by one fitted on `fit`, a run a seed, in `HeadRuns.table`'s form.

    Features are scaled by one scalar ("mean-norm"), whatever the study's scaling.
    Raises ValueError for an unknown method, and for spectral clustering, which cannot place images
    that it was not fitted on, where `score` is another feature set than `fit`.
    """
    if method not in METHODS:
        raise ValueError(f"The clusterer {method!r} is not known; pass one of "
                         f"{', '.join(METHODS)}.")
    if method == SPECTRAL and score.fingerprint != fit.fingerprint:
        raise ValueError("Spectral clustering only clusters the images that it is fitted on; pass "
                         "the same feature set as fit and score.")
    scaler = Scaler().fit(fit.features)
    fitted, scored = scaler.transform(fit.features), scaler.transform(score.features)

    def make(seeds) -> dict:
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            return {"clusters": np.stack(joblib.Parallel(n_jobs=joblib.cpu_count())(
                joblib.delayed(_clusters)(method, fitted, scored, fit.n_clusters, seed)
                for seed in seeds)).astype(np.int16)}

    arrays, _ = cache.seeds(
        "clusterers", f"{fit.dataset}_{fit.backbone}",
        {"method": method, "n_clusters": fit.n_clusters, "fit": fit.fingerprint,
         "score": score.fingerprint},
        [_clusters, Scaler.fit, Scaler.transform], study.seeds, make)
    return score_clusters(study, fit, score, {method: lambda _: arrays["clusters"]}, only="test")


def _clusters(method: str, fitted, scored, n_clusters: int, seed: int) -> np.ndarray:
    """Clusters [N] of the scored vectors by one run; both float32 [N, D]."""
    if method == SPECTRAL:
        return SpectralClustering(n_clusters, affinity="nearest_neighbors", n_neighbors=20,
                                  random_state=seed).fit_predict(fitted)
    if "unit length" in method:
        fitted, scored = scale_features(fitted, "l2"), scale_features(scored, "l2")
    if "standardised" in method:
        mean, std = fitted.mean(0), fitted.std(0)
        fitted, scored = ((x - mean) / np.where(std > 0, std, 1) for x in (fitted, scored))
    if method in REDUCED:
        axes = PCA(min(32, fitted.shape[1]), random_state=0).fit(fitted)
        fitted, scored = axes.transform(fitted), axes.transform(scored)
    if "mixture" in method:  # float32 ends in "ill-defined empirical covariance" on our patches
        fitted, scored = fitted.astype(np.float64), scored.astype(np.float64)
        return GaussianMixture(n_clusters, random_state=seed).fit(fitted).predict(scored)
    starts = 20 if "20 starts" in method else 1
    return KMeans(n_clusters, n_init=starts, random_state=seed).fit(fitted).predict(scored)
