"""Toy data of several tests: blobs with neighbours and centres, clothes in a folder."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import make_blobs

from tsp_utils import kmeans, load_dataset, nearest_neighbors, scale_features
from tsp_utils.study.feature_sets import FeatureSet

BLOBS, CLASSES = make_blobs(600, 16, centers=5, cluster_std=3.0, random_state=0)
FEATURES = scale_features(BLOBS)
NEIGHBORS = nearest_neighbors(FEATURES, 10)
CENTERS = kmeans(FEATURES, 5, [0, 1]).centers
CLOTHES = load_dataset("fashion-mnist", "test").subset(slice(0, 60))
QUICK = dict(n_init=2, max_epochs=3, min_steps=30)  # of the estimator


def fill(folder: Path, side: int = 28) -> Path:
    """24 of the clothes as 000.png and on: so few that a page needs no UMAP, which is quicker."""
    folder.mkdir()
    for i, image in enumerate(CLOTHES.images[:24]):
        Image.fromarray(image[..., 0]).resize((side, side)).save(folder / f"{i:03d}.png")
    return folder


def made_of(features, labels) -> FeatureSet:
    """A feature set of up to three classes."""
    return FeatureSet("toys", "test", "made up", features.astype(np.float32), labels, tuple("abc"))


def three_blobs(n: int = 300, noise: float = 3.0) -> FeatureSet:
    labels = np.arange(n) % 3
    noises = np.random.default_rng(0).standard_normal((n, 8))
    return made_of(4 * np.eye(3, 8)[labels] + noise * noises, labels)
