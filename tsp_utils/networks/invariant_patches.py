"""Patches of two sizes, projected on what the views of an image have in common.

A dictionary of patches as in `patch_kmeans`, and after it no PCA but Fisher's discriminant with
every image as its own class and its augmented views as the class's samples: self-supervision in
closed form. `pretraining/invariant.py` learns it; `docs/closed_form.md` has the search behind it.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tsp_utils.networks.patch_kmeans import SIDE, normalised_patches

CELLS = 3  # a side


def _cells(grid: int) -> torch.Tensor:
    """Means over 3 x 3 overlapping cells as a matrix [9, grid * grid].

    A cell's weights fall linearly from its centre to the next cell's.
    """
    centres = (torch.arange(CELLS) + 0.5) * grid / CELLS - 0.5
    away = (torch.arange(grid) - centres[:, None]).abs() * CELLS / grid  # [3, grid]
    weights = (1 - away).clamp(min=0)
    weights /= weights.sum(1, keepdim=True)
    return torch.einsum("ay,bx->abyx", weights, weights).reshape(CELLS**2, grid**2)


class InvariantPatches(nn.Module):
    """Patches -> products with atoms -> soft threshold -> cells -> square root -> projection.

    filters: for each size of patches [A, 3 * size^2], atoms times whitener; offsets: for each size
    [A], subtracted from the products: threshold and the patches' mean; axes [9 sum A, D].
    """

    axes: torch.Tensor

    def __init__(self, filters, offsets, axes):
        super().__init__()
        self.sizes = [round((part.shape[1] / 3) ** 0.5) for part in filters]
        for size, part, offset in zip(self.sizes, filters, offsets, strict=True):
            self.register_buffer(f"filters_{size}", part.float())
            self.register_buffer(f"offsets_{size}", offset.float())
            self.register_buffer(f"cells_{size}", _cells(SIDE - size + 1), persistent=False)
        self.register_buffer("axes", axes.float())

    def activations(self, images: torch.Tensor) -> torch.Tensor:
        """What is projected: for each size of patches brought to mean 0 and deviation 1 by image.

        images float32 [B, 3, 32, 32] in [0, 1]; returns [B, 9 sum A].
        """
        return torch.cat([self._pooled(images, size) for size in self.sizes], 1)

    def _pooled(self, images: torch.Tensor, size: int) -> torch.Tensor:
        filters, offsets, cells = (getattr(self, f"{name}_{size}")
                                   for name in ("filters", "offsets", "cells"))
        pooled = images.new_empty(len(images), len(cells), len(filters))
        products = images.new_empty(cells.shape[1], len(filters))  # of one image, for the cache
        for few, out in zip(images.split(8), pooled.split(8), strict=True):
            for i, patches in enumerate(normalised_patches(few, size)):
                torch.addmm(offsets, patches, filters.T, beta=-1, out=products).relu_()
                torch.mm(cells, products, out=out[i])
        roots = pooled.flatten(1).sqrt()
        roots = roots - roots.mean(1, keepdim=True)
        return roots / roots.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images float32 [B, 3, 32, 32] in [0, 1] -> features float32 [B, D], of length 1."""
        return F.normalize(self.activations(images) @ self.axes)

    def save(self, path, metadata: dict | None = None) -> None:
        """Write one safetensors file in half precision."""
        save_file({name: value.half() for name, value in self.state_dict().items()}, path, metadata)

    @classmethod
    def load(cls, path) -> "InvariantPatches":
        """Read what `save` wrote."""
        state = load_file(path)
        sizes = sorted(int(key.removeprefix("filters_")) for key in state if "filters" in key)
        filters, offsets = ([state[f"{name}_{size}"] for size in sizes]
                            for name in ("filters", "offsets"))
        return cls(filters, offsets, state["axes"])
