"""Features: images -> latent vectors in bounded memory, and their cache on disk."""

import hashlib
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from tsp_utils.paths import cache_dir

EXTRACTOR_VERSION = 1  # raise it when this file or backbones.py changes what a vector is
log = logging.getLogger(__name__)


def extract_features(backbone, images, batch_size: int = 256, progress: bool = True,
                     out: np.ndarray | None = None) -> np.ndarray:
    """Pass images through a backbone, a batch at a time.

    images: uint8 [N,H,W,C] or a sequence of [H,W,C]; returns float32 [N,D], which is `out` where
    that is given. Raises ValueError for no images, non-finite features or an `out` of another
    shape.
    """
    for start, features in _feature_batches(backbone, images, batch_size, progress):
        shape = (len(images), features.shape[1])
        out = np.empty(shape, np.float32) if out is None else out
        if out.shape != shape:
            raise ValueError(f"out has shape {list(out.shape)}: pass one of {list(shape)}")
        out[start:start + len(features)] = features
    return out


def cached_features(backbone, dataset, cache: str | os.PathLike | None = None,
                    batch_size: int = 256, progress: bool = True) -> np.ndarray:
    """Features of a data set, read from the cache or extracted into it, the same whatever N.

    cache: a folder, by default `features` in TSP_CACHE. Returns a read-only map float32 [N,D].
    An extraction that was killed goes on where it stopped; one that failed starts again. Raises
    what `extract_features` raises, TypeError for anything but a data set, and OSError for a folder
    that cannot be written.
    """
    if not hasattr(dataset, "fingerprint"):
        raise TypeError(f"cached_features takes a data set, and this is of type "
                        f"{type(dataset).__name__}: pass load_dataset(NAME or FOLDER), or images "
                        f"in an array to extract_features")
    folder = Path(cache) if cache is not None else cache_dir() / "features"
    description = {
        "dataset": dataset.name, "split": dataset.split, "content": dataset.fingerprint,
        "images": len(dataset.images), "backbone": backbone.describe(),
        "extractor": EXTRACTOR_VERSION,
    }
    text = json.dumps(description, sort_keys=True)
    key, description = hashlib.sha256(text.encode()).hexdigest()[:16], json.loads(text)
    label = re.sub(r"[^\w.-]+", "_", f"{dataset.name}-{dataset.split}-{backbone.name}")
    label = label[-80:].lstrip("-.")
    path = folder / f"{label}-{key}.npy"
    whole = _open_whole(path, description)
    if whole is not None:
        return whole
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(path.with_suffix(".lock")).acquire()  # the system frees a killed one's
    with held:
        whole = _open_whole(path, description)  # another process may have finished it meanwhile
        if whole is None:
            if path.exists():
                log.warning("%s does not match its description and is built again", path)
            _extract_to(path, description, backbone, dataset.images, batch_size, progress)
            whole = _open_whole(path, description)
    if whole is None:
        raise OSError(f"{path} did not read back as it was written: check the disk, or set "
                      "TSP_CACHE to another folder")
    return whole


def _feature_batches(backbone, images, batch_size, progress,
                     start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [B,D]) from row `start` on; the next batch is prepared meanwhile."""
    n = len(images)
    if n == 0 or batch_size < 1:
        raise ValueError(f"{n} images in batches of {batch_size}: pass at least one of each")

    def prepare(row):
        if isinstance(images, np.ndarray):
            return backbone.prepare(images[row:row + batch_size])
        return backbone.prepare(images[i] for i in range(row, min(row + batch_size, n)))

    width, bar = None, tqdm(total=n, initial=start, unit="image", desc=backbone.name,
                            disable=not progress)
    with ThreadPoolExecutor(1) as pool, bar:
        ahead = pool.submit(prepare, start) if start < n else None
        for row in range(start, n, batch_size):
            batch = ahead.result()
            if row + batch_size < n:
                ahead = pool.submit(prepare, row + batch_size)
            features = np.asarray(backbone.encode(batch), np.float32)  # [B,D]
            finite = np.isfinite(features).all(1)  # [B]
            if not finite.all():
                raise ValueError(f"{backbone.name} gave NaN or infinite features, first in row "
                                 f"{row + int(np.argmin(finite))}: check its weights, or load it "
                                 "with dtype='float32'")
            if width not in (None, features.shape[1]):
                raise ValueError(f"{backbone.name} gave {features.shape[1]} features in row {row} "
                                 f"and {width} before: pass images of one size")
            width = features.shape[1]
            yield row, features
            bar.update(len(features))


def _extract_to(path: Path, description: dict, backbone, images, batch_size, progress) -> None:
    """Grow `<path>.partial`, with a count of finished rows beside it; rename it when whole."""
    partial, count = Path(f"{path}.partial"), Path(f"{path}.partial.json")
    done = _finished(partial, count)
    try:
        with _writing(path.parent):
            file = open(partial, "r+b" if done["rows"] else "wb")  # noqa: SIM115
        with file:
            file.seek(done["bytes"])
            for row, features in _feature_batches(backbone, images, batch_size, progress,
                                                  done["rows"]):
                block = features.tobytes()
                if row == 0:
                    block = _npy_header(len(images), features.shape[1]) + block
                with _writing(path.parent):
                    # written, not mapped: mapped pages would count as memory, and a full disk
                    # would be a crash instead of an error
                    file.write(block)
                    file.flush()
                    done = {"rows": row + len(features), "bytes": done["bytes"] + len(block),
                            "crc32": zlib.crc32(block, done["crc32"])}
                    _write_json(count, done)
        with _writing(path.parent):
            _write_json(path.with_suffix(".json"), {"description": description, **done})
            os.replace(partial, path)
            count.unlink()
    except Exception:  # after an error nothing stays; after a kill or Ctrl-C the rows do
        for unfinished in (partial, count, path.with_suffix(".json")):
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        raise


def _finished(partial: Path, count: Path) -> dict:
    try:
        done = json.loads(count.read_text())
        if partial.stat().st_size >= done["bytes"]:
            return {"rows": done["rows"], "bytes": done["bytes"], "crc32": done["crc32"]}
    except (OSError, ValueError, KeyError, TypeError):  # none, or torn
        pass
    return {"rows": 0, "bytes": 0, "crc32": 0}


def _open_whole(path: Path, description: dict) -> np.ndarray | None:
    """The cached features [N,D], or None unless description, size, sum and shape all agree."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        total = 0
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total = zlib.crc32(block, total)
        if (record["description"], record["crc32"]) != (description, total):
            return None
        features = np.load(path, mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    right = features.ndim == 2 and features.dtype == np.float32
    return features if right and len(features) == description["images"] else None


def _npy_header(n: int, dim: int) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (n, dim)})
    return header.getvalue()


def _write_json(path: Path, content: dict) -> None:
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(json.dumps(content, indent=1))
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


@contextmanager
def _writing(folder: Path):
    try:
        yield
    except OSError as error:
        raise OSError(f"the cache folder {folder} cannot be written ({error.strerror or error}): "
                      "set TSP_CACHE to a folder that can") from error
