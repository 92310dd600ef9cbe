"""C6 without a GPU, by one eigenproblem: backbones learned from the source, the target, or both.

Equal views an arm, many replicates. Labels are read by the read-outs alone.
"""

import functools
import logging
import time
from pathlib import Path

import joblib
import numpy as np
import torch

from tsp_utils import cache
from tsp_utils.backbones import BACKBONES, Backbone, load_backbone
from tsp_utils.datasets import load_dataset
from tsp_utils.features import extract_features
from tsp_utils.files.paths import bundled_dir, write_lines
from tsp_utils.networks.invariant_patches import InvariantPatches
from tsp_utils.pretraining.invariant import (
    activations_of_views,
    between_within,
    learn_filters,
    projection,
)
from tsp_utils.study.feature_sets import FeatureSet
from tsp_utils.study.frozen_evaluation import read_out

logger = logging.getLogger(__name__)

# The recipe of `invariant_patches`, smaller: one size of patches.
SIZE, POWER = 4, 0.25
SETTINGS = dict(n_atoms=256, n_patches=100_000, n_features=256, n_views=200_000)
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3)  # relative to S_w's largest eigenvalue
# Name: images of the source and of the target, replicates. C6 compares the first two.
INVARIANT_ARMS = {
    "source 100,000": (100_000, 0, 10), "target 4,000": (0, 4_000, 10),
    "target 12,500": (0, 12_500, 3), "target 50,000": (0, 50_000, 3),
    "source 4,000": (4_000, 0, 3), "source 20,000": (20_000, 0, 3),
    "union 96,000 + 4,000": (96_000, 4_000, 3), "union 50,000 + 50,000": (50_000, 50_000, 3),
}


def learn_invariant_arms(n_heads: int = 5, n_jobs: int = -1) -> Path:
    """Learn every arm's backbones and read each out on CIFAR-10's test images.

    Needs both data sets; about five minutes of a core a backbone, n_jobs at once (-1: as many as
    there are cores), resumed backbone by backbone. Returns the path of the records.
    """
    wanted = [{"arm": name, "n_source": n_source, "n_target": n_target, "seed": seed,
               "settings": SETTINGS, "n_heads": n_heads, "code": code_of_the_invariant_arms()}
              for name, (n_source, n_target, n_seeds) in INVARIANT_ARMS.items()
              for seed in range(n_seeds)]
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        found = joblib.Parallel(n_jobs, return_as="generator", batch_size=1)(
            joblib.delayed(_recorded)(one) for one in wanted)
    records = []
    for one, record in zip(wanted, found, strict=True):
        records.append(one | record)
        logger.info("%s, seed %d: %.1f s", one["arm"], one["seed"], record["seconds"])
    return write_lines(bundled_dir() / "readouts" / "invariant_arms.json", records)


def code_of_the_invariant_arms() -> str:
    """The key of the code behind a record, but for that which reads images and networks."""
    return cache.code_of(learn_with_a_chosen_ridge, InvariantPatches, Backbone, read_out,
                         given=(load_dataset, load_backbone))


@torch.inference_mode()
def learn_with_a_chosen_ridge(images: np.ndarray, n_atoms: int, n_patches: int, n_features: int,
                              n_views: int, seed: int) -> tuple[InvariantPatches, dict]:
    """A backbone from images uint8 [N, 32, 32, 3] and n_views views of them in all, plain included.

    The ridge is the one whose axes from nine tenths of the images have the highest mean ratio of
    between to within on the last tenth; returns the network, and that ratio by ridge. The axes that
    stay are of all images: both parts' matrices, weighted by their images.
    """
    generator = torch.Generator().manual_seed(seed)
    filters, offsets = learn_filters(images, SIZE, n_atoms, n_patches, generator)
    network = InvariantPatches([filters], [offsets], axes=torch.zeros(1, 1))
    views, held = n_views // len(images), len(images) // 10
    order = torch.randperm(len(images), generator=generator).numpy()
    (b_fit, w_fit), (b_held, w_held) = (
        between_within(activations_of_views(network, images[rows], views, generator,
                                            at_once=max(1, 4_000 // views)))
        for rows in (order[held:], order[:held]))
    ratios = {}
    for ridge in RIDGES:
        axes = projection(b_fit, w_fit, n_features, ridge, power=0)
        ratios[ridge] = float(np.mean((axes * (b_held @ axes)).sum(0)
                                      / (axes * (w_held @ axes)).sum(0)))
    share = held / len(images)
    axes = projection((1 - share) * b_fit + share * b_held, (1 - share) * w_fit + share * w_held,
                      n_features, max(ratios, key=ratios.__getitem__), POWER)
    axes = torch.from_numpy(axes / np.abs(axes).max())
    return InvariantPatches([filters], [offsets], axes), ratios


def _recorded(wanted: dict) -> dict:
    return cache.record("records", f"{wanted['arm']} {wanted['seed']}", wanted, [],
                        lambda: _learn_and_read_out(wanted))


def _learn_and_read_out(wanted: dict) -> dict:
    start, rng = time.perf_counter(), np.random.default_rng(wanted["seed"])
    parts = [("tinyimagenet32", wanted["n_source"]), ("cifar10", wanted["n_target"])]
    images = np.concatenate([_images(name)[np.sort(rng.permutation(len(_images(name)))[:n])]
                             for name, n in parts if n])
    network, ratios = learn_with_a_chosen_ridge(images, seed=wanted["seed"], **wanted["settings"])
    backbone = Backbone(BACKBONES["invariant_patches"], network, torch.device("cpu"), torch.float32)
    target = load_dataset("cifar10", "test")
    found = FeatureSet("cifar10", "test", f"{wanted['arm']} {wanted['seed']}",
                       extract_features(backbone, target.images), target.labels, target.classes)
    return read_out(found, wanted["n_heads"]) | {
        "ratios": {f"{ridge:g}": round(ratio, 5) for ridge, ratio in ratios.items()},
        "seconds": round(time.perf_counter() - start, 1), "hardware": cache.hardware("cpu"),
        "versions": cache.versions()}


@functools.cache
def _images(name: str) -> np.ndarray:
    """All of a train split, read once by each process."""
    return load_dataset(name, "train").images
