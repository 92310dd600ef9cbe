"""C6 without a GPU: dictionaries of patches learned from the source or the target alone.

Many pretraining seeds an arm, at equal patches seen. Labels are read by the read-outs alone.
"""

import logging
import time
from pathlib import Path

import torch

from experiments.arms import ARMS, arm_images
from tsp_utils import cache
from tsp_utils.backbones import BACKBONES, Backbone, load_backbone
from tsp_utils.cache import hardware, versions
from tsp_utils.datasets import load_dataset
from tsp_utils.features import extract_features
from tsp_utils.files.paths import bundled_dir, write_lines
from tsp_utils.networks.patch_kmeans import PatchKMeans
from tsp_utils.pretraining.dictionary import learn_patch_kmeans
from tsp_utils.study.feature_sets import FeatureSet
from tsp_utils.study.frozen_evaluation import read_out

logger = logging.getLogger(__name__)

# Smaller than the bundled dictionary (1,536 atoms), so that ten seeds of every arm take minutes.
SETTINGS = dict(n_atoms=256, n_patches=100_000, n_features=128, n_pca_images=4_000)
# Our arm's name, the pretraining arm that has the same images, patches relative to the source's.
DICTIONARY_ARMS = {
    "source": ("vit_nano", 1),
    "target 4,000": ("vit_nano_cifar10_4k", 1),
    "target 12,500": ("vit_nano_cifar10_12k", 1),
    "target 50,000": ("vit_nano_cifar10", 1),
    "source and target": ("vit_nano_union", 1),
    "target 4,000, equal epochs": ("vit_nano_cifar10_4k", 25),
}


def learn_dictionary_arms(n_seeds: int = 10, n_heads: int = 5) -> Path:
    """Learn every arm's dictionaries and read each out on CIFAR-10's test images.

    Needs both data sets; 36 minutes on one core, resumed dictionary by dictionary. Returns the path
    of the records.
    """
    target, records = load_dataset("cifar10", "test"), []
    for name, (twin, fewer) in DICTIONARY_ARMS.items():
        for seed in range(n_seeds):
            settings = SETTINGS | dict(n_patches=SETTINGS["n_patches"] // fewer, seed=seed)
            wanted = {"arm": name, "source": ARMS[twin].source, "settings": settings,
                      "n_heads": n_heads, "code": code_of_the_arms()}
            records.append(wanted | cache.record(
                "records", f"dictionary {name} {seed}", wanted, [],
                lambda wanted=wanted, twin=twin: _learn_and_read_out(wanted, twin, target)))
            logger.info("%s, seed %d: %.1f s", name, seed, records[-1]["seconds"])
    return write_lines(bundled_dir() / "readouts" / "dictionaries.json", records)


def code_of_the_arms() -> str:
    """The key of the code behind a record, but for that which reads images and networks."""
    return cache.code_of(learn_patch_kmeans, PatchKMeans, Backbone, read_out,
                         given=(load_dataset, load_backbone))


def _learn_and_read_out(wanted: dict, twin: str, target) -> dict:
    start = time.perf_counter()
    network = learn_patch_kmeans(arm_images(ARMS[twin]), **wanted["settings"])
    backbone = Backbone(BACKBONES["patch_kmeans"], network, torch.device("cpu"), torch.float32)
    name = f"dictionary {wanted['arm']} {wanted['settings']['seed']}"
    found = FeatureSet("cifar10", "test", name, extract_features(backbone, target.images),
                       target.labels, target.classes)
    return read_out(found, wanted["n_heads"]) | {
        "seconds": round(time.perf_counter() - start, 1), "hardware": hardware("cpu"),
        "versions": versions()}
