"""Every method of notebook 10 on the same features: tuned without labels, fitted, scored.

One row a method and seed. `python -m experiments heads` writes the records that ship; notebook 10
reads them, and runs a few seeds itself.
"""

from functools import cached_property
from itertools import product

import faiss
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tsp_utils import cache
from tsp_utils.devices import find_device
from tsp_utils.files.unknown_names import unknown
from tsp_utils.heads import best_head
from tsp_utils.metrics import clustering_metrics, match_clusters
from tsp_utils.neighbors import nearest_neighbors
from tsp_utils.scaling import Scaler
from tsp_utils.study.baselines import KMEANS, MIXTURE, SPECTRAL, run_baseline
from tsp_utils.study.feature_sets import FeatureSet
from tsp_utils.study.training import fit_kmeans
from tsp_utils.study.verdicts import bootstrap_interval
from tsp_utils.systems.rivals import RIVALS, train_rival

CONSENSUS = "tsp consensus"
CLUSTERERS = {"k-means": KMEANS[0], "k-means-20": KMEANS[1], "gmm": MIXTURE, "spectral": SPECTRAL}
ABLATIONS = {"icbpl, no neighbour pull": {"neighbor": 0.0},
             "icbpl, no nearest centre": {"center": 0.0}, "icbpl, no MMD": {"mmd": 0.0}}
METHODS = ("k-means", "k-means-20", "spherical k-means", "gmm", "spectral", *RIVALS, CONSENSUS)
# Each trained method gets the same trials: learning rate x sharpness of the start.
TRIALS = tuple(product((1e-4, 1e-3), (1.0, 10.0)))
TRIAL_SEEDS = 3
ROW_COLUMNS = ("dataset", "backbone", "protocol", "method", "seed", "acc", "nmi", "ari", "n_used",
               "learning_rate", "sharpness", "against", "against_low", "against_high", "not_run")
MAX_GMM_OPERATIONS = 7e9  # N C D^2, an iteration of full covariances; ten fits: minutes of a core


class NotRun(ValueError):
    """A method that cannot run on these features, with the reason: the others go on."""


class FeaturesToCluster:
    """One feature set of a study, scaled, with K-means' centres and neighbours, each made once."""

    def __init__(self, study, fit: FeatureSet, score: FeatureSet):
        self.study, self.fit, self.score = study, fit, score
        self.centers, self.scaler = fit_kmeans(study, fit)  # [S, C, D]
        self.fitted = self.scaler.transform(fit.features)
        self.scored = self.scaler.transform(score.features)

    @cached_property
    def neighbors(self):
        return nearest_neighbors(self.fitted, self.study.n_neighbors, self.study.metric,
                                 find_device())

    def train(self, method: str, seeds, **settings):
        """Heads and losses of these seeds, a budget of the study's min_steps."""
        return train_rival(method, self.fitted, self.neighbors, self.centers[list(seeds)], seeds,
                           n_steps=self.study.min_steps, batch_size=self.study.batch_size,
                           device=find_device(), **settings)

    def cached(self, method: str, settings: dict, seeds, make) -> dict:
        """Arrays by seed of a method; keyed by settings, fitted features and the method's code."""
        needed = ("scaling", "n_neighbors", "metric", "min_steps", "batch_size")
        inputs = {name: getattr(self.study, name) for name in needed} | settings | {
            "method": method, "n_clusters": self.fit.n_clusters, "fit": self.fit.fingerprint}
        code = [train_rival, *RIVALS[method].code] if method in RIVALS else [_spherical]
        return cache.seeds("compared", f"{self.fit.dataset}_{self.fit.backbone}_{method}", inputs,
                           [*code, Scaler.fit, Scaler.transform], seeds, make)[0]


def tune(data: FeaturesToCluster, method: str) -> pd.DataFrame:
    """All trials of one method, one row each; `chosen` marks one. No label is read.

    Chosen is the lowest final loss (mean over three seeds) among the trials in which no cluster of
    any seed ended empty; among all where there is none such.
    """
    rows = []
    for rate, sharpness in TRIALS:
        found = _trained(data, method, range(min(TRIAL_SEEDS, data.study.n_seeds)),
                         learning_rate=rate, sharpness=sharpness)
        rows.append((rate, sharpness, found["loss"].mean(), found["used"].min()))
    table = pd.DataFrame(rows, columns=["learning_rate", "sharpness", "loss", "least_used"])
    full = table["least_used"] == data.centers.shape[1]
    candidates = table[full] if full.any() else table
    best = candidates.index[best_head(candidates["loss"])]
    return table.assign(method=method, chosen=table.index == best)


def _trained(data: FeaturesToCluster, method: str, seeds, **settings) -> dict:
    """Weights, loss and clusters in use on the fitted images, by seed; cached."""
    def make(seeds) -> dict:
        heads, loss = data.train(method, seeds, **settings)
        used = np.array([len(np.unique(row)) for row in heads.predict(data.fitted)])
        return {f"state_{name}": value.detach().numpy()
                for name, value in heads.named_parameters()} | {"loss": loss, "used": used}

    return data.cached(method, settings, seeds, make)


def run_head(data: FeaturesToCluster, method: str, **options) -> dict:
    """One trained method, all seeds, at its tuned settings: clusters [S, N] of the scored images,
    loss [S]. options go to the head (ICBPL's weights; the full loss's tuning stays)."""
    import torch

    chosen = tune(data, method).query("chosen").iloc[0]
    settings = {name: float(chosen[name]) for name in ("learning_rate", "sharpness")}
    found = _trained(data, method, data.study.seeds, **settings, **options)
    heads = RIVALS[method].heads(data.fitted, data.fit.n_clusters, data.study.seeds, data.centers,
                                 **options)
    heads.load_state_dict({name.removeprefix("state_"): torch.from_numpy(value)
                           for name, value in found.items() if name.startswith("state_")},
                          strict=False)  # fixed centres are no weights
    return settings | dict(clusters=heads.predict(data.scored), loss=found["loss"])


def consensus(clusters: np.ndarray, reference: int) -> np.ndarray:
    """Majority vote [N] of S clusterings [S, N], each matched to the reference one beforehand.

    Ties go to the reference's lower cluster number. No label is read: the reference stands in.
    """
    n_clusters = int(clusters.max()) + 1
    votes = np.zeros((clusters.shape[1], n_clusters), int)
    for found in clusters:
        to_reference = match_clusters(clusters[reference], found)[found]
        rows = np.flatnonzero(to_reference >= 0)
        votes[rows, to_reference[rows]] += 1
    return votes.argmax(1)


def compare_heads(study, dataset: str, backbone: str, methods=METHODS):
    """Every method on one feature set -> rows (a method and seed each), trials (all of them).

    rows: dataset, backbone, protocol, method, seed, acc, nmi, ari (percent), n_used (clusters),
    learning_rate, sharpness, against_low and against_high (the consensus alone), not_run (why; then
    without numbers). A method that cannot run does not stop the others.
    """
    data = FeaturesToCluster(study, *study.fit_and_score(dataset, backbone))
    where = dict(dataset=dataset, backbone=backbone, protocol=study.protocol)
    rows, trials = [], []
    for method in methods:
        try:
            found = scores_of(data, method)
            if method in RIVALS:
                trials.append(tune(data, method).assign(**where))
        except (NotRun, MemoryError) as error:
            found = [dict(not_run=str(error) or "not enough memory")]
        rows += [where | dict(method=method) | row for row in found]
    return (pd.DataFrame(rows).reindex(columns=ROW_COLUMNS),
            pd.concat(trials, ignore_index=True) if trials else pd.DataFrame())


def scores_of(data: FeaturesToCluster, method: str) -> list[dict]:
    """One row a seed. Raises NotRun, with the reason, where the method cannot run."""
    study, n_clusters = data.study, data.centers.shape[1]
    n, dim = data.fitted.shape
    if method not in (*METHODS, *ABLATIONS):
        raise NotRun(unknown("method", method, METHODS))
    if min(study.batch_size, n) < n_clusters and method not in (*CLUSTERERS, "spherical k-means"):
        raise NotRun(f"batches of {min(study.batch_size, n)} are smaller than the {n_clusters} "
                     f"clusters that they are to be spread over")
    if method in RIVALS or method in ABLATIONS:
        found = run_head(data, method if method in RIVALS else "icbpl",
                         **ABLATIONS.get(method, {}))
        how = {name: found[name] for name in ("learning_rate", "sharpness")}
        return [how | _scored(data, clusters, seed) for seed, clusters in
                enumerate(found["clusters"])]
    if method == CONSENSUS:
        found = run_head(data, "tsp")
        best = best_head(found["loss"])
        clusters = consensus(found["clusters"], best)
        right = [match_clusters(data.score.labels, each)[each] == data.score.labels
                 for each in (clusters, found["clusters"][best])]
        low, high = bootstrap_interval(100.0 * right[0] - 100.0 * right[1])
        return [_scored(data, clusters, best)
                | dict(against=100 * right[1].mean(), against_low=low, against_high=high)]
    if method == "spherical k-means":
        found = data.cached(method, {}, study.seeds, lambda seeds: {"centers": np.stack(
            [_spherical(data.fitted, n_clusters, seed) for seed in seeds])})
        return [_scored(data, (data.scored @ centers.T).argmax(1), seed)
                for seed, centers in enumerate(found["centers"])]
    if method == "gmm" and n < n_clusters * (dim + 1):
        raise NotRun(f"{n_clusters} full covariances of {dim} dimensions need at least "
                     f"{n_clusters * (dim + 1)} samples, and there are {n}")
    if method == "gmm" and n * n_clusters * dim**2 > MAX_GMM_OPERATIONS:
        raise NotRun(f"full covariances of {dim} dimensions on {n} samples cost "
                     f"{n * n_clusters * dim**2 / MAX_GMM_OPERATIONS:.1f} times this "
                     f"comparison's limit")
    if method == "spectral" and data.score.fingerprint != data.fit.fingerprint:
        raise NotRun("spectral clustering only clusters the images that it is fitted on")
    table = run_baseline(study, data.fit, data.score, CLUSTERERS[method])
    return table[["seed", "acc", "nmi", "ari"]].to_dict("records")


def _scored(data: FeaturesToCluster, clusters: np.ndarray, seed: int) -> dict:
    scores = clustering_metrics(data.score.labels, clusters)
    return dict(seed=seed, n_used=len(np.unique(clusters))) | {
        name: 100 * value for name, value in scores.items()}


def _spherical(fitted, n_clusters: int, seed: int) -> np.ndarray:
    """K-means by cosine (Dhillon and Modha, 2001), faiss's: [N, D] -> unit centres [C, D]."""
    fitted = fitted / np.maximum(np.linalg.norm(fitted, axis=1, keepdims=True), 1e-12)
    found = faiss.Kmeans(fitted.shape[1], n_clusters, niter=100, spherical=True, seed=seed + 1,
                         max_points_per_centroid=len(fitted), min_points_per_centroid=1)
    found.train(fitted)
    return found.centroids


def linear_probe(fit: FeatureSet, score: FeatureSet) -> float:
    """ACC in percent of logistic regression WITH labels: what a linear head could reach at most.

    Fitted on `fit` and scored on `score`; where both are the same images, by five-fold
    cross-validation on them.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    if fit.fingerprint == score.fingerprint:
        predicted = cross_val_predict(model, fit.features, fit.labels, cv=5)
    else:
        predicted = model.fit(fit.features, fit.labels).predict(score.features)
    return 100 * float((predicted == score.labels).mean())


def compared_backbones(study) -> list[str]:
    """The two backbones whose features the heads are compared on: the default, and a network."""
    return list(dict.fromkeys((study.default_backbone, *study.vit_and_resnet)))[:2]
