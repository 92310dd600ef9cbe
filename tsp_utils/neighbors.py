"""Nearest neighbours: exact search, how likely each is drawn (Eq. 4, others), label consistency."""

from dataclasses import dataclass
from numbers import Integral

import faiss
import numpy as np
import torch
from scipy.spatial.distance import cdist

from tsp_utils.scaling import check_finite

METRICS = ("cosine", "euclidean", "inner")
SAFE = 1e-12, 1e12  # largest entries whose squares add up well within float32
BLURRED = 1e-3  # of the squares: differences of which float32 keeps less than four digits


@dataclass(frozen=True)
class Neighbors:
    """The K nearest neighbours of each of N samples, nearest first, never the sample itself.

    indices int64 [N, K]; distances float32 [N, K], Euclidean between the vectors that were searched
    (unit vectors for the cosine metric), whatever the metric that ordered them; float64 where
    float32 cannot hold them.
    """

    indices: np.ndarray
    distances: np.ndarray
    metric: str

    def __post_init__(self):
        if self.indices.ndim != 2 or self.indices.shape != self.distances.shape:
            raise ValueError(f"Indices and distances of neighbours have the shapes "
                             f"{self.indices.shape} and {self.distances.shape}; pass two tables "
                             f"[N, K].")

    def first(self, k: int) -> "Neighbors":
        """The nearest k of the K. Raises ValueError for k below 1 or above K."""
        n_found = self.indices.shape[1]
        if not isinstance(k, Integral) or not 1 <= k <= n_found:
            raise ValueError(f"k is {k} and {n_found} neighbours were searched; pass a whole "
                             f"number from 1 to {n_found}.")
        return Neighbors(self.indices[:, :k], self.distances[:, :k], self.metric)


def nearest_neighbors(features: np.ndarray, k: int, metric: str = "cosine",
                      device: str = "cpu") -> Neighbors:
    """Exact search for the k nearest neighbours of every sample among the others.

    features [N, D] of any scale; metric cosine, euclidean or inner (the inner product of Figs 1 and
    2). The sample itself is left out by its index, so duplicates stay. faiss searches on the CPU,
    torch on another device. Raises ValueError for k < 3 (Eq. 4 needs the third neighbour), k >= N,
    an unknown metric, NaN or infinite features.
    """
    features = _checked(features, metric)
    if not isinstance(k, Integral) or k < 3:
        raise ValueError(f"n_neighbors is {k}, and Eq. 4 takes its width from the third nearest "
                         f"neighbour; pass a whole number of at least 3.")
    return Neighbors(*_nearest(features, features, k, metric, True, device), metric)


def neighbor_weights(neighbors: Neighbors) -> np.ndarray:
    """Eq. 4: P(x_j | x_i), Gaussian with sigma_i half the distance to the third neighbour.

    Returns float32 [N, K], rows that sum to 1. Where sigma_i = 0 (three duplicates or more) the
    weights are uniform over the neighbours at distance 0: the limit of the Gaussian. Raises
    ValueError for K < 3.
    """
    if neighbors.distances.shape[1] < 3:
        raise ValueError(f"Each sample has {neighbors.distances.shape[1]} neighbours here, and "
                         f"Eq. 4 takes its width from the third; keep 3 or more.")
    d = neighbors.distances.astype(np.float64)
    sigma = d[:, 2:3] / 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_weights = np.where(sigma > 0, -np.square(d / sigma) / 2, np.where(d == 0, 0, -np.inf))
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def uniform_weights(neighbors: Neighbors) -> np.ndarray:
    """1 / K for each neighbour, float32 [N, K]: what SCAN and most others draw by."""
    n_neighbors = neighbors.indices.shape[1]
    return np.full(neighbors.indices.shape, 1 / n_neighbors, np.float32)


# How a neighbour is drawn: another P(.|i) is a row here, and a profile may name it.
WEIGHTINGS = {"gaussian": neighbor_weights, "uniform": uniform_weights}


def neighbor_perplexity(weights: np.ndarray) -> np.ndarray:
    """exp of the entropy of each row: how many neighbours it effectively weighs. [N, K] -> [N]."""
    p = weights.astype(np.float64)
    return np.exp(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1))


def label_consistency(neighbors: Neighbors, labels: np.ndarray) -> np.ndarray:
    """Share of the nearest k neighbours with the sample's own label, mean over samples (Fig. 1).

    A read-out: labels [N]. Returns [K], entry k-1 for the k nearest, fractions in [0, 1]. Raises
    ValueError for more or fewer labels than samples.
    """
    labels = _checked_labels(labels, len(neighbors.indices))
    agrees = labels[neighbors.indices] == labels[:, None]  # [N, K]
    return agrees.cumsum(1).mean(0) / np.arange(1, agrees.shape[1] + 1)


def knn_accuracy(train_features, train_labels, test_features=None, test_labels=None,
                 k: int = 20, temperature: float = 0.07) -> float:
    """Weighted k-nearest-neighbour accuracy as in DINO: cosine, votes exp(cos / temperature).

    features [N, D], labels [N]; without test features it is leave-one-out on the train features. A
    read-out, in [0, 1]. Raises ValueError for k < 1, more or fewer labels than samples, NaN or
    infinite features. Source: Caron et al. (2021), Sec. 4.1 and eval_knn.py.
    """
    if (test_features is None) != (test_labels is None):
        raise ValueError("Test features and test labels belong together, and one of them is "
                         "missing; pass both, or neither to leave one out of the train features.")
    train = test = _checked(train_features, "cosine")
    train_labels = query_labels = _checked_labels(train_labels, len(train))
    leave_one_out = test_features is None
    if not leave_one_out:
        test = _checked(test_features, "cosine")
        query_labels = _checked_labels(test_labels, len(test))
        k = min(k, len(train))
    found, distances = _nearest(test, train, k, "cosine", others=leave_one_out)  # [N, k]
    has_length = train.any(1)[found] & test.any(1)[:, None]  # type: ignore[index]
    cosines = np.where(has_length, 1 - distances.astype(np.float64) ** 2 / 2, 0)
    classes, train_class = np.unique(train_labels, return_inverse=True)
    votes = np.zeros((len(test), len(classes)))
    rows = np.arange(len(test))
    for j in range(k):
        np.add.at(votes, (rows, train_class[found[:, j]]), np.exp(cosines[:, j] / temperature))
    return float((classes[votes.argmax(1)] == query_labels).mean())


def _checked(features, metric: str) -> np.ndarray:
    """Features [N, D] that the metric can search, float64 where float32 would round them."""
    if metric not in METRICS:
        raise ValueError(f"The metric {metric!r} is not known; pass one of {', '.join(METRICS)}.")
    features = np.asarray(features)
    if features.dtype != np.float32:
        fits = np.can_cast(features.dtype, np.float32)
        features = features.astype(np.float32 if fits else np.float64)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"Features are a table [N, D], and these have the shape {features.shape}.")
    check_finite(features)
    return features


def _checked_labels(labels, n: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"There are {n} samples, and labels of the shape {labels.shape}; pass one "
                         f"label a sample.")
    return labels


def _nearest(queries, database, k: int, metric: str, others: bool, device: str = "cpu"):
    """The k nearest of the database, nearest first: indices int64 [Q, k], distances [Q, k].

    `others`: queries and database are the same, and none is its own neighbour. The search is in
    float32; the rows that it cannot tell apart are searched again in float64.
    """
    n, most = len(database), len(database) - others
    if queries.shape[1] != database.shape[1]:
        raise ValueError(f"Train features have {database.shape[1]} columns and test features "
                         f"{queries.shape[1]}; pass those of one backbone.")
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k is {k}; pass a whole number of at least 1.")
    if k > most:
        raise ValueError(f"n_neighbors is {k} and there are only {n} samples, each with {most} "
                         f"others; pass at most {most}.")
    y, exponent = _searched(database, metric, np.float32)
    x = y if others else _searched(queries, metric, np.float32)[0]
    scores, found = (_search(y, x, k + others, metric) if device == "cpu" else
                     _search_on(device, y, x, k + others, metric))
    if others:
        is_self = found == np.arange(n)[:, None]
        # A stable sort by "is itself" moves the sample to the end, where it is cut off; where more
        # than K duplicates crowded it out of its own list, the farthest entry is cut instead.
        found = np.take_along_axis(found, is_self.argsort(1, kind="stable")[:, :k], 1)
    distances = _distances(x, y, found)
    rows = _blurred(x, scores, distances, metric)
    if len(rows):
        distances = distances.astype(np.float64)
        found[rows], distances[rows] = _search_again(queries, database, rows, k, metric, others)
    return found, _scaled_back(distances, exponent)


def _searched(features, metric: str, dtype) -> tuple[np.ndarray, int]:
    """The vectors that a metric searches, of unit length for the cosine, as float32 or float64.

    Where squares would not fit, they are divided by a power of two, which rounds nothing: one a row
    for the cosine, else one for all, whose exponent is returned.
    """
    largest = np.maximum(features.max(1), -features.min(1))  # [N]
    if metric != "cosine":
        largest = largest.max(keepdims=True)
    safe = (largest > SAFE[0]) & (largest < SAFE[1])
    exponents = np.where(safe, 0, np.frexp(largest)[1])
    if exponents.any():
        wider = np.result_type(features, dtype)
        features = np.ldexp(features, -exponents[:, None], dtype=wider)
    vectors = np.ascontiguousarray(features, dtype)
    if metric != "cosine":
        return vectors, int(exponents[0])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1), 0


def _search(database, queries, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """faiss's exact flat index -> similarities or squared distances [Q, k], indices [Q, k]."""
    dim = database.shape[1]
    index = faiss.IndexFlatL2(dim) if metric == "euclidean" else faiss.IndexFlatIP(dim)
    index.add(database)
    return index.search(queries, k)


def _search_on(device: str, database, queries, k: int, metric: str):
    """`_search` by matrix products in blocks of 256 MB; similarities are x.y, less ||y||^2 / 2."""
    y = torch.as_tensor(database, device=device)
    offset = -y.square().sum(1) / 2 if metric == "euclidean" else y.new_zeros(1)
    x = y if queries is database else torch.as_tensor(queries, device=device)
    parts = [torch.addmm(offset, rows, y.T).topk(k)  # nearest first
             for rows in x.split(max(1, 2**26 // len(y)))]
    return tuple(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))


def _distances(queries, database, indices: np.ndarray, rows: int = 16) -> np.ndarray:
    """||x_i - y_j|| from the differences themselves, so that duplicates are at exactly 0."""
    distances = np.empty(indices.shape, np.float32)
    # Few rows at a time and `take`, so that the gaps stay in the cache: 4 % of the search's time.
    for start in range(0, len(queries), rows):
        stop = start + rows
        gaps = database.take(indices[start:stop], 0)  # [rows, K, D]
        gaps -= queries[start:stop, None]
        np.sqrt(np.einsum("nkd,nkd->nk", gaps, gaps), out=distances[start:stop])
    return distances


def _blurred(queries, scores, distances, metric: str) -> np.ndarray:
    """Rows whose neighbours differ by too little, beside their lengths, for faiss's float32."""
    if metric == "inner":
        sizes = np.abs(scores)  # [Q, k + 1]
        close = scores.max(1) - scores.min(1) <= BLURRED * sizes.max(1)
        return np.flatnonzero(close | (sizes.min(1) < 1e-30))
    lengths = np.einsum("nd,nd->n", queries, queries)  # squared, as faiss takes distances apart
    return np.flatnonzero(distances.min(1) ** 2 <= np.maximum(BLURRED * lengths, 1e-30))


def _search_again(queries, database, rows, k: int, metric: str, others: bool):
    """What `_nearest` finds for some rows, by brute force in float64."""
    y, _ = _searched(database, metric, np.float64)
    found, distances = np.empty((len(rows), k), np.int64), np.empty((len(rows), k))
    step = max(1, 2**22 // len(y))  # 32 MB of distances at a time
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        x = y[rows[part]] if others else _searched(queries[rows[part]], metric, np.float64)[0]
        away = -x @ y.T if metric == "inner" else cdist(x, y)  # [step, N]
        if others:
            away[np.arange(len(x)), rows[part]] = np.inf
        found[part] = away.argsort(1, kind="stable")[:, :k]
        distances[part] = (np.linalg.norm(y[found[part]] - x[:, None], axis=2) if metric == "inner"
                           else np.take_along_axis(away, found[part], 1))
    return found, distances


def _scaled_back(distances: np.ndarray, exponent: int) -> np.ndarray:
    """Distances times 2 ** exponent: float32 where it holds them all, else float64."""
    with np.errstate(over="ignore", under="ignore"):
        wide = np.ldexp(distances, exponent, dtype=np.float64)
        short = wide.astype(np.float32)
    if not np.isfinite(wide).all():
        raise ValueError("Some distances are larger than float64 can hold; divide the features by "
                         "a constant first.")
    fits = np.isfinite(short) & ((short >= np.finfo(np.float32).tiny) | (wide == 0))
    return short if fits.all() else wide
