"""Rungs of feature quality: what a head adds to K-means, against how often neighbours agree.

Real rungs are features as they are. Simulated ones are real features moved with the help of their
labels: a positive control and no result, never in Table 1, the ledger, a tuning or a default.
"""

from dataclasses import replace

import numpy as np
from sklearn.neighbors import NearestNeighbors

from tsp_utils.metrics import clustering_metrics, confusion
from tsp_utils.neighbors import label_consistency, nearest_neighbors
from tsp_utils.study.feature_sets import FeatureSet
from tsp_utils.study.head_comparison import consensus
from tsp_utils.study.training import run_heads

SHIFTS = (0.5, 1.0, 1.5, 2.0, 3.0)  # strengths of `shifted`, from worse to better
SHARES = (0.4, 0.3, 0.2, 0.1, 0.0)  # shares of `moved` that go wrong, from worse to better


def shifted(found: FeatureSet, strength: float) -> FeatureSet:
    """Every class moved away from the centre of all: x + strength (mean of its class - mean).

    What lies within a class stays as it is, so the classes part as a whole.
    """
    x, labels = found.features, found.labels
    classes, of_row = np.unique(labels, return_inverse=True)
    means = np.stack([x[labels == c].mean(0) for c in classes])  # [C, D]
    return replace(found, backbone=f"simulated_shift_{strength:g}_{found.backbone}",
                   features=(x + strength * (means[of_row] - x.mean(0))).astype(np.float32))


def moved(found: FeatureSet, share: float, n_neighbors: int = 20, seed: int = 0) -> FeatureSet:
    """Every image moved to the mean of its nearest images of one class: its own, or a wrong one.

    A share of the images, drawn by seed, goes to the class of its nearest wrong image. No class
    moves as a whole, and parts of a class stay parts. Raises ValueError where a class has no more
    than n_neighbors images.
    """
    x, labels = found.features, found.labels
    classes, of_row, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() <= n_neighbors:
        raise ValueError(f"The class {found.classes[classes[counts.argmin()]]} has {counts.min()} "
                         f"images; pass n_neighbors below that.")
    goal, nearest = np.empty((len(classes), *x.shape), np.float32), []  # [C, N, D], C x [N]
    for i in range(len(classes)):
        rows = np.flatnonzero(of_row == i)
        distances, found_rows = NearestNeighbors(n_neighbors=n_neighbors + 1).fit(
            x[rows]).kneighbors(x)
        own = (of_row == i)[:, None]  # of its own class the image itself is the first
        found_rows = np.where(own, found_rows[:, 1:], found_rows[:, :-1])
        goal[i] = x[rows][found_rows].mean(1)
        nearest.append(np.where(own[:, 0], np.inf, distances[:, 0]))
    wrong = np.random.default_rng(seed).random(len(x)) < share
    to = np.where(wrong, np.argmin(nearest, axis=0), of_row)
    return replace(found, backbone=f"simulated_moved_{share:g}_{found.backbone}",
                   features=goal[to, np.arange(len(x))])


def classes_found(labels: np.ndarray, clusters: np.ndarray) -> int:
    """How many classes are the largest one of some cluster; the others were merged into them."""
    table = confusion(labels, clusters)  # [classes, clusters]
    return len(np.unique(table.argmax(0)[table.any(0)]))


def read_rung(study, found: FeatureSet) -> dict:
    """K-means and heads of one rung under a study's settings, fitted and scored on all of it.

    Lists have one entry a seed: ACC in percent, classes found, the head's loss and clusters in use.
    consensus is the ACC of the heads' matched majority.
    agreement is label consistency@20 with the clusters of the head with the lowest loss in the
    place of labels (percent): what can be known without labels.
    """
    run = run_heads(study, found, found)
    neighbors = nearest_neighbors(found.features, 20)
    clusters = {"k-means": run.kmeans_clusters(found.features),
                "head": run.head_clusters(found.features)}  # [S, N] each
    acc = run.table.groupby("method")["acc"]
    agreement = 100 * label_consistency(neighbors, clusters["head"][run.best])[-1]
    voted = clustering_metrics(found.labels, consensus(clusters["head"], run.best))["acc"]
    return {"agreement": round(float(agreement), 2), "consensus": round(100 * voted, 3),
            "loss": run.curves["loss"][-1].round(4).tolist(),
            "n_used": [len(np.unique(c)) for c in clusters["head"]]} | {
        method: {"acc": acc.get_group(method).round(3).tolist(),
                 "classes_found": [classes_found(found.labels, c) for c in rows]}
        for method, rows in clusters.items()}


def consistency(found: FeatureSet) -> float:
    """Label consistency@20 in percent, by cosine: the axis of the ladder."""
    return round(100 * float(label_consistency(nearest_neighbors(found.features, 20),
                                               found.labels)[-1]), 2)
