"""The benchmark: what the study takes in time and memory on this machine, as a Markdown table.

`make bench`, or python -m benchmarks.bench in the repository.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest import mock

import faiss
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from tsp_utils.backbones import load_backbone
from tsp_utils.datasets import ImageDataset
from tsp_utils.features import cached_features, extract_features
from tsp_utils.files.paths import REPOSITORY
from tsp_utils.heads import init_heads, train_heads
from tsp_utils.neighbors import Neighbors, nearest_neighbors, neighbor_weights
from tsp_utils.scaling import scale_features
from tsp_utils.study.feature_sets import FeatureSet
from tsp_utils.study.head_comparison import METHODS, FeaturesToCluster, scores_of
from tsp_utils.study.profile import load_study

C, D, K, BATCH, SEEDS, ROUNDS = 10, 384, 20, 256, range(10), 3


def bench(say=print, n: int = 50_000, n_images: int = 2_048, memory_images=(5_000, 50_000),
          memory_backbone: str = "vit_mini_random", profile: str = "offline") -> None:
    """Measure everything in one run and say the table, one line about the machine before it.

    n vectors for heads and neighbours, n_images for speed, memory_images for the two extractions
    whose memory is compared. Five minutes on two cores, which it wants for itself.
    """
    parts = [(head_training, n), (neighbor_search, n),
             (extraction, "patch_kmeans", n_images, "300 images/s"),
             (extraction, "vit_mini_random", n_images, "none"),
             (extraction_memory, memory_backbone, memory_images), (changed_neighbors, profile),
             (all_heads, n // 5, profile)]
    rows = [part(*arguments) for part, *arguments in tqdm(parts, "bench", leave=False)]
    say(f"{machine()}\n")
    say("| what | measured | aim | how |\n|---|---|---|---|")
    for row in rows:
        say(f"| {' | '.join(row)} |")
    say("\n`make reproduce` is not run here: it says its own minutes, notebook by notebook.")


def machine() -> str:
    """One line: processor, cores, torch, and whether bf16 is what networks run in."""
    info = Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"model name\s*: (.+)", info.read_text())
    model = found[1] if found else platform.processor() or platform.machine()
    bf16 = load_backbone("vit_mini_random", "cpu").dtype == torch.bfloat16
    return (f"{model}, {os.cpu_count()} cores; {platform.system()}, torch {torch.__version__}, "
            f"bf16 through AMX: {'yes' if bf16 else 'no'}.")


def head_training(n: int) -> tuple[str, str, str, str]:
    """One epoch: ten seeds at once by `train_heads`, against one seed by a plain loop."""
    features = scale_features(random_clusters(n))
    rng = np.random.default_rng(1)  # which neighbours they are makes no difference to the time
    neighbors = Neighbors(rng.integers(0, n, (n, K)),
                          np.sort(rng.random((n, K), np.float32) + 1, 1), "cosine")

    def batched():
        train_heads(init_heads(features, C, SEEDS, "random"), features, neighbors,
                    max_epochs=1, min_steps=1, batch_size=BATCH, progress=False)

    ours, plain = alternate(batched, lambda: plain_epoch(features, neighbors))
    ours /= len(SEEDS)
    return ("one epoch of head training, per seed",
            f"{plain / ours:.1f} times cheaper ({ours:.3f} s against {plain:.2f} s)",
            "15 times, at least 8",
            f"{n:,} x {D}: {len(SEEDS)} seeds at once, divided by {len(SEEDS)}, against Dataset + "
            f"DataLoader (no workers) + nn.Linear + Adam of one; medians of {ROUNDS} in turn")


class Pairs(Dataset):
    """The plain way: each item draws its neighbour when it is asked for."""

    def __init__(self, features, neighbors):
        self.features = torch.from_numpy(features)
        self.indices = torch.from_numpy(neighbors.indices)
        self.weights = torch.from_numpy(neighbor_weights(neighbors))

    def __len__(self):
        return len(self.features)

    def __getitem__(self, i):
        drawn = torch.multinomial(self.weights[i], 1).item()
        return self.features[i], self.features[self.indices[i, drawn]]


def plain_epoch(features, neighbors) -> None:
    """One seed, one epoch, as one would first write it down."""
    head = torch.nn.Linear(D, C)
    adam = torch.optim.Adam(head.parameters(), lr=1e-4)
    for x, y in DataLoader(Pairs(features, neighbors), BATCH, shuffle=True, drop_last=True):
        p, q = head(x).softmax(1), head(y).softmax(1)  # [B, C]
        mean = p.mean(0)  # [C]
        loss = -(p * q).sum(1).log().mean() + 3 * (mean * mean.log()).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()


def neighbor_search(n: int) -> tuple[str, str, str, str]:
    """`nearest_neighbors` of raw features, against faiss on vectors that are ready for it."""
    features = random_clusters(n)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)

    def direct():
        index = faiss.IndexFlatIP(D)
        index.add(unit)
        index.search(unit, K + 1)

    ours, theirs = alternate(lambda: nearest_neighbors(features, K), direct)
    return (f"exact neighbours, K = {K}",
            f"{ours / theirs:.2f} times faiss ({ours:.2f} s against {theirs:.2f} s)", "1.1 times",
            f"{n:,} x {D}, normalisation and exact distances included, against IndexFlatIP's add "
            f"and search of {K + 1} on normalised vectors; medians of {ROUNDS} in turn")


def extraction(name: str, n: int, aim: str) -> tuple[str, str, str, str]:
    """Images a second, from bytes to vectors."""
    backbone = load_backbone(name, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8)
    extract_features(backbone, images[:BATCH], progress=False)
    start = time.perf_counter()
    extract_features(backbone, images, progress=False)
    return (f"extraction, {name}", f"{n / (time.perf_counter() - start):.0f} images/s", aim,
            f"{n:,} random images of 32 px, {str(backbone.dtype).removeprefix('torch.')}, batches "
            f"of {BATCH}, after one batch to warm up")


def extraction_memory(name: str, counts) -> tuple[str, str, str, str]:
    """Each count in a process of its own, as a peak never comes down again."""
    growth = []
    for n in counts:
        code = f"from benchmarks import bench; print(bench.memory_growth({name!r}, {n}))"
        found = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True)
        growth.append(f"{float(found):.0f} MB")
    of = " and ".join(f"{n:,}" for n in counts)
    return (f"memory of extraction, {of} images", " and ".join(growth), "the same",
            f"cached_features, {name}: peak resident memory less that after loading the backbone; "
            f"one image repeated through a view of stride 0, so that the input does not count")


def memory_growth(name: str, n: int) -> float:
    """Peak resident memory of one cached extraction above what was there before it, MB."""
    backbone = load_backbone(name, "cpu")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    images = ImageDataset("bench", None, np.broadcast_to(image, (n, *image.shape)))
    before = resident_mb()
    with tempfile.TemporaryDirectory() as cache:
        cached_features(backbone, images, cache, progress=False)
        return resident_mb(peak=True) - before


def resident_mb(peak: bool = False) -> float:
    """This process's resident memory, now or at its peak; NaN where there is no Linux's /proc."""
    status, key = Path("/proc/self/status"), "VmHWM" if peak else "VmRSS"
    found = status.exists() and re.search(rf"{key}:\s*(\d+) kB", status.read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def changed_neighbors(profile: str) -> tuple[str, str, str, str]:
    """Notebook 03 with another n_neighbors: features are there, heads are not."""
    study = load_study(profile)
    dataset, backbone = study.datasets[0], study.default_backbone
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TSP_CACHE=folder):
        study = replace(study, profile=folder)  # an absolute path: its record goes there too
        study.features(dataset, backbone)
        start = time.perf_counter()
        study.train(dataset, backbone, n_neighbors=7)
        seconds = time.perf_counter() - start
    return ("n_neighbors changed in notebook 03", f"{seconds:.0f} s", "30 s",
            f"profile {profile}, {dataset}, {backbone}, n_neighbors=7, an empty cache of heads: "
            f"K-means, neighbours, {study.n_seeds} heads and their scores; no figure drawn")


def all_heads(n: int, profile: str, dim: int = 192) -> tuple[str, str, str, str]:
    """Every method of notebook 10 once, ten seeds, without its tuning trials."""
    study = replace(load_study(profile), n_seeds=len(SEEDS), batch_size=BATCH)
    features, seconds = random_clusters(n, dim), {}
    found = FeatureSet("bench", "test", "none", features, np.arange(n) % C, ())
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TSP_CACHE=folder):
        data = FeaturesToCluster(study, found, found)
        untuned = pd.DataFrame([dict(learning_rate=1e-3, sharpness=1.0, chosen=True)])
        with mock.patch("tsp_utils.study.head_comparison.tune", lambda data, method: untuned):
            for method in tqdm(METHODS, "heads", leave=False):
                start = time.perf_counter()
                with suppress(ValueError):  # too few samples for a mixture
                    scores_of(data, method)
                    seconds[method] = time.perf_counter() - start
    slowest = sorted(seconds, key=seconds.get)[-3:][::-1]
    return (f"all {len(seconds)} heads of notebook 10", f"{sum(seconds.values()):.0f} s", "180 s",
            f"{n:,} x {dim}, {len(study.seeds)} seeds each, {study.min_steps:,} steps where there "
            f"are steps, no trials; the longest: "
            f"{', '.join(f'{name} {seconds[name]:.0f} s' for name in slowest)}")


def random_clusters(n: int, dim: int = D) -> np.ndarray:
    """C overlapping Gaussian clusters, float32 [n, dim]."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((C, dim), np.float32)
    return centers[rng.integers(0, C, n)] + 1.5 * rng.standard_normal((n, dim), np.float32)


def alternate(*functions) -> list[float]:
    """Median seconds of each function, called in turn so that all meet the same disturbances."""
    seconds = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [median(taken) for taken in seconds]


if __name__ == "__main__":
    bench()
