"""Vectors of the paper's central row: exported, taken in, used by `offline`; on stand-ins.

Blobs in the shape of the real file, 10,000 x 384, of which no real one was made so far.
"""

import hashlib
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from experiments import what_ships
from tsp_utils.__main__ import main
from tsp_utils.datasets import DATASETS
from tsp_utils.files.paths import bundled_dir
from tsp_utils.files.published_sets import DatasetInfo
from tsp_utils.study import feature_sets
from tsp_utils.study.profile import load_study

NAME = "cifar10_test_dino_vits16.safetensors"


@pytest.fixture(scope="module")
def blobs():
    """Ten blobs of 1,000 vectors, as tensors and card of a good file."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), 1000))
    centres = rng.standard_normal((10, 384), np.float32)
    noise = rng.standard_normal((10_000, 384), np.float32)
    features = (3 * centres[labels] + noise).astype(np.float16)
    card = {"classes": json.dumps(DATASETS["cifar10"].classes), "dataset": "cifar10",
            "split": "test", "backbone": "dino_vits16", "weights_sha256": "0f" * 32,
            "sha256": hashlib.sha256(features.tobytes() + labels.tobytes()).hexdigest()}
    return {"features": features, "labels": labels}, card


@pytest.fixture
def bundle(own_folders, tmp_path, monkeypatch):
    """A bundle of its own, with what ships in it; returns the folder of vectors."""
    folder = tmp_path / "bundled" / "vectors"
    folder.mkdir(parents=True)
    for shipped in (*bundled_dir().iterdir(), *(bundled_dir() / "vectors").iterdir()):
        if shipped.name not in ("vectors", NAME):
            (tmp_path / "bundled" / shipped.relative_to(bundled_dir())).symlink_to(shipped)
    monkeypatch.setattr(feature_sets, "bundled_dir", lambda: tmp_path / "bundled")
    monkeypatch.setenv("TSP_DATA", str(tmp_path / "data"))
    return folder


def stored(path, tensors, card):
    save_file(tensors, path, card)
    return path


@pytest.fixture
def sent(blobs, tmp_path):
    return stored(tmp_path / "sent.safetensors", *blobs)


def test_offline_s_lessons_use_what_was_taken_in(bundle, blobs, sent, tmp_path, capsys):
    offline, before = load_study("offline"), load_study("offline").cells()
    assert offline.backbone_for("cifar10") == "patch_kmeans"
    assert main(["bundle-vectors", str(sent)]) == 0
    assert str(bundle / NAME) in capsys.readouterr().out
    assert (bundle / NAME).read_bytes() == sent.read_bytes()

    assert load_study("offline") == offline and offline.default_backbone == "patch_kmeans"
    assert offline.backbone_for("cifar10") == "dino_vits16"
    assert offline.backbone_for("fashion-mnist") == "patch_kmeans"  # there are no such vectors
    assert [cell for cell in offline.cells() if cell not in before] == [("cifar10", "dino_vits16")]
    for profile, chosen in (("offline default_backbone=vit_nano_cpu", "vit_nano_cpu"),
                            ("offline backbones=vit_nano_cpu", "vit_nano_cpu"),
                            ("small", "patch_kmeans")):
        assert load_study(profile).backbone_for("cifar10") == chosen

    quick = load_study("offline n_images=1000 n_seeds=2 max_epochs=2 min_steps=20")
    found = quick.features("cifar10", "dino_vits16")
    rows = np.linspace(0, 9999, 1000).astype(int)
    assert (found.features == blobs[0]["features"][rows]).all()
    table = quick.train("cifar10", quick.backbone_for("cifar10")).table
    assert table.query("method == 'head'")["acc"].min() > 60  # well apart, of which chance has 10
    (record,) = (tmp_path / "runs").glob("*/records/*.json")
    assert json.loads(record.read_text())["settings"]["fit"] == found.fingerprint


def test_another_file_is_not_put_in_the_place_of_the_first(bundle, blobs, sent, tmp_path):
    second = stored(tmp_path / "second", blobs[0], blobs[1] | {"weights_sha256": "1e" * 32})
    for _ in range(2):
        assert feature_sets.take_in_vectors(sent)[0] == bundle / NAME
    with pytest.raises(FileExistsError, match=r"vits16.safetensors holds other vectors; delete"):
        feature_sets.take_in_vectors(second)
    assert (bundle / NAME).read_bytes() == sent.read_bytes()


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(("tensors", "card", "said"), [
    (lambda x, y: {"features": x}, {}, "it holds {'features': 'float16 [10000, 384]'} where"),
    (lambda x, y: {"features": x.astype("f4"), "labels": y}, {}, "'float32 [10000, 384]'"),
    (lambda x, y: {"features": x, "labels": y.astype("i8")}, {}, "'int64 [10000]'"),
    (lambda x, y: {"features": x[1:], "labels": y[1:]}, {}, "'float16 [9999, 384]'"),
    (lambda x, y: {"features": changed(x, (7, 5), np.nan), "labels": y}, {}, "row 7 of its feat"),
    (lambda x, y: {"features": changed(x, 9, 0), "labels": y}, {}, "row 9 of its features is zero"),
    (lambda x, y: {"features": x, "labels": changed(y, 0, (y[0] + 1) % 10)}, {}, "1,000 of each"),
    (lambda x, y: {"features": x, "labels": changed(y, y == 9, 10)}, {}, "class from 0 to 9"),
    (lambda x, y: {"features": x[::-1].copy(), "labels": y}, {}, "whose SHA-256 its card has"),
    (None, None, "names the data set '', split ''"),
    (None, {"dataset": "cifar11"}, "names the data set 'cifar11', split 'test', which is not"),
    (None, {"split": "val"}, "split 'val', which is not known"),
    (None, {"backbone": "vit_small"}, "names the backbone 'vit_small', which is none of"),
    (None, {"backbone": "patch_kmeans"}, "the backbone 'patch_kmeans', which is none of"),
    (None, {"backbone": "dino_vitb16"}, "'features': 'float16 [10000, 768]'"),
    (None, {"classes": '["a", "b"]'}, "does not name the classes of its data set in their order"),
    (None, {"weights_sha256": "0f"}, "lacks the SHA-256 of the file of weights")])
def test_another_file_is_refused_in_one_sentence(bundle, blobs, tmp_path, tensors, card, said):
    arrays = blobs[0] if tensors is None else tensors(*blobs[0].values())
    file = stored(tmp_path / "other.safetensors", arrays, card if card is None else blobs[1] | card)
    with pytest.raises(ValueError) as refused:
        feature_sets.take_in_vectors(file)
    assert str(refused.value).startswith(f"{file} is not taken in: ") and said in str(refused.value)
    assert "\n" not in str(refused.value) and str(refused.value).endswith("one that is.")
    assert not (bundle / NAME).exists()


def test_a_file_that_is_cut_off_another_kind_or_missing_is_refused(bundle, sent, tmp_path):
    places = [tmp_path / "missing.safetensors", tmp_path]
    for i, content in enumerate((sent.read_bytes()[:-100], b"", b"PK\x03\x04 of another kind")):
        places.append(tmp_path / f"{i}.safetensors")
        places[-1].write_bytes(content)
    for place in places:
        with pytest.raises(ValueError, match="not taken in: it is missing, cut off, or no"):
            feature_sets.take_in_vectors(place)
    assert not (bundle / NAME).exists()


def test_a_disk_that_fills_up_leaves_nothing_in_the_bundle(bundle, sent, monkeypatch):
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(
        OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="cannot be written"):
        feature_sets.take_in_vectors(sent)
    assert not list(bundle.glob("*vits16*"))


def test_what_is_exported_is_taken_in(bundle, tmp_path, monkeypatch):
    """From stand-ins for images and weights, through the command, into `offline`."""
    names = DATASETS["cifar10"].classes
    monkeypatch.setitem(DATASETS, "cifar10", DatasetInfo({"train": 40, "test": 20}, "", names))
    for i in range(60):
        path = (tmp_path / "data" / "cifar10" / ("test" if i < 20 else "train") / names[i % 10]
                / f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    weights = tmp_path / "data" / "weights" / "dino_deitsmall16_pretrain.pth"
    weights.parent.mkdir()
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), weights)

    test, train = what_ships.export_paper_vectors(train=True)
    assert test == tmp_path / "runs" / "paper-mini" / "vectors" / NAME
    with safe_open(test, "np") as file:
        card = file.metadata()
    assert card["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(card["network"])["dtype"] in ("float32", "bfloat16")
    assert {"torch", "timm"} <= set(json.loads(card["versions"])) and card["date"].count("-") == 2

    fresh = load_study("paper-mini").features("cifar10", "dino_vits16")
    assert (load_file(test)["features"] == fresh.features.astype(np.float16)).all()
    for file in (test, train):
        feature_sets.take_in_vectors(file)
    offline = load_study("offline protocol=split")
    fit, score = offline.fit_and_score("cifar10", offline.backbone_for("cifar10"))
    assert (len(fit.labels), len(score.labels)) == (40, 20) and (score.labels == fresh.labels).all()
    with pytest.raises(ValueError, match="only the test images' vectors are bundled"):
        offline.fit_and_score("cifar10", "patch_kmeans")
