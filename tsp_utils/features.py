"""Features: images -> latent vectors in bounded memory, kept image by image."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm.auto import tqdm

from tsp_utils import cache
from tsp_utils.files.paths import cache_dir


class Encoder(Protocol):
    """A backbone as it is asked for vectors: a `Backbone`, or what has these."""

    name: str

    def describe(self) -> dict: ...  # all that shapes a vector, as JSON values

    def prepare(self, images): ...  # uint8 [B,H,W,C], or images one by one -> its input x

    def encode(self, x): ...  # x -> [B,D]


def extract_features(backbone: Encoder, images, batch_size: int = 256, progress: bool = True,
                     out: np.ndarray | None = None) -> np.ndarray:
    """Pass images through a backbone, a batch at a time.

    images: uint8 [N,H,W,C] or a sequence of [H,W,C]; returns float32 [N,D], `out` where that is
    given. Raises ValueError for no images, non-finite features or an `out` of another shape.
    """
    for rows, features in _feature_batches(backbone, images, range(len(images)), batch_size,
                                           progress):
        shape = (len(images), features.shape[1])
        out = np.empty(shape, np.float32) if out is None else out
        if out.shape != shape:
            raise ValueError(f"out has shape {list(out.shape)}: pass one of {list(shape)}")
        out[rows[0] : rows[-1] + 1] = features
    return out  # type: ignore[return-value]


def cached_features(backbone: Encoder, dataset, folder: str | os.PathLike | None = None,
                    batch_size: int = 256, progress: bool = True, maker: str = "") -> np.ndarray:
    """Features of a data set: of images that were seen before, in whatever set, from the cache.

    folder: by default `features` in TSP_CACHE. Returns a read-only map float32 [N,D]. A vector
    depends on the image, on the backbone (its weights, its transform) and on the code of both. An
    extraction that was killed goes on where it stopped. Processes wait for each other, but for
    those with different names as maker, which are given different images. Raises what
    `extract_features` raises, TypeError for what is no data set, OSError for a read-only folder.
    """
    if not hasattr(dataset, "images"):
        raise TypeError(f"cached_features takes a data set, and this is of type "
                        f"{type(dataset).__name__}: pass load_dataset(NAME or FOLDER), or images "
                        f"in an array to extract_features")
    images = dataset.images
    if not len(images):
        raise ValueError("0 images: pass at least one")
    sees_any_size = getattr(getattr(backbone, "spec", None), "input_size", 1) is None
    inputs = {"backbone": backbone.describe(),
              "image_shape": list(images[0].shape) if sees_any_size else None}
    digests = getattr(images, "digests", None) or array_digests(images)
    return cache.rows(Path(folder) if folder is not None else cache_dir() / "features",
                      backbone.name, inputs, [_feature_batches, *code_that_sees(backbone, images)],
                      digests,
                      lambda rows: _feature_batches(backbone, images, rows, batch_size, progress),
                      maker)


def code_that_sees(backbone, images) -> list:
    """What shapes a vector beside weights and settings: backbone, network and reader of files."""
    model = getattr(backbone, "model", None)
    parts = model.modules() if model is not None else ()
    return [backbone, *parts, *([] if isinstance(images, np.ndarray) else [type(images)])]


def array_digests(images) -> list[bytes]:
    """16 bytes an image, of its shape and its pixels."""
    return [hashlib.blake2b(str(image.shape).encode() + np.ascontiguousarray(image).tobytes(),
                            digest_size=16).digest() for image in images]


def _feature_batches(backbone, images, rows, batch_size, progress
                     ) -> Iterator[tuple[list[int], np.ndarray]]:
    """(rows, float32 [B,D]) of the images of these rows; the next batch is prepared meanwhile."""
    n = len(rows)
    if n == 0 or batch_size < 1:
        raise ValueError(f"{n} images in batches of {batch_size}: pass at least one of each")
    batches = [list(rows[start : start + batch_size]) for start in range(0, n, batch_size)]

    def prepare(batch):
        if isinstance(images, np.ndarray):
            return backbone.prepare(images[batch])
        return backbone.prepare(images[i] for i in batch)

    width, bar = None, tqdm(total=len(images), initial=len(images) - n, unit="image",
                            desc=backbone.name, disable=not progress)
    with ThreadPoolExecutor(1) as pool, bar:
        ahead = pool.submit(prepare, batches[0])
        for at, batch in enumerate(batches):
            ready = ahead.result()
            if at + 1 < len(batches):
                ahead = pool.submit(prepare, batches[at + 1])
            features = np.asarray(backbone.encode(ready), np.float32)  # [B,D]
            finite = np.isfinite(features).all(1)  # [B]
            if not finite.all():
                raise ValueError(f"{backbone.name} gave NaN or infinite features, first in row "
                                 f"{batch[int(np.argmin(finite))]}: check its weights, or load it "
                                 "with dtype='float32'")
            if width not in (None, features.shape[1]):
                raise ValueError(f"{backbone.name} gave {features.shape[1]} features in row "
                                 f"{batch[0]} and {width} before: pass images of one size")
            width = features.shape[1]
            yield batch, features
            bar.update(len(features))
