"""Nearest neighbours in the latent space: exact search, Eq. 4's weights, label consistency."""

from dataclasses import dataclass

import faiss
import numpy as np

METRICS = ("cosine", "euclidean", "inner")


@dataclass(frozen=True)
class Neighbors:
    """The K nearest neighbours of each of N samples, nearest first, never the sample itself.

    indices int64 [N, K]; distances float32 [N, K], Euclidean between the vectors that were searched
    (unit vectors for the cosine metric), whatever the metric that ordered them.
    """

    indices: np.ndarray
    distances: np.ndarray
    metric: str

    def __post_init__(self):
        assert self.indices.shape == self.distances.shape and self.indices.ndim == 2

    def first(self, k: int) -> "Neighbors":
        """The nearest k of the K."""
        return Neighbors(self.indices[:, :k], self.distances[:, :k], self.metric)


def nearest_neighbors(features: np.ndarray, k: int, metric: str = "cosine") -> Neighbors:
    """Exact search for the k nearest neighbours of every sample among the others.

    features [N, D]; metric cosine, euclidean or inner (the inner product of Figs 1 and 2). The
    sample itself is left out by its index, so duplicates stay. Raises ValueError for k < 3 (Eq. 4
    needs the third neighbour), k >= N, an unknown metric, NaN or infinite features.
    """
    vectors = _searched(features, metric)
    n = len(vectors)
    if k < 3:
        raise ValueError(f"n_neighbors is {k}, and Eq. 4 takes its width from the third nearest "
                         f"neighbour; pass 3 or more.")
    if k >= n:
        raise ValueError(f"n_neighbors is {k} and there are only {n} samples, each with {n - 1} "
                         f"others; pass at most {n - 1}.")
    _, found = _search(vectors, vectors, k + 1, metric)  # [N, K+1]
    is_self = found == np.arange(n)[:, None]
    # A stable sort by "is itself" moves the sample to the end, where it is cut off; where more
    # than K duplicates crowded it out of its own list, the farthest entry is cut instead.
    indices = np.take_along_axis(found, is_self.argsort(1, kind="stable")[:, :k], 1)
    return Neighbors(indices, _distances(vectors, indices), metric)


def neighbor_weights(neighbors: Neighbors) -> np.ndarray:
    """Eq. 4: P(x_j | x_i), Gaussian with sigma_i half the distance to the third neighbour.

    Returns float32 [N, K], rows that sum to 1. Where sigma_i = 0 (three duplicates or more) the
    weights are uniform over the neighbours at distance 0: the limit of the Gaussian.
    """
    d = neighbors.distances.astype(np.float64)
    sigma = d[:, 2:3] / 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_weights = np.where(sigma > 0, -np.square(d / sigma) / 2, np.where(d == 0, 0, -np.inf))
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def neighbor_perplexity(weights: np.ndarray) -> np.ndarray:
    """exp of the entropy of each row: how many neighbours it effectively weighs. [N, K] -> [N]."""
    p = weights.astype(np.float64)
    return np.exp(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1))


def label_consistency(neighbors: Neighbors, labels: np.ndarray) -> np.ndarray:
    """Share of the nearest k neighbours with the sample's own label, mean over samples (Fig. 1).

    A read-out: labels int64 [N]. Returns [K], entry k-1 for the k nearest, fractions in [0, 1].
    """
    agrees = labels[neighbors.indices] == np.asarray(labels)[:, None]  # [N, K]
    return agrees.cumsum(1).mean(0) / np.arange(1, agrees.shape[1] + 1)


def knn_accuracy(train_features, train_labels, test_features=None, test_labels=None,
                 k: int = 20, temperature: float = 0.07) -> float:
    """Weighted k-nearest-neighbour accuracy as in DINO: cosine, votes exp(cos / temperature).

    features [N, D], labels int64 [N]; without test features it is leave-one-out on the train
    features. A read-out, in [0, 1]. Source: Caron et al. (2021), Sec. 4.1 and eval_knn.py.
    """
    train = _searched(train_features, "cosine")
    train_labels = np.asarray(train_labels)
    if test_features is None:
        found = nearest_neighbors(train_features, k).indices  # [N, k]
        test, test_labels = train, train_labels
        cosines = 1 - _distances(train, found).astype(np.float64) ** 2 / 2
    else:
        test = _searched(test_features, "cosine")
        cosines, found = _search(train, test, min(k, len(train)), "cosine")
    votes = np.zeros((len(test), int(train_labels.max()) + 1))
    rows = np.arange(len(test))
    for j in range(found.shape[1]):
        np.add.at(votes, (rows, train_labels[found[:, j]]), np.exp(cosines[:, j] / temperature))
    return float((votes.argmax(1) == np.asarray(test_labels)).mean())


def _searched(features, metric: str) -> np.ndarray:
    """The vectors that a metric searches: checked, float32, of unit length for the cosine."""
    if metric not in METRICS:
        raise ValueError(f"The metric {metric!r} is not known; pass one of {', '.join(METRICS)}.")
    vectors = np.ascontiguousarray(features, dtype=np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"Features are a table [N, D], and these have the shape {vectors.shape}.")
    check_finite(vectors)
    if metric != "cosine":
        return vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def check_finite(features: np.ndarray) -> None:
    """Raise ValueError naming the first row with a NaN or an infinity."""
    finite = np.isfinite(features.sum(1, dtype=np.float64))  # one pass, no [N, D] mask
    if not finite.all():
        raise ValueError(f"{(~finite).sum()} of {len(features)} feature vectors hold NaN or "
                         f"infinite values, the first in row {int((~finite).argmax())}; remove "
                         f"these rows or extract them again in float32.")


def _search(database, queries, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """faiss's exact flat index -> similarities or squared distances [Q, k], indices [Q, k]."""
    dim = database.shape[1]
    index = faiss.IndexFlatL2(dim) if metric == "euclidean" else faiss.IndexFlatIP(dim)
    index.add(database)
    return index.search(queries, k)


def _distances(vectors: np.ndarray, indices: np.ndarray, rows: int = 16) -> np.ndarray:
    """||x_i - x_j|| from the differences themselves, so that duplicates are at exactly 0."""
    distances = np.empty(indices.shape, np.float32)
    # Few rows at a time and `take`, so that the gaps stay in the cache: 4 % of the search's time.
    for start in range(0, len(vectors), rows):
        stop = start + rows
        gaps = vectors.take(indices[start:stop], 0)  # [rows, K, D]
        gaps -= vectors[start:stop, None]
        np.sqrt(np.einsum("nkd,nkd->nk", gaps, gaps), out=distances[start:stop])
    return distances
