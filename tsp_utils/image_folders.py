"""Folders of images: listed, decoded, and labelled by the class folders they lie in."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
LARGEST_ARRAY_PX = 64  # images up to this size are held in memory, larger ones decoded on access
DECODE_CHUNK = 250  # files a task of the thread pool
PROGRESS_FROM = 2000  # files; fewer are decoded before a progress bar could be read


class ImageFiles(Sequence):
    """Images [H,W,3] uint8 of any size, decoded from their files on each access.

    An integer gives one image, a slice another ImageFiles. Raises OSError naming a bad file.
    """

    def __init__(self, folder: Path, paths: Sequence[str]):
        self.folder, self.paths = Path(folder), tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read_bytes(self, path: str) -> bytes:
        """What a file holds."""
        return (self.folder / path).read_bytes()

    @property
    def digests(self) -> list[bytes]:
        """16 bytes an image, of what its file holds."""
        return [hashlib.blake2b(self.read_bytes(path), digest_size=16).digest()
                for path in self.paths]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ImageFiles(self.folder, self.paths[index])
        pixels = _decode(self.folder / self.paths[index])
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


class ReadableFiles(ImageFiles):
    """ImageFiles that goes on where a file cannot be read: a grey image in its place, and a note.

    `seen` has the indices that were decoded, `unreadable` the paths among them that could not be,
    each with the sentence that says why.
    """

    def __init__(self, folder: Path, paths: Sequence[str]):
        super().__init__(folder, paths)
        self.seen: set[int] = set()
        self.unreadable: dict[str, str] = {}
        self._shape: tuple[int, ...] = (32, 32, 3)

    def read_bytes(self, path: str) -> bytes:
        """What a file holds; nothing where it cannot be opened."""
        try:
            return super().read_bytes(path)
        except OSError:
            return b""

    def __getitem__(self, index):
        self.seen.add(index)
        try:
            image = super().__getitem__(index)
        except OSError as error:
            self.unreadable[self.paths[index]] = str(error)
            return np.full(self._shape, 128, np.uint8)
        self._shape = image.shape  # so that backbones for images of one size go on, too
        return image


def find_images(folder: Path) -> list[str]:
    """Paths of all images under `folder`, relative, sorted, with forward slashes.

    Hidden files and folders are passed over, and links that lead back to a folder they lie in.
    Raises OSError for a folder that cannot be listed.
    """

    def refuse(error: OSError):
        raise OSError(f"Cannot list {error.filename}: {error.strerror}; check its permissions.")

    paths: list[str] = []
    above: dict[str, set] = {}  # a folder's own real path and those of the folders it lies in
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        outer, real = above.get(os.path.dirname(parent), set()), os.path.realpath(parent)
        if real in outer:
            folders.clear()
            continue
        above[parent] = outer | {real}
        folders[:] = [f for f in folders if not f.startswith(".")]
        prefix = Path(parent).relative_to(folder).as_posix() + "/"
        prefix = "" if prefix == "./" else prefix
        images = (n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and n[0] != ".")
        paths += [prefix + n for n in images]
    return sorted(paths)


def list_images(folder: Path) -> list[str]:
    """`find_images` of a folder that has to have some.

    Raises FileNotFoundError for what is no folder, ValueError for one without images.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: pass the path of a folder of images.")
    if not (paths := find_images(folder)):
        raise ValueError(f"{folder} holds no images: files that end in {', '.join(IMAGE_SUFFIXES)} "
                         f"were looked for, in it and in its folders.")
    return paths


def read_images(folder: Path, paths: list[str]) -> np.ndarray | ImageFiles:
    """uint8 [N,H,W,C] (C = 1 if all are grey) if of one size up to LARGEST_ARRAY_PX, else files.

    Raises OSError naming a bad file.
    """
    size, all_grey = _decode(folder / paths[0]).shape[:2], True
    if max(size) > LARGEST_ARRAY_PX:
        return ImageFiles(folder, paths)
    images = np.empty((len(paths), *size, 3), dtype=np.uint8)
    decoded = joblib.Parallel(min(8, joblib.cpu_count()), "threading", return_as="generator",
                              batch_size=DECODE_CHUNK)(
        joblib.delayed(_decode)(f"{folder}{os.sep}{path}") for path in paths)
    for i, pixels in enumerate(tqdm(decoded, f"decoding {folder.name}", len(paths), leave=False,
                                    unit="image", disable=len(paths) <= PROGRESS_FROM)):
        if pixels.shape[:2] != size:
            return ImageFiles(folder, paths)
        images[i] = pixels
        all_grey &= pixels.shape[2] == 1
    return images[..., :1].copy() if all_grey else images


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


def labels_from_folders(paths, official) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels int64 [N] and classes by first folder, as in `official` where all names are official.

    None and () where an image lies beside the folders, or one folder is all there is.
    """
    found = sorted({path.split("/")[0] for path in paths})
    if any("/" not in path for path in paths) or (len(found) < 2 and not official):
        return None, ()
    number = {c.replace("/", "_"): i for i, c in enumerate(official)}  # no "/" in a folder's name
    if set(found) <= set(number):
        classes = tuple(official)
    else:
        number, classes = {c: i for i, c in enumerate(found)}, tuple(found)
    return np.array([number[path.split("/")[0]] for path in paths], dtype=np.int64), classes
