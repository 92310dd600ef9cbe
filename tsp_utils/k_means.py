"""K-means, a run a seed: by scikit-learn on a CPU, by torch on another device."""

from dataclasses import dataclass

import joblib
import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus


@dataclass(frozen=True)
class KMeansRuns:
    """Independent K-means runs: centers [S, C, D], clusters [S, N], inertia [S], seeds."""

    centers: np.ndarray
    clusters: np.ndarray
    inertia: np.ndarray
    seeds: tuple[int, ...]


def kmeans(features: np.ndarray, n_clusters: int, seeds, n_init: int = 1,
           device: str = "cpu") -> KMeansRuns:
    """scikit-learn's K-means (k-means++ start, Lloyd), once a seed; features [N, D].

    On another device than the CPU the start is scikit-learn's and the iterations are torch's.
    Raises ValueError for fewer samples, or fewer distinct samples, than clusters.
    """
    if len(features) < n_clusters:
        raise ValueError(f"{len(features)} samples cannot make {n_clusters} clusters; pass at most "
                         f"{len(features)} as n_clusters, or more samples.")
    # Distinct rows are counted only up to the number needed.
    distinct: set[bytes] = set()
    rows = iter(np.ascontiguousarray(features))
    while len(distinct) < n_clusters and (row := next(rows, None)) is not None:
        distinct.add(row.tobytes())
    if len(distinct) < n_clusters:
        raise ValueError(f"The {len(features)} samples hold only {len(distinct)} distinct feature "
                         f"vectors, fewer than the {n_clusters} clusters asked for; remove "
                         f"duplicates or pass a smaller n_clusters.")
    if device != "cpu":
        return _kmeans_on(device, features, n_clusters, seeds, n_init)
    # One thread a run: two runs side by side end sooner than one run on two threads.
    work = features.size * n_init * len(seeds)
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        runs = joblib.Parallel(n_jobs=min(len(seeds), joblib.cpu_count()) if work > 1e7 else 1)(
            joblib.delayed(KMeans(n_clusters, n_init=n_init, random_state=seed).fit)(features)
            for seed in seeds)
    return KMeansRuns(np.stack([run.cluster_centers_ for run in runs]),
                      np.stack([run.labels_ for run in runs]).astype(np.int64),
                      np.array([run.inertia_ for run in runs]), tuple(seeds))


def _kmeans_on(device: str, features, n_clusters: int, seeds, n_init: int) -> KMeansRuns:
    x, found = torch.as_tensor(np.asarray(features, np.float32), device=device), []
    tolerance = 1e-4 * float(x.var(0, correction=0).mean())  # scikit-learn's
    for seed in seeds:
        state, runs = np.random.RandomState(seed), []
        for _ in range(n_init):
            centers, _ = kmeans_plusplus(features, n_clusters, random_state=state)
            runs.append(_lloyd(x, torch.as_tensor(centers, device=device), tolerance))
        found.append(min(runs, key=lambda run: run[2]))
    centers, clusters, inertia = (np.stack(part) for part in zip(*found, strict=True))
    return KMeansRuns(centers, clusters, inertia, tuple(seeds))


def _lloyd(x: torch.Tensor, centers: torch.Tensor, tolerance: float, max_iter: int = 300):
    """Lloyd's iterations from centers [C, D] -> centers, clusters [N], inertia, as numpy.

    A cluster that is left without samples takes the sample farthest from its centre. Whether the
    centres still move is read back at every tenth iteration: each time a GPU waits.
    """
    squares, stands = x.square().sum(1), torch.zeros((), dtype=torch.bool, device=x.device)
    for step in range(1, max_iter + 1):
        distances = centers.square().sum(1) - 2 * x @ centers.T  # [N, C], less ||x||^2
        nearest, clusters = distances.min(1)
        sizes = x.new_zeros(len(centers)).index_add_(0, clusters, torch.ones_like(nearest))
        moved = torch.zeros_like(centers).index_add_(0, clusters, x)
        moved /= sizes.clamp_min(1)[:, None]
        empty = sizes == 0  # the first of them takes the farthest sample, the next the next
        far = (nearest + squares).topk(len(centers)).indices[empty.cumsum(0).sub(1).clamp_min(0)]
        moved = torch.where(empty[:, None], x[far], moved)
        moved = torch.where(stands, centers, moved)
        stands = (moved - centers).square().sum() <= tolerance
        centers = moved
        if step % 10 == 0 and stands:
            break
    nearest, clusters = (centers.square().sum(1) - 2 * x @ centers.T).min(1)
    return (centers.cpu().numpy(), clusters.cpu().numpy(),
            float((nearest + squares).sum(dtype=torch.float64)))
