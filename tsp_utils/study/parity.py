"""Forward parity: the paper's networks through our loading and transform, against official code.

Weights and images come from a seed, so the check needs no download. The features to be met were
computed by experiments/official_parity.py with DINO's own vision_transformer.py and torchvision's
ResNet-50, and ship: the first 64 of each image.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file

from tsp_utils.backbones import BACKBONES, Backbone, load_backbone
from tsp_utils.files.paths import bundled_dir, write_whole

NETWORKS = ("dino_vits16", "dino_vitb16", "dino_resnet50")
SIDES = (32, 96, 224)  # px of the images, which are enlarged to 224
N_IMAGES, N_FEATURES = 4, 64
TOLERANCE = 1e-5  # of features whose mean size is about 1, in float32


def seeded_state(template: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by seed 0 for a network's names and shapes, in which every part matters."""
    rng, state = np.random.default_rng(0), {}
    for name, value in sorted(template.items()):
        x = rng.standard_normal(value.shape, np.float32)
        if value.ndim in (2, 4):  # of layers, whose output is as large as their input
            x /= np.sqrt(np.prod(value.shape[1:]))
        elif value.ndim == 1:  # variances and scales of norms near 1, means and biases near 0
            x = 0.1 * np.abs(x) + ("running_var" in name or name.endswith("weight"))
        state[name] = torch.as_tensor(x).to(value.dtype)
    return state


def seeded_images(side: int) -> np.ndarray:
    """uint8 [4, side, side, 3] by seed 1."""
    return np.random.default_rng(1).integers(0, 256, (N_IMAGES, side, side, 3), np.uint8)


def seeded_backbone(name: str, device: str = "cpu") -> Backbone:
    """A row of the table with `seeded_state`, through a file in the official format."""
    template = timm.create_model(BACKBONES[name].architecture, num_classes=0).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / BACKBONES[name].file
        write_whole(path, lambda file: torch.save(seeded_state(template), file))
        return load_backbone(name, device, path, "float32")


def departure(backbone: Backbone, side: int) -> float:
    """The largest difference of a feature to the official code's; TOLERANCE bounds it."""
    expected = load_file(bundled_dir() / "parity.safetensors")[f"{backbone.name} {side}"]
    found = backbone(seeded_images(side))[:, :N_FEATURES]
    return float((found - expected).abs().max())
