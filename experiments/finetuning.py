"""The full runs of claim C7: fine-tuning against the frozen arm, five seeds, two learning rates.

Labels are read by the read-outs alone. Notebook 06 draws the committed records.
"""

import copy
import logging
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from tsp_utils import cache
from tsp_utils.backbones import Backbone, load_backbone
from tsp_utils.cache import hardware, versions
from tsp_utils.datasets import ImageDataset, load_dataset
from tsp_utils.features import extract_features
from tsp_utils.files.paths import bundled_dir, write_lines
from tsp_utils.heads import LinearHeads, init_heads, train_heads
from tsp_utils.k_means import kmeans
from tsp_utils.metrics import clustering_metrics
from tsp_utils.neighbors import WEIGHTINGS, label_consistency, nearest_neighbors
from tsp_utils.networks.weights import attention
from tsp_utils.scaling import Scaler
from tsp_utils.study.feature_sets import draw_rows
from tsp_utils.systems.finetune import finetune

logger = logging.getLogger(__name__)

N_IMAGES, N_SEEDS, MAP_POINTS = 10_000, 5, 2_000
SOURCE_TOO = "1e-4, source images too"  # as many source images as target images, mixed in
# Each run: how many seeds, what differs from `finetune`'s defaults.
VARIANTS = {
    "frozen": (5, dict(trained="nothing")),
    "1e-4": (5, dict(learning_rate=1e-4)),
    "1e-5": (5, dict(learning_rate=1e-5)),
    "1e-4, last block only": (1, dict(learning_rate=1e-4, trained="last block")),
    "1e-4, first neighbours kept": (1, dict(learning_rate=1e-4, refresh=False)),
    SOURCE_TOO: (1, dict(learning_rate=1e-4)),
}


def run_finetuning(backbone_name: str = "vit_nano_cpu") -> Path:
    """Fine-tune from the same starting heads, every variant and seed; returns the records' path.

    Needs CIFAR-10 and Tiny-ImageNet; about an hour on one core, resumed run by run. 10,000 images
    drawn once from CIFAR-10's train split, scored on all of test before and after each of three
    epochs.
    """
    with attention(fused=torch.cuda.is_available()):
        backbone = load_backbone(backbone_name)
    (target, test, scaler, starts), records = starting_point(backbone), []
    for variant, (n_seeds, options) in VARIANTS.items():
        for seed in range(n_seeds):
            wanted = {"variant": variant, "seed": seed, "backbone": backbone_name,
                      "target": "cifar10", "n_images": N_IMAGES, "options": options,
                      "code": code_of_the_runs()}

            mixed_in = [source_images()] if variant == SOURCE_TOO else []

            def make(variant=variant, seed=seed, options=options, mixed_in=mixed_in) -> dict:
                images = np.concatenate([target.images, *mixed_in])
                return _run(backbone, starts, seed, images, test, scaler.scale_, options,
                            keep_map=variant == "1e-4" and seed == 0)

            name = f"finetuning {variant} {seed}"
            inputs = [wanted, target.fingerprint, test.fingerprint, *mixed_in]
            records.append(wanted | cache.record("records", name, inputs, [], make))
            logger.info("%s, seed %d: %s", variant, seed, records[-1]["epochs"][-1])
    return write_lines(bundled_dir() / "readouts" / "finetuning.json", records)


def starting_point(backbone) -> tuple[ImageDataset, ImageDataset, Scaler, LinearHeads]:
    """What every run shares: images to learn from and to score, the scaler, heads to start from."""
    target, test = load_dataset("cifar10", "train"), load_dataset("cifar10", "test")
    target = target.subset(draw_rows(len(target), N_IMAGES))
    features = extract_features(backbone, target.images, progress=False)
    scaler = Scaler().fit(features)
    return target, test, scaler, _starting_heads(scaler.transform(features), len(target.classes))


def code_of_the_runs() -> str:
    """The key of the code behind a record."""
    return cache.code_of(finetune, WEIGHTINGS["gaussian"], _starting_heads, _run, Backbone,
                         Scaler.fit, Scaler.transform)


def source_images() -> np.ndarray:
    """Images of the backbone's own pretraining set, drawn once: uint8 [N, 32, 32, 3]."""
    source = load_dataset("tinyimagenet32", "train")
    return source.subset(draw_rows(len(source), N_IMAGES)).images


def _starting_heads(scaled, n_clusters: int) -> LinearHeads:
    """The heads of the frozen features, trained in full: every variant starts from these."""
    seeds = range(N_SEEDS)
    heads = init_heads(scaled, n_clusters, seeds, centers=kmeans(scaled, n_clusters, seeds).centers)
    train_heads(heads, scaled, nearest_neighbors(scaled, 20), progress=False)
    return heads


def head_of(heads: LinearHeads, seed: int) -> LinearHeads:
    """A copy of one seed's head, which can be trained alone."""
    one = copy.deepcopy(heads)
    one.weight.data = heads.weight.detach()[seed : seed + 1].clone()
    one.bias.data = heads.bias.detach()[seed : seed + 1].clone()
    one.seeds = (seed,)
    return one


def read_out(epoch: int, x: np.ndarray, head: LinearHeads, labels: np.ndarray) -> dict:
    """What one head and its scaled features x [N, D] are worth after an epoch, in percent."""
    clusters = head.predict(x)[0]
    consistency = label_consistency(nearest_neighbors(x, 20), labels)[-1]
    scores = clustering_metrics(labels, clusters) | {"consistency": float(consistency)}
    return {"epoch": epoch, "n_nonempty": len(set(clusters.tolist()))} | {
        name: round(100 * value, 3) for name, value in scores.items()}


def _run(backbone, starts, seed, images, test: ImageDataset, scale, options, keep_map) -> dict:
    epochs, vectors, chosen = [], {}, draw_rows(len(test), MAP_POINTS)

    def keep(epoch, network, head):
        x = extract_features(network, test.images, progress=False) * np.float32(scale)
        epochs.append(read_out(epoch, x, head, test.labels))
        vectors["before" if epoch == 0 else "after"] = x[chosen].astype(np.float16)

    start = time.perf_counter()
    finetune(backbone, head_of(starts, seed), images, scale=scale, callback=keep, **options)
    if keep_map:
        save_file(vectors | {"labels": test.labels[chosen].astype(np.uint8)},
                  bundled_dir() / "readouts" / "finetuning_map.safetensors")
    return {"epochs": epochs, "seconds": round(time.perf_counter() - start, 1),
            "hardware": hardware(backbone.device.type), "versions": versions()}
