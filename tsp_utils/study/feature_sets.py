"""Features with their labels, as notebooks and records use them: extracted, or bundled vectors."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from tsp_utils.backbones import BACKBONES, load_backbone
from tsp_utils.datasets import DATASETS, load_dataset
from tsp_utils.features import cached_features
from tsp_utils.files.paths import IS_CLONE, bundled_dir, data_dir, write_whole


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
    """Where the bundled vectors of a data set's images under a backbone are.

    Of an installed package, which nobody writes into, what was taken in is with the user's data.
    """
    name = f"{dataset}_{split}_{backbone}.safetensors"
    shipped = bundled_dir() / "vectors" / name
    return shipped if IS_CLONE or shipped.exists() else data_dir() / "vectors" / name


def load_vectors(dataset: str, backbone: str, split: str = "test") -> FeatureSet:
    """Bundled vectors (fp16 on disk). Raises FileNotFoundError where none ship."""
    path = vectors_path(dataset, backbone, split)
    if not path.exists():
        raise FileNotFoundError(f"No vectors of {dataset} under {backbone} are bundled; run the "
                                f"profile small, which extracts them from the images.")
    with safe_open(path, "np") as file:
        return FeatureSet(dataset, split, backbone, file.get_tensor("features").astype(np.float32),
                          file.get_tensor("labels").astype(np.int64),
                          tuple(json.loads(file.metadata()["classes"])))


def vectors_sha256(features: np.ndarray, labels: np.ndarray) -> str:
    """Hex SHA-256 of features and labels as they are stored."""
    return hashlib.sha256(features.tobytes() + labels.tobytes()).hexdigest()


def take_in_vectors(file: str | Path) -> tuple[Path, dict[str, str]]:
    """Put a file of `make paper-vectors` where `load_vectors` looks; its path there and its card.

    Raises ValueError for a file that is damaged or not what its card says, FileExistsError where
    other vectors are in its place.
    """
    try:
        content = Path(file).read_bytes()
        with safe_open(file, "np") as opened:
            card = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        card, arrays = {}, None
    if fault := next(_faults(arrays, card), ""):
        raise ValueError(f"{file} is not taken in: {fault}; make paper-vectors writes one that is.")
    path = vectors_path(card["dataset"], card["backbone"], card["split"])
    if path.exists() and path.read_bytes() != content:
        raise FileExistsError(f"{path} holds other vectors; delete it to take in {file}.")
    write_whole(path, lambda out: out.write(content))
    return path, card


def _faults(arrays: dict[str, np.ndarray] | None, card: dict[str, str]):
    """What is wrong with vectors from elsewhere: the first is what the others rely on."""
    if arrays is None:
        yield "it is missing, cut off, or no safetensors file"
    dataset, split, backbone = (card.get(key, "") for key in ("dataset", "split", "backbone"))
    if dataset not in DATASETS or split not in DATASETS[dataset].splits:
        yield f"its card names the data set {dataset!r}, split {split!r}, which is not known"
    if backbone not in BACKBONES or BACKBONES[backbone].source != "url":
        yield f"its card names the backbone {backbone!r}, which is none of the paper's networks"
    info = DATASETS[dataset]
    n, dim = info.splits[split], BACKBONES[backbone].dim
    n_classes = max(1, len(info.classes))
    due = {"features": f"float16 {[n, dim]}", "labels": f"uint8 {[n]}"}
    held = {name: f"{array.dtype} {list(array.shape)}" for name, array in sorted(arrays.items())}
    if held != due:
        yield f"it holds {held} where {due} is due"
    features, labels = arrays["features"], arrays["labels"]
    lengths = np.linalg.norm(features.astype(np.float32), axis=1)
    good = np.isfinite(lengths) & (lengths > 0)
    if not good.all():
        yield f"row {np.argmin(good)} of its features is zero or not finite"
    if (np.bincount(labels, minlength=n_classes) != n // n_classes).any():
        yield f"its labels are not {n // n_classes:,} of each class from 0 to {n_classes - 1}"
    if card.get("classes") != json.dumps(info.classes):
        yield "its card does not name the classes of its data set in their order"
    if card.get("sha256") != vectors_sha256(features, labels):
        yield "its vectors are not those whose SHA-256 its card has"
    if not re.fullmatch("[0-9a-f]{64}", card.get("weights_sha256", "")):
        yield "its card lacks the SHA-256 of the file of weights"


_backbone = lru_cache(maxsize=4)(load_backbone)


def load_images(dataset: str, split: str, n_images: int | None = None):
    """Labelled images of a split, or n_images of them evenly spaced (folders lie class by class).

    Raises ValueError for a set without labels, against which no lesson could be scored.
    """
    return _load_images(dataset, split, n_images, data_dir())


@lru_cache(maxsize=2)  # a notebook asks for the same two splits again and again
def _load_images(dataset: str, split: str, n_images: int | None, root: Path):
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
    return FeatureSet(images.name, images.split, backbone,
                      cached_features(_backbone(backbone), images), images.labels, images.classes)
