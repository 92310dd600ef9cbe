"""What a frozen network is worth on a target, as one record: neighbours, K-means, ten heads."""

from dataclasses import replace

import numpy as np

from tsp_utils.neighbors import knn_accuracy, label_consistency, nearest_neighbors
from tsp_utils.study.feature_sets import FeatureSet
from tsp_utils.study.profile import load_study
from tsp_utils.study.training import run_heads

CONSISTENCY_AT = (1, 5, 20)  # neighbours
N_DRAWS = 100  # of a small pool from a large one


def balanced_rows(labels: np.ndarray, seed: int, per_class: int = 50) -> np.ndarray:
    """Rows of a pool with equally many images a class, drawn by seed; int64 [classes x 50]."""
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    return np.concatenate([rng.choice(rows, min(per_class, len(rows)), replace=False)
                           for rows in classes])


def small_pool_consistency(found: FeatureSet, k: int = 20) -> np.ndarray:
    """Label consistency@k in percent within pools of 50 images a class, one a draw: [draws].

    C5 compares pools of one size. A set that is such a pool itself, as the source's 500 images, is
    read once: [1].
    """
    rows = [balanced_rows(found.labels, seed) for seed in range(N_DRAWS)]
    rows = rows[:1] if len(rows[0]) == len(found.labels) else rows
    return np.array([100 * label_consistency(nearest_neighbors(found.features[r], k),
                                             found.labels[r])[-1] for r in rows])


def read_out(found: FeatureSet, n_seeds: int = 10) -> dict:
    """Label consistency, leave-one-out kNN, K-means and heads of one feature set, in percent.

    Protocol `all` on the images given, settings of `offline`; acc, nmi and ari are lists, one entry
    a seed. Labels score and do nothing else.
    """
    study = replace(load_study("offline"), profile="pretrain", n_seeds=n_seeds)
    consistency = label_consistency(nearest_neighbors(found.features, max(CONSISTENCY_AT)),
                                    found.labels)
    table = run_heads(study, found, found).table
    return {
        "dataset": found.dataset, "split": found.split, "n": len(found.labels), "protocol": "all",
        "consistency": {str(k): round(100 * float(consistency[k - 1]), 3) for k in CONSISTENCY_AT},
        "knn_leave_one_out": round(100 * knn_accuracy(found.features, found.labels), 3),
    } | {method: {name: rows[name].round(3).tolist() for name in ("acc", "nmi", "ari")}
         for method, rows in table.groupby("method", sort=False)}
