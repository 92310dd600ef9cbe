"""When does fine-tuning help, when does it destroy? Loss x learning rate x depth x source (D1).

Only the last blocks of a transformer learn, so what comes before them is computed once and the
tokens are kept: several times cheaper than `finetune`, which C7 uses for the whole network.
"""

import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tsp_utils import cache
from tsp_utils.backbones import Backbone, load_backbone
from tsp_utils.cache import versions
from tsp_utils.datasets import load_dataset
from tsp_utils.heads import LinearHeads, Scaler, draw_pairs, kmeans
from tsp_utils.losses import tsp_loss
from tsp_utils.metrics import clustering_metrics
from tsp_utils.neighbors import label_consistency, nearest_neighbors, neighbor_weights
from tsp_utils.paths import bundled_dir, write_lines
from tsp_utils.pretraining.multi_crop import random_colors, random_crops
from tsp_utils.study.arms import attention, hardware
from tsp_utils.study.feature_sets import draw_rows
from tsp_utils.study.finetuning_runs import N_IMAGES, N_SEEDS
from tsp_utils.systems.icbpl import ICBPLHeads
from tsp_utils.systems.rivals import RIVALS, train_rival

logger = logging.getLogger(__name__)

N_VIEWS = 2  # augmented views an image, made once
HEAD_RATE = {"tsp": 1e-4, "icbpl": 1e-3}  # as the heads were trained before
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


class LastBlocks(nn.Module):
    """The last n blocks of a vision transformer with its final norm, a copy that can learn.

    tokens(images uint8 [N, H, W, C]) -> what enters them, [N, T, D]; forward(tokens) -> features
    [N, D]: together the backbone's own features. n = 0: nothing learns.
    """

    def __init__(self, backbone: Backbone, n: int):
        super().__init__()
        model = backbone.model
        if not hasattr(model, "blocks") or n > len(model.blocks):
            raise ValueError(f"{backbone.name} has no {n} last blocks; pass a vision transformer, "
                             f"and at most as many blocks as it has.")
        self.n, self.backbone = n, [backbone]  # in a list: not a part of this module
        self.blocks = nn.ModuleList(copy.deepcopy(list(model.blocks)[len(model.blocks) - n :]))
        self.norm = copy.deepcopy(model.norm)
        self.requires_grad_(n > 0)

    @torch.inference_mode()
    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """What `Backbone.prepare` gave, [N, 3, S, S] -> [N, T, D] in the backbone's dtype."""
        backbone, parts = self.backbone[0], []
        model = backbone.model
        for rows in x.split(256):
            with self._autocast():
                found = model._pos_embed(model.patch_embed(rows.to(backbone.device)))
                found = model.norm_pre(model.patch_drop(found))
                for block in list(model.blocks)[: len(model.blocks) - self.n]:
                    found = block(found)
            parts.append(found.to(backbone.dtype).cpu())
        return torch.cat(parts).clone()  # a tensor of its own, outside inference mode

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        backbone = self.backbone[0]
        with self._autocast():
            for block in self.blocks:
                tokens = block(tokens)
            found = backbone.model.forward_head(self.norm(tokens), pre_logits=True)
        return found.float()

    def _autocast(self):
        backbone = self.backbone[0]
        return torch.autocast(backbone.device.type, torch.bfloat16,
                              backbone.dtype == torch.bfloat16)

    @torch.no_grad()
    def features(self, tokens: torch.Tensor) -> np.ndarray:
        """Features of all tokens, float32 [N, D], without gradients."""
        place = self.backbone[0].device
        return torch.cat([self(rows.to(place)).cpu() for rows in tokens.split(1024)]).numpy()


def tsp_of(head, x, neighbor_x, view_x, progress):
    """Eq. 5 on features [1, B, D]: TSP has no views."""
    return tsp_loss(head(x), head(neighbor_x))[0]


def icbpl_of(head, x, neighbor_x, view_x, progress):
    return head.loss(x, neighbor_x, view_x, progress)


LOSSES: dict[str, Callable] = {"tsp": tsp_of, "icbpl": icbpl_of}


def finetune_last_blocks(tail: LastBlocks, head: LinearHeads, tokens: torch.Tensor,
                         views: torch.Tensor, *, loss: str, scale: float, learning_rate: float,
                         n_epochs: int = 3, batch_size: int = 256, n_neighbors: int = 20,
                         callback=None) -> None:
    """Train a head of one seed and the last blocks on one loss, in place; no label is read.

    tokens [N, T, D] of the images, views [N, V, T, D] of their augmented views (TSP leaves them
    out). Neighbours are searched again before each epoch. As in `finetune`, the draws included.
    callback(epoch, tail, head) before the first epoch with 0, and after each.
    """
    weights = [p for p in tail.parameters() if p.requires_grad]
    groups = [dict(params=head.parameters(), lr=HEAD_RATE[loss])]
    adam = torch.optim.Adam(groups + [dict(params=weights, lr=learning_rate)] * bool(weights))
    rng, seed = np.random.default_rng([head.seeds[0], 3]), head.seeds[0]
    choice = np.random.default_rng([seed, 5])
    n_pairs = len(tokens) // batch_size * batch_size
    done, total = 0, n_epochs * n_pairs // batch_size
    place = next(head.parameters()).device
    if callback is not None:
        callback(0, tail, head)
    for epoch in range(1, n_epochs + 1):
        features = tail.features(tokens) * np.float32(scale)
        neighbors = nearest_neighbors(features, n_neighbors)
        gaussian = (neighbor_weights(neighbors) if loss == "tsp"
                    else np.full(neighbors.indices.shape, 1 / n_neighbors, np.float32))
        pairs = draw_pairs(rng, neighbors.indices, gaussian.cumsum(1), n_pairs)  # [2, T * B]
        for rows in np.split(pairs, n_pairs // batch_size, axis=1):
            entering = [tokens[rows[0]], tokens[rows[1]]]
            if loss == "icbpl":
                entering.append(views[rows[0], choice.integers(0, views.shape[1], batch_size)])
            x = tail(torch.cat(entering).to(place)) * scale  # [2B or 3B, D]
            x = [part[None] for part in x.split(batch_size)]
            value = LOSSES[loss](head, x[0], x[1], x[2] if len(x) > 2 else None, done / total)
            adam.zero_grad(set_to_none=True)
            value.sum().backward()
            adam.step()
            done += 1
        if callback is not None:
            callback(epoch, tail, head)


def augmented(images: np.ndarray, backbone: Backbone, seed: int) -> torch.Tensor:
    """One augmented view of each image as the network takes it: crops of 40 to 100 % of the area,
    flips, colours as DINO's local views. uint8 [N, H, W, 3] -> float32 [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.spec.mean, backbone.spec.std))
    parts = [random_colors(random_crops(rows, rows.shape[-1], (0.4, 1.0), generator), generator,
                           0.25, 0.0) for rows in x.split(1024)]
    return (torch.cat(parts) - mean) / std


def records_path() -> Path:
    return bundled_dir() / "readouts" / "finetuning_map.json"


def run_finetuning_map(backbone_name: str = "vit_nano_cpu", runs=None) -> Path:
    """Every cell of the map and every seed; returns the records' path. Resumed run by run.

    Needs CIFAR-10 and Tiny-ImageNet; about an hour on one core. Images, heads, epochs and read-outs
    are C7's: 10,000 images of CIFAR-10's train split drawn once, scored on all of test.
    """
    runs = RUNS if runs is None else runs
    with attention(fused=torch.cuda.is_available()):
        backbone = load_backbone(backbone_name)
    images, test = load_dataset("cifar10", "train"), load_dataset("cifar10", "test")
    images = images.subset(draw_rows(len(images), N_IMAGES))
    source = load_dataset("tinyimagenet32", "train")
    source = source.subset(draw_rows(len(source), N_IMAGES)).images
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
    return write_lines(records_path(), records)


def code_of_the_map() -> str:
    """The key of the code behind a record."""
    return cache.code_of(finetune_last_blocks, starting_heads, _of_seed, _tokens, _run, LastBlocks,
                         *LOSSES.values(), RIVALS["tsp"].loss, ICBPLHeads, Backbone,
                         Scaler.fit, Scaler.transform)


def starting_heads(scaled: np.ndarray, n_clusters: int) -> dict[str, list]:
    """Heads trained on the frozen features by each loss, one a seed: where all runs start."""
    seeds = range(N_SEEDS)
    neighbors, centers = nearest_neighbors(scaled, 20), kmeans(scaled, n_clusters, seeds).centers
    starts = {}
    for loss, rate in HEAD_RATE.items():
        heads, _ = train_rival(loss, scaled, neighbors, centers, seeds, learning_rate=rate,
                               n_steps=3900, progress=False)
        starts[loss] = [_of_seed(heads, seed) for seed in seeds]
    return starts


def _of_seed(heads: LinearHeads, seed: int) -> LinearHeads:
    one = copy.deepcopy(heads)
    one.weight.data = heads.weight.detach()[seed : seed + 1].clone()
    one.bias.data = heads.bias.detach()[seed : seed + 1].clone()
    one.seeds = (seed,)
    return one


def _tokens(tail: LastBlocks, images: np.ndarray, test: np.ndarray) -> tuple:
    backbone = tail.backbone[0]
    views = [tail.tokens(augmented(images, backbone, seed)) for seed in range(N_VIEWS)]
    return (tail.tokens(backbone.prepare(images)), torch.stack(views, 1),
            tail.tokens(backbone.prepare(test)))


def _run(tail, head, labels, loss, scale, rate, tokens, views, test_tokens) -> dict:
    epochs = []

    def read_out(epoch, tail, head):
        x = tail.features(test_tokens) * np.float32(scale)
        clusters = head.predict(x)[0]
        consistency = label_consistency(nearest_neighbors(x, 20), labels)[-1]
        scores = clustering_metrics(labels, clusters) | {"consistency": float(consistency)}
        epochs.append({"epoch": epoch, "n_nonempty": len(set(clusters.tolist()))}
                      | {name: round(100 * value, 3) for name, value in scores.items()})

    start = time.perf_counter()
    finetune_last_blocks(tail, head, tokens, views, loss=loss, scale=scale, learning_rate=rate,
                         callback=read_out)
    return {"epochs": epochs, "seconds": round(time.perf_counter() - start, 1),
            "hardware": hardware(tail.backbone[0].device.type), "versions": versions()}
