"""Making again what ships in bundled/: the dictionaries of patches, the networks, the vectors."""

import datetime
import hashlib
import inspect
import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from experiments.arms import ARMS, find_arm
from tsp_utils.backbones import load_backbone
from tsp_utils.cache import versions
from tsp_utils.datasets import DATASETS, load_dataset
from tsp_utils.features import cached_features
from tsp_utils.files.paths import (
    bundled_dir,
    data_dir,
    runs_dir,
    write_json,
    write_lines,
    write_whole,
)
from tsp_utils.neighbors import knn_accuracy
from tsp_utils.networks.registry import spec_of_recipe
from tsp_utils.networks.weights import file_sha256
from tsp_utils.pretraining.dictionary import learn_patch_kmeans
from tsp_utils.pretraining.invariant import learn_invariant_patches
from tsp_utils.study.feature_sets import FeatureSet, vectors_path, vectors_sha256
from tsp_utils.study.frozen_evaluation import read_out, small_pool_consistency
from tsp_utils.study.profile import load_study

logger = logging.getLogger(__name__)

PRETRAINED = ("vit_nano_cpu", "vit_nano_cpu_cifar10_4k", "vit_pico_cpu", "resnet_nano_cpu",
              "resnet_contrast_cifar10")
VECTOR_BACKBONES = ("vit_mini_random", "patch_kmeans", "invariant_patches", *PRETRAINED)
FASHION_BACKBONES = ("vit_mini_random", "vit_nano_cpu")
MOST_BYTES = 16_000_000  # of one network that ships
C5_CLASSES = range(0, 200, 20)  # of Tiny-ImageNet, in the order of their names; 50 images each


def learn_patches(out: str | None = None, seed: int = 0) -> Path:
    """Learn patch_kmeans from Tiny-ImageNet's train split and write it with its card.

    Needs tinyimagenet32 as an image folder; minutes on two cores. Returns the path of the weights.
    """
    defaults = inspect.signature(learn_patch_kmeans).parameters

    def learn(images):
        network = learn_patch_kmeans(images, seed=seed)
        return network, {
            "method": "Coates, Lee and Ng (2011): K-means over whitened 6x6 patches, no labels, no "
                      "gradients; triangle activation, four quadrants, PCA",
            "atoms": len(network.atoms), "patches": defaults["n_patches"].default,
            "dim": network.axes.shape[1], "pca_images": defaults["n_pca_images"].default,
            "seed": seed}

    return _learn_with_card("patch_kmeans", out, learn)


def learn_invariant(out: str | None = None, seed: int = 0) -> Path:
    """Learn invariant_patches from Tiny-ImageNet's train split and write it with its card.

    Needs tinyimagenet32 as an image folder; 20 minutes of processor time. Returns the path of
    the weights.
    """
    defaults = inspect.signature(learn_invariant_patches).parameters

    def learn(images):
        seconds, start = {}, (time.perf_counter(), time.process_time())

        def note(stage):
            seconds[stage] = round(time.perf_counter() - start[0] - sum(seconds.values()), 1)
            logger.info("%s: %.1f s", stage, seconds[stage])

        network = learn_invariant_patches(images, seed=seed, on_stage=note)
        return network, {
            "method": "Fisher's discriminant with every image as its own class and its augmented "
                      "views as samples, on soft-thresholded products with K-means atoms of "
                      "whitened patches, no labels, no gradients; 3 x 3 overlapping cells, square "
                      "root",
            "sizes": network.sizes, "atoms": defaults["n_atoms"].default,
            "patches": defaults["n_patches"].default, "dim": network.axes.shape[1],
            **{name: defaults[name].default for name in ("n_views", "reg", "power")},
            "seed": seed, "seconds": seconds,
            "cpu_minutes": round((time.process_time() - start[1]) / 60, 1)}

    return _learn_with_card("invariant_patches", out, learn)


def _learn_with_card(name: str, out: str | None, learn) -> Path:
    """Write the network that `learn` makes of the source's images, and its card beside it.

    learn: images uint8 [N, 32, 32, 3] -> the network, and what the card says of it.
    """
    path = Path(out) if out else bundled_dir() / f"{name}.safetensors"
    learned = path.with_name(f".{path.name}.new")  # takes its place when its card is known
    path.parent.mkdir(parents=True, exist_ok=True)  # before the minutes, not after
    source = load_dataset("tinyimagenet32", "train")
    start = time.perf_counter()
    network, about = learn(source.images)
    minutes = round((time.perf_counter() - start) / 60, 1)
    network.save(learned)
    card = {
        "name": name,
        "source": "tinyimagenet32, train split, 32 px JPEG (ImageNet's terms: research only)",
        "n_source_images": len(source), "source_sha256": source.fingerprint, **about,
        "minutes": minutes, "hardware": f"{os.cpu_count()} CPU cores",
        "sha256": hashlib.sha256(learned.read_bytes()).hexdigest(), "versions": versions(),
        "knn": knn_readouts(load_backbone(name, checkpoint=learned)),
    }
    write_json(path.with_suffix(".json"), card, indent=1)
    learned.replace(path)
    return path


def bundle_backbone(name: str) -> Path:
    """Put a finished pretraining arm into bundled/: weights, model card and read-outs.

    Of other seeds, equal epochs, a mini network at nano's budget and networks above 16 MB the
    read-outs alone. Needs `python -m experiments pretrain NAME` to have finished, and both data
    sets; nothing is written before all is computed. Returns the path of what it wrote last. Raises
    ValueError for an unknown arm, FileNotFoundError for one that has not finished.
    """
    arm, folder = find_arm(name), runs_dir() / "pretrain" / name
    if not (folder / "log.json").exists():
        raise FileNotFoundError(f"The arm {name} has not finished; run python -m experiments "
                                f"pretrain {name} first.")
    weights, records = (folder / "final.safetensors").read_bytes(), readouts_of(name, folder)
    out = bundled_dir() / "readouts" / f"{name}.json"
    if arm.seed or name.endswith(("_epochs", "_short")) or len(weights) > MOST_BYTES:
        write_lines(out, records)
        return out
    card = json.loads((folder / "log.json").read_text())
    network = _network_of(name, folder / "final.safetensors")
    card |= {"sha256": hashlib.sha256(weights).hexdigest(),
             "terms_of_the_images": [DATASETS[data].source for data in arm.data],
             "licence_of_the_weights": "MIT, as this repository",
             "knn": knn_readouts(network)}
    if "tinyimagenet32" in arm.data:
        card["knn"]["tinyimagenet32, train to val"] = _in_domain(network)
    write_lines(out, records)
    write_json(bundled_dir() / f"{name}.json", card, indent=1)
    path = bundled_dir() / f"{name}.safetensors"
    write_whole(path, lambda file: file.write(weights))
    return path


def _network_of(name: str, weights: Path):
    """The arm's network with weights of a file, as `load_backbone` gives it."""
    return load_backbone(spec_of_recipe(name, asdict(ARMS[name].recipe), str(weights)))


def readouts_of(name: str, folder: Path) -> list[dict]:
    """What the arm's checkpoints are worth on CIFAR-10's test images, a record each."""
    target, source = load_dataset("cifar10", "test"), load_dataset("tinyimagenet32", "val")
    inside, records = source.subset(np.isin(source.labels, C5_CLASSES)), []
    for mark in ("start", "quarter", "half", "final"):
        if mark != "final" and not (folder / f"{mark}.safetensors").exists():
            continue  # an arm of before, or one that lost it
        network = _network_of(name, folder / f"{mark}.safetensors")
        shifted, home = (FeatureSet(images.name, images.split, f"{name} {mark}",
                                    cached_features(network, images), images.labels, images.classes)
                         for images in (target, inside))
        records.append({"backbone": name, "checkpoint": mark} | read_out(shifted) | {
            "consistency@20 within 500 images": {
                where: round(float(small_pool_consistency(found).mean()), 3)
                for where, found in (("tinyimagenet32 val", home), ("cifar10 test", shifted))}})
    return records


def _in_domain(network) -> float:
    """Weighted kNN accuracy on the source itself: Tiny-ImageNet's train images vote on its val."""
    train, val = (load_dataset("tinyimagenet32", split) for split in ("train", "val"))
    return round(100 * knn_accuracy(cached_features(network, train), train.labels,
                                    cached_features(network, val), val.labels), 2)


def knn_readouts(network) -> dict[str, float]:
    """Weighted kNN accuracy (K = 20, percent) on the targets, read once after learning."""
    train, test = (load_dataset("cifar10", split) for split in ("train", "test"))
    fashion = load_dataset("fashion-mnist", "test")
    cifar = [cached_features(network, images) for images in (train, test)]
    return {
        "cifar10, train to test": round(
            100 * knn_accuracy(cifar[0], train.labels, cifar[1], test.labels), 2),
        "fashion-mnist test, leave-one-out": round(
            100 * knn_accuracy(cached_features(network, fashion), fashion.labels), 2),
    }


def extract_bundled_vectors(backbones=VECTOR_BACKBONES) -> list[Path]:
    """Write the fp16 vectors of CIFAR-10's test images, and of C5's 500 images in domain.

    Of Fashion-MNIST, whose images ship, those of the two transformers: a processor with bf16
    computes others than one without, and Table 1 is to be the same on both.
    """
    target, source = load_dataset("cifar10", "test"), load_dataset("tinyimagenet32", "val")
    inside, fashion = (source.subset(np.isin(source.labels, C5_CLASSES)),
                       load_dataset("fashion-mnist", "test"))
    pairs = [(name, images) for name in backbones for images in (target, inside)]
    pairs += [(name, fashion) for name in backbones if name in FASHION_BACKBONES]
    return [save_vectors(FeatureSet(images.name, images.split, name,
                                    cached_features(load_backbone(name), images),
                                    images.labels, images.classes))
            for name, images in pairs]


def save_vectors(found: FeatureSet, path: Path | None = None, **card: str) -> Path:
    """Write a feature set in the bundle's format: fp16 features, uint8 labels, its card."""
    path = path or vectors_path(found.dataset, found.backbone, found.split)
    features, labels = found.features.astype(np.float16), found.labels.astype(np.uint8)
    card |= {"classes": json.dumps(found.classes), "dataset": found.dataset, "split": found.split,
             "backbone": found.backbone, "sha256": vectors_sha256(features, labels)}
    content = save({"features": features, "labels": labels}, card)
    write_whole(path, lambda file: file.write(content))
    return path


def export_paper_vectors(train: bool = False) -> list[Path]:
    """The vectors that `make paper-mini` extracted, a file a split, for `bundle-vectors`.

    What is not in the cache is extracted. The card says what made them: `Backbone.describe`, the
    SHA-256 of the file of weights, versions and date.
    """
    study = load_study("paper-mini")
    dataset, network = study.datasets[0], load_backbone(study.default_backbone)
    card = {"network": json.dumps(network.describe()), "versions": json.dumps(versions()),
            "weights_sha256": file_sha256(data_dir() / "weights" / network.spec.file),
            "date": datetime.date.today().isoformat()}
    folder = study.run_dir / "vectors"
    return [save_vectors(study.features(dataset, network.name, split),
                         folder / vectors_path(dataset, network.name, split).name, **card)
            for split in ("test", "train")[:1 + train]]
