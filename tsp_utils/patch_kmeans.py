"""The single-layer network of Coates, Lee and Ng (2011): features learned by K-means on patches.

What there was before DINO, and from the same source images: a dictionary of whitened 6x6 patches
learned without labels or gradients, compared with every patch of an image, pooled over the four
quadrants, standardised and reduced by PCA. "An analysis of single-layer networks in unsupervised
feature learning", AISTATS 2011, Secs 3 and 4; their contrast constant 10 and whitening constant 0.1
are for pixels in [0, 255], and so are ours.
"""

import logging

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch import nn
from tqdm.auto import tqdm

PATCH, SIDE = 6, 32
GRID = SIDE - PATCH + 1  # 27 positions a side
CONTRAST, WHITENING = 10.0, 0.1

logger = logging.getLogger(__name__)


def _quadrants() -> torch.Tensor:
    """Sum pooling over four quadrants as a matrix [4, GRID * GRID]."""
    upper = (torch.arange(GRID) < (GRID + 1) // 2).float()
    halves = torch.stack([upper, 1 - upper])  # [2, GRID]
    return torch.einsum("ay,bx->abyx", halves, halves).reshape(4, GRID * GRID)


def _contrast_normalised(images: torch.Tensor) -> torch.Tensor:
    """All 6x6 patches of images [B, 3, 32, 32] in [0, 1], each brought to mean 0 and variance 1.

    Returns [B, 729, 108].
    """
    patches = F.unfold(images * 255, PATCH)  # [B, 108, 729]
    patches = patches - patches.mean(1, keepdim=True)
    variance = patches.square().sum(1, keepdim=True) / (patches.shape[1] - 1)  # `var`, but faster
    return (patches / (variance + CONTRAST).sqrt()).mT


class PatchKMeans(nn.Module):
    """Patches -> distances to atoms -> triangle activation -> four quadrants -> PCA.

    mean [108] and whitener [108, 108] of the patches, atoms [A, 108] in whitened space; centre and
    scale [4A] standardise the pooled activations, axes [4A, D] (already scaled) reduce them.
    """

    def __init__(self, mean, whitener, atoms, centre, scale, axes):
        super().__init__()
        for name, value in dict(mean=mean, whitener=whitener, atoms=atoms, centre=centre,
                                scale=scale, axes=axes).items():
            self.register_buffer(name, value.float())
        # ||z - c||^2 = ||z||^2 - 2 z.c + ||c||^2 as ONE matrix product: [z, ||z||^2, 1] @ distance
        distance = torch.cat([-2 * self.atoms, torch.ones(len(atoms), 1),
                              self.atoms.square().sum(1, keepdim=True)], 1).T  # [110, A]
        self.register_buffer("distance", distance.contiguous(), persistent=False)
        self.register_buffer("quadrants", _quadrants(), persistent=False)

    def activations(self, images: torch.Tensor) -> torch.Tensor:
        """Triangle activations max(0, mean_k d_k - d_k) (Sec. 3.2.2), summed over the quadrants.

        images float32 [B, 3, 32, 32] in [0, 1]; returns [B, 4A].
        """
        pooled = images.new_empty(len(images), 4, len(self.atoms))
        d = images.new_empty(GRID * GRID, len(self.atoms))  # fresh memory an image costs more
        for few, out in zip(images.split(8), pooled.split(8), strict=True):  # few, for the cache
            z = (_contrast_normalised(few) - self.mean) @ self.whitener  # [8, 729, 108]
            z = torch.cat([z, z.square().sum(-1, keepdim=True), torch.ones_like(z[..., :1])], -1)
            for i, patches in enumerate(z):  # and one by one: 729 x A distances are 4.5 MB
                torch.mm(patches, self.distance, out=d).clamp_(min=0).sqrt_()  # [729, A]
                torch.mm(self.quadrants, torch.sub(d.mean(1, keepdim=True), d, out=d).relu_(),
                         out=out[i])
        return pooled.flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images float32 [B, 3, 32, 32] in [0, 1] -> features float32 [B, D]."""
        return (self.activations(images) - self.centre) / self.scale @ self.axes

    def save(self, path, metadata: dict | None = None) -> None:
        """Write one safetensors file; the axes in 8 bits a number, one step size a column."""
        step = self.axes.abs().amax(0) / 127  # [D]
        save_file({"mean": self.mean.half(), "whitener": self.whitener.half(),
                   "atoms": self.atoms.half(), "centre": self.centre, "scale": self.scale,
                   "axes": (self.axes / step).round().to(torch.int8), "axes_step": step},
                  path, metadata)

    @classmethod
    def load(cls, path) -> "PatchKMeans":
        """Read what `save` wrote."""
        state = load_file(path)
        step = state.pop("axes_step")
        return cls(**state | {"axes": state["axes"].float() * step})


@torch.inference_mode()
def learn_patch_kmeans(images, n_atoms=1536, n_features=256, n_patches=400_000,
                       n_pca_images=10_000, seed=0) -> PatchKMeans:
    """Learn dictionary, standardisation and PCA from images alone.

    images uint8 [N, 32, 32, 3]; no labels. Raises ValueError for images of another shape or fewer
    of them than the PCA needs. Axes of the PCA are scaled by singular value to the power -1/2,
    half way between PCA (1) and whitening (0 in relative scale).
    """
    if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"The dictionary is learned from images [N, 32, 32, 3], and these have "
                         f"the shape {tuple(images.shape)}; resize them to 32 px first.")
    if len(images) < 2 * n_features:
        raise ValueError(f"{len(images)} images are too few for a PCA to {n_features} features; "
                         f"pass at least {2 * n_features} images or a smaller n_features.")
    rng = np.random.default_rng(seed)
    patches = _draw_patches(images, n_patches, rng)  # [n_patches, 108]
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    whitener = vectors @ torch.diag((values + WHITENING).rsqrt()) @ vectors.T
    atoms = _kmeans_atoms(((patches - mean) @ whitener).numpy(), n_atoms, seed)

    rest = (torch.zeros(1), torch.ones(1), torch.zeros(1, 1))  # not yet known, not yet used
    network = PatchKMeans(mean, whitener, atoms, *rest)
    chosen = rng.choice(len(images), min(n_pca_images, len(images)), replace=False)
    activations = torch.cat([network.activations(_to_float(images[chosen[i : i + 128]]))
                             for i in tqdm(range(0, len(chosen), 128), "activations")])  # [n, 4A]
    centre, scale = activations.mean(0), activations.std(0).clamp(min=1e-6)
    activations.sub_(centre).div_(scale)
    pca = PCA(n_features, svd_solver="randomized", random_state=seed).fit(activations.numpy())
    axes = torch.from_numpy(pca.components_ * pca.singular_values_[:, None] ** -0.5).T  # [4A, D]
    return PatchKMeans(mean, whitener, atoms, centre, scale, axes)


def _to_float(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def _draw_patches(images, n_patches: int, rng) -> torch.Tensor:
    """Contrast-normalised patches [n_patches, 108] from random places of random images."""
    which = rng.integers(len(images), size=n_patches)
    y, x = rng.integers(GRID, size=(2, n_patches, 1, 1))
    inside = np.arange(PATCH)
    patches = images[which[:, None, None], y + inside[:, None], x + inside]  # [n, 6, 6, 3]
    patches = torch.from_numpy(patches).permute(0, 3, 1, 2).flatten(1).float()  # as F.unfold
    patches -= patches.mean(-1, keepdim=True)
    return patches / (patches.var(-1, keepdim=True) + CONTRAST).sqrt()


def _kmeans_atoms(patches: np.ndarray, n_atoms: int, seed: int) -> torch.Tensor:
    kmeans = faiss.Kmeans(patches.shape[1], n_atoms, niter=25, seed=seed + 1,
                          max_points_per_centroid=len(patches) // n_atoms + 1)
    kmeans.train(patches)
    logger.info("K-means over %d patches: %d atoms", len(patches), n_atoms)
    return torch.from_numpy(kmeans.centroids.copy())
