"""The features that `study/parity.py` is to meet: by DINO's own code and by torchvision's.

python -m experiments parity PATH, with the folder of a clone of facebookresearch/dino: its
vision_transformer.py is run and nothing of it is kept here.
"""

import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchvision.models import resnet50
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from tsp_utils.files.paths import bundled_dir
from tsp_utils.networks.weights import IMAGENET_MEAN, IMAGENET_STD
from tsp_utils.study.parity import N_FEATURES, NETWORKS, SIDES, seeded_images, seeded_state


def official_features(dino: str) -> Path:
    """Write the official features of the seeded networks and images; returns their path."""
    sys.path.insert(0, dino)
    official = importlib.import_module("vision_transformer")
    makers = zip(NETWORKS, (official.vit_small, official.vit_base, resnet50), strict=True)
    features = {}
    for name, make in makers:
        network = make().eval()
        network.fc = torch.nn.Identity()  # ResNet-50's, which the official file does not have
        network.load_state_dict(seeded_state(network.state_dict()))
        for side in SIDES:
            x = torch.from_numpy(seeded_images(side)).permute(0, 3, 1, 2) / 255
            x = TF.resize(x, [224, 224], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
            with torch.inference_mode():
                found = network(TF.normalize(x, IMAGENET_MEAN, IMAGENET_STD))
            features[f"{name} {side}"] = found[:, :N_FEATURES].contiguous()
    path = bundled_dir() / "parity.safetensors"
    save_file(features, path)
    return path
