"""ICBPL, reconstructed: a linear map to the sphere, clusters around fixed centres (2408.01920).

Zhu, Hu and Wang (2024). The abstract, all that we had of the paper, names a pretrained network and
its fine-tuning, the pull of a sample towards one of its nearest neighbours, and the pull towards
the nearest of predefined centres. Ours are: that the centres are a simplex' corners, the MMD and
the pull towards an augmented view (all three after the same group's ICAE, Zhu and Wang, 2020, arXiv
1906.03905), the one linear layer, and every weight and schedule.
"""

import numpy as np
import torch
from scipy.linalg import helmert
from torch.nn import functional as F

from tsp_utils.heads import LinearHeads

# Of the four terms. MMD: of 1, 3 and 10 the least at which no cluster ended empty (no label read).
WEIGHTS = {"mmd": 3.0, "neighbor": 1.0, "view": 1.0, "center": 1.0}


def simplex_centers(n_clusters: int, dim: int | None = None) -> np.ndarray:
    """C unit vectors [C, d] with pairwise cosine -1 / (C - 1), the regular simplex; float64.

    d is C - 1 by default; what is above that stays 0. Raises ValueError for d < C - 1 (C vectors
    cannot be that far apart in fewer dimensions) and for fewer than 2 clusters.
    """
    dim = n_clusters - 1 if dim is None else dim
    if n_clusters < 2:
        raise ValueError(f"A simplex of {n_clusters} centres has no sides; pass 2 clusters or "
                         f"more.")
    if dim < n_clusters - 1:
        raise ValueError(f"{n_clusters} centres with equal angles need {n_clusters - 1} dimensions "
                         f"and the embedding has {dim}; pass {n_clusters - 1} or more.")
    corners = helmert(n_clusters).T * np.sqrt(n_clusters / (n_clusters - 1))  # [C, C - 1]
    return np.pad(corners, ((0, 0), (0, dim - n_clusters + 1)))


def mmd2(z: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy of z [..., B, d] and the centres [C, d], tiled evenly.

    Sum of five Gaussian kernels exp(-||u - v||^2 / w), w = m (1/4, 1/2, 1, 2, 4), m the mean
    squared distance among both sets: the multi-kernel MMD of Long et al. (2015). Tiling is a mean
    over the centres, so the batch need not be a multiple of C. Returns [...]; 0 for equal sets.
    """
    centers = centers.to(z).expand(*z.shape[:-2], *centers.shape)
    pairs = [_squared(z, z), _squared(centers, centers), _squared(z, centers)]
    b = z.shape[-2]
    # The mean over all ordered pairs of two different members of both sets, B of each.
    m = sum(weight * d.mean((-2, -1)) for weight, d in zip((1, 1, 2), pairs, strict=True))
    m = (m * b / (2 * (2 * b - 1))).detach().clamp_min(1e-12)[..., None, None]
    within, among, across = (_kernels(d / m).mean((-2, -1)) for d in pairs)
    return within + among - 2 * across


def _squared(u, v):
    return (u.square().sum(-1)[..., None] + v.square().sum(-1)[..., None, :]
            - 2 * u @ v.mT).clamp_min(0)


def _kernels(d):
    """Five Gaussians, each the square of the one before it: half its width."""
    kernel = torch.exp(-d / 4)
    total = kernel
    for _ in range(4):
        kernel = kernel.square()
        total = total + kernel
    return total


class ICBPLHeads(LinearHeads):
    """S linear maps to the unit sphere of R^d; logits are the cosines to the fixed centres.

    kmeans_centers [S, C, D]: least squares sends K-means' centres to the simplex' corners, with
    the smallest weights that do. weights: of the terms of `loss`, `WEIGHTS` where not given.
    """

    def __init__(self, kmeans_centers: np.ndarray, seeds, dim: int | None = None, **weights):
        n_clusters = kmeans_centers.shape[1]
        corners = simplex_centers(n_clusters, dim)
        middle = kmeans_centers.mean(1, keepdims=True)  # [S, 1, D]
        maps = np.stack([np.linalg.lstsq(found, corners, rcond=None)[0].T
                         for found in (kmeans_centers - middle).astype(np.float64)])  # [S, d, D]
        super().__init__(maps, seeds)
        self.bias.data = -torch.as_tensor(maps @ middle.mT, dtype=torch.float32)[..., 0]
        self.register_buffer("corners", torch.as_tensor(corners, dtype=torch.float32))
        if unknown := set(weights) - set(WEIGHTS):
            raise ValueError(f"ICBPL has no term {', '.join(sorted(unknown))}; its weights are "
                             f"{', '.join(WEIGHTS)}.")
        self.weights = WEIGHTS | weights

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, B, D] or [N, D] -> z [S, B or N, d], of unit length."""
        return F.normalize(super().forward(x), dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x) @ self.corners.T

    def loss(self, x, neighbor_x, view_x=None, progress: float = 1.0, warm_up: float = 0.2):
        """mmd MMD^2(z, centres) + neighbor mean ||z_i - z_j||^2 + view mean ||z_i - z'_i||^2
        + center mean_i (1 - max_c cos(z_i, centre_c)), the last from the share warm_up on.

        x, neighbor_x and view_x (None where there are no images to change) [S, B, D]; returns [S].
        """
        z, weights = self.embed(x), self.weights
        total = weights["mmd"] * mmd2(z, self.corners)
        total = total + weights["neighbor"] * _apart(z, self.embed(neighbor_x))
        if view_x is not None:
            total = total + weights["view"] * _apart(z, self.embed(view_x))
        if progress >= warm_up:
            nearest = (z @ self.corners.T).amax(-1)  # [S, B]
            total = total + weights["center"] * (1 - nearest).mean(-1)
        return total


def _apart(z, other):
    return (z - other).square().sum(-1).mean(-1)
