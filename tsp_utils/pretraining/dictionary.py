"""A dictionary of patches, learned from images alone: the network is `patch_kmeans.py`."""

import faiss
import numpy as np
import torch
from sklearn.decomposition import PCA
from tqdm.auto import tqdm

from tsp_utils.networks.patch_kmeans import CONTRAST, GRID, PATCH, SIDE, WHITENING, PatchKMeans


def check_source(images, n_features: int) -> None:
    """Raises ValueError for images that are not [N, 32, 32, 3], or fewer than twice n_features."""
    if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"Dictionaries are learned from images [N, 32, 32, 3], and these have the "
                         f"shape {tuple(images.shape)}; resize them to 32 px first.")
    if len(images) < 2 * n_features:
        raise ValueError(f"{len(images)} images are too few for {n_features} features; pass at "
                         f"least {2 * n_features} images or a smaller n_features.")


@torch.inference_mode()
def learn_patch_kmeans(images, n_atoms=1536, n_features=256, n_patches=400_000,
                       n_pca_images=10_000, seed=0) -> PatchKMeans:
    """Learn dictionary, standardisation and PCA from images alone.

    images uint8 [N, 32, 32, 3]; no labels. Raises ValueError for images of another shape or fewer
    of them than the PCA needs. Axes of the PCA are scaled by singular value to the power -1/2,
    half way between PCA (1) and whitening (0 in relative scale).
    """
    check_source(images, n_features)
    rng = np.random.default_rng(seed)
    patches = _draw_patches(images, n_patches, rng)  # [n_patches, 108]
    mean, whitener, atoms = whitened_atoms(patches, n_atoms, WHITENING, seed + 1)
    rest = (torch.zeros(1), torch.ones(1), torch.zeros(1, 1))  # not yet known, not yet used
    network = PatchKMeans(mean, whitener, atoms, *rest)
    chosen = rng.choice(len(images), min(n_pca_images, len(images)), replace=False)
    activations = torch.cat([network.activations(to_float(images[chosen[i : i + 128]]))
                             for i in tqdm(range(0, len(chosen), 128), "activations")])  # [n, 4A]
    centre, scale = activations.mean(0), activations.std(0).clamp(min=1e-6)
    activations.sub_(centre).div_(scale)
    pca = PCA(n_features, svd_solver="randomized", random_state=seed).fit(activations.numpy())
    axes = torch.from_numpy(pca.components_ * pca.singular_values_[:, None] ** -0.5).T  # [4A, D]
    return PatchKMeans(mean, whitener, atoms, centre, scale, axes)


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [0, 1]."""
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


def whitened_atoms(patches: torch.Tensor, n_atoms: int, constant: float, seed: int):
    """Mean [P] and whitener [P, P] of patches [n, P], and by K-means their atoms [A, P]."""
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    whitener = vectors @ torch.diag((values + constant).rsqrt()) @ vectors.T
    kmeans = faiss.Kmeans(patches.shape[1], n_atoms, niter=25, seed=seed,
                          max_points_per_centroid=len(patches) // n_atoms + 1)
    kmeans.train(((patches - mean) @ whitener).numpy())
    return mean, whitener, torch.from_numpy(kmeans.centroids.copy())
