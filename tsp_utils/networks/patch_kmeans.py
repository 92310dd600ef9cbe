"""The single-layer network of Coates, Lee and Ng (2011): features learned by K-means on patches.

What there was before DINO, and from the same source images: a dictionary of whitened 6x6 patches
learned without labels or gradients, compared with every patch of an image, pooled over the four
quadrants, standardised and reduced by PCA. "An analysis of single-layer networks in unsupervised
feature learning", AISTATS 2011, Secs 3 and 4; their contrast constant 10 and whitening constant 0.1
are for pixels in [0, 255], and so are ours.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

PATCH, SIDE = 6, 32
GRID = SIDE - PATCH + 1  # 27 positions a side
CONTRAST, WHITENING = 10.0, 0.1


def _quadrants() -> torch.Tensor:
    """Sum pooling over four quadrants as a matrix [4, GRID * GRID]."""
    upper = (torch.arange(GRID) < (GRID + 1) // 2).float()
    halves = torch.stack([upper, 1 - upper])  # [2, GRID]
    return torch.einsum("ay,bx->abyx", halves, halves).reshape(4, GRID * GRID)


def normalised_patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """All patches of images [B, 3, 32, 32] in [0, 1], less their mean, over sqrt(variance + 10).

    Returns [B, positions, 3 * size^2]; the variance is of pixels from 0 to 255.
    """
    patches = F.unfold(images * 255, size)
    patches = patches - patches.mean(1, keepdim=True)
    variance = patches.square().sum(1, keepdim=True) / (patches.shape[1] - 1)  # `var`, but faster
    return (patches / (variance + CONTRAST).sqrt()).mT


class PatchKMeans(nn.Module):
    """Patches -> distances to atoms -> triangle activation -> four quadrants -> PCA.

    mean [108] and whitener [108, 108] of the patches, atoms [A, 108] in whitened space; centre and
    scale [4A] standardise the pooled activations, axes [4A, D] (already scaled) reduce them.
    """

    mean: torch.Tensor
    whitener: torch.Tensor
    atoms: torch.Tensor
    centre: torch.Tensor
    scale: torch.Tensor
    axes: torch.Tensor
    distance: torch.Tensor
    quadrants: torch.Tensor

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
            z = (normalised_patches(few, PATCH) - self.mean) @ self.whitener  # [8, 729, 108]
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
