"""The networks that ship: they are those of their cards, load without network, and hold figures."""

import functools
import hashlib
import json
import re

import numpy as np
import pytest
import timm
import torch

from experiments import what_ships
from experiments.arms import ARMS, save_backbone
from experiments.what_ships import (
    C5_CLASSES,
    FASHION_BACKBONES,
    PRETRAINED,
    VECTOR_BACKBONES,
    bundle_backbone,
)
from tsp_utils.backbones import BACKBONES, load_backbone
from tsp_utils.datasets import ImageDataset, load_dataset
from tsp_utils.features import cached_features
from tsp_utils.files.paths import REPOSITORY, bundled_dir, data_dir, shipped_records
from tsp_utils.neighbors import knn_accuracy, label_consistency, nearest_neighbors
from tsp_utils.networks.registry import model_card
from tsp_utils.study.feature_sets import load_vectors

each = pytest.mark.parametrize("name", PRETRAINED)
OF_PATCHES = {"patch_kmeans": 2_000_000, "invariant_patches": 3_600_000}  # most bytes
random_images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)


def knn_of_the_vectors(name: str) -> float:
    """Leave-one-out, in percent, on the CIFAR-10 vectors that ship."""
    found = load_vectors("cifar10", name)
    return 100 * knn_accuracy(found.features, found.labels)


def checked_card(path, n_figures) -> dict:
    """The card beside weights, which has their hash and that many figures."""
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(written["knn"]) == n_figures
    return written


@pytest.mark.parametrize("name", [*OF_PATCHES, *PRETRAINED])
def test_the_file_is_small_and_the_one_on_its_card(name):
    path = bundled_dir() / f"{name}.safetensors"
    checked_card(path, n_figures=2 if name in (*OF_PATCHES, "resnet_contrast_cifar10") else 3)
    assert path.stat().st_size < OF_PATCHES.get(name, 16_000_000)
    network = load_backbone(name, device="cpu")
    assert network(random_images[:2]).shape == (2, network.spec.dim)


def test_the_dictionaries_that_ship_have_the_settings_of_their_cards_and_figures_that_serve():
    for name, knn in (("patch_kmeans", 64), ("invariant_patches", 71)):
        written, network = model_card(name), load_backbone(name, device="cpu")
        assert network.spec.dim == network.model.axes.shape[1] == written["dim"]
        assert written["knn"]["cifar10, train to test"] >= knn
        if name == "patch_kmeans":
            assert network.model.atoms.shape == (written["atoms"], 108)
    assert network.model.sizes == written["sizes"]
    assert network.model.filters_8.shape == (written["atoms"], 192)
    assert sum(written["seconds"].values()) <= 60 * written["minutes"] + 6


@each
def test_the_card_is_of_the_arm_in_the_table(name):
    arm, written = ARMS[name], model_card(name)
    assert written["images_seen"] == arm.budget_images and written["seed"] == arm.seed
    assert written["source"] == arm.source
    assert written["recipe"] == json.loads(json.dumps(vars(arm.recipe)))
    assert written["log"][-1]["images_seen"] == arm.budget_images
    assert len(written["terms_of_the_images"]) == len(arm.data)
    assert written["minutes"] > 0 and written["hardware"] and written["code_sha256"]


def test_what_ships_stays_small():
    assert sum(path.stat().st_size for path in bundled_dir().rglob("*.safetensors")) < 65_000_000


def test_fashion_mnist_figures_of_the_cards():
    """Of vectors that ship, of the default backbone and of the smallest network."""
    images = load_dataset("fashion-mnist", "test")
    vectors = {"vit_nano_cpu": load_vectors("fashion-mnist", "vit_nano_cpu").features}
    for name in ("vit_pico_cpu", "patch_kmeans"):
        vectors[name] = cached_features(load_backbone(name, "cpu"), images, progress=False)
    for name, features in vectors.items():
        assert 100 * knn_accuracy(features, images.labels) == pytest.approx(
            model_card(name)["knn"]["fashion-mnist test, leave-one-out"],
            abs=0.1 if name in OF_PATCHES else 0.5)


@pytest.mark.parametrize(("data", "split"), [
    ("fashion-mnist", "test"), ("cifar10", "test"), ("tinyimagenet32", "val")])
def test_the_networks_give_the_vectors_that_ship(data, split):
    """Of 50 images, nearly: a processor with bf16 computes others than one without."""
    if data != "fashion-mnist" and not (data_dir() / data / split).is_dir():
        pytest.skip(f"no {data} as an image folder in TSP_DATA")
    images = load_dataset(data, split)
    if data == "tinyimagenet32":
        images = images.subset(np.isin(images.labels, C5_CLASSES))
    rows = slice(None, None, len(images) // 50)
    for name in FASHION_BACKBONES if data == "fashion-mnist" else VECTOR_BACKBONES:
        shipped = load_vectors(data, name, split)
        np.testing.assert_array_equal(shipped.labels, images.labels)
        due = torch.from_numpy(shipped.features[rows].astype(np.float32))
        found, centre = load_backbone(name, "cpu")(images.images[rows]), due.mean(0)
        alike = torch.cosine_similarity(found - centre, due - centre)
        assert alike.mean() > 0.99, f"{name}: {alike.mean():.3f}"


@each
def test_read_outs_are_of_three_checkpoints_and_agree_with_the_vectors(name):
    records = shipped_records(name)
    assert [record["checkpoint"] for record in records][-3:] == ["quarter", "half", "final"]
    assert all(len(record["head"]["acc"]) == 10 for record in records)
    assert knn_of_the_vectors(name) == pytest.approx(records[-1]["knn_leave_one_out"], abs=0.1)


def test_the_dictionarys_vectors_know_more_of_the_classes_than_an_untrained_networks():
    untrained = knn_of_the_vectors("vit_mini_random")
    assert 15 < untrained < 35 and knn_of_the_vectors("patch_kmeans") > untrained + 20


@pytest.mark.parametrize("name", [
    "vit_mini", "vit_mini_cifar10_4k", "resnet_mini", "resnet_contrast", "resnet_contrast_cifar10",
    "resnet_contrast_cifar10_4k", "resnet_contrast_cifar10_long", "vit_contrast"])
def test_the_table_of_the_arms_of_a_gpu_is_their_records(name):
    page = (REPOSITORY / "docs" / "pretraining.md").read_text()
    scores = r"(\S+ \+- \S+) \| (\S+ \+- \S+) \|$"
    rows = re.findall(rf"^\| `{name}` \| (\w+).* \| (.+) \| ([\d.]+) \| " + scores, page, re.M)
    records = shipped_records(name)
    assert len(rows) == len(records)
    for (mark, at_home, consistency, *accuracies), record in zip(rows, records, strict=True):
        acc = [np.array(record[method]["acc"]) for method in ("k-means", "head")]
        assert record["checkpoint"] == mark
        knn = record.get("knn_tinyimagenet_val")
        assert at_home == ("not read" if knn is None else f"{knn:.2f}")
        assert consistency == f"{record['consistency']['20']:.1f}"
        assert accuracies == [f"{a.mean():.1f} +- {a.std(ddof=1):.1f}" for a in acc]


def test_the_page_of_the_search_is_its_record():
    page = (REPOSITORY / "docs" / "closed_form.md").read_text()
    record = json.loads((REPOSITORY / "docs" / "closed_form.json").read_text())
    tried = [f"| {t['best']['knn']:.2f} | {t['best']['cons']:.2f} |" for t in record["trials"]]
    ended = [f"| {f['knn']:.1f} | {f['cons']:.1f} | {f['acc']:.1f} +- {f['acc_sd']:.1f} |"
             for f in record["finals"]]
    ships = [f"| {r['knn']:.2f} | {r['cons']:.1f} | {r['km'][0]:.1f} +- {r['km'][1]:.1f} | "
             f"{r['head'][0]:.1f} +- {r['head'][1]:.1f} |" for r in record["library"]]
    assert (len(tried), len(ended), len(ships)) == (23, 4, 3)
    assert all(row in page for row in tried + ended + ships)
    knn = model_card("invariant_patches")["knn"]["cifar10, train to test"]
    assert record["library"][0]["knn"] == knn
    vectors = load_vectors("cifar10", "invariant_patches")
    found = label_consistency(nearest_neighbors(vectors.features, 20), vectors.labels)[-1]
    assert 100 * found == pytest.approx(record["library"][0]["cons"], abs=0.01)


def test_the_trials_by_contrast_are_their_record():
    page = " ".join((REPOSITORY / "docs" / "pretraining.md").read_text().split())
    record = json.loads((REPOSITORY / "docs" / "contrast.json").read_text())
    other, spread = record["temperature 0.4"], record["deviation of lengths over mean"]
    kmeans, heads = (f"{np.mean(acc):.1f} +- {np.std(acc, ddof=1):.1f}"
                     for acc in (other["k-means"], other["head"]))
    said = [f"| {t['setting']} | {t['knn']:.2f} |" for t in record["short_runs"]]
    said += [f"({record['images of a short run']:,} images each",
             f"for {other['log'][-1]['images_seen']:,} images",
             f"at {other['log'][-1]['knn_tinyimagenet_val']:.2f} on Tiny-ImageNet",
             f"a consistency of {other['consistency@20']:.1f}, K-means {kmeans} and heads {heads}",
             f"{spread['resnet_contrast_cifar10_4k']:.2f} of their mean"]
    assert len(record["short_runs"]) == 5 and [words for words in said if words not in page] == []
    best = max(record["short_runs"], key=lambda trial: trial["knn"])
    assert best["setting"] == f"temperature {ARMS['resnet_contrast'].recipe.temperature}"


def test_vectors_of_c5_are_fifty_images_of_each_class_fixed_beforehand():
    for name in VECTOR_BACKBONES:
        counts = np.bincount(load_vectors("tinyimagenet32", name, "val").labels, minlength=200)
        np.testing.assert_array_equal(counts, 50 * np.isin(np.arange(200), C5_CLASSES))


def write_arm(name, root, marks):
    """An arm's untrained network and log, as its trainer writes them."""
    recipe, folder = ARMS[name].recipe, root / "pretrain" / name
    with torch.random.fork_rng():
        network = timm.create_model(recipe.architecture, num_classes=0, **dict(recipe.options))
    for mark in marks:
        save_backbone(network, folder / f"{mark}.safetensors")
    (folder / "log.json").write_text(json.dumps({"name": name, "recipe": vars(recipe)}))
    return network, folder


@pytest.mark.parametrize("name", {(arm.recipe.architecture, arm.recipe.options): name
                                  for name, arm in ARMS.items()}.values())
def test_the_network_of_every_arm_is_read_back_at_its_size(name, tmp_path, monkeypatch):
    """Also those that nobody has trained yet."""
    network, folder = write_arm(name, tmp_path, ["final"])
    images = random_images[:2]
    found = what_ships._network_of(name, folder / "final.safetensors")(images)
    assert found.shape == (2, network.num_features) and found.isfinite().all()
    if name not in BACKBONES:
        monkeypatch.setattr("tsp_utils.networks.registry.runs_dir", lambda: tmp_path)
        torch.testing.assert_close(load_backbone(name)(images), found)


def images_of(name, split) -> ImageDataset:
    """300 images of ten classes, those of C5 for Tiny-ImageNet."""
    labels = np.arange(300) % 10 * (20 if name == "tinyimagenet32" else 1)
    return ImageDataset(name, split, random_images, labels, tuple(map(str, range(200))))


def test_a_finished_arm_is_bundled_of_another_seed_its_read_outs(
        monkeypatch, tmp_path, own_folders):
    bundled = tmp_path / "bundled"
    for name in ("vit_nano", "vit_nano_s1"):  # seed 0 and seed 1
        write_arm(name, tmp_path / "runs", ["quarter", "half", "final"])
    for name, stand_in in dict(
            read_out=lambda found: {"n": len(found.labels)}, load_dataset=images_of,
            runs_dir=lambda: tmp_path / "runs", bundled_dir=lambda: bundled).items():
        monkeypatch.setattr(what_ships, name, stand_in)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(what_ships, "knn_readouts", lambda network: 1 / 0)
        bundle_backbone("vit_nano")
    assert not bundled.exists()  # nothing is written before all is computed
    assert bundle_backbone("vit_nano_s1") == bundled / "readouts" / "vit_nano_s1.json"
    assert bundle_backbone("vit_nano") == bundled / "vit_nano.safetensors"
    assert sorted(str(path.relative_to(bundled)) for path in bundled.rglob("*.*")) == [
        "readouts/vit_nano.json", "readouts/vit_nano_s1.json", "vit_nano.json",
        "vit_nano.safetensors"]
    checked_card(bundled / "vit_nano.safetensors", n_figures=3)
    records = json.loads((bundled / "readouts" / "vit_nano.json").read_text())
    assert [record["checkpoint"] for record in records] == ["quarter", "half", "final"]
    monkeypatch.setattr("tsp_utils.networks.registry.bundled_dir", lambda: bundled)
    assert load_backbone("vit_nano").dim == 128  # by its card, without a row in the table
    with pytest.raises(FileNotFoundError, match="run python -m experiments pretrain"):
        bundle_backbone("vit_nano_s2")  # which has not finished
    with pytest.raises(ValueError, match="nearest one is 'vit_nano'"):
        bundle_backbone("vit_nan")


@pytest.mark.parametrize(("experiment", "function", "settings"), [
    ("learn_patches", "learn_patch_kmeans", dict(n_pca_images=200)),
    ("learn_invariant", "learn_invariant_patches", dict(n_views=2))])
def test_a_dictionary_learned_again_takes_its_place_with_its_card(
        experiment, function, settings, monkeypatch, tmp_path, own_folders):
    small = functools.partial(getattr(what_ships, function), n_atoms=16, n_features=8,
                              n_patches=2000, **settings)
    monkeypatch.setattr(what_ships, function, small)
    monkeypatch.setattr(what_ships, "load_dataset", images_of)
    path = getattr(what_ships, experiment)(tmp_path / "dictionary" / "patches.safetensors")
    written = checked_card(path, n_figures=2)
    assert written["atoms"] == 16 and written["dim"] == 8 and written["n_source_images"] == 300
    assert sorted(p.name for p in path.parent.iterdir()) == ["patches.json", "patches.safetensors"]
