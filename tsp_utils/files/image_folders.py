"""Folders of images: listed, decoded upright, labelled by the class folders they lie in."""

import contextlib
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import joblib
import numpy as np
from PIL import ExifTags, Image, ImageSequence, UnidentifiedImageError
from tqdm.auto import tqdm

with contextlib.suppress(ImportError):  # of the extra `photos`: HEIC, as phones take photos
    from pillow_heif import register_heif_opener

    register_heif_opener()

HEIF_SUFFIXES = (".heic", ".heif")
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
LARGEST_SIDE = 2048  # px: what is larger is halved, cut to a third ... as it is decoded
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
        return [digest_of(self.read_bytes(path)) for path in self.paths]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ImageFiles(self.folder, self.paths[index])
        return self._with_page(self.folder / self.paths[index])[0]

    def _with_page(self, path: Path, content: bytes | None = None) -> tuple[np.ndarray, int]:
        pixels, page = _decode(path, content)
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels, page


def digest_of(content: bytes) -> bytes:
    """16 bytes for what a file holds."""
    return hashlib.blake2b(content, digest_size=16).digest()


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
    more, lacks = sum(n for _, n in kinds[6:]), "HEIF" not in Image.OPEN
    said = [f"{n:,} {kind}" + " (pip install pillow-heif reads them)"
            * (lacks and kind in HEIF_SUFFIXES) for kind, n in kinds[:6] if n]
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


def _decode(path: Path | str, content: bytes | None = None) -> tuple[np.ndarray, int]:
    """One image, upright: uint8 [H,W,1] if grey, else [H,W,3]; and which page of several it is.

    Of several pages or frames the first that is not of one colour, or the first if all are: a scan
    may have a blank cover. Page 0 for a single one, and for the first frame of an animation.
    """
    try:
        image = Image.open(io.BytesIO(Path(path).read_bytes() if content is None else content))
        image.draft(None, (LARGEST_SIDE, LARGEST_SIDE))  # JPEGs alone: no smaller than that
        number, pixels = 0, _pixels(image)
        blank, tiff = is_constant(pixels), image.format == "TIFF"
        several = (blank or tiff) and getattr(image, "is_animated", False)
        if several and blank:
            pages = enumerate(map(_pixels, ImageSequence.Iterator(image)))
            number, pixels = next((p for p in pages if not is_constant(p[1])), (0, pixels))
        return pixels, number + 1 if several and (tiff or number) else 0
    except MemoryError:
        raise MemoryError(f"{path} does not fit the memory: shrink it or delete it.") from None
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
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    grey, clear = image.mode in ("L", "LA", "La", "1"), image.has_transparency_data
    factor, parts = -(-max(image.size) // LARGEST_SIDE), []
    for part in _strips(image, factor):
        if clear:
            part = part.convert("LA") if part.mode == "La" else part  # Pillow needs a step between
            ground = Image.new("RGBA", part.size, (GROUND, GROUND, GROUND, 255))
            part = Image.alpha_composite(ground, part.convert("RGBA"))
        part = part.convert("L" if grey else "RGB")
        parts.append(np.asarray(part.reduce(factor) if factor > 1 else part))
    pixels = np.concatenate(parts)
    if turn is not None:
        pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    return pixels[:, :, None] if grey else pixels


def _strips(image: Image.Image, step: int = 1) -> Iterator[Image.Image]:
    """An image in parts from top to bottom, so that what is large is not in memory twice."""
    height = max(1, 2**22 // image.width // step) * step
    return (image.crop((0, top, image.width, min(top + height, image.height)))
            for top in range(0, image.height, height))


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 or 32 bits or of fractions in 256 greys, by one rule, file by file.

    Black to white is 0 to the smallest power of 16 that holds the largest value: 1, 16, 256, 4,096
    (12 bits), 65,536 (16 bits). Fractions may pass it by a quarter, as resampling makes them, and
    are cut. From minus that power where values are negative; from the smallest value where fewer
    than four greys would be left. NaN and the value that a PNG calls transparent are GROUND. A
    file's own values alone decide, as its vector is kept by what the file holds.
    """
    hidden, spare = image.info.get("transparency"), 1.25 if image.mode == "F" else 1.0

    def values(part: Image.Image) -> np.ndarray:
        found = np.asarray(part, np.float64)
        return found if hidden is None else np.where(found == hidden, np.nan, found)

    ends: list[float] = []
    for part in _strips(image):
        finite = values(part)
        finite = finite[np.isfinite(finite)]
        ends += [finite.min(), finite.max()] if finite.size else []
    low, high = min(ends, default=0.0), max(ends, default=0.0)

    def power(value: float) -> float:
        return 16.0 ** math.ceil(math.log2(value / spare) / 4) if value else 1.0

    top = power(max(high, -low))
    begin = -top if low < (1 - spare) * top else 0.0
    if 0 < high - low < (top - begin) / 64:
        begin, top = low, low + power(high - low)
    grey, row = Image.new("L", image.size), 0
    for part in _strips(image):
        levels = np.clip((values(part) - begin) * (256 / (top - begin)), 0, 255)
        levels[np.isnan(levels)] = GROUND
        grey.paste(Image.fromarray(levels.astype(np.uint8)), (0, row))
        row += part.height
    return grey


def is_constant(pixels: np.ndarray) -> bool:
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
