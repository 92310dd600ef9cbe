"""Clusters against classes, after the fact: matching, ACC, NMI, ARI, confusion."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score


def confusion(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Counts [n_classes, n_clusters]: how many samples of each class lie in each cluster.

    labels and clusters int [N], from 0. A row is one of the distinct labels, in their order; a
    column is a cluster's number, up to the largest that occurs. Raises ValueError for unequal
    lengths, negative entries and what is no whole number.
    """
    labels, clusters = _checked(labels, clusters)
    classes, rows = np.unique(labels, return_inverse=True)
    table = np.zeros((len(classes), clusters.max() + 1), np.int64)
    np.add.at(table, (rows, clusters), 1)
    return table


def match_clusters(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The best one-to-one matching of clusters to classes (Hungarian algorithm).

    Returns int64 [n_clusters]: the label of each cluster, by its number; -1 for clusters left over
    when there are more of them than classes (distinct labels). Raises what `confusion` raises.
    """
    table = confusion(labels, clusters)
    rows, matched = linear_sum_assignment(table, maximize=True)
    class_of = np.full(table.shape[1], -1)
    class_of[matched] = np.unique(labels)[rows]
    return class_of


def clustering_metrics(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ACC (after `match_clusters`), NMI (arithmetic mean) and ARI, fractions (ARI in [-0.5, 1])."""
    labels, clusters = _checked(labels, clusters)
    return {
        "acc": float((match_clusters(labels, clusters)[clusters] == labels).mean()),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


def _checked(labels, clusters) -> tuple[np.ndarray, np.ndarray]:
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if labels.shape != clusters.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels and clusters must be two equally long lists, and these have the "
                         f"shapes {labels.shape} and {clusters.shape}.")
    if labels.dtype.kind not in "iu" or clusters.dtype.kind not in "iu":
        raise ValueError(f"labels and clusters are whole numbers, and these are of the types "
                         f"{labels.dtype} and {clusters.dtype}; number the names, for example by "
                         f"np.unique(names, return_inverse=True).")
    if labels.min() < 0 or clusters.min() < 0:
        raise ValueError("labels and clusters are numbered from 0, and a negative number is among "
                         "them; leave unlabelled samples out first.")
    return labels, clusters
