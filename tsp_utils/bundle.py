"""Making again what ships in bundled/: the dictionary of patches and the feature vectors."""

import hashlib
import inspect
import json
import os
import time
from pathlib import Path

from tsp_utils.backbones import load_backbone
from tsp_utils.datasets import load_dataset
from tsp_utils.feature_sets import FeatureSet, save_vectors
from tsp_utils.features import cached_features
from tsp_utils.head_runs import versions
from tsp_utils.neighbors import knn_accuracy
from tsp_utils.patch_kmeans import learn_patch_kmeans
from tsp_utils.paths import bundled_dir

VECTOR_BACKBONES = ("vit_mini_random", "patch_kmeans")


def learn_patches(out: str | None = None, seed: int = 0) -> Path:
    """Learn patch_kmeans from Tiny-ImageNet's train split and write it with its card.

    Needs tinyimagenet32 as an image folder; minutes on two cores. Returns the path of the weights.
    """
    path = Path(out) if out else bundled_dir() / "patch_kmeans.safetensors"
    source = load_dataset("tinyimagenet32", "train")
    start = time.perf_counter()
    network = learn_patch_kmeans(source.images, seed=seed)
    network.save(path)
    defaults = inspect.signature(learn_patch_kmeans).parameters
    card = {
        "name": "patch_kmeans",
        "method": "Coates, Lee and Ng (2011): K-means over whitened 6x6 patches, no labels, no "
                  "gradients; triangle activation, four quadrants, PCA",
        "source": "tinyimagenet32, train split, 32 px JPEG (ImageNet's terms: research only)",
        "n_source_images": len(source), "source_sha256": source.fingerprint,
        "atoms": len(network.atoms), "patches": defaults["n_patches"].default,
        "dim": network.axes.shape[1], "pca_images": defaults["n_pca_images"].default, "seed": seed,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "hardware": f"{os.cpu_count()} CPU cores",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "versions": versions(),
        "knn": knn_readouts("patch_kmeans", path),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return path


def knn_readouts(backbone: str, checkpoint=None) -> dict[str, float]:
    """Weighted kNN accuracy (K = 20, percent) on the targets, read once after learning."""
    network = load_backbone(backbone, checkpoint=checkpoint)
    train, test = (load_dataset("cifar10", split) for split in ("train", "test"))
    fashion = load_dataset("fashion-mnist", "test")
    cifar = [cached_features(network, images) for images in (train, test)]
    return {
        "cifar10, train to test": round(
            100 * knn_accuracy(cifar[0], train.labels, cifar[1], test.labels), 2),
        "fashion-mnist test, leave-one-out": round(
            100 * knn_accuracy(cached_features(network, fashion), fashion.labels), 2),
    }


def bundle_vectors(backbones=VECTOR_BACKBONES) -> list[Path]:
    """Write the fp16 vectors of CIFAR-10's test images under each bundled backbone."""
    images = load_dataset("cifar10", "test")
    return [save_vectors(FeatureSet("cifar10", "test", name,
                                    cached_features(load_backbone(name), images),
                                    images.labels, images.classes)) for name in backbones]
