"""The clustering head: one linear layer and a softmax, many seeds trained at once."""

import logging
import math
import time
import warnings
from dataclasses import dataclass, field

import joblib
import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import nn
from tqdm.auto import tqdm

from tsp_utils.losses import log_probabilities, loss_terms
from tsp_utils.neighbors import Neighbors, check_finite, neighbor_weights

logger = logging.getLogger(__name__)


def scale_features(features: np.ndarray, scaling: str = "mean-norm") -> np.ndarray:
    """Features [N, D] as K-means, neighbours and heads receive them, float32 [N, D].

    "mean-norm" divides all by ONE scalar so that the mean norm is sqrt(D): the geometry is the
    backbone's, and a learning rate means the same for every backbone. "raw" leaves them, "l2" makes
    each vector sqrt(D) long. Raises ValueError for all-zero features and unknown scalings.
    """
    features = np.asarray(features, np.float32)
    check_finite(features)
    norms = np.linalg.norm(features, axis=1)
    if norms.max() == 0:
        raise ValueError("All features are 0, so there is nothing to cluster; check the images.")
    target = math.sqrt(features.shape[1])
    if scaling == "mean-norm":
        return features * np.float32(target / norms.mean())
    if scaling == "l2":
        return features * (target / np.maximum(norms, 1e-12))[:, None].astype(np.float32)
    if scaling == "raw":
        return features
    raise ValueError(f"The scaling {scaling!r} is not known; pass mean-norm, raw or l2.")


@dataclass(frozen=True)
class KMeansRuns:
    """Independent K-means runs: centers [S, C, D], clusters [S, N], inertia [S], seeds."""

    centers: np.ndarray
    clusters: np.ndarray
    inertia: np.ndarray
    seeds: tuple[int, ...]


def kmeans(features: np.ndarray, n_clusters: int, seeds, n_init: int = 1) -> KMeansRuns:
    """scikit-learn's K-means (k-means++ start, Lloyd), once a seed; features [N, D].

    Raises ValueError for fewer samples, or fewer distinct samples, than clusters.
    """
    if len(features) < n_clusters:
        raise ValueError(f"{len(features)} samples cannot make {n_clusters} clusters; pass at most "
                         f"{len(features)} as n_clusters, or more samples.")
    # Distinct rows are counted only up to the number needed.
    distinct, rows = set(), iter(np.ascontiguousarray(features))
    while len(distinct) < n_clusters and (row := next(rows, None)) is not None:
        distinct.add(row.tobytes())
    if len(distinct) < n_clusters:
        raise ValueError(f"The {len(features)} samples hold only {len(distinct)} distinct feature "
                         f"vectors, fewer than the {n_clusters} clusters asked for; remove "
                         f"duplicates or pass a smaller n_clusters.")
    # One thread a run: two runs side by side end sooner than one run on two threads.
    work = features.size * n_init * len(seeds)
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        runs = joblib.Parallel(n_jobs=min(len(seeds), joblib.cpu_count()) if work > 1e7 else 1)(
            joblib.delayed(KMeans(n_clusters, n_init=n_init, random_state=seed).fit)(features)
            for seed in seeds)
    return KMeansRuns(np.stack([run.cluster_centers_ for run in runs]),
                      np.stack([run.labels_ for run in runs]).astype(np.int64),
                      np.array([run.inertia_ for run in runs]), tuple(seeds))


class LinearHeads(nn.Module):
    """S independent heads p = softmax(W x + b): weight [S, C, D], bias [S, C] (starting at 0)."""

    def __init__(self, weight, seeds):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32).clone())
        self.bias = nn.Parameter(torch.zeros(self.weight.shape[:2]))
        self.seeds = tuple(seeds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, D] for all heads, or [S, B, D] one batch a head -> logits [S, N or B, C]."""
        if x.ndim == 2:
            x = x.expand(len(self.weight), *x.shape)
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))

    @torch.inference_mode()
    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """Cluster probabilities float32 [S, N, C] of features [N, D]."""
        x = torch.as_tensor(np.asarray(features, np.float32), device=self.weight.device)
        return torch.cat([self(rows).softmax(-1) for rows in x.split(8192)], 1).cpu().numpy()

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The most probable cluster, int64 [S, N]."""
        return self.predict_proba(features).argmax(-1)


def init_heads(features, n_clusters: int, seeds, init: str = "k-means",
               row_norm: float | None = None, centers: np.ndarray | None = None) -> LinearHeads:
    """Appendix A: row c of W is C_c / (||C_c|| sqrt(D)), C_c the centres of K-means, a run a seed.

    features [N, D]; init "random" draws the rows' directions uniformly instead (the paper leaves
    the law open); row_norm replaces 1 / sqrt(D) (torch's default layer has about 1 / sqrt(3)).
    `centers` [S, C, D] saves running K-means again.
    """
    dim = features.shape[1]
    if init == "k-means":
        rows = kmeans(features, n_clusters, seeds).centers if centers is None else centers
    elif init == "random":
        rows = np.stack([np.random.default_rng([seed, 1]).standard_normal((n_clusters, dim))
                         for seed in seeds])
    else:
        raise ValueError(f"The initialisation {init!r} is not known; pass k-means or random.")
    norms = np.linalg.norm(rows, axis=2, keepdims=True)  # [S, C, 1]
    row_norm = 1 / math.sqrt(dim) if row_norm is None else row_norm
    return LinearHeads(rows / np.maximum(norms, 1e-12) * row_norm, seeds)


class MLPHeads(LinearHeads):
    """S heads with one hidden layer of H units: hidden [S, H, D] and [S, H], then a linear head.

    What Sec. 3.2 advises against (claim C10). Starts from torch's default law, a seed a head:
    Appendix A has no start for several layers.
    """

    def __init__(self, dim: int, n_clusters: int, seeds, n_hidden: int = 128):
        rngs = [np.random.default_rng([seed, 4]) for seed in seeds]
        super().__init__(np.stack([rng.uniform(-1, 1, (n_clusters, n_hidden)) for rng in rngs])
                         / math.sqrt(n_hidden), seeds)
        self.hidden = LinearHeads(np.stack([rng.uniform(-1, 1, (n_hidden, dim)) for rng in rngs])
                                  / math.sqrt(dim), seeds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.hidden(x).relu())


@dataclass
class History:
    """Training curves, each a list over epochs of float [S] (means over the epoch's batches).

    entropy is that of the mean prediction over the whole epoch; n_nonempty counts clusters that are
    somebody's most probable one; largest_share is the largest cluster's share of the samples.
    """

    loss: list = field(default_factory=list)
    consistency: list = field(default_factory=list)
    entropy: list = field(default_factory=list)
    n_nonempty: list = field(default_factory=list)
    largest_share: list = field(default_factory=list)
    seconds: float = 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        """Every curve as [E, S]."""
        return {name: np.stack(curve) for name, curve in vars(self).items() if name != "seconds"}


def train_heads(heads: LinearHeads, features: np.ndarray, neighbors: Neighbors, *,
                weights: np.ndarray | None = None, entropy_weight: float = 3.0,
                max_epochs: int = 100, min_steps: int = 2000, batch_size: int = 256,
                learning_rate: float = 1e-4, device: str = "cpu", progress: bool = True,
                callback=None) -> History:
    """Train S heads at once on Eq. 5 with Adam, in place; no label is read.

    features float32 [N, D] (as from `scale_features`), neighbors of the same N samples, weights
    [N, K] (Eq. 4 by default). Each head has its own shuffles and draws one neighbour j ~ P(.|i) per
    sample and epoch, from its own seed: it is the same head alone or among others. Trains
    max(max_epochs epochs, min_steps steps) of batches of batch_size; what is left of an epoch's
    shuffle is dropped. `callback(epoch, heads)` is called after each epoch, for read-outs.
    Settings: Sec. 4.2 of the paper (lambda 3, Adam 1e-4, batch 256, 100 epochs).
    """
    n, n_seeds, n_clusters = len(features), len(heads.seeds), heads.weight.shape[1]
    if neighbors.indices.shape[0] != n:
        raise ValueError(f"There are {n} feature vectors and neighbours of "
                         f"{neighbors.indices.shape[0]}; search the neighbours of these features.")
    batch_size = min(batch_size, n)
    n_steps = n // batch_size
    n_epochs = max(max_epochs, math.ceil(min_steps / n_steps))
    cumulative = (neighbor_weights(neighbors) if weights is None else weights).cumsum(1)  # [N, K]
    draws = [np.random.default_rng([seed, 2]) for seed in heads.seeds]
    x = torch.as_tensor(np.ascontiguousarray(features, np.float32), device=device)
    heads.to(device)
    batch = x.new_empty(n_seeds * 2 * batch_size, x.shape[1])  # fresh memory a step costs far more
    adam = torch.optim.Adam(heads.parameters(), lr=learning_rate)
    history, start = History(), time.perf_counter()
    for epoch in tqdm(range(n_epochs), "training heads", disable=not progress, leave=False):
        pairs = np.stack([draw_pairs(rng, neighbors.indices, cumulative, n_steps * batch_size)
                          for rng in draws])  # [S, 2, T * B]
        pairs = torch.from_numpy(pairs).to(device).view(n_seeds, 2, n_steps, batch_size)
        terms = torch.empty(n_steps, 2, n_seeds)
        mean_p = torch.zeros(n_seeds, n_clusters, device=device)
        assigned = torch.zeros(n_seeds, n_clusters, device=device)
        for step in range(n_steps):
            rows = pairs[:, :, step].reshape(-1)  # [S * 2B]: samples, then neighbours
            torch.index_select(x, 0, rows, out=batch)
            logits = heads(batch.view(n_seeds, -1, x.shape[1]))  # [S, 2B, C]
            log_p, log_q = map(log_probabilities, logits.split(batch_size, 1))  # [S, C, B] each
            consistency, entropy = loss_terms(log_p, log_q)  # [S], [S]
            heads.zero_grad()
            (consistency - entropy_weight * entropy).sum().backward()  # heads do not mix
            adam.step()
            with torch.no_grad():
                terms[step] = torch.stack([consistency, entropy]).cpu()
                mean_p += log_p.exp().mean(-1) / n_steps
                best = log_p.max(1).indices  # [S, B]; argmax is slower
                assigned.scatter_add_(1, best, torch.ones_like(log_p[:, 0]))
        _write_history(history, terms.numpy(), mean_p.cpu().numpy(), assigned.cpu().numpy(),
                       entropy_weight)
        if callback is not None:
            callback(epoch, heads)
    history.seconds = time.perf_counter() - start
    heads.cpu()
    warn_of_collapse(history.arrays(), heads.seeds, n_clusters, entropy_weight)
    return history


def draw_pairs(rng, indices, cumulative, n_pairs: int) -> np.ndarray:
    """One epoch of one seed: shuffled samples and a drawn neighbour of each, int64 [2, n_pairs].

    indices [N, K] of the neighbours, cumulative [N, K] sums of their weights.
    """
    samples = rng.permutation(len(indices))[:n_pairs]
    sums = cumulative.take(samples, 0)  # [n_pairs, K]
    u = rng.random(n_pairs, np.float32)[:, None] * sums[:, -1:]
    beyond = sums > u
    beyond[:, -1] = True  # where rounding brings u up to the whole sum
    return np.stack([samples, indices[samples, beyond.argmax(1)]])


def _write_history(history, terms, mean_p, assigned, entropy_weight) -> None:
    """terms [T, 2, S] of one epoch, mean prediction [S, C], samples assigned [S, C]."""
    consistency, entropy = terms.mean(0)
    history.loss.append(consistency - entropy_weight * entropy)
    history.consistency.append(consistency)
    history.entropy.append(-(mean_p * np.log(np.maximum(mean_p, 1e-30))).sum(1))
    history.n_nonempty.append((assigned > 0).sum(1))
    history.largest_share.append(assigned.max(1) / assigned.sum(1))


def warn_of_collapse(curves, seeds, n_clusters: int, entropy_weight: float) -> None:
    """Warn, with the figures, of every head that ended with unused clusters; curves [E, S]."""
    nonempty, share = curves["n_nonempty"][-1], curves["largest_share"][-1]
    for s in np.flatnonzero(nonempty < n_clusters):
        warnings.warn(
            f"Collapse: the head of seed {seeds[s]} ended with {int(nonempty[s])} of {n_clusters} "
            f"clusters in use, the largest with {100 * share[s]:.0f} % of the samples, entropy of "
            f"the mean prediction {curves['entropy'][-1][s]:.2f} of at most "
            f"{math.log(n_clusters):.2f} nats, at entropy_weight {entropy_weight:g}; raise "
            f"entropy_weight or batch_size, or ask for fewer clusters.", stacklevel=3)
