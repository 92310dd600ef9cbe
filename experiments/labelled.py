"""One small network trained on Tiny-ImageNet's labels: the labelled rungs of notebook 11 at 32 px.

Nowhere else in this study does training see a label. Here it shall: the network is that of
`resnet_nano_cpu` and sees as many images. What it is told about them differs, and with it the
recipe.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import tsp_utils.networks.small_resnet  # noqa: F401  (timm learns its name)
from tsp_utils.backbones import Backbone, load_backbone
from tsp_utils.cache import hardware, versions
from tsp_utils.datasets import load_dataset
from tsp_utils.features import extract_features
from tsp_utils.files.paths import runs_dir, write_json, write_whole
from tsp_utils.networks.registry import find_spec
from tsp_utils.pretraining.multi_crop import random_crops
from tsp_utils.pretraining.trainer import groups_by_decay

logger = logging.getLogger(__name__)

TWIN = "resnet_nano_cpu"  # without labels, by DINO
MARKS = (64_000, 128_000, 256_000, 512_000)  # images seen; the last is the twin's budget
CROP, SCALE = 24, (0.35, 1.0)  # px, and the share of the area; as small as the twin's, for speed
BATCH, RATE, DECAY, WARMUP = 128, 0.1, 5e-4, 0.1  # images; of SGD; share of the steps
MOMENTUM = (0.85, 0.95)  # least where the rate is highest
SEED = 0


def checkpoint(n_images: int) -> Path:
    """The weights after so many images."""
    return runs_dir() / "labelled" / f"{TWIN}_{n_images}.pt"


def load_labelled(n_images: int) -> Backbone:
    """The network after so many images. Raises FileNotFoundError where it was not trained."""
    spec = replace(find_spec(TWIN), name=f"labelled_resnet_nano_{n_images // 1000}k", note="")
    return load_backbone(spec, checkpoint=checkpoint(n_images))


def learn_from_labels() -> list[Path]:
    """Train on the 100,000 labelled images of Tiny-ImageNet; the checkpoints and the log.

    Cross-entropy over 200 classes on random crops, mirrored or not; one rate cycle over the whole
    budget. The log has top-1 accuracy on the val split, percent.
    """
    source, held = (load_dataset("tinyimagenet32", split) for split in ("train", "val"))
    spec = find_spec(TWIN)
    torch.manual_seed(SEED)
    network = timm.create_model(spec.architecture, num_classes=len(source.classes), **spec.options)
    network = network.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(SEED)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    steps = MARKS[-1] // BATCH
    sgd = torch.optim.SGD(groups_by_decay(network), lr=RATE, momentum=MOMENTUM[1],
                          nesterov=True, weight_decay=DECAY)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        sgd, RATE, steps, pct_start=WARMUP, base_momentum=MOMENTUM[0], max_momentum=MOMENTUM[1])
    y, order, log, paths = torch.from_numpy(source.labels), torch.empty(0, dtype=int), [], []
    for step in range(1, steps + 1):
        if len(order) < BATCH:  # a new epoch, behind what is left of the last one
            order = torch.cat([order, torch.randperm(len(y), generator=generator)])
        rows, order = order[:BATCH], order[BATCH:]
        x = torch.from_numpy(source.images[rows.numpy()]).permute(0, 3, 1, 2).float() / 255
        x = (random_crops(x, CROP, SCALE, generator) - mean) / std
        loss = F.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), y[rows])
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        cycle.step()
        if step * BATCH in MARKS:
            paths.append(checkpoint(step * BATCH))
            state = {name: value for name, value in network.state_dict().items()
                     if not name.startswith("fc.")}
            write_whole(paths[-1], lambda file, state=state: torch.save(state, file))
            log.append({"images_seen": step * BATCH, "loss": round(float(loss.detach()), 3),
                        "top1_val": round(top1(network, held, spec), 2)})
            logger.info("%s", json.dumps(log[-1]))
    log_path = runs_dir() / "labelled" / "log.json"
    write_json(log_path, {"network": TWIN, "seed": SEED, "hardware": hardware("cpu"),
                          "versions": versions(), "log": log}, indent=1)
    return [*paths, log_path]


def top1(network: torch.nn.Module, images, spec) -> float:
    """Share of images, percent, whose class the network names; whole, at their 32 px."""
    whole = Backbone(spec, network, torch.device("cpu"), torch.float32)
    logits = extract_features(whole, images.images, progress=False)  # [N, classes]
    network.train()
    return 100 * float((logits.argmax(1) == images.labels).mean())
