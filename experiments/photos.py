"""Which backbone for which images? Kinds of images that people bring, under the backbones at hand.

Two Debian packages, unpacked by `dpkg -x`, hold photographs that a rerun can fetch:
tuxpaint-stamps-default 2022.06.04 (cut-out objects in folders by kind) and mate-backgrounds 1.26.0
(landscapes and flowers). Beside them stand 2,000 images of each of two small sets.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tsp_utils import cache
from tsp_utils.backbones import load_backbone
from tsp_utils.datasets import ImageDataset, load_dataset
from tsp_utils.features import cached_features
from tsp_utils.files.image_folders import ImageFiles, list_images
from tsp_utils.files.paths import bundled_dir, write_lines
from tsp_utils.study.feature_sets import FeatureSet, load_images
from tsp_utils.study.frozen_evaluation import read_out

logger = logging.getLogger(__name__)

BACKBONES = ("patch_kmeans", "invariant_patches", "resnet_contrast_cifar10", "efficientnet_lite0")
STAMPS = "usr/share/tuxpaint/stamps"
NATURE = "usr/share/backgrounds/mate/nature"
FEWEST = 30  # images of a folder of stamps that is taken
N_CROPS, CROP_PX = 60, (256, 640)  # of each landscape
N_SMALL = 2000  # images of a small set


def stamps(folder: Path) -> ImageDataset:
    """Photographs of objects without ground, by the folder they lie in."""
    folder = folder / STAMPS
    paths = [path for path in list_images(folder) if path.endswith(".png")]
    counts = Counter(path.split("/")[0] for path in paths)
    classes = tuple(sorted(name for name, n in counts.items() if n >= FEWEST))
    paths = [path for path in paths if path.split("/")[0] in classes]
    labels = np.array([classes.index(path.split("/")[0]) for path in paths])
    return ImageDataset("cut-out objects", None, ImageFiles(folder, paths), labels, classes)


def crops(folder: Path) -> ImageDataset:
    """Squares from random places of photographs: which photograph is a square from?"""
    folder, rng, images, labels = folder / NATURE, np.random.default_rng(0), [], []
    names = tuple(list_images(folder))
    for label, name in enumerate(names):
        photo = np.asarray(Image.open(folder / name).convert("RGB"))
        for _ in range(N_CROPS):
            side = int(rng.integers(*CROP_PX))
            y, x = (int(rng.integers(0, length - side)) for length in photo.shape[:2])
            square = Image.fromarray(photo[y:y + side, x:x + side])
            images.append(np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC)))
            labels.append(label)
    return ImageDataset("squares of photographs", None, np.stack(images), np.array(labels), names)


def kinds(folder: Path) -> Iterator[tuple[str, ImageDataset]]:
    """What the images are, in words, and the images with their labels."""
    yield "cut-out photographs and drawings of objects", stamps(folder)
    yield "squares of photographs of nature", crops(folder)
    yield "small photographs, 32 px", load_images("cifar10", "test", N_SMALL)
    yield "small grey pictures, 28 px", load_images("fashion-mnist", "test", N_SMALL)


def code_of_a_kind() -> str:
    """The key of the code behind a record, but for that which reads images and networks."""
    return cache.code_of(read_out, cached_features, given=(load_dataset, load_backbone))


def read_kinds(folder: str) -> Path:
    """Every kind under every backbone, ten seeds; returns the path of the records."""
    records = []
    for kind, images in kinds(Path(folder)):
        for name in BACKBONES:
            backbone = load_backbone(name)
            found = FeatureSet(images.name, images.split or "", name, np.asarray(
                cached_features(backbone, images, progress=False)), images.labels, images.classes)
            about = {"kind": kind, "backbone": name, "dtype": backbone.describe()["dtype"],
                     "n_clusters": found.n_clusters}
            records.append(about | read_out(found) | {
                "code": code_of_a_kind(), "hardware": cache.hardware("cpu"),
                "versions": cache.versions()})
            logger.info("%s under %s: consistency %s", kind, name, records[-1]["consistency"])
    return write_lines(bundled_dir() / "readouts" / "kinds_of_images.json", records)
