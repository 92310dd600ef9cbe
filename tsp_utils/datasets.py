"""Images and labels by name: bundled, from torchvision's files, or from any folder of images."""

import difflib
import errno
import gzip
import hashlib
import io
import logging
import os
import pickle
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from tsp_utils.paths import bundled_dir, data_dir

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
LARGEST_ARRAY_PX = 64  # images up to this size are held in memory, larger ones decoded on access
DECODE_CHUNK = 250  # files a task of the thread pool
PROGRESS_FROM = 2000  # files; fewer are decoded before a progress bar could be read


@dataclass(frozen=True)
class DatasetInfo:
    """What is published about a set: images a split, number of classes, their names, source."""

    splits: dict[str, int]
    n_classes: int
    source: str
    classes: tuple[str, ...] = ()  # in label order; empty: read from the files
    torchvision: str | None = None  # torchvision's class of this set; None: image folder only


CIFAR_SOURCE = "Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html; no licence stated"
DATASETS = {
    "fashion-mnist": DatasetInfo(
        {"train": 60_000, "test": 10_000}, 10,
        "Xiao et al. (2017), https://github.com/zalandoresearch/fashion-mnist; MIT",
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
         "Bag", "Ankle boot"),
        "FashionMNIST",
    ),
    "cifar10": DatasetInfo(
        {"train": 50_000, "test": 10_000}, 10, CIFAR_SOURCE,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "CIFAR10",
    ),
    "cifar100": DatasetInfo(
        {"train": 50_000, "test": 10_000}, 100, CIFAR_SOURCE, torchvision="CIFAR100",
    ),
    "cifar100-20": DatasetInfo(
        {"train": 50_000, "test": 10_000}, 20, CIFAR_SOURCE + "; the 20 superclasses",
        torchvision="CIFAR100",
    ),
    "stl10": DatasetInfo(
        {"train": 5_000, "test": 8_000, "unlabeled": 100_000}, 10,
        "Coates et al. (2011), https://cs.stanford.edu/~acoates/stl10/; drawn from ImageNet, "
        "no licence stated",
        ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        "STL10",
    ),
    "tinyimagenet32": DatasetInfo(
        {"train": 100_000, "val": 10_000}, 200,
        "Tiny-ImageNet-200 (Stanford CS231n) at 32 px, http://cs231n.stanford.edu/; "
        "ImageNet's terms: research only",
    ),
}  # fmt: skip


class ImageFiles(Sequence):
    """Images [H,W,3] uint8 of any size, decoded from their files on each access.

    An integer gives one image, a slice another ImageFiles. Raises OSError naming a bad file.
    """

    def __init__(self, folder: Path, paths: Sequence[str]):
        self.folder, self.paths = Path(folder), tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ImageFiles(self.folder, self.paths[index])
        pixels = _decode(self.folder / self.paths[index])
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


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
                content = (self.images.folder / path).read_bytes()
                digest.update(f"{path}\0{len(content)}\0".encode() + content)
        else:
            digest.update(str(self.images.shape).encode())
            for start in range(0, len(self), 1000):  # a chunk, as the array may be a view
                digest.update(np.ascontiguousarray(self.images[start : start + 1000]))
        return digest.hexdigest()

    def subset(self, indices) -> "ImageDataset":
        """The images at `indices` (integers, a slice or a boolean mask [N]), in that order."""
        if not isinstance(indices, slice):
            indices = np.asarray(indices)
            if indices.size == 0:
                indices = indices.astype(np.int64)
        chosen = np.arange(len(self))[indices]
        paths = None if self.paths is None else tuple(self.paths[i] for i in chosen)
        if isinstance(self.images, ImageFiles):
            images = ImageFiles(self.images.folder, [self.images.paths[i] for i in chosen])
        else:
            images = self.images[chosen]
        labels = None if self.labels is None else self.labels[chosen]
        return ImageDataset(self.name, self.split, images, labels, self.classes, paths)


def load_dataset(
    name: str | Path,
    split: str | None = "test",
    root: str | Path | None = None,
    download: bool = True,
) -> ImageDataset:
    """One split of a set in DATASETS, or a folder of images given by its path.

    A named set is looked for under `root` (default: TSP_DATA or data/): as an image folder
    `<root>/<name>/<split>/<class>/*`, then as torchvision's files, then downloaded into `root`.
    Fashion-MNIST's test split is bundled. A path has no splits: its class folders become labels.
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
        return _load_idx(name, split, bundled_dir() / "fashion-mnist")
    folder = root / name / split
    if folder.is_dir() and (paths := _find_images(folder)):
        if len(paths) != info.splits[split]:
            logger.warning(
                "%s holds %d images, but %s %s is published with %d.",
                folder, len(paths), name, split, info.splits[split],
            )  # fmt: skip
        return _load_folder(name, split, folder, paths)
    if info.torchvision is None:
        raise FileNotFoundError(
            f"{name} is not downloaded automatically: lay its images out as "
            f"{folder}/<class>/*.JPEG, or set TSP_DATA (or root=) to the folder above {name}."
        )
    return _load_torchvision(name, split, root, download)


# ---- folders of images ---------------------------------------------------------------------


def _load_path(name: str | Path, split: str | None) -> ImageDataset:
    folder = Path(name).expanduser()
    looks_like_name = isinstance(name, str) and not folder.exists() and len(folder.parts) == 1
    if looks_like_name or not str(name):
        nearest = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(
            f"Unknown data set {name!r}{hint}: pass one of {', '.join(DATASETS)}, "
            "or the path of a folder of images."
        )
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: pass the path of a folder of images.")
    if split not in (None, "test"):  # "test" is the default, so it says nothing
        raise ValueError(f"A folder of images has no split {split!r}: pass the folder itself.")
    if not (paths := _find_images(folder)):
        raise ValueError(
            f"{folder} holds no images: files that end in {', '.join(IMAGE_SUFFIXES)} "
            "were looked for, in it and in its folders."
        )
    return _load_folder(folder.resolve().name, None, folder, paths)


def _find_images(folder: Path) -> list[str]:
    """Paths of all images under `folder`, relative, sorted, with forward slashes."""

    def refuse(error: OSError):
        raise OSError(f"Cannot list {error.filename}: {error.strerror}; check its permissions.")

    paths = []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        prefix = Path(parent).relative_to(folder).as_posix() + "/"
        prefix = "" if prefix == "./" else prefix
        images = (n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and n[0] != ".")
        paths += [prefix + n for n in images]
    return sorted(paths)


def _load_folder(name: str, split: str | None, folder: Path, paths: list[str]) -> ImageDataset:
    images = _decode_all(folder, paths)
    labels, classes = _labels_from_folders(paths, DATASETS[name].classes if split else ())
    if split == "unlabeled":
        labels, classes = None, ()
    if labels is None and any("/" in path for path in paths) and not split:
        logger.warning(
            "%s is taken as images without labels: labels need two or more class folders "
            "and no image beside them.", folder,
        )  # fmt: skip
    images = ImageFiles(folder, paths) if images is None else images
    return ImageDataset(name, split, images, labels, classes, tuple(paths))


def _labels_from_folders(paths, official) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels by first folder: numbered as in `official` where all names are official."""
    found = sorted({path.split("/")[0] for path in paths})
    if any("/" not in path for path in paths) or (len(found) < 2 and not official):
        return None, ()
    number = {c.replace("/", "_"): i for i, c in enumerate(official)}  # no "/" in a folder's name
    if set(found) <= set(number):
        classes = tuple(official)
    else:
        number, classes = {c: i for i, c in enumerate(found)}, tuple(found)
    return np.array([number[path.split("/")[0]] for path in paths], dtype=np.int64), classes


def _decode(path: Path | str) -> np.ndarray:
    """One image, upright: uint8 [H,W,1] if grey, else [H,W,3]."""
    try:
        with open(path, "rb") as file:
            image = Image.open(io.BytesIO(file.read()))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] == "I":  # 16-bit grey, which Pillow would clip at 255
            return (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)[:, :, None]
        if image.mode in ("L", "LA", "La", "1", "F"):
            return np.asarray(image.convert("L"))[:, :, None]
        return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise OSError(f"{path} is not an image that can be read: replace or delete it.") from None
    except Exception as error:  # Pillow's decoders raise many kinds, each without the file's name
        raise OSError(f"{path} cannot be read ({error}): replace or delete it.") from error


def _decode_all(folder: Path, paths: list[str]) -> np.ndarray | None:
    """All images [N,H,W,C] if of one size up to LARGEST_ARRAY_PX, else None."""
    size = _decode(folder / paths[0]).shape[:2]
    if max(size) > LARGEST_ARRAY_PX:
        return None
    images = np.empty((len(paths), *size, 3), dtype=np.uint8)
    prefix = str(folder) + os.sep

    def fill(start: int) -> tuple[bool, bool]:
        all_grey = True
        for i in range(start, min(start + DECODE_CHUNK, len(paths))):
            pixels = _decode(prefix + paths[i])
            if pixels.shape[:2] != size:
                return False, False
            images[i] = pixels
            all_grey &= pixels.shape[2] == 1
        return True, all_grey

    starts = range(0, len(paths), DECODE_CHUNK)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        grey = []
        quiet = len(paths) <= PROGRESS_FROM
        what = {"desc": f"decoding {folder.name}", "unit": "image"}
        with tqdm(total=len(paths), leave=False, disable=quiet, **what) as bar:
            for one_size, all_grey in pool.map(fill, starts):
                if not one_size:
                    return None
                grey.append(all_grey)
                bar.update(min(DECODE_CHUNK, len(paths) - bar.n))
    finally:
        pool.shutdown(cancel_futures=True)
    return images[..., :1].copy() if all(grey) else images


# ---- published files -----------------------------------------------------------------------


def _idx_paths(split: str) -> list[str]:
    prefix = "train" if split == "train" else "t10k"
    return [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]


def _load_idx(name: str, split: str, folder: Path) -> ImageDataset:
    images, labels = (_read_idx(folder / path) for path in _idx_paths(split))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise OSError(f"The images and labels of {split} in {folder} do not match: replace them.")
    classes = DATASETS[name].classes
    return ImageDataset(name, split, images[..., None], labels.astype(np.int64), classes)


def _read_idx(path: Path) -> np.ndarray:
    """A file in MNIST's format, plain or .gz: magic, sizes (big-endian int32), then uint8."""
    path = path if path.exists() else path.with_name(path.name + ".gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        n_dims = data[3]
        shape = np.frombuffer(data, ">i4", n_dims, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * n_dims).reshape(shape).copy()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: put it there again.") from None
    except Exception as error:  # gzip, zlib, struct and numpy each raise their own
        raise OSError(f"{path} is corrupt ({error}): replace or delete it.") from error


def _load_torchvision(name: str, split: str, root: Path, download: bool) -> ImageDataset:
    import torchvision.datasets

    source = getattr(torchvision.datasets, DATASETS[name].torchvision)
    if name == "fashion-mnist":  # its files have no checksums once unpacked: _read_idx is stricter
        _fetch(name, source, root, [f"FashionMNIST/raw/{f}" for f in _idx_paths(split)], download)
        return _load_idx(name, split, root / "FashionMNIST" / "raw")
    folder = root / source.base_folder
    checksums = dict(source.train_list + source.test_list)
    if name != "stl10":
        checksums[source.meta["filename"]] = source.meta["md5"]
    _fetch(name, source, root, [f"{source.base_folder}/{f}" for f in checksums], download)
    try:
        which = {"split": split} if name == "stl10" else {"train": split == "train"}
        data = source(root, **which)
    except Exception as error:  # torchvision does not say which file
        check = torchvision.datasets.utils.check_integrity
        bad = [f for f, md5 in checksums.items() if not check(folder / f, md5)]
        raise OSError(
            f"{', '.join(bad) or name} in {folder} is corrupt (not the published checksum): "
            f"delete it and load {name} again to fetch it anew."
        ) from error
    if name == "stl10":
        labels = None if split == "unlabeled" else data.labels.astype(np.int64)
        classes = () if labels is None else DATASETS[name].classes
        return ImageDataset(name, split, data.data.transpose(0, 2, 3, 1), labels, classes)
    labels, classes = data.targets, data.classes
    if name == "cifar100-20":  # torchvision has just checked these pickles' checksums
        labels = pickle.loads((folder / split).read_bytes(), encoding="latin1")["coarse_labels"]
        meta = pickle.loads((folder / "meta").read_bytes(), encoding="latin1")
        classes = meta["coarse_label_names"]
    images = np.ascontiguousarray(data.data)  # torchvision's is a view in another order
    return ImageDataset(name, split, images, np.array(labels, dtype=np.int64), tuple(classes))


def _fetch(name: str, source, root: Path, files: list[str], download: bool):
    """Complete `files` under `root` from torchvision's archive there, else by its download.

    All of it arrives in a hidden folder first, so that a failure leaves nothing behind.
    """
    from torchvision.datasets.utils import check_integrity, extract_archive

    if all((root / f).exists() or (root / f"{f}.gz").exists() for f in files):
        return
    if name == "fashion-mnist":  # single files, no archive
        archive = None
        by_hand = f"put {files[0]}.gz and {files[1]}.gz from {source.mirrors[0]} into {root}"
    else:
        archive = root / source.filename
        by_hand = f"put {source.filename} from {source.url} into {root}"
    packed = archive is not None and archive.exists()
    if packed and not check_integrity(archive, source.tgz_md5):
        raise OSError(f"{archive} is corrupt or incomplete: delete it and load {name} again.")
    if not packed and not download:
        raise FileNotFoundError(f"{name} is not in {root}: pass download=True, or {by_hand}.")
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as staging:
            if packed:
                extract_archive(str(archive), staging)
            else:
                source(staging, download=True)
            for path in Path(staging).rglob("*"):
                target = root / path.relative_to(staging)
                if path.is_file() and path.suffix != ".gz" and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
    except Exception as error:  # URLError, HTTPException, RuntimeError, TarError, OSError ...
        refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
        if getattr(error, "errno", None) in refused:
            raise OSError(
                f"Cannot write {name} into {root} ({error.strerror}): set TSP_DATA or pass root= "
                "to a folder that can be written."
            ) from error
        raise ConnectionError(
            f"Could not fetch {name} ({' '.join(str(error).split())}): check the network and the "
            f"free space, or {by_hand} and load it again."
        ) from error
    finally:
        for folder in created:  # innermost first; one that is not empty stays
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
