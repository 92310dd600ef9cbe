"""Features with their labels, as notebooks and records use them: extracted, or bundled vectors."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from tsp_utils.paths import bundled_dir, data_dir


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Vectors of one split under one backbone: features float32 [N, D], labels int64 [N]."""

    dataset: str
    split: str
    backbone: str
    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def n_clusters(self) -> int:
        """C, assumed known as in every system of this family (Sec. 3.2): the distinct labels."""
        return len(np.unique(self.labels))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the vectors, not of the labels."""
        return hashlib.sha256(np.ascontiguousarray(self.features)).hexdigest()[:16]


def vectors_path(dataset: str, backbone: str, split: str = "test") -> Path:
    """Where the bundled vectors of a data set's images under a backbone are."""
    return bundled_dir() / "vectors" / f"{dataset}_{split}_{backbone}.safetensors"


def load_vectors(dataset: str, backbone: str, split: str = "test") -> FeatureSet:
    """Bundled vectors (fp16 on disk). Raises FileNotFoundError where none ship."""
    from safetensors import safe_open

    path = vectors_path(dataset, backbone, split)
    if not path.exists():
        raise FileNotFoundError(f"No vectors of {dataset} under {backbone} are bundled; run the "
                                f"profile small, which extracts them from the images.")
    with safe_open(path, "np") as file:
        return FeatureSet(dataset, split, backbone, file.get_tensor("features").astype(np.float32),
                          file.get_tensor("labels").astype(np.int64),
                          tuple(json.loads(file.metadata()["classes"])))


def save_vectors(found: FeatureSet) -> Path:
    """Write a feature set as bundled vectors: fp16 features, uint8 labels, its provenance."""
    from safetensors.numpy import save_file

    path = vectors_path(found.dataset, found.backbone, found.split)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": found.features.astype(np.float16),
               "labels": found.labels.astype(np.uint8)}, path,
              {"classes": json.dumps(found.classes), "dataset": found.dataset,
               "split": found.split, "backbone": found.backbone})
    return path


@lru_cache(maxsize=4)
def _backbone(name: str):
    from tsp_utils.backbones import load_backbone
    return load_backbone(name)


def load_images(dataset: str, split: str, n_images: int | None = None):
    """Labelled images of a split, or n_images of them evenly spaced (folders lie class by class).

    Raises ValueError for a set without labels, against which no lesson could be scored.
    """
    return _load_images(dataset, split, n_images, data_dir())


@lru_cache(maxsize=2)  # a notebook asks for the same two splits again and again
def _load_images(dataset: str, split: str, n_images: int | None, root: Path):
    from tsp_utils.datasets import load_dataset

    images = load_dataset(dataset, split, root)
    if images.labels is None:
        raise ValueError(f"{dataset} has no labels, and this study scores clusters against them; "
                         f"lay its images out as one folder a class.")
    return images if n_images is None else images.subset(spread_rows(len(images), n_images))


def spread_rows(n: int, n_rows: int | None) -> np.ndarray:
    """n_rows of n row numbers, evenly spaced; all of them for None."""
    return np.arange(n) if n_rows is None else np.linspace(0, n - 1, min(n, n_rows)).astype(int)


def draw_rows(n: int, n_rows: int) -> np.ndarray:
    """n_rows of n row numbers, drawn once by seed 0 and without labels, in order; at most all."""
    return np.sort(np.random.default_rng(0).permutation(n)[:n_rows])


def extract(backbone: str, images) -> FeatureSet:
    """Features of an `ImageDataset`, through the cache."""
    from tsp_utils.features import cached_features

    return FeatureSet(images.name, images.split, backbone,
                      cached_features(_backbone(backbone), images), images.labels, images.classes)
