"""The networks that ship: they are those of their cards, load without network, and hold figures."""

import hashlib
import json

import numpy as np
import pytest

from tsp_utils.arms import ARMS
from tsp_utils.backbones import load_backbone
from tsp_utils.bundle import C5_CLASSES, PRETRAINED, VECTOR_BACKBONES, bundle_backbone
from tsp_utils.datasets import load_dataset
from tsp_utils.feature_sets import load_vectors
from tsp_utils.features import extract_features
from tsp_utils.neighbors import knn_accuracy
from tsp_utils.paths import bundled_dir, data_dir

each = pytest.mark.parametrize("name", PRETRAINED)


def card(name: str) -> dict:
    return json.loads((bundled_dir() / f"{name}.json").read_text())


def readouts(name: str) -> list[dict]:
    return json.loads((bundled_dir() / "readouts" / f"{name}.json").read_text())


@each
def test_the_file_is_the_one_on_its_card(name):
    content = (bundled_dir() / f"{name}.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == card(name)["sha256"]
    assert len(content) < 16_000_000
    network = load_backbone(name, device="cpu")
    assert network(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, network.spec.dim)


@each
def test_the_card_is_of_the_arm_in_the_table(name):
    arm, written = ARMS[name], card(name)
    assert written["images_seen"] == arm.budget_images and written["seed"] == arm.seed
    assert written["source"] == arm.source
    assert written["recipe"] == json.loads(json.dumps(vars(arm.recipe)))
    assert written["log"][-1]["images_seen"] == arm.budget_images
    assert len(written["terms_of_the_images"]) == len(arm.data)
    assert written["minutes"] > 0 and written["hardware"] and written["code_sha256"]


def test_what_ships_stays_small():
    sizes = [path.stat().st_size for path in bundled_dir().rglob("*.safetensors")]
    assert sum(sizes) < 60_000_000


@each
def test_fashion_mnist_figure_of_the_card(name):
    images = load_dataset("fashion-mnist", "test")
    features = extract_features(load_backbone(name, "cpu"), images.images, progress=False)
    found = 100 * knn_accuracy(features, images.labels)
    assert found == pytest.approx(card(name)["knn"]["fashion-mnist test, leave-one-out"], abs=0.5)


def test_cifar10_figure_of_the_card():
    if not (data_dir() / "cifar10" / "train").is_dir():
        pytest.skip("no CIFAR-10 as an image folder in TSP_DATA")
    name, network = PRETRAINED[0], load_backbone(PRETRAINED[0], "cpu")
    train, test = (load_dataset("cifar10", split) for split in ("train", "test"))
    vectors = [extract_features(network, images.images, progress=False) for images in (train, test)]
    found = 100 * knn_accuracy(vectors[0], train.labels, vectors[1], test.labels)
    assert found == pytest.approx(card(name)["knn"]["cifar10, train to test"], abs=0.5)


@each
def test_read_outs_are_of_three_checkpoints_and_agree_with_the_vectors(name):
    records = readouts(name)
    assert [record["checkpoint"] for record in records] == ["quarter", "half", "final"]
    assert all(len(record["head"]["acc"]) == 10 for record in records)
    found = load_vectors("cifar10", name)
    assert 100 * knn_accuracy(found.features, found.labels) == pytest.approx(
        records[-1]["knn_leave_one_out"], abs=0.1)


@pytest.mark.parametrize("name", VECTOR_BACKBONES)
def test_vectors_of_c5_are_fifty_images_of_each_class_fixed_beforehand(name):
    found = load_vectors("tinyimagenet32", name, "val")
    assert sorted(set(found.labels)) == list(C5_CLASSES)
    assert (np.bincount(found.labels)[list(C5_CLASSES)] == 50).all()


def test_an_unfinished_arm_is_not_bundled(monkeypatch, tmp_path):
    monkeypatch.setattr("tsp_utils.bundle.runs_dir", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="run python -m tsp_utils pretrain vit_nano first"):
        bundle_backbone("vit_nano")
