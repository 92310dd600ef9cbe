"""Images and labels by name: bundled, from torchvision's files, or from any folder of images."""

import hashlib
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from tsp_utils.files.downloads import read_idx_pair, read_published
from tsp_utils.files.image_folders import (
    ImageFiles,
    find_images,
    labels_from_folders,
    list_images,
    read_images,
)
from tsp_utils.files.paths import bundled_dir, data_dir
from tsp_utils.files.published_sets import DATASETS as DATASETS
from tsp_utils.files.unknown_names import unknown

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images of one split, with labels where they are known.

    images: uint8 [N,H,W,C] (C = 1 if all are grey, else 3) or ImageFiles; labels: int64 [N] or
    None; classes: names by label, or (); paths: files relative to their folder, or None.
    """

    name: str
    split: str | None
    images: np.ndarray | ImageFiles = field(repr=False)
    labels: np.ndarray | None = field(default=None, repr=False)
    classes: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the images in their order (of files: names and bytes), not the labels."""
        digest = hashlib.sha256()
        if isinstance(self.images, ImageFiles):
            for path in self.images.paths:
                content = self.images.read_bytes(path)
                name = f"{path}\0{len(content)}\0"
                digest.update(name.encode("utf-8", "surrogateescape") + content)
        else:
            digest.update(str(self.images.shape).encode())
            for start in range(0, len(self), 1000):  # a chunk, as the array may be a view
                digest.update(self.images[start : start + 1000].tobytes())
        return digest.hexdigest()

    def subset(self, indices) -> "ImageDataset":
        """The images at `indices` (integers, a slice or a boolean mask [N]), in that order."""
        chosen = np.arange(len(self))[indices]
        paths = None if self.paths is None else tuple(self.paths[i] for i in chosen)
        if isinstance(self.images, ImageFiles):
            images = ImageFiles(self.images.folder, [self.images.paths[i] for i in chosen])
        else:
            images = self.images[chosen]
        labels = None if self.labels is None else self.labels[chosen]
        return ImageDataset(self.name, self.split, images, labels, self.classes, paths)


def load_dataset(name: str | Path, split: str | None = "test", root: str | Path | None = None,
                 download: bool = True) -> ImageDataset:
    """One split of a set in DATASETS, or a folder of images given by its path.

    A named set is looked for under `root` (default: TSP_DATA or data/): as an image folder
    `<root>/<name>/<split>/<class>/*`, then as torchvision's files, then downloaded into `root`.
    Fashion-MNIST's test split is bundled, digits come with scikit-learn. A path has no splits: its
    class folders become labels.
    Raises ValueError (unknown name or split, no images), FileNotFoundError (nothing there),
    ConnectionError (no download), OSError (a corrupt file, named).
    """
    if name not in DATASETS:
        return _load_path(name, split)
    info = DATASETS[name]
    if split not in info.splits:
        raise ValueError(f"{name} has no split {split!r}: pass one of {', '.join(info.splits)}.")
    root = data_dir() if root is None else Path(root).expanduser()
    if name == "fashion-mnist" and split == "test":
        images, labels = read_idx_pair(bundled_dir() / "fashion-mnist", split)
        return ImageDataset(name, split, images, labels, info.classes)
    if name == "digits":
        found = load_digits()  # grey values 0 to 16
        images = np.round(found.images[..., None] * (255 / 16)).astype(np.uint8)
        return ImageDataset(name, split, images, found.target.astype(np.int64), info.classes)
    folder = root / name / split
    if folder.is_dir() and (paths := find_images(folder)):
        if len(paths) != info.splits[split]:
            logger.warning("%s holds %d images, but %s %s is published with %d.", folder,
                           len(paths), name, split, info.splits[split])
        return _load_folder(name, split, folder, paths)
    if info.torchvision is None:
        raise FileNotFoundError(f"{name} is not downloaded automatically: lay its images out as "
                                f"{folder}/<class>/*.JPEG, or set TSP_DATA (or root=) to the "
                                f"folder above {name}.")
    images, labels, classes = read_published(name, info.torchvision, split, root, download)
    classes = () if labels is None else info.classes or classes
    return ImageDataset(name, split, images, labels, classes)


def _load_path(name: str | Path, split: str | None) -> ImageDataset:
    folder = Path(name).expanduser()
    looks_like_name = isinstance(name, str) and not folder.exists() and len(folder.parts) == 1
    if looks_like_name or not str(name):
        raise ValueError(unknown("data set", name, [*DATASETS, "or a folder of images"]))
    if split not in (None, "test"):  # "test" is the default, so it says nothing
        raise ValueError(f"A folder of images has no split {split!r}: pass the folder itself.")
    return _load_folder(folder.resolve().name, None, folder, list_images(folder))


def _load_folder(name: str, split: str | None, folder: Path, paths: list[str]) -> ImageDataset:
    labels, classes = labels_from_folders(paths, DATASETS[name].classes if split else ())
    if split == "unlabeled":
        labels, classes = None, ()
    if labels is None and any("/" in path for path in paths) and not split:
        logger.warning("%s is taken as images without labels: labels need two or more class "
                       "folders (which train and test are not) and no image beside them.", folder)
    return ImageDataset(name, split, read_images(folder, paths), labels, classes, tuple(paths))
