"""A profile: read, refused, overridden; and a run of the tiny one, with the record it leaves."""

import errno
import json
import os
from dataclasses import FrozenInstanceError, asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from sklearn.cluster import KMeans

from tsp_utils import clustering_metrics, heads, load_backbone, load_dataset, losses
from tsp_utils.files.image_folders import find_images, read_images
from tsp_utils.files.paths import data_dir, write_json
from tsp_utils.scaling import scale_features
from tsp_utils.study import profile
from tsp_utils.study.feature_sets import FeatureSet, draw_rows, load_vectors
from tsp_utils.study.profile import Study, load_study
from tsp_utils.study.training import code_of_heads, run_heads, summarise

pytestmark = pytest.mark.filterwarnings("ignore:Collapse")  # a few steps on a few images
PIXELS = "fashion-mnist", "pixels"


@pytest.fixture
def tiny(own_folders) -> Study:
    return load_study("tiny")


@pytest.fixture
def found(tiny) -> FeatureSet:
    return tiny.features(*PIXELS)


class Counted:
    """Trains heads, and keeps the seeds of each training (a list in a closure shapes a key)."""

    def __init__(self):
        self.train, self.seeds = heads.train_heads, []

    def __call__(self, untrained, *args, **kwargs):
        self.seeds.append(list(untrained.seeds))
        return self.train(untrained, *args, **kwargs)


@pytest.fixture
def trained(monkeypatch) -> list[list[int]]:
    """The seeds of each training of heads."""
    monkeypatch.setattr("tsp_utils.study.training.train_heads", counted := Counted())
    return counted.seeds


def records(study: Study) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((study.run_dir / "records").glob("*.json"))]


def sklearns(x, seed: int = 0) -> np.ndarray:
    return KMeans(10, n_init=1, random_state=seed).fit(x).labels_


# Reading a profile.


@pytest.mark.parametrize("name", sorted(path.stem for path in profile.PROFILES.glob("*.yaml")))
def test_every_profile_is_read_and_its_default_backbone_is_one_of_its_backbones(name):
    study = load_study(name)
    assert study.profile == study.run_dir.name == name and study.datasets and study.cells()
    assert study.default_backbone in study.backbones


def test_settings_that_the_profile_paper_does_not_name_are_the_papers():
    paper = load_study("paper")
    assert (paper.n_neighbors, paper.entropy_weight, paper.learning_rate) == (20, 3.0, 1e-4)
    assert (paper.batch_size, paper.max_epochs, paper.n_seeds) == (256, 100, 10)
    assert paper.seeds == range(10) and paper.protocol == "split"


@pytest.mark.parametrize(("setting", "value", "wanted"), [
    (setting, value, wanted) for setting, values, wanted in [
        ("n_seeds", "two 2.5 0 -3 true null .inf [1,2]", "a whole number of at least 1"),
        ("n_images", "0", "a whole number of at least 1 or null"),
        ("min_steps", "-1", "a whole number of at least 0"),
        ("entropy_weight", "-1 .inf", "a number of at least 0"),
        ("row_norm", "inf", "a number of at least 0 or null"),
        ("learning_rate", ".nan true fast 0", "a number above 0"),
        ("bundled_vectors", "maybe", "true or false"),
        ("protocol", "both", "split or all"),
        ("metric", "5 manhattan", "cosine or euclidean or inner")] for value in values.split()])
def test_a_value_of_another_kind_is_refused_with_what_to_pass(setting, value, wanted):
    content = yaml.safe_load(value)
    for make in (lambda: load_study(f"tiny {setting}={value}"),
                 lambda: replace(load_study("tiny"), **{setting: content})):
        with pytest.raises(ValueError) as refused:
            make()
        assert str(refused.value) == f"The setting {setting} is {content!r}; pass {wanted}."


@pytest.mark.parametrize(("profile", "changes", "sentence"), [
    ("offlin", {}, "profile 'offlin' is not known; the nearest one is 'offline', all are .*tiny"),
    ("", {}, "profile '' is not known"),
    ("tiny bakbones=pixels", {}, "nearest one is 'backbones'"),
    ("tiny profile=x", {}, "setting 'profile' is not known; the nearest one is 'protocol'"),
    ("tiny n_seeds", {}, "'n_seeds' has no value; write n_seeds=VALUE"),
    ("tiny n_seeds=[", {}, "override n_seeds=. cannot be read"),
    ("tiny backbones=pixels,", {}, "pass names, with commas between"),
    ("tiny default_backbone=pixel", {}, "'pixel' is not among the backbones; pass one of pixels"),
    ("tiny", dict(max_epochs=0, min_steps=0), "nothing would be trained; pass at least 1"),
    ("tiny", dict(n_neighbor=5), "setting 'n_neighbor' is not known; .* 'n_neighbors'"),
    ("tiny", dict(kmeans_only="pixels"), "kmeans_only is 'pixels'; pass names"),
])
def test_other_mistakes_are_refused_in_one_sentence(profile, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        replace(load_study(profile), **changes)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


@pytest.mark.parametrize(("text", "sentence"), [
    ("datasets: [a", "mine.yaml cannot be read"), ("- a\n- b\n", "mine.yaml is not a list of"),
    ("datasets: [a]\nbackbones: [b]\n", "'mine' lacks default_backbone, protocol"),
    ("datasets: []", r"datasets is \[\]; pass names")])
def test_a_damaged_profile_is_named(tmp_path, monkeypatch, text, sentence):
    monkeypatch.setattr(profile, "PROFILES", tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_study("mine")


def test_a_study_is_its_settings_and_does_not_change():
    study = load_study("tiny")
    changed = replace(study, n_seeds=3, max_epochs=0, row_norm=1)
    assert asdict(changed) == asdict(study) | dict(n_seeds=3, max_epochs=0, row_norm=1.0)
    assert repr(study).startswith("Study(profile='tiny', datasets=('fashion-mnist',), ")
    assert list(asdict(study)) == list(vars(study))
    assert replace(changed, n_seeds=2, max_epochs=study.max_epochs, row_norm=None) == study
    with pytest.raises(FrozenInstanceError):
        study.n_seeds = 3


def test_overrides_and_their_own_folder():
    study, plain = load_study("tiny datasets=a,b/c backbones=patch_kmeans n_seeds=3 "
                              "learning_rate=1e-3 n_images=null"), load_study("tiny")
    assert study.datasets == ("a", "b/c") and study.backbones == ("patch_kmeans",)
    assert (study.n_seeds, study.learning_rate, study.n_images) == (3, 1e-3, None)
    assert study.default_backbone == "patch_kmeans"  # the profile's is not compared any more
    assert study.run_dir.parent == plain.run_dir.parent != study.run_dir
    assert study.run_dir != load_study("tiny n_seeds=3").run_dir
    assert (study.max_epochs, study.metric) == (plain.max_epochs, plain.metric)


# Features of a study.


def test_cells_of_offline_leave_out_what_has_no_vectors():
    cells = load_study("offline").cells()
    assert ("cifar10", "patch_kmeans") in cells and ("cifar10", "vit_mini_random") in cells
    assert ("cifar10", "pixels") not in cells  # no images, so no pixels
    assert ("fashion-mnist", "pixels") in cells  # these images ship
    assert cells[0][0] == "cifar10" and ("cifar10", "pixels") in load_study("small").cells()


def test_bundled_vectors_are_test_images_only():
    found = load_study("offline n_images=50").features("cifar10", "patch_kmeans")
    assert found.features.shape == (50, 256) and len(found.labels) == 50
    assert found.features.dtype == np.float32 and found.labels.dtype == np.int64
    with pytest.raises(ValueError, match="only the test images' vectors are bundled"):
        load_study("offline protocol=split").fit_and_score("cifar10", "patch_kmeans")
    with pytest.raises(FileNotFoundError, match="run the profile small"):
        load_vectors("cifar10", "pixels")


@pytest.mark.parametrize("name", ["patch_kmeans", "vit_mini_random", "vit_nano_cpu"])
def test_bundled_vectors_equal_a_fresh_extraction(name):
    folder = data_dir() / "cifar10" / "test"
    if not folder.is_dir():
        pytest.skip("no CIFAR-10 as an image folder in TSP_DATA")
    chosen, paths, stored = [0, 1, 4321, 9999], find_images(folder), load_vectors("cifar10", name)
    images = read_images(folder, [paths[i] for i in chosen])
    fresh = load_backbone(name, device="cpu")(images).numpy()
    assert len(stored.labels) == len(paths) == 10_000 and len(set(stored.labels)) == 10
    # The bundled ones were computed in bfloat16, which this processor may not use.
    gaps = np.linalg.norm(stored.features[chosen] - fresh, axis=1)
    assert (gaps < 0.03 * np.linalg.norm(fresh, axis=1)).all(), gaps
    assert [stored.classes[stored.labels[i]] for i in chosen] == [
        paths[i].split("/")[0] for i in chosen]


# A run of the tiny profile.


def test_a_run_leaves_a_record_and_is_not_trained_twice(tiny, found, trained):
    first = tiny.train(*PIXELS)
    (record,) = records(tiny)
    assert record["settings"]["n_neighbors"] == 20 and record["settings"]["n"] == 600
    assert {"dataset", "backbone", "fit"} <= record["settings"].keys()
    assert record["code"] == code_of_heads(tiny)
    (made_with,) = record["made_with"]
    assert {"python", "torch", "scikit-learn", "machine", "device"} <= made_with.keys()
    assert record["seconds"] > 0 and len(record["final_loss"]) == 2
    assert [[row[name] for name in ("method", "seed", "protocol", "scored")]
            for row in record["metrics"]] == [
        [method, seed, "all", "test"] for method in ("k-means", "head") for seed in (0, 1)]

    again = tiny.train(*PIXELS)
    assert len(trained) == 1 and len(records(tiny)) == 1
    pd.testing.assert_frame_equal(again.table, first.table)
    assert (again.head_clusters(found.features) == first.head_clusters(found.features)).all()
    assert again.best == first.best and again.curves["loss"].shape == first.curves["loss"].shape
    assert not list(tiny.run_dir.parent.parent.rglob("*.partial"))

    tiny.train(*PIXELS, umap_points=7, full_seeds=True, default_backbone="x",
               vit_and_resnet=("a", "b"), kmeans_only=("y",))  # of maps and of other claims
    assert len(trained) == 1 == len(records(tiny))
    changed = tiny.train(*PIXELS, n_neighbors=5)
    assert len(trained) == 2 == len(records(tiny))
    assert changed.settings["n_neighbors"] == 5 and tiny.n_neighbors == 20


@pytest.mark.parametrize("n_hidden", [None, 8])
def test_more_seeds_train_only_the_difference(tiny, trained, monkeypatch, tmp_path, n_hidden):
    def train(n_seeds):
        return tiny.train(*PIXELS, n_seeds=n_seeds, n_hidden=n_hidden)

    train(2)
    monkeypatch.setattr("tsp_utils.cache.entries.versions", lambda: {"torch": "a later one"})
    grown, fewer = train(4), train(3)
    assert trained == [[0, 1], [2, 3]]

    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "another cache"))
    at_once = train(4)
    assert trained[2:] == [[0, 1, 2, 3]]
    for name, array in at_once.heads.state_dict().items():
        torch.testing.assert_close(grown.heads.state_dict()[name], array, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fewer.heads.state_dict()[name], array[:3], rtol=1e-5, atol=1e-6)
    pd.testing.assert_frame_equal(grown.table, at_once.table)
    for name, curve in at_once.curves.items():
        assert curve.shape == (5, 4)  # [E, S]
        np.testing.assert_allclose(grown.curves[name], curve, rtol=1e-5)
        np.testing.assert_allclose(fewer.curves[name], curve[:, :3], rtol=1e-5)
    assert fewer.seconds < grown.seconds
    made_with = {record["settings"]["n_seeds"]: [made["torch"] for made in record["made_with"]]
                 for record in records(tiny)}
    assert made_with == {2: [version("torch")], 3: [version("torch"), "a later one"],
                         4: ["a later one"]}  # the last was made at once, in another cache


def test_features_and_code_train_again_and_scores_do_not(tiny, found, trained, monkeypatch):
    before = run_heads(tiny, found, found)
    few = replace(found, features=found.features[:50], labels=found.labels[:50])
    run_heads(replace(tiny, protocol="split"), found, few)
    run_heads(tiny, replace(found, labels=np.roll(found.labels, 1)), found)
    assert len(trained) == 1  # what is scored shapes no head, nor do labels
    moved = replace(found, features=found.features + np.float32(1e-3))
    run_heads(tiny, moved, moved)
    assert len(trained) == 2
    loss = losses.tsp_loss
    monkeypatch.setattr(losses, "tsp_loss", lambda a, b, entropy_weight: loss(a, b, 10.0))
    after = run_heads(tiny, found, found)
    assert len(trained) == 3
    assert not np.allclose(after.curves["loss"], before.curves["loss"])


def test_labels_with_gaps_are_as_many_clusters(tiny, found):
    """{0, 5, 10, 15} are four classes, and were sixteen clusters."""
    odd = replace(found, labels=5 * (found.labels % 4))
    run = run_heads(tiny, odd, odd)
    assert odd.n_clusters == run.settings["n_clusters"] == run.centers.shape[1] == 4
    assert run.head_clusters(found.features).max() <= 3


@pytest.mark.parametrize(("scaling", "by_hand"), [
    ("mean-norm", scale_features), ("raw", np.asarray),
    ("l2", lambda x: x * (x.shape[1] ** 0.5 / np.linalg.norm(x, axis=1, keepdims=True)))])
def test_kmeans_is_scikit_learns_on_the_features_scaled(tiny, found, scaling, by_hand):
    run, scaled = tiny.train(*PIXELS, scaling=scaling), by_hand(found.features)
    np.testing.assert_allclose(run.scaled(found.features), scaled, rtol=1e-4 * (scaling != "raw"))
    for seed, clusters in enumerate(run.kmeans_clusters(found.features)):
        assert (clusters == sklearns(scaled, seed)).mean() > 0.998  # ties in float32


def test_settings_of_the_ablations_reach_the_head(tiny, found):
    plain = tiny.train(*PIXELS).curves["loss"][0]
    for changes in (dict(init="random"), dict(row_norm=1.0), dict(weighting="uniform"),
                    dict(n_hidden=8)):
        run = tiny.train(*PIXELS, **changes)
        assert run.head_clusters(found.features).shape == (2, 600)
        assert not np.allclose(run.curves["loss"][0], plain), changes
    read_back = tiny.train(*PIXELS, n_hidden=8)
    assert torch.equal(read_back.heads.hidden.weight, run.heads.hidden.weight)


def test_images_are_drawn_once_from_the_fitted_ones(tiny, found):
    rows = draw_rows(600, 100)
    assert len(rows) == 100 and (np.diff(rows) > 0).all()
    for _ in range(2):
        fit, score = replace(tiny, n_fit=100).fit_and_score(*PIXELS)
        np.testing.assert_array_equal(fit.features, found.features[rows])
        assert len(fit.labels) == 100 and len(score.labels) == 600
    assert len(replace(tiny, n_fit=10_000).fit_and_score(*PIXELS)[0].labels) == 600


def test_seeds_of_a_verdict_are_those_of_the_rules_where_the_profile_wants_them(tiny):
    assert tiny.claim_seeds("C8") == tiny.n_seeds == 2
    full = replace(tiny, full_seeds=True)
    assert (full.claim_seeds("C8"), full.claim_seeds("C9")) == (100, 30)
    assert load_study("small").full_seeds and not load_study("offline").full_seeds


def test_protocol_split_fits_on_train_and_its_table_is_what_the_clusters_of_both_give(
        tiny, monkeypatch):
    images = load_dataset("fashion-mnist", "test")
    halves = {"train": images.subset(slice(600, 1200)), "test": images.subset(slice(0, 300))}
    monkeypatch.setattr(profile, "load_images", lambda name, split, n: halves[split])
    study = replace(tiny, protocol="split")
    run = study.train(*PIXELS)
    assert run.settings["n"] == 600 and run.settings["protocol"] == "split"
    fit, score = study.fit_and_score(*PIXELS)
    expected = sklearns(scale_features(fit.features))
    assert (run.kmeans_clusters(fit.features)[0] == expected).mean() > 0.998
    rows = run.table.set_index(["scored", "method", "seed"]).sort_index()
    assert len(rows) == 8
    for split, found in (("train", fit), ("test", score)):
        for method, clusters in (("head", run.head_clusters(found.features)),
                                 ("k-means", run.kmeans_clusters(found.features))):
            assert clusters.shape == (2, len(found.labels))
            for seed in (0, 1):
                for name, value in clustering_metrics(found.labels, clusters[seed]).items():
                    assert rows.loc[(split, method, seed), name] == pytest.approx(100 * value)
    assert "fitted on train, scored on test" in study.caption(*PIXELS)
    pd.testing.assert_frame_equal(study.kmeans_table(*PIXELS), run.table[
        run.table["method"] == "k-means"].reset_index(drop=True))

    mean = summarise(run.table).set_index(["scored", "method"]).loc["test", "head"]
    accuracies = rows.loc[("test", "head"), "acc"].to_numpy()
    assert mean["acc_mean"] == pytest.approx(accuracies.mean()) and mean["n"] == 2
    assert mean["acc_std"] == pytest.approx(abs(np.diff(accuracies)[0]) / 2**0.5)  # n - 1


def test_a_place_that_cannot_be_written_is_named_with_what_would_help(tmp_path, monkeypatch):
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "file"))
    for place, sentence in (
            ("file/heads", r"file.heads cannot be written \(.*\); make it writable, with some "
                           r"space left, or point TSP_CACHE"),
            ("other", r"other cannot .* \(.*\); make it writable, with some space left\.$")):
        (tmp_path / place.split("/")[0]).touch()
        with pytest.raises(OSError, match=sentence):
            write_json(tmp_path / place / "a.json", {})


@pytest.mark.parametrize(("owner", "name", "number", "sentence"), [
    (np, "savez", errno.ENOSPC, "No space left on device.*TSP_CACHE"),
    (Path, "mkdir", errno.EROFS, r"written \(Read-only file system\).*TSP_CACHE")])
def test_a_full_or_read_only_cache_is_one_sentence_and_leaves_nothing(
        tiny, found, monkeypatch, owner, name, number, sentence):
    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(OSError, match=sentence) as refused:
        run_heads(tiny, found, found)
    assert "\n" not in str(refused.value)
    assert not list(Path(os.environ["TSP_CACHE"]).rglob("heads/*.npz"))
    assert not tiny.run_dir.exists()


def test_a_figure_stands_beside_its_numbers(tiny, monkeypatch, capsys):
    monkeypatch.setenv("TSP_SVG", "1")
    figure = Figure()
    tiny.save_figure(figure, "03_test", pd.DataFrame({"x": [1, 2], "y": [0.123456789, 3]}), "what",
                     "The result")
    folder = tiny.run_dir / "figures"
    assert capsys.readouterr().out == "what\n" and figure.get_suptitle() == "The result"
    drawn = Image.open(folder / "03_test.png")  # 256 colours: a map has a third of the bytes
    assert drawn.text["Description"] == "what" and drawn.mode == "P"
    assert drawn.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert "<svg" in (folder / "03_test.svg").read_text()
    assert (folder / "03_test.csv").read_text() == "x,y\n1,0.123457\n2,3\n"
