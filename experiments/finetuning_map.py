"""When does fine-tuning help, when does it destroy? Loss x learning rate x depth x source (D1).

Only the last blocks of a transformer learn, so what comes before them is computed once and the
tokens are kept: several times cheaper than tuning the whole network, as C7 does.
"""

import copy
import logging
import time
from pathlib import Path

import numpy as np
import torch

from experiments.finetuning import N_IMAGES, N_SEEDS, head_of, read_out, source_images
from tsp_utils import cache
from tsp_utils.backbones import Backbone, load_backbone
from tsp_utils.cache import hardware, versions
from tsp_utils.datasets import load_dataset
from tsp_utils.files.paths import bundled_dir, write_lines
from tsp_utils.k_means import kmeans
from tsp_utils.neighbors import WEIGHTINGS, nearest_neighbors
from tsp_utils.networks.weights import attention
from tsp_utils.pretraining.multi_crop import random_colors, random_crops
from tsp_utils.scaling import Scaler
from tsp_utils.study.feature_sets import draw_rows
from tsp_utils.systems.finetune import LastBlocks, eq5, train_together
from tsp_utils.systems.icbpl import ICBPLHeads
from tsp_utils.systems.rivals import RIVALS, train_rival

logger = logging.getLogger(__name__)

N_VIEWS = 2  # augmented views an image, made once
# loss, last blocks that learn (0: frozen), learning rate, source images too, seeds
RUNS = [
    ("icbpl", 0, 0.0, False, N_SEEDS), ("icbpl", 2, 1e-4, False, N_SEEDS),
    ("icbpl", 2, 1e-5, False, N_SEEDS), ("tsp", 0, 0.0, False, N_SEEDS),
    ("tsp", 2, 1e-4, False, 1), ("tsp", 2, 1e-5, False, 1),
    ("tsp", 1, 1e-4, False, 1), ("tsp", 1, 1e-5, False, 1),
    ("icbpl", 1, 1e-4, False, 1), ("icbpl", 1, 1e-5, False, 1),
    ("icbpl", 2, 1e-4, True, 1), ("icbpl", 2, 1e-5, True, 1),
    ("tsp", 2, 1e-4, True, 1), ("tsp", 2, 1e-5, True, 1),
]


# The loss, the head's rate (as the heads were trained before) and how neighbours are drawn.
LOSSES = {"tsp": dict(loss=eq5, head_learning_rate=1e-4),
          "icbpl": dict(loss=ICBPLHeads.loss, head_learning_rate=1e-3, weighting="uniform")}


def augmented(images: np.ndarray, backbone: Backbone, seed: int) -> torch.Tensor:
    """One augmented view of each image as the network takes it: crops of 40 to 100 % of the area,
    flips, colours as DINO's local views. uint8 [N, H, W, 3] -> float32 [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.spec.mean, backbone.spec.std))
    parts = [random_colors(random_crops(rows, rows.shape[-1], (0.4, 1.0), generator), generator,
                           0.25, 0.0) for rows in x.split(1024)]
    return (torch.cat(parts) - mean) / std


def run_finetuning_map(backbone_name: str = "vit_nano_cpu", runs=None) -> Path:
    """Every cell of the map and every seed; returns the records' path. Resumed run by run.

    Needs CIFAR-10 and Tiny-ImageNet; about an hour on one core. Images, heads, epochs and read-outs
    are C7's: 10,000 images of CIFAR-10's train split drawn once, scored on all of test.
    """
    runs = RUNS if runs is None else runs
    with attention(fused=torch.cuda.is_available()):
        backbone = load_backbone(backbone_name)
    images, test = load_dataset("cifar10", "train"), load_dataset("cifar10", "test")
    images, source = images.subset(draw_rows(len(images), N_IMAGES)), source_images()
    raw = LastBlocks(backbone, 0)
    raw = raw.features(raw.tokens(backbone.prepare(images.images)))
    scaler = Scaler().fit(raw)
    starts = starting_heads(scaler.transform(raw), len(images.classes))
    records, entering = [], {}
    for loss, n_blocks, rate, with_source, n_seeds in runs:
        for seed in range(n_seeds):
            wanted = dict(loss=loss, n_blocks=n_blocks, learning_rate=rate, source=with_source,
                          seed=seed, backbone=backbone_name, target="cifar10", n_images=N_IMAGES,
                          code=code_of_the_map())

            def make(loss=loss, place=(n_blocks, with_source), seed=seed, rate=rate) -> dict:
                tail = LastBlocks(backbone, place[0])
                if place not in entering:
                    entering.clear()  # gigabytes
                    entering[place] = _tokens(
                        tail, np.concatenate([images.images, source]) if place[1]
                        else images.images, test.images)
                return _run(tail, copy.deepcopy(starts[loss][seed]), test.labels, loss,
                            scaler.scale_, rate, *entering[place])

            where = "source" if with_source else "target"
            name = f"map {loss} {n_blocks} {rate:g} {where} {seed}"
            inputs = [wanted, images.fingerprint, test.fingerprint]
            records.append(wanted | cache.record("records", name, inputs, [], make))
            logger.info("%s: %s", name, records[-1]["epochs"][-1])
    return write_lines(bundled_dir() / "readouts" / "finetuning_map.json", records)


def code_of_the_map() -> str:
    """The key of the code behind a record."""
    return cache.code_of(train_together, *WEIGHTINGS.values(), starting_heads, head_of, _tokens,
                         _run, LastBlocks, eq5, RIVALS["tsp"].loss, ICBPLHeads, ICBPLHeads.loss,
                         Backbone, Scaler.fit, Scaler.transform)


def starting_heads(scaled: np.ndarray, n_clusters: int) -> dict[str, list]:
    """Heads trained on the frozen features by each loss, one a seed: where all runs start."""
    seeds = range(N_SEEDS)
    neighbors, centers = nearest_neighbors(scaled, 20), kmeans(scaled, n_clusters, seeds).centers
    starts = {}
    for loss, how in LOSSES.items():
        heads, _ = train_rival(loss, scaled, neighbors, centers, seeds, n_steps=3900,
                               learning_rate=how["head_learning_rate"], progress=False)
        starts[loss] = [head_of(heads, seed) for seed in seeds]
    return starts


def _tokens(tail: LastBlocks, images: np.ndarray, test: np.ndarray) -> tuple:
    backbone = tail.of[0]
    views = [tail.tokens(augmented(images, backbone, seed)) for seed in range(N_VIEWS)]
    return (tail.tokens(backbone.prepare(images)), torch.stack(views, 1),
            tail.tokens(backbone.prepare(test)))


def _run(tail, head, labels, loss, scale, rate, tokens, views, test_tokens) -> dict:
    epochs = []

    def keep(epoch, tail, head):
        x = tail.features(test_tokens) * np.float32(scale)
        epochs.append(read_out(epoch, x, head, labels))

    start = time.perf_counter()
    train_together(tail, head, tokens, views=views if loss == "icbpl" else None, scale=scale,
                   learning_rate=rate, callback=keep, **LOSSES[loss])
    return {"epochs": epochs, "seconds": round(time.perf_counter() - start, 1),
            "hardware": hardware(tail.device.type), "versions": versions()}
