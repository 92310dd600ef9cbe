"""Where data, caches and results live. The only module that reads TSP_DATA and TSP_CACHE."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent


def data_dir() -> Path:
    """Folder of images and downloaded weights: $TSP_DATA, else data/ in the repository."""
    return Path(os.environ.get("TSP_DATA") or REPOSITORY / "data")


def cache_dir() -> Path:
    """Folder of extracted features and trained heads: $TSP_CACHE, else cache/ in the repository."""
    return Path(os.environ.get("TSP_CACHE") or REPOSITORY / "cache")


def runs_dir() -> Path:
    """Folder of executed notebooks, their figures and run records."""
    return REPOSITORY / "runs"


def bundled_dir() -> Path:
    """Folder of what ships with the package: weights, vectors, Fashion-MNIST's test split."""
    return PACKAGE / "bundled"
