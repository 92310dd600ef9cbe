"""The clustering head: one linear layer and a softmax, from K-means on, many seeds at once."""

import functools
import itertools
import math
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from tsp_utils import losses
from tsp_utils.k_means import kmeans
from tsp_utils.losses import log_probabilities
from tsp_utils.neighbors import Neighbors, neighbor_weights


class LinearHeads(nn.Module):
    """S independent heads p = softmax(W x + b): weight [S, C, D], bias [S, C] (starting at 0)."""

    def __init__(self, weight, seeds):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32).clone())
        self.bias = nn.Parameter(torch.zeros(self.weight.shape[:2]))
        self.seeds = tuple(seeds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, D] for all heads, or [S, B, D] one batch a head -> logits [S, N or B, C]."""
        # W x^T, not x W^T: of these skinny products BLAS makes the one two times faster than the
        # other, and its gradient four times.
        if x.ndim == 2:
            flat = torch.addmm(self.bias.flatten()[:, None], self.weight.flatten(0, 1), x.mT)
            return flat.view(*self.bias.shape, len(x)).mT
        return torch.baddbmm(self.bias[..., None], self.weight, x.mT).mT

    @torch.inference_mode()
    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """Cluster probabilities float32 [S, N, C] of features [N, D]."""
        x = torch.as_tensor(np.asarray(features, np.float32), device=self.weight.device)
        return torch.cat([log_probabilities(self(rows)).exp().mT for rows in x.split(8192)],
                         1).cpu().numpy()

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


@dataclass(frozen=True)
class History:
    """Training curves by name, each [E, S] over E epochs and S heads, and the seconds it took.

    loss and the loss's terms (Eq. 5: consistency) are means over the epoch's batches. entropy is
    that of the mean prediction over the whole epoch (the loss's own is a batch estimate),
    n_nonempty counts clusters that are somebody's most probable one, largest_share is the largest
    cluster's share of the samples.
    """

    curves: dict[str, np.ndarray]
    seconds: float


def train_heads(heads: LinearHeads, features: np.ndarray, neighbors: Neighbors, *, loss=None,
                weights: np.ndarray | None = None, entropy_weight: float = 3.0,
                max_epochs: int = 100, min_steps: int = 2000, batch_size: int = 256,
                learning_rate: float = 1e-4, device: str = "cpu", progress: bool = True,
                callback=None) -> History:
    """Train S heads at once with Adam, in place; no label is read.

    features float32 [N, D] (as from `Scaler`), neighbors of the same N samples, weights [N, K]
    (Eq. 4 by default). loss: None is Eq. 5, `losses.tsp_loss` at entropy_weight; another one takes
    logits and neighbours' logits [S, B, C] and returns its value [S] and its terms by name, each
    [S] (entropy_weight is then not used). Each head has its own shuffles and draws one neighbour
    j ~ P(.|i) per sample and epoch, from its own seed: it is the same head alone or among others.
    Trains max(max_epochs epochs, min_steps steps) of batches of batch_size; what is left of an
    epoch's shuffle is dropped. `callback(epoch, heads)` is called after each epoch, for read-outs.
    Settings: Sec. 4.2 of the paper (lambda 3, Adam 1e-4, batch 256, 100 epochs).
    Raises ValueError for settings that cannot train and for a loss of another contract.
    """
    check_training(entropy_weight, max_epochs, min_steps, batch_size, learning_rate)
    n, n_seeds, n_clusters = len(features), len(heads.seeds), heads.weight.shape[1]
    if neighbors.indices.shape[0] != n:
        raise ValueError(f"There are {n} feature vectors and neighbours of "
                         f"{neighbors.indices.shape[0]}; search the neighbours of these features.")
    if loss is None:  # looked up now, so that whoever replaces it trains on the replacement
        loss = functools.partial(losses.tsp_loss, entropy_weight=entropy_weight)
    batch_size = min(batch_size, n)
    n_steps = n // batch_size
    n_epochs = max(max_epochs, math.ceil(min_steps / n_steps))
    weights = neighbor_weights(neighbors) if weights is None else weights  # [N, K]
    draws = [np.random.default_rng([seed, 2]) for seed in heads.seeds]
    batches = draw_batches(neighbors, weights, draws, batch_size, n_epochs * n_steps, device)
    x = torch.as_tensor(np.ascontiguousarray(features, np.float32), device=device)
    heads.to(device)
    batch = x.new_empty(n_seeds * 2 * batch_size, x.shape[1])  # fresh memory a step costs far more
    adam = torch.optim.Adam(heads.parameters(), lr=learning_rate, fused=True)
    curves, start = defaultdict(list), time.perf_counter()
    for epoch in tqdm(range(n_epochs), "training heads", disable=not progress, leave=False):
        sums = defaultdict(lambda: x.new_zeros(n_seeds))  # of the loss and its terms
        mean_p, assigned = x.new_zeros(2, n_seeds, n_clusters)
        for rows in itertools.islice(batches, n_steps):  # [S, 2, B]: samples, their neighbours
            torch.index_select(x, 0, rows.reshape(-1), out=batch)
            logits = heads(batch.view(n_seeds, -1, x.shape[1]))  # [S, 2B, C]
            own, others = logits.split(batch_size, 1)  # [S, B, C] each
            value, terms = _of_the_contract(loss(own, others), n_seeds)
            adam.zero_grad()
            value.sum().backward()  # heads do not mix
            adam.step()
            with torch.no_grad():  # nothing is read back before the epoch ends: a GPU goes on
                for name, term in {**terms, "loss": value}.items():
                    sums[name] += term
                log_p = log_probabilities(own)  # [S, C, B]
                mean_p += log_p.exp().mean(-1)
                best = log_p.max(1).indices  # [S, B]; argmax is slower
                assigned.scatter_add_(1, best, torch.ones_like(log_p[:, 0]))
        mean_p = (mean_p / n_steps).clamp_min(1e-30)
        ended = {name: total / n_steps for name, total in sums.items()} | {
            "entropy": -(mean_p * mean_p.log()).sum(1), "n_nonempty": (assigned > 0).sum(1),
            "largest_share": assigned.amax(1) / assigned.sum(1)}
        for name, values in ended.items():
            curves[name].append(values.cpu().numpy())
        if callback is not None:
            callback(epoch, heads)
    heads.cpu()
    history = History({name: np.stack(curve) for name, curve in curves.items()},
                      time.perf_counter() - start)
    warn_of_collapse(history.curves, heads.seeds, n_clusters, entropy_weight)
    return history


def check_training(entropy_weight: float, max_epochs: int, min_steps: int, batch_size: int,
                   learning_rate: float) -> None:
    """Raise ValueError, in one sentence, for settings with which no head can be trained."""
    if not 0 <= entropy_weight < math.inf:
        raise ValueError(f"entropy_weight is {entropy_weight!r}; pass 0 or more, about 3.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate!r}; pass a number above 0, about 1e-4.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; pass 1 or more, about 256.")
    if min(max_epochs, min_steps) < 0 or max_epochs == min_steps == 0:
        raise ValueError(f"max_epochs is {max_epochs!r} and min_steps {min_steps!r}, with which "
                         f"nothing is trained; pass 0 or more of each, and not 0 of both.")


def _of_the_contract(found, n_seeds: int):
    """What a loss returned, where it is a value [S] and terms by name, each [S]."""
    value, terms = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
    parts = [value, *terms.values()] if isinstance(terms, dict) else [None]
    if not all(torch.is_tensor(part) and part.shape == (n_seeds,) for part in parts) or (
            not value.requires_grad):  # type: ignore[union-attr]
        raise ValueError(f"A loss takes logits and neighbours' logits [S, B, C] and returns its "
                         f"value [S] and its terms by name, each [S] (here S = {n_seeds}), and "
                         f"this one did not; write it as losses.tsp_loss is written.")
    return value, terms


def best_head(final_losses) -> int:
    """The head with the lowest training loss, of losses [S]: chosen without labels.

    Raises ValueError where no loss is a finite number.
    """
    finite = np.where(np.isfinite(final_losses), final_losses, np.inf)
    if not np.isfinite(finite).any():
        raise ValueError("The loss of every head is no finite number, so that there is none to "
                         "choose; lower learning_rate.")
    return int(finite.argmin())


def draw_batches(neighbors: Neighbors, weights: np.ndarray, rngs, batch_size: int, n_steps: int,
                 device: str = "cpu"):
    """Rows int64 [S, 2, B] of each step: shuffled samples and a drawn neighbour of each.

    weights [N, K], rows that sum to 1: P(.|i), by Eq. 4 or another; rngs: one a seed. What an
    epoch's shuffle has left that fills no batch is dropped.
    """
    cumulative, per_epoch = weights.cumsum(1), len(weights) // batch_size
    for done in range(0, n_steps, per_epoch):
        pairs = np.stack([draw_pairs(rng, neighbors.indices, cumulative, per_epoch * batch_size)
                          for rng in rngs])
        steps = torch.from_numpy(pairs).to(device).view(len(rngs), 2, per_epoch, batch_size)
        yield from steps.unbind(2)[: n_steps - done]


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


def warn_of_collapse(curves, seeds, n_clusters: int, entropy_weight: float) -> None:
    """Warn, with the figures, of every head that ended with unused clusters; curves [E, S]."""
    for s in np.flatnonzero(~np.isfinite(curves["loss"][-1])):
        warnings.warn(f"The loss of the head of seed {seeds[s]} is no finite number in the end; "
                      f"lower learning_rate.", stacklevel=3)
    nonempty, share = curves["n_nonempty"][-1], curves["largest_share"][-1]
    for s in np.flatnonzero(nonempty < n_clusters):
        warnings.warn(
            f"Collapse: the head of seed {seeds[s]} ended with {int(nonempty[s])} of {n_clusters} "
            f"clusters in use, the largest with {100 * share[s]:.0f} % of the samples, entropy of "
            f"the mean prediction {curves['entropy'][-1][s]:.2f} of at most "
            f"{math.log(n_clusters):.2f} nats, at entropy_weight {entropy_weight:g}; raise "
            f"entropy_weight or batch_size, or ask for fewer clusters.", stacklevel=3)
