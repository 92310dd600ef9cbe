"""When do clusters break under fine-tuning? C7's arms and others, longer and on a good network.

Labels are read by the read-outs alone. Notebook 06 draws the committed records.
"""

import logging
import time
from functools import partial
from pathlib import Path

import numpy as np

from experiments.finetuning import (
    N_IMAGES,
    _starting_heads,
    head_of,
    read_out,
    source_images,
    starting_point,
)
from tsp_utils import cache
from tsp_utils.backbones import Backbone, load_backbone
from tsp_utils.cache import hardware, versions
from tsp_utils.datasets import load_dataset
from tsp_utils.features import extract_features
from tsp_utils.files.paths import bundled_dir, shipped_records, write_lines
from tsp_utils.neighbors import WEIGHTINGS
from tsp_utils.scaling import Scaler
from tsp_utils.systems.finetune import eq5, finetune

logger = logging.getLogger(__name__)

N_EPOCHS = 16  # of 39 steps each; C7's own budget is the first three
# Each arm: how many seeds, what differs from C7's (all learns at 1e-4, lambda = 3, neighbours are
# searched anew before each epoch). white_sheep: as many images of Tiny-ImageNet are mixed in, and
# the same steps are half as many epochs.
ARMS: dict[str, tuple[int, dict]] = {
    "frozen": (5, dict(trained="nothing")),
    "1e-4": (5, {}),
    "1e-5": (5, dict(learning_rate=1e-5)),
    "1e-3": (3, dict(learning_rate=1e-3)),
    "1e-4, lambda = 0": (3, dict(entropy_weight=0.0)),
    "1e-5, lambda = 0": (1, dict(learning_rate=1e-5, entropy_weight=0.0)),
    "1e-3, lambda = 0": (1, dict(learning_rate=1e-3, entropy_weight=0.0)),
    "1e-4, last stage only": (3, dict(trained="last block")),
    "1e-3, last stage only": (1, dict(learning_rate=1e-3, trained="last block")),
    "1e-4, first neighbours kept": (3, dict(refresh=False)),
    "1e-4, white sheep": (3, dict(white_sheep=True)),
    "1e-3, white sheep": (1, dict(learning_rate=1e-3, white_sheep=True)),
    "1e-4, lambda = 0, white sheep": (1, dict(entropy_weight=0.0, white_sheep=True)),
}


def run_collapse(backbone_name: str = "resnet_contrast_cifar10_long") -> Path:
    """Fine-tune from the same starting heads, every arm and seed; returns the records' path.

    Needs CIFAR-10, Tiny-ImageNet, the network (`python -m experiments pretrain NAME`) and a GPU:
    less than a minute per run. Those that ship, of the same code and the same weights, are taken
    as they are, and a run that ended is not made again. 10,000 images drawn once from CIFAR-10's
    train split, scored on all of test before and after every epoch.
    """
    shipped = shipped_records("collapse")
    backbone = load_backbone(backbone_name)
    weights = backbone.describe()["weights_sha256"]
    (target, test, scaler, starts), records = starting_point(backbone), []
    for name, (n_seeds, options) in ARMS.items():
        for seed in range(n_seeds):
            wanted = {"variant": name, "seed": seed, "backbone": backbone_name,
                      "weights_sha256": weights, "target": "cifar10", "n_images": N_IMAGES,
                      "options": options, "n_epochs": N_EPOCHS, "code": code_of_the_sweep()}
            inputs = [wanted, target.fingerprint, test.fingerprint,
                      *([source_images()] if "white_sheep" in options else [])]
            made = next((record for record in shipped if wanted.items() <= record.items()), None)
            records.append(made or wanted | cache.record(
                "records", f"collapse {name} {seed}", inputs, [],
                lambda seed=seed, options=options: _run(
                    backbone, head_of(starts, seed), target.images, test, scaler.scale_,
                    **options)))
            logger.info("%s, seed %d: %s", name, seed, records[-1]["epochs"][-1])
    return write_lines(bundled_dir() / "readouts" / "collapse.json", records)


def code_of_the_sweep() -> str:
    """The key of the code behind a record, but for that which reads images and networks."""
    return cache.code_of(finetune, WEIGHTINGS["gaussian"], _starting_heads, _run, Backbone,
                         Scaler.fit, Scaler.transform, given=(load_dataset, load_backbone))


def _run(backbone, head, images, test, scale, *, entropy_weight: float = 3.0,
         learning_rate: float = 1e-4, white_sheep: bool = False, **options) -> dict:
    if white_sheep:
        images = np.concatenate([images, source_images()])
    epochs: list[dict] = []

    def keep(epoch, network, head):
        x = extract_features(network, test.images, progress=False) * np.float32(scale)
        epochs.append(read_out(epoch, x, head, test.labels))

    start = time.perf_counter()
    finetune(backbone, head, images, scale=scale, callback=keep, learning_rate=learning_rate,
             n_epochs=N_EPOCHS // 2 if white_sheep else N_EPOCHS,
             loss=partial(eq5, entropy_weight=entropy_weight), **options)
    return {"epochs": epochs, "seconds": round(time.perf_counter() - start, 1),
            "hardware": hardware(backbone.device.type), "versions": versions()}
