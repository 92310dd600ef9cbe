"""Read-outs against scikit-learn and brute force; the dictionaries of C6: fair, resumed, whole."""

import json

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

import experiments.dictionary_arms as dictionary_arms
from experiments.arms import ARMS
from experiments.dictionary_arms import DICTIONARY_ARMS, learn_dictionary_arms
from tsp_utils.datasets import ImageDataset
from tsp_utils.study.feature_sets import FeatureSet
from tsp_utils.study.frozen_evaluation import balanced_rows, read_out, small_pool_consistency

pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(n=300, n_classes=3, spread=0.5) -> FeatureSet:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % n_classes
    features = np.eye(n_classes, 8, dtype=np.float32)[labels] * 5
    return FeatureSet("blobs", "test", "made up", features + spread * rng.normal(
        size=features.shape).astype(np.float32), labels, tuple("abc"))


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tsp_utils.study.profile.runs_dir", lambda: tmp_path / "runs")
    monkeypatch.setattr(dictionary_arms, "bundled_dir", lambda: tmp_path / "bundled")


def test_read_out_of_separable_and_of_shuffled_labels():
    found = blobs()
    record = read_out(found, n_seeds=2)
    assert record["head"]["acc"] == record["k-means"]["acc"] == [100.0, 100.0]
    assert record["knn_leave_one_out"] == 100 and record["n"] == 300
    shuffled = FeatureSet("blobs", "test", "made up", found.features,
                          np.random.default_rng(1).permutation(found.labels), found.classes)
    record = read_out(shuffled, n_seeds=2)
    index = NearestNeighbors(n_neighbors=21, metric="cosine").fit(found.features)
    rows = index.kneighbors(found.features, return_distance=False)[:, 1:]
    for k in (1, 5, 20):
        expected = 100 * (shuffled.labels[rows[:, :k]] == shuffled.labels[:, None]).mean()
        assert record["consistency"][str(k)] == pytest.approx(expected, abs=0.01)
    assert max(record["head"]["acc"]) < 60


def images_of(name, split, *_, **__) -> ImageDataset:
    rng = np.random.default_rng(sum(map(ord, name + split)))
    n = 60 if split == "test" else 80
    return ImageDataset(name, split, rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
                        np.arange(n) % 3, tuple("abc"))


def test_dictionaries_are_learned_once_and_written_whole(monkeypatch):
    monkeypatch.setattr(dictionary_arms, "load_dataset", images_of)
    monkeypatch.setattr("experiments.arms.load_dataset", images_of)
    monkeypatch.setattr(dictionary_arms, "SETTINGS", dict(
        n_atoms=8, n_patches=2_000, n_features=4, n_pca_images=40))
    path = learn_dictionary_arms(n_seeds=2, n_heads=2)
    records = json.loads(path.read_text())
    assert len(records) == 2 * len(DICTIONARY_ARMS)
    assert {record["settings"]["n_patches"] for record in records} == {2_000, 80}
    by_arm = {name: [r for r in records if r["arm"] == name] for name in DICTIONARY_ARMS}
    assert all(len(r["head"]["acc"]) == 2 for r in records)
    assert by_arm["source"][0]["head"] != by_arm["source"][1]["head"]  # seeds are runs of their own

    before = path.read_bytes()
    monkeypatch.setattr(dictionary_arms, "arm_images", None)  # any learning would fail
    assert learn_dictionary_arms(n_seeds=2, n_heads=2).read_bytes() == before


def test_the_arms_have_the_ratios_of_the_rules():
    n = {"source": 100_000, "target 4,000": 4_000, "target 12,500": 12_500,
         "target 50,000": 50_000}
    for name, n_images in n.items():
        arm, fewer = ARMS[DICTIONARY_ARMS[name][0]], DICTIONARY_ARMS[name][1]
        assert fewer == 1 and (arm.n_images or {"tinyimagenet32": 100_000, "cifar10": 50_000}[
            arm.data[0]]) == n_images
    assert DICTIONARY_ARMS["target 4,000, equal epochs"] == (DICTIONARY_ARMS["target 4,000"][0], 25)


def test_small_pools_are_balanced_and_their_consistency_is_scikit_learns():
    found = blobs(spread=3)
    rows = balanced_rows(found.labels, seed=4)
    assert np.bincount(found.labels[rows]).tolist() == [50, 50, 50] and len(set(rows)) == 150
    shares = small_pool_consistency(found)
    index = NearestNeighbors(n_neighbors=21, metric="cosine").fit(found.features[rows])
    near = index.kneighbors(found.features[rows], return_distance=False)[:, 1:]
    labels = found.labels[rows]
    assert shares[4] == pytest.approx(100 * (labels[near] == labels[:, None]).mean(), abs=0.01)
    pool = FeatureSet("pool", "val", "made up", found.features[rows], labels, found.classes)
    assert small_pool_consistency(pool) == pytest.approx([shares[4]])
