"""Maps: images placed in two dimensions by UMAP, so that like features lie together."""

import warnings
from contextlib import contextmanager, suppress

import numpy as np
from threadpoolctl import threadpool_limits

from tsp_utils import cache
from tsp_utils.neighbors import nearest_neighbors


def umap_points(features: np.ndarray, n_points: int, seed: int = 0):
    """UMAP (cosine) of n_points features chosen by seed: indices [n] and coordinates [n, 2]."""
    n_points = min(n_points, len(features))
    chosen = np.sort(np.random.default_rng(seed).choice(len(features), n_points, replace=False))
    vectors = np.asarray(features[chosen])
    found = cache.arrays("maps", f"umap_{len(vectors)}", [vectors, seed], [_umap],
                         lambda: {"points": _umap(vectors, seed)})
    return chosen, found["points"]


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    with _threads_kept(), warnings.catch_warnings():
        from umap import UMAP, layouts, umap_  # takes seconds

        for compiled in [*vars(umap_).values(), *vars(layouts).values()]:
            with suppress(AttributeError, RuntimeError):  # not compiled; no folder to write in
                compiled.enable_caching()  # else each process compiles for ten seconds
        # "n_jobs overridden by random_state" is what we ask for, and no new points are mapped.
        warnings.simplefilter("ignore")
        return UMAP(metric="cosine", random_state=seed,
                    precomputed_knn=_umap_neighbors(vectors)).fit_transform(vectors)


def _umap_neighbors(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each of N points and its 14 neighbours, int32 [N, 15], and their cosine distances [N, 15]."""
    # UMAP's own search of few points is a loop in Python: three seconds for 2,000.
    found = nearest_neighbors(features, min(14, len(features) - 1))
    itself = np.arange(len(features))[:, None]
    return (np.hstack([itself, found.indices]).astype(np.int32),
            np.hstack([0 * itself, found.distances**2 / 2]).astype(np.float32))  # of unit vectors


@contextmanager
def _threads_kept():
    """Put back OpenMP's and numba's numbers of threads: numba sets both to the number of cores,
    torch's, too, and what that trains next waits for its threads on a busy machine."""
    with threadpool_limits(limits=None):  # sets none, and puts back what it found
        import numba

        before = numba.get_num_threads()
        try:
            yield
        finally:
            numba.set_num_threads(before)
