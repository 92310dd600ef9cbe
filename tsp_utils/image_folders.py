"""Folders of images: listed, decoded, and labelled by the class folders they lie in."""

import contextlib
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
from PIL import ExifTags, Image, ImageSequence, UnidentifiedImageError
from tqdm.auto import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif",
                  ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".tga")  # named where they are no images
# What Pillow knows by name alone, or names without the means to decode it: never by content.
NOT_BY_CONTENT = {"BUFR", "DIB", "EPS", "GRIB", "HDF5", "IM", "IMT", "IPTC", "MPEG", "PCD",
                  "SPIDER", "TGA", "WMF"}
# TIFFs by what they hold, of which Pillow would show the small preview in place of the photo.
RAW_SUFFIXES = (".dng", ".nef", ".cr2", ".arw", ".orf", ".rw2", ".pef", ".srw", ".3fr", ".iiq")
# Folders of thumbnails, snapshots and deleted files, in lower case.
JUNK = {"@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler",
        "__macosx", "lost+found", "system volume information"}
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
GROUND = 128  # grey under what is transparent: black and white drawings both stand out from it
T = Image.Transpose
TURNS = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
         6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}  # by EXIF's orientation
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
        return self._with_page(index)[0]

    def _with_page(self, index: int) -> tuple[np.ndarray, str]:
        pixels, page = _decode(self.folder / self.paths[index])
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels, page


class ReadableFiles(ImageFiles):
    """ImageFiles that goes on where a file cannot be read: a grey image in its place, and a note.

    `seen` has the indices that were decoded. Of their paths, `unreadable` has those that could not
    be, each with the sentence that says why, `constant` those of one colour throughout, and `pages`
    which page was taken of those that have several.
    """

    def __init__(self, folder: Path, paths: Sequence[str]):
        super().__init__(folder, paths)
        self.seen: set[int] = set()
        self.unreadable: dict[str, str] = {}
        self.constant: set[str] = set()
        self.pages: dict[str, str] = {}
        self._shape: tuple[int, ...] = (32, 32, 3)

    def read_bytes(self, path: str) -> bytes:
        """What a file holds; nothing where it cannot be opened."""
        try:
            return super().read_bytes(path)
        except OSError:
            return b""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return super().__getitem__(index)
        path = self.paths[index]  # an IndexError ends an iteration
        self.seen.add(index)
        try:
            image, page = self._with_page(index)
        except OSError as error:
            self.unreadable[path] = str(error)
            return np.full(self._shape, 128, np.uint8)
        if page:
            self.pages[path] = page
        if _is_constant(image):
            self.constant.add(path)
        self._shape = image.shape  # so that backbones for images of one size go on, too
        return image


def find_images(folder: Path, others: Counter | None = None) -> list[str]:
    """Paths of all images under `folder`, relative, sorted, with forward slashes.

    Known by their ending, or by what they hold where the ending says nothing. Hidden files and
    folders and those of JUNK are passed over, and links that lead back to a folder they lie in.
    `others` is given the number of files passed over, by kind.
    Raises OSError for a folder that cannot be listed.
    """

    def refuse(error: OSError):
        raise OSError(f"Cannot list {error.filename}: {error.strerror}; check its permissions.")

    paths: list[str] = []
    others = Counter() if others is None else others
    above: dict[str, set] = {}  # a folder's own real path and those of the folders it lies in
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        outer, real = above.get(os.path.dirname(parent), set()), os.path.realpath(parent)
        if real in outer:
            folders.clear()
            continue
        above[parent] = outer | {real}
        for junk in [f for f in folders if f[0] == "." or f.lower() in JUNK]:
            folders.remove(junk)
            others["in hidden folders" if junk[0] == "." else f"in {junk}"] += sum(
                len(inside) for _, _, inside in os.walk(os.path.join(parent, junk)))
        prefix = Path(parent).relative_to(folder).as_posix() + "/"
        prefix = "" if prefix == "./" else prefix
        for name in names:
            if name[0] == ".":
                others["hidden"] += 1
            elif name.lower().endswith(IMAGE_SUFFIXES) or _holds_image(os.path.join(parent, name)):
                paths.append(prefix + name)
            else:
                others[os.path.splitext(name)[1].lower() or "without an ending"] += 1
    return sorted(paths)


def _holds_image(path: str) -> bool:
    """Whether Pillow knows a file by what it holds. One that cannot be opened is no image."""
    if path.lower().endswith(RAW_SUFFIXES):
        return False
    Image.init()
    try:
        with open(path, "rb") if os.path.isfile(path) else io.BytesIO() as file:  # no pipe waits
            Image.open(file, formats=[kind for kind in Image.ID if kind not in NOT_BY_CONTENT])
        return True
    except Exception as error:  # each of Pillow's formats raises kinds of its own
        return isinstance(error, Image.DecompressionBombError)  # an image: named when it is read


def kinds_of(others: Counter) -> str:
    """The files that `find_images` passed over in words, the most frequent kinds first, or ""."""
    kinds = sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))
    more = sum(n for _, n in kinds[6:])
    said = [f"{n:,} {kind}" for kind, n in kinds[:6] if n]
    return ", ".join([*said, f"{more:,} of other kinds"] if more else said)


def list_images(folder: Path, others: Counter | None = None) -> list[str]:
    """`find_images` of a folder that has to have some.

    Raises FileNotFoundError for what is no folder, ValueError for one without images.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: pass the path of a folder of images.")
    others = Counter() if others is None else others
    if not (paths := find_images(folder, others)):
        found = f", only other files ({kinds_of(others)})" if kinds_of(others) else ""
        raise ValueError(f"{folder} holds no images, in it or in its folders{found}: pass a folder "
                         f"of JPEG, PNG, TIFF, WebP, AVIF or other images that Pillow reads.")
    return paths


def read_images(folder: Path, paths: list[str]) -> np.ndarray | ImageFiles:
    """uint8 [N,H,W,C] (C = 1 if all are grey) if of one size up to LARGEST_ARRAY_PX, else files.

    Raises OSError naming a bad file.
    """
    size, all_grey = _decode(folder / paths[0])[0].shape[:2], True
    if max(size) > LARGEST_ARRAY_PX:
        return ImageFiles(folder, paths)
    images = np.empty((len(paths), *size, 3), dtype=np.uint8)
    decoded = joblib.Parallel(min(8, joblib.cpu_count()), "threading", return_as="generator",
                              batch_size=DECODE_CHUNK)(
        joblib.delayed(_decode)(f"{folder}{os.sep}{path}") for path in paths)
    for i, (pixels, _) in enumerate(tqdm(
            decoded, f"decoding {folder.name}", len(paths), leave=False, unit="image",
            disable=len(paths) <= PROGRESS_FROM)):
        if pixels.shape[:2] != size:
            return ImageFiles(folder, paths)
        images[i] = pixels
        all_grey &= pixels.shape[2] == 1
    return images[..., :1].copy() if all_grey else images


def _decode(path: Path | str) -> tuple[np.ndarray, str]:
    """One image, upright: uint8 [H,W,1] if grey, else [H,W,3]; and the page that it is, in words.

    Of several pages or frames the first that is not of one colour, or the first if all are: a scan
    may have a blank cover. No words for a single page, or for the first frame of an animation.
    """
    try:
        with open(path, "rb") as file:
            image = Image.open(io.BytesIO(file.read()))
        number, pixels = 0, _pixels(image)
        blank, tiff = _is_constant(pixels), image.format == "TIFF"
        several = (blank or tiff) and getattr(image, "is_animated", False)
        if several and blank:
            pages = enumerate(map(_pixels, ImageSequence.Iterator(image)))
            number, pixels = next((p for p in pages if not _is_constant(p[1])), (0, pixels))
        return pixels, f"page {number + 1}" if several and (tiff or number) else ""
    except UnidentifiedImageError:
        raise OSError(f"{path} is not an image that can be read: replace or delete it.") from None
    except Exception as error:  # Pillow's decoders raise many kinds, each without the file's name
        raise OSError(f"{path} cannot be read ({error}): replace or delete it.") from error


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H,W,1 or 3] of the page that an image is at; what is transparent lies on GROUND."""
    image.load()  # first: Pillow turns a TIFF here, and then has no orientation left
    turn = None
    with contextlib.suppress(Exception):  # tags that cannot be read do not cost the photo
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        turn = TURNS.get(int(value[0] if isinstance(value, (tuple, bytes, str)) else value))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":
        return _eight_bits(np.asarray(image), image.info.get("transparency"))[:, :, None]
    grey = image.mode in ("L", "LA", "La", "1")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (GROUND, GROUND, GROUND, 255))
        whole = image.convert("LA") if image.mode == "La" else image  # Pillow needs a step between
        image = Image.alpha_composite(ground, whole.convert("RGBA"))
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[:, :, None] if grey else pixels


def _eight_bits(stored: np.ndarray, hidden: int | None) -> np.ndarray:
    """Grey values [H,W] of 16 or 32 bits or with fractions as uint8, by one rule, file by file.

    Black to white is 0 to the smallest power of 16 that holds the largest value: 1, 16, 256, 4,096
    (12 bits), 65,536 (16 bits). Fractions may pass it by a quarter, as resampling makes them, and
    are cut. From minus that power where values are negative; from the smallest value where fewer
    than four greys would be left. NaN and the `hidden` value, which a PNG calls transparent, are
    GROUND. A file's own values alone decide, as its vector is kept by what the file holds.
    """
    values, spare = stored.astype(np.float64), 1.25 if stored.dtype.kind == "f" else 1.0
    if hidden is not None:
        values[stored == hidden] = np.nan
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)

    def power(value: float) -> float:
        return 16.0 ** math.ceil(math.log2(value / spare) / 4) if value else 1.0

    top = power(max(high, -low))
    start = -top if low < (1 - spare) * top else 0.0
    if 0 < high - low < (top - start) / 64:
        start, top = low, low + power(high - low)
    levels = np.clip((values - start) * (256 / (top - start)), 0, 255)
    return np.where(np.isnan(levels), GROUND, levels).astype(np.uint8)


def _is_constant(pixels: np.ndarray) -> bool:
    """Whether an image [H,W,C] is of one colour throughout; a few pixels settle most."""
    return all((part == pixels[0, 0]).all() for part in (pixels[::16, ::16], pixels))


def split_folders(paths) -> list[str]:
    """The first folders that are named as the splits of a data set are, sorted."""
    return sorted({path.split("/")[0] for path in paths
                   if "/" in path and path.split("/")[0].lower() in SPLITS})


def labels_from_folders(paths, official) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels int64 [N] and classes by first folder, as in `official` where all names are official.

    None and () where an image lies beside the folders, one folder is all there is, or all are
    named as splits are (SPLITS).
    """
    found = sorted({path.split("/")[0] for path in paths})
    no_classes = found == split_folders(paths) or (len(found) < 2 and not official)
    if any("/" not in path for path in paths) or no_classes:
        return None, ()
    number = {c.replace("/", "_"): i for i, c in enumerate(official)}  # no "/" in a folder's name
    if set(found) <= set(number):
        classes = tuple(official)
    else:
        number, classes = {c: i for i, c in enumerate(found)}, tuple(found)
    return np.array([number[path.split("/")[0]] for path in paths], dtype=np.int64), classes
