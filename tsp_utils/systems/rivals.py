"""The table of other systems' heads: which loss trains which; another head is a row here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch.nn import Parameter
from torch.nn import functional as F
from tqdm.auto import tqdm

from tsp_utils.files.unknown_names import unknown
from tsp_utils.heads import LinearHeads, draw_batches, init_heads
from tsp_utils.k_means import kmeans
from tsp_utils.neighbors import WEIGHTINGS, Neighbors
from tsp_utils.systems import other_losses as losses
from tsp_utils.systems.icbpl import ICBPLHeads
from tsp_utils.systems.other_losses import SECU_TEMPERATURE


class CosineHeads(LinearHeads):
    """Logits cos(x, w_c) / 0.05, the centres w_c starting at K-means' (SeCu)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(x, dim=-1) / SECU_TEMPERATURE
        return (F.normalize(self.weight, dim=-1) @ x.mT).mT


class DECHeads(LinearHeads):
    """DEC's own head: a linear encoder to E = 10 dimensions and centres [S, C, E] in there.

    Logits are log q, q_c ~ 1 / (1 + ||z - centre_c||^2). DEC starts from an autoencoder; the best
    linear one is PCA. z is scaled to a mean norm of sqrt(E), as features are.
    """

    def __init__(self, features: np.ndarray, n_clusters: int, seeds, dim: int = 10):
        axes = PCA(min(dim, *features.shape), random_state=0).fit(features)
        z = axes.transform(features)
        scale = math.sqrt(z.shape[1]) / np.linalg.norm(z, axis=1).mean()
        super().__init__(np.stack([axes.components_ * scale] * len(seeds)), seeds)
        self.bias.data += torch.as_tensor(-axes.components_ @ axes.mean_ * scale)
        self.centers = Parameter(torch.as_tensor(
            kmeans((z * scale).astype(np.float32), n_clusters, seeds).centers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = super().forward(x)  # [S, B, E]
        squared = (z.square().sum(-1, keepdim=True) + self.centers.square().sum(-1)[:, None]
                   - 2 * z @ self.centers.mT)
        return (-squared.clamp_min(0).log1p()).mT.contiguous().log_softmax(1).mT


def _linear(features, n_clusters, seeds, centers):
    return init_heads(features, n_clusters, seeds, centers=centers)


def _dec_heads(features, n_clusters, seeds, centers):
    return DECHeads(features, n_clusters, seeds)


def _cosine_heads(features, n_clusters, seeds, centers):
    return CosineHeads(centers, seeds)


def _icbpl_heads(features, n_clusters, seeds, centers, **weights):
    return ICBPLHeads(centers, seeds, **weights)


@dataclass(frozen=True)
class Rival:
    """A loss, the head that it trains (from features, C, seeds, centres), and how j is drawn."""

    loss: Callable
    heads: Callable = _linear
    draw: str = "uniform"  # of `WEIGHTINGS`: among the K nearest, or Eq. 4

    @property
    def code(self) -> list[Callable]:
        """What a result of it depends on, for the cache: a registry is not followed."""
        return [self.loss, self.heads, WEIGHTINGS[self.draw]]


RIVALS = {
    "scan": Rival(losses.scan),
    "tsp": Rival(losses.tsp, draw="gaussian"),
    "nnm": Rival(losses.nnm),
    "temi": Rival(losses.temi),
    "iic": Rival(losses.iic),
    "pica": Rival(losses.pica),
    "dac": Rival(losses.dac),
    "dccm": Rival(losses.dccm),
    "dec": Rival(losses.dec, _dec_heads),
    "cc": Rival(losses.cc),
    "secu": Rival(losses.secu, _cosine_heads),
    "icbpl": Rival(losses.icbpl, _icbpl_heads),
}


def train_rival(method: str, features: np.ndarray, neighbors: Neighbors, centers: np.ndarray,
                seeds, *, learning_rate: float = 1e-3, sharpness: float = 1.0,
                n_steps: int = 2000, batch_size: int = 256, device: str = "cpu",
                progress: bool = True, **options):
    """Train S heads of one method at once with Adam; no label is read.

    features float32 [N, D] (as from `scale_features`), neighbors of the same samples, centers
    [S, C, D] of K-means, a run a seed: every method's start, its weights times sharpness (1:
    Appendix A's nearly uniform predictions). Shuffles and draws are those of `train_heads`.
    options go to the head (ICBPL's weights). Returns the heads, and the mean loss
    [S] over the last tenth of the steps. Raises ValueError for an unknown method (the nearest one
    is named) and for batches smaller than the number of clusters.
    """
    if method not in RIVALS:
        raise ValueError(unknown("method", method, RIVALS))
    rival, n, n_clusters = RIVALS[method], len(features), centers.shape[1]
    batch_size = min(batch_size, n)
    if batch_size < n_clusters:
        raise ValueError(f"A batch of {batch_size} is smaller than the {n_clusters} clusters that "
                         f"it is to be spread over; pass a batch_size of {n_clusters} or more.")
    heads = rival.heads(features, n_clusters, seeds, centers, **options).to(device)
    for parameter in heads.parameters():
        parameter.data *= sharpness
    weights = WEIGHTINGS[rival.draw](neighbors)
    batches = draw_batches(neighbors, weights / weights.sum(1, keepdims=True),
                           [np.random.default_rng([seed, 2]) for seed in seeds], batch_size,
                           n_steps, device)
    x = torch.as_tensor(np.ascontiguousarray(features, np.float32), device=device)
    adam = torch.optim.Adam(heads.parameters(), lr=learning_rate, fused=True)
    step, values = losses.Step(heads, x), []
    for at, rows in enumerate(tqdm(batches, method, n_steps, disable=not progress, leave=False)):
        step.progress, step.starts_epoch = at / n_steps, at % (n // batch_size) == 0
        batch = x.index_select(0, rows.reshape(-1)).view(*rows.shape, -1)  # [S, 2, B, D]
        step.x, step.neighbor_x = batch[:, 0], batch[:, 1]
        logits = heads(batch.flatten(1, 2)).mT.contiguous()  # [S, C, 2B]
        loss = rival.loss(*logits.split(batch_size, 2), step)  # [S]
        adam.zero_grad(set_to_none=True)
        loss.sum().backward()  # heads do not mix
        adam.step()
        if at >= n_steps - max(n_steps // 10, 1):
            values.append(loss.detach())
    return heads.cpu(), torch.stack(values).cpu().mean(0).numpy()
