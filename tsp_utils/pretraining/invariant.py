"""Self-supervision in closed form: the axes of `invariant_patches.py`, from one eigenproblem.

Every image is a class of its own and its augmented views are the class's samples. Fisher's
discriminant then finds what stays within the views of an image and differs between images.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import LinAlgError, eigh, get_blas_funcs, helmert
from scipy.sparse.linalg import eigsh
from tqdm.auto import tqdm

from tsp_utils.networks.invariant_patches import InvariantPatches
from tsp_utils.networks.patch_kmeans import SIDE, normalised_patches
from tsp_utils.pretraining.dictionary import check_source, to_float, whitened_atoms
from tsp_utils.pretraining.multi_crop import random_colors, random_crops

WHITENING, THRESHOLD = 1.0, 0.5
AREA = 0.35, 1.0  # of a view's crop


@torch.inference_mode()
def learn_invariant_patches(images, n_atoms=358, sizes=(4, 8), n_features=256, n_views=3, reg=1e-4,
                            power=0.25, n_patches=300_000, seed=0,
                            on_stage: Callable[[str], object] | None = None) -> InvariantPatches:
    """Learn dictionaries and projection from images alone.

    images uint8 [N, 32, 32, 3]; no labels. n_atoms of each size of patches; on_stage is told each
    stage that is done. Raises ValueError for images of another shape or of single colours, for
    fewer than twice n_features, and for views that do not differ.
    """
    check_source(images, n_features)
    if n_views < 2:
        raise ValueError(f"n_views is {n_views}: pass at least 2, the image and one that differs.")
    done = on_stage or (lambda stage: None)
    generator = torch.Generator().manual_seed(seed)
    filters, offsets = zip(*(learn_filters(images, size, n_atoms, n_patches, generator)
                             for size in sorted(sizes)), strict=True)  # as a file is read
    done("dictionaries")
    network = InvariantPatches(filters, offsets, axes=torch.zeros(1, 1))
    s_b, s_w = between_within(activations_of_views(network, images, n_views, generator))
    done("activations and sums")
    axes = projection(s_b, s_w, n_features, reg, power)  # [P, D]
    done("eigenproblem")
    axes /= np.abs(axes).max()  # for half precision; features are of unit length anyway
    return InvariantPatches(filters, offsets, torch.from_numpy(axes))


def between_within(blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """S_b and S_w float64 [P, P] of activations that come in blocks [B, V, P].

    S_w is the mean covariance within an image's V views, S_b the covariance of the images' means
    less S_w / V, what the views alone would give it. Blocks are summed in float64.
    """
    n = 0
    for views in blocks:
        if not n:
            size = views.shape[2]
            total, between, within = np.zeros(size), *np.zeros((2, size, size))
        n, n_views = n + len(views), views.shape[1]
        means = views.mean(1)  # [B, P]
        # V - 1 orthonormal contrasts have the sum of squares of V differences from the mean
        apart = np.matmul(helmert(n_views).astype(views.dtype), views)  # [B, V - 1, P]
        total += means.sum(0, dtype=np.float64)
        between += _upper_gram(means)
        within += _upper_gram(apart.reshape(-1, size))
    s_w = within / (n * (n_views - 1))
    s_b = (between - np.outer(total, total) / n) / (n - 1) - s_w / n_views
    return tuple(np.triu(upper) + np.triu(upper, 1).T for upper in (s_b, s_w))


def projection(s_b: np.ndarray, s_w: np.ndarray, n_axes: int, reg: float = 1e-4,
               power: float = 0.25) -> np.ndarray:
    """Axes float64 [P, n_axes]: S_b v = lambda (S_w + reg max(eig S_w) I) v, times lambda^power.

    Largest lambda first, v^T (S_w + ...) v = 1. Raises ValueError for more axes than P, and for an
    S_w that is zero beside S_b, or singular where reg is 0.
    """
    size = len(s_b)
    if n_axes > size:
        raise ValueError(f"{n_axes} axes are too many for {size} activations; pass fewer.")
    if not np.trace(s_w) > 1e-10 * np.trace(s_b):
        raise ValueError("The views of each image are all equal: S_w is zero; pass views that "
                         "differ.")
    ridge = reg * eigsh(s_w, 1, v0=np.ones(size), return_eigenvectors=False)[0] if reg else 0.0
    try:
        values, axes = eigh(s_b, s_w + ridge * np.eye(size),
                            subset_by_index=[size - n_axes, size - 1])
    except LinAlgError as error:
        raise ValueError("S_w is singular: some directions never change within an image; pass "
                         "reg above 0, or more images and views than activations.") from error
    return np.ascontiguousarray(axes[:, ::-1] * np.maximum(values[::-1], 0) ** power)


def activations_of_views(network, images, n_views: int, generator,
                         at_once: int = 1000) -> Iterator[np.ndarray]:
    """Activations [B, V, P] of images uint8 [N, 32, 32, 3], each plain and in V - 1 views, at_once
    images at a time; views are DINO's, without blur."""
    for start in tqdm(range(0, len(images), at_once), "activations", leave=False):
        plain = to_float(images[start : start + at_once])
        views = [plain] + [random_colors(random_crops(plain, SIDE, AREA, generator), generator,
                                         blur=0, solarize=0) for _ in range(n_views - 1)]
        yield torch.stack([network.activations(view) for view in views], 1).numpy()


def learn_filters(images, size: int, n_atoms: int, n_patches: int, generator):
    """filters [A, 3 size^2] and offsets [A]: K-means of whitened patches, atoms of length 1."""
    chosen, drawn = torch.randperm(len(images), generator=generator)[:6000], []
    for rows in chosen.split(500):
        patches = normalised_patches(to_float(images[rows.numpy()]), size)  # [500, G, 3 size^2]
        places = torch.randint(patches.shape[1], (len(rows), -(-n_patches // len(chosen))),
                               generator=generator)
        drawn.append(patches[torch.arange(len(rows))[:, None], places].flatten(0, 1))
    patches = torch.cat(drawn)
    if not patches.any():
        raise ValueError(f"Each of the {len(images)} images is of a single colour; pass images "
                         "that show something.")
    mean, whitener, atoms = whitened_atoms(
        patches, n_atoms, WHITENING, int(torch.randint(2**31, (), generator=generator)))
    filters = F.normalize(atoms) @ whitener
    return filters, filters @ mean + THRESHOLD


def _upper_gram(rows: np.ndarray) -> np.ndarray:
    """The upper triangle of rows.T @ rows, for half the price of the whole."""
    return get_blas_funcs("syrk", (rows,))(1.0, rows.T, lower=True).T  # BLAS counts by columns
