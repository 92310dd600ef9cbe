"""The paper's networks give the official code's features, and each planted departure is seen."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tsp_utils.study import parity
from tsp_utils.study.parity import NETWORKS, SIDES, TOLERANCE, departure, seeded_backbone


@pytest.fixture(scope="module")
def vit():
    return seeded_backbone("dino_vits16")


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_the_official_codes(name):
    backbone = seeded_backbone(name)
    assert max(departure(backbone, side) for side in SIDES) < TOLERANCE


def other_transform(**changes):
    return lambda backbone: setattr(backbone, "spec", replace(backbone.spec, **changes))


def average_of_tokens(backbone):
    backbone.model.global_pool = "avg"


def no_positions(backbone):
    torch.nn.init.zeros_(backbone.model.pos_embed)


def another_epsilon(backbone):
    for module in backbone.model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-3


@pytest.mark.parametrize("planted", [
    other_transform(mean=(0.0,) * 3, std=(1.0,) * 3), other_transform(interpolation="bilinear"),
    other_transform(mean=(0.5,) * 3, std=(0.5,) * 3), average_of_tokens, no_positions,
    another_epsilon], ids=["not normalised", "bilinear", "timm's own mean", "tokens averaged",
                           "no positions", "another epsilon"])
def test_a_departure_is_seen(vit, planted):
    changed = copy.deepcopy(vit)
    planted(changed)
    assert departure(changed, 32) > 10 * TOLERANCE


def test_channels_in_another_order_are_seen(vit, monkeypatch):
    images = parity.seeded_images(32)
    monkeypatch.setattr(parity, "seeded_images", lambda side: np.ascontiguousarray(
        images[..., ::-1]))
    assert departure(vit, 32) > 100 * TOLERANCE
