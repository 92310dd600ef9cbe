"""Nearest neighbours of however many samples: exact, or nearly all by faiss's inverted lists."""

import logging
import math
from numbers import Integral

import faiss
import numpy as np

from tsp_utils import neighbors as exact
from tsp_utils.neighbors import Neighbors, nearest_neighbors

SEARCHES = ("auto", "exact", "approximate")
EXACT_UP_TO = 200_000  # samples: minutes of two cores, and four times as long for twice as many
FEWEST = 25_600  # samples: K-means wants 40 of them for each of its 4 sqrt(N) lists
WANTED, ASKED = 0.99, 500  # the share of the true neighbours, and the samples it is measured on
logger = logging.getLogger(__name__)


def find_neighbors(features: np.ndarray, k: int, metric: str = "cosine", device: str = "cpu",
                   search: str = "auto") -> Neighbors:
    """`nearest_neighbors`, or on a CPU an approximate search that ends for a million samples.

    features [N, D]. search: "exact", "approximate", or "auto": exact up to 200,000 samples and on
    another device. Approximately: K-means cuts the samples into 4 sqrt(N) lists, and each looks
    into so many of the nearest that 99 % of the exact neighbours of 500 samples are found (which is
    logged), at exact distances. Exact, too, where that takes an eighth of the lists (as inner
    products do) and below 25,600 samples. Raises what `nearest_neighbors` raises.
    """
    if search not in SEARCHES:
        raise ValueError(f"neighbor_search is {search!r}; pass one of {', '.join(SEARCHES)}.")
    many = device == "cpu" and len(features) > EXACT_UP_TO
    asked = search == "approximate" or (search == "auto" and many)
    return (asked and _by_lists(features, k, metric)) or nearest_neighbors(features, k, metric,
                                                                           device)


def _by_lists(features: np.ndarray, k: int, metric: str) -> Neighbors | None:
    """The approximate search; None where the exact one is quicker, or refuses."""
    n = len(features)
    if metric not in exact.METRICS or not isinstance(k, Integral) or not 3 <= k < n or n < FEWEST:
        return None
    x, exponent = exact._searched(exact._checked(features, metric), metric, np.float32)
    kind = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    rng, n_lists = np.random.default_rng(0), int(4 * math.sqrt(n))
    index = faiss.IndexIVFFlat(faiss.IndexFlat(dim := x.shape[1], kind), dim, n_lists, kind)
    index.train(x[np.sort(rng.choice(n, 40 * n_lists, replace=False))])
    index.add(x)
    some = x[np.sort(rng.choice(n, ASKED, replace=False))]
    last, recall, index.nprobe = faiss.knn(some, x, k + 1, kind)[0][:, -1:], 0.0, 4
    slack = 1e-5 * np.abs(last)  # of those at one distance any will do
    while recall < WANTED:
        index.nprobe *= 2
        if index.nprobe > n_lists / 8:
            logger.info("Lists serve these %d samples too little: the search is exact.", n)
            return None
        scores = index.search(some, k + 1)[0]
        recall = float((scores <= last + slack if metric == "euclidean"
                        else scores >= last - slack).mean())
    logger.info("Neighbours of %d samples, %d of %d lists each: %.1f %% of the exact ones.", n,
                index.nprobe, n_lists, 100 * recall)
    indices, distances = np.empty((n, k), np.int64), np.empty((n, k), np.float32)
    for at in range(0, n, 4096):
        rows = np.arange(at, min(at + 4096, n))
        found = index.search(x[rows], k + 1)[1]
        if len(short := np.flatnonzero(found.min(1) < 0)):  # their lists hold too few
            found[short] = faiss.knn(x[rows[short]], x, k + 1, kind)[1]
        is_self = found == rows[:, None]  # cut off, or the farthest, if duplicates crowd it out
        indices[rows] = np.take_along_axis(found, is_self.argsort(1, kind="stable")[:, :k], 1)
        distances[rows] = exact._distances(x[rows], x, indices[rows])
    return Neighbors(indices, exact._scaled_back(distances, exponent), metric)
