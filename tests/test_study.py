"""A profile: read, refused, overridden; and a run of the tiny one, with the record it leaves."""

import errno
import json
import os
from dataclasses import FrozenInstanceError, asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from tsp_utils import clustering_metrics, heads, load_backbone, load_dataset, losses
from tsp_utils.image_folders import find_images, read_images
from tsp_utils.paths import data_dir, write_json
from tsp_utils.scaling import scale_features
from tsp_utils.study import profile
from tsp_utils.study.feature_sets import draw_rows, load_vectors
from tsp_utils.study.profile import Study, load_study
from tsp_utils.study.training import code_of_heads, run_heads, summarise

pytestmark = pytest.mark.filterwarnings("ignore:Collapse")  # a few steps on a few images
PROFILES = sorted(path.stem for path in profile.PROFILES.glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small runs on a busy machine wait for their threads more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Study:
    """The tiny profile, with a cache and a run folder of its own."""
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tsp_utils.study.profile.runs_dir", lambda: tmp_path / "runs")
    return load_study("tiny")


class Counted:
    """Trains heads, and keeps the seeds of each training (a list in a closure shapes a key)."""

    def __init__(self):
        self.train, self.seeds = heads.train_heads, []

    def __call__(self, untrained, *args, **kwargs):
        self.seeds.append(list(untrained.seeds))
        return self.train(untrained, *args, **kwargs)

    def __len__(self):
        return len(self.seeds)


@pytest.fixture
def trainings(monkeypatch) -> Counted:
    """Counts the trainings of heads."""
    counted = Counted()
    monkeypatch.setattr("tsp_utils.study.training.train_heads", counted)
    return counted


def records(study: Study) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((study.run_dir / "records").glob("*.json"))]


# Reading a profile.


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_read(name):
    study = load_study(name)
    assert study.profile == name and study.run_dir.name == name
    assert study.default_backbone in study.backbones and study.datasets and study.cells()
    assert isinstance(study.datasets, tuple) and isinstance(study.backbones, tuple)


def test_settings_that_no_profile_names_are_the_papers():
    study = load_study("paper")
    assert (study.n_neighbors, study.entropy_weight, study.learning_rate) == (20, 3.0, 1e-4)
    assert (study.batch_size, study.max_epochs, study.n_seeds) == (256, 100, 10)
    assert list(study.seeds) == list(range(10)) and study.protocol == "split"


@pytest.mark.parametrize("profile, sentence", [
    ("offlin", "no profile 'offlin'; pass one of .*offline"),
    ("", "no profile ''"),
    ("tiny n_neighbor=5", "no setting 'n_neighbor'; the nearest one is 'n_neighbors'"),
    ("tiny bakbones=pixels", "nearest one is 'backbones'"),
    ("tiny profile=x", "no setting 'profile'; the nearest one is 'protocol'"),
    ("tiny n_seeds", "'n_seeds' has no value; write n_seeds=VALUE"),
    ("tiny n_seeds=two", "n_seeds is 'two'; pass a whole number"),
    ("tiny n_seeds=2.5", "n_seeds is 2.5; pass a whole number"),
    ("tiny n_seeds=0", "n_seeds is 0; pass a whole number of at least 1"),
    ("tiny n_seeds=-3", "n_seeds is -3"),
    ("tiny n_seeds=true", "n_seeds is True"),
    ("tiny n_seeds=null", "n_seeds is None"),
    ("tiny n_seeds=.inf", "n_seeds is inf"),
    ("tiny n_seeds=[1,2]", "n_seeds is"),
    ("tiny n_seeds=[", "override n_seeds=. cannot be read"),
    ("tiny entropy_weight=-1", "entropy_weight is -1; pass a number of at least 0"),
    ("tiny learning_rate=.nan", "learning_rate is nan"),
    ("tiny learning_rate=true", "learning_rate is True; pass a number above 0"),
    ("tiny learning_rate=fast", "learning_rate is 'fast'; pass a number above 0"),
    ("tiny learning_rate=0", "learning_rate is 0; pass a number above 0"),
    ("tiny entropy_weight=.inf", "entropy_weight is inf; pass a number of at least 0"),
    ("tiny row_norm=inf", "row_norm is 'inf'; pass a number of at least 0 or null"),
    ("tiny min_steps=-1", "min_steps is -1; pass a whole number of at least 0"),
    ("tiny max_epochs=0 min_steps=0", "nothing would be trained; pass at least 1"),
    ("tiny n_images=0", "n_images is 0; pass a whole number of at least 1 or null"),
    ("tiny bundled_vectors=maybe", "bundled_vectors is 'maybe'; pass true or false"),
    ("tiny protocol=both", "protocol is 'both'; pass split or all"),
    ("tiny metric=5", "metric is 5; pass cosine or euclidean or inner"),
    ("tiny backbones=pixels,", "pass names, with commas between"),
    ("tiny default_backbone=pixel", "'pixel' is not among the backbones; pass one of pixels"),
])
def test_bad_settings_are_refused_in_one_sentence(profile, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        load_study(profile)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


@pytest.mark.parametrize("changes, sentence", [
    (dict(n_seeds=0), "n_seeds is 0; pass a whole number of at least 1"),
    (dict(entropy_weight=float("inf")), "entropy_weight is inf; pass a number of at least 0"),
    (dict(max_epochs=0, min_steps=0), "nothing would be trained; pass at least 1"),
    (dict(metric="manhattan"), "metric is 'manhattan'; pass cosine or euclidean or inner"),
    (dict(n_neighbor=5), "no setting 'n_neighbor'; the nearest one is 'n_neighbors'"),
    (dict(kmeans_only="pixels"), "kmeans_only is 'pixels'; pass names"),
])
def test_bad_changes_to_a_study_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        replace(load_study("tiny"), **changes)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_a_study_is_its_settings_and_does_not_change():
    study = load_study("tiny")
    changed = replace(study, n_seeds=3, max_epochs=0, row_norm=1)
    assert asdict(changed) == asdict(study) | dict(n_seeds=3, max_epochs=0, row_norm=1.0)
    assert list(asdict(study)) == [field.name for field in fields(study)] == list(vars(study))
    assert repr(study).startswith("Study(profile='tiny', datasets=('fashion-mnist',), ")
    assert replace(changed, n_seeds=2, max_epochs=study.max_epochs, row_norm=None) == study
    with pytest.raises(FrozenInstanceError):
        study.n_seeds = 3


def test_a_damaged_profile_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "PROFILES", tmp_path)
    for text, sentence in (("datasets: [a", "mine.yaml cannot be read"),
                           ("- a\n- b\n", "mine.yaml is not"),
                           ("datasets: [a]\nbackbones: [b]\n", "lacks default_backbone, protocol"),
                           ("datasets: []", r"datasets is \[\]; pass names"),
                           ("datasets: pixels", "datasets is 'pixels'; pass names")):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_study("mine")


def test_overrides_and_their_own_folder():
    study = load_study("tiny datasets=a,b/c backbones=patch_kmeans n_seeds=3 learning_rate=1e-3 "
                       "n_images=null")
    assert study.datasets == ("a", "b/c") and study.backbones == ("patch_kmeans",)
    assert (study.n_seeds, study.learning_rate, study.n_images) == (3, 1e-3, None)
    assert study.default_backbone == "patch_kmeans"  # the profile's is not compared any more
    assert study.run_dir.parent == load_study("tiny").run_dir.parent != study.run_dir
    assert study.run_dir != load_study("tiny n_seeds=3").run_dir
    plain = load_study("tiny")
    assert (study.max_epochs, study.metric) == (plain.max_epochs, plain.metric)


# Features of a study.


def test_cells_of_offline_leave_out_what_has_no_vectors():
    cells = load_study("offline").cells()
    assert ("cifar10", "patch_kmeans") in cells and ("cifar10", "vit_mini_random") in cells
    assert ("cifar10", "pixels") not in cells  # no images, so no pixels
    assert ("fashion-mnist", "pixels") in cells  # these images ship
    assert cells[0][0] == "cifar10"
    assert ("cifar10", "pixels") in load_study("small").cells()


def test_bundled_vectors_are_test_images_only():
    study = load_study("offline n_images=50")
    found = study.features("cifar10", "patch_kmeans")
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
    chosen = [0, 1, 4321, 9999]
    paths = find_images(folder)
    fresh = load_backbone(name, device="cpu")(read_images(folder, [paths[i] for i in chosen]))
    stored = load_vectors("cifar10", name)
    assert len(stored.labels) == len(paths) == 10_000 and len(set(stored.labels)) == 10
    # The bundled ones were computed in bfloat16, which this processor may not use.
    fresh = fresh.numpy()
    gaps = np.linalg.norm(stored.features[chosen] - fresh, axis=1)
    assert (gaps < 0.03 * np.linalg.norm(fresh, axis=1)).all(), gaps
    assert [stored.classes[stored.labels[i]] for i in chosen] == [
        paths[i].split("/")[0] for i in chosen]


# A run of the tiny profile.


def test_a_run_leaves_a_record_and_is_not_trained_twice(tiny, trainings):
    first = tiny.train("fashion-mnist", "pixels")
    assert len(trainings) == 1
    (record,) = records(tiny)
    assert record["settings"]["n_neighbors"] == 20 and record["settings"]["n"] == 600
    assert {"dataset", "backbone", "fit"} <= record["settings"].keys()
    assert record["code"] == code_of_heads(tiny)
    (made_with,) = record["made_with"]
    assert {"python", "torch", "scikit-learn", "machine", "device"} <= made_with.keys()
    assert record["seconds"] > 0 and len(record["final_loss"]) == 2
    assert [(row["method"], row["seed"]) for row in record["metrics"]] == [
        ("k-means", 0), ("k-means", 1), ("head", 0), ("head", 1)]
    assert all(row["protocol"] == "all" and row["scored"] == "test" for row in record["metrics"])

    again = tiny.train("fashion-mnist", "pixels")
    assert len(trainings) == 1 and len(records(tiny)) == 1
    pd.testing.assert_frame_equal(again.table, first.table)
    features = tiny.features("fashion-mnist", "pixels").features
    assert (again.head_clusters(features) == first.head_clusters(features)).all()
    assert again.best == first.best and again.curves["loss"].shape == first.curves["loss"].shape
    assert not list(tiny.run_dir.parent.parent.rglob("*.partial"))

    changed = tiny.train("fashion-mnist", "pixels", n_neighbors=5)
    assert len(trainings) == 2 and len(records(tiny)) == 2
    assert changed.settings["n_neighbors"] == 5 and tiny.n_neighbors == 20


@pytest.mark.parametrize("n_hidden", [None, 8])
def test_more_seeds_train_only_the_difference_and_fewer_train_none(tiny, trainings, monkeypatch,
                                                                   tmp_path, n_hidden):
    settings = dict(n_hidden=n_hidden)
    tiny.train("fashion-mnist", "pixels", n_seeds=2, **settings)
    monkeypatch.setattr("tsp_utils.cache.entries.versions", lambda: {"torch": "a later one"})
    grown = tiny.train("fashion-mnist", "pixels", n_seeds=4, **settings)
    fewer = tiny.train("fashion-mnist", "pixels", n_seeds=3, **settings)
    assert trainings.seeds == [[0, 1], [2, 3]]

    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "another cache"))
    at_once = tiny.train("fashion-mnist", "pixels", n_seeds=4, **settings)
    assert trainings.seeds[2:] == [[0, 1, 2, 3]]
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


def test_a_place_that_cannot_be_written_is_named_with_what_would_help(tmp_path, monkeypatch):
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    (tmp_path / "other").touch()
    with pytest.raises(OSError, match=r"file.heads cannot be written \(.*\); make it writable, "
                                      r"with some space left, or point TSP_CACHE"):
        write_json(tmp_path / "file" / "heads" / "a.json", {})
    with pytest.raises(OSError, match=r"other cannot be written \(.*\); make it writable, with "
                                      r"some space left\.$"):
        write_json(tmp_path / "other" / "a.json", {})


def test_changed_features_or_code_train_again_and_changed_scores_do_not(tiny, trainings,
                                                                        monkeypatch):
    found = tiny.features("fashion-mnist", "pixels")
    before = run_heads(tiny, found, found)
    moved = replace(found, features=found.features + np.float32(1e-3))
    run_heads(tiny, moved, moved)
    assert len(trainings) == 2
    few = replace(found, features=found.features[:50], labels=found.labels[:50])
    run_heads(replace(tiny, protocol="split"), found, few)
    run_heads(tiny, replace(found, labels=np.roll(found.labels, 1)), found)
    assert len(trainings) == 2  # what is scored shapes no head, nor do labels
    loss = losses.tsp_loss
    monkeypatch.setattr(losses, "tsp_loss", lambda a, b, entropy_weight: loss(a, b, 10.0))
    after = run_heads(tiny, found, found)
    assert len(trainings) == 3
    assert not np.allclose(after.curves["loss"], before.curves["loss"])


def test_n_clusters_is_the_number_of_distinct_labels(tiny):
    """{0, 5, 10, 15} are four classes, and were sixteen clusters."""
    found = tiny.features("fashion-mnist", "pixels")
    gaps = replace(found, labels=5 * (found.labels % 4))
    run = run_heads(tiny, gaps, gaps)
    assert gaps.n_clusters == 4 and run.centers.shape[1] == 4
    assert run.head_clusters(found.features).max() <= 3
    assert run.settings["n_clusters"] == 4


def test_a_damaged_cache_is_trained_again(tiny, trainings):
    first = tiny.train("fashion-mnist", "pixels")
    for n_bytes in (200, 0):  # cut off, and what a power cut leaves
        for path in Path(os.environ["TSP_CACHE"]).glob("heads/*.npz"):
            path.write_bytes(path.read_bytes()[:n_bytes])
        before = len(trainings)
        pd.testing.assert_frame_equal(tiny.train("fashion-mnist", "pixels").table, first.table)
        assert len(trainings) == before + 1


def test_the_table_is_what_the_clusters_give(tiny):
    run = tiny.train("fashion-mnist", "pixels")
    found = tiny.features("fashion-mnist", "pixels")
    assert len(run.table) == 4
    for method, clusters in (("head", run.head_clusters(found.features)),
                             ("k-means", run.kmeans_clusters(found.features))):
        assert clusters.shape == (2, 600)
        for seed in (0, 1):
            row = run.table[(run.table.method == method) & (run.table.seed == seed)].iloc[0]
            for name, value in clustering_metrics(found.labels, clusters[seed]).items():
                assert row[name] == pytest.approx(100 * value)

    mean = summarise(run.table).set_index("method").loc["head"]
    accuracies = run.table.query("method == 'head'")["acc"].to_numpy()
    assert mean["acc_mean"] == pytest.approx(accuracies.mean()) and mean["n"] == 2
    assert mean["acc_std"] == pytest.approx(abs(np.diff(accuracies)[0]) / 2**0.5)  # n - 1


def test_kmeans_clusters_and_table_are_scikit_learns(tiny):
    run = tiny.train("fashion-mnist", "pixels")
    found = tiny.features("fashion-mnist", "pixels")
    scaled = scale_features(found.features)
    np.testing.assert_allclose(run.scaled(found.features), scaled, rtol=1e-5)
    for seed, clusters in enumerate(run.kmeans_clusters(found.features)):
        expected = KMeans(10, n_init=1, random_state=seed).fit(scaled).labels_
        assert (clusters == expected).mean() > 0.998  # ties may fall either way in float32
    alone = tiny.kmeans_table("fashion-mnist", "pixels")
    pd.testing.assert_frame_equal(alone, run.table.query("method == 'k-means'"))


@pytest.mark.parametrize("scaling, length", [("raw", None), ("l2", 784**0.5)])
def test_other_scalings(tiny, scaling, length):
    run = tiny.train("fashion-mnist", "pixels", scaling=scaling)
    features = tiny.features("fashion-mnist", "pixels").features
    scaled = run.scaled(features)
    if scaling == "raw":
        np.testing.assert_array_equal(scaled, features)
    else:
        np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), length, rtol=1e-4)
    expected = KMeans(10, n_init=1, random_state=0).fit(scaled).labels_
    assert (run.kmeans_clusters(features)[0] == expected).mean() > 0.998


def test_settings_of_the_ablations_reach_the_head(tiny):
    def first_loss(**changes):
        run = tiny.train("fashion-mnist", "pixels", **changes)
        assert run.heads.predict(run.scaled(tiny.features(
            "fashion-mnist", "pixels").features)).shape == (2, 600)
        return run.curves["loss"][0]

    plain = first_loss()
    for changes in (dict(init="random"), dict(row_norm=1.0), dict(weighting="uniform"),
                    dict(n_hidden=8)):
        assert not np.allclose(first_loss(**changes), plain), changes
    # read back, it is the same head again
    runs = [tiny.train("fashion-mnist", "pixels", n_hidden=8) for _ in range(2)]
    assert torch.equal(runs[0].heads.hidden.weight, runs[1].heads.hidden.weight)


def test_images_are_drawn_once_from_the_fitted_ones(tiny):
    few = replace(tiny, n_fit=100)
    fit, score = few.fit_and_score("fashion-mnist", "pixels")
    again, _ = few.fit_and_score("fashion-mnist", "pixels")
    everything = tiny.features("fashion-mnist", "pixels")
    assert len(fit.labels) == 100 and len(score.labels) == 600
    np.testing.assert_array_equal(fit.features, again.features)
    rows = draw_rows(600, 100)
    np.testing.assert_array_equal(fit.features, everything.features[rows])
    assert len(set(rows)) == 100 and (np.diff(rows) > 0).all()
    assert replace(tiny, n_fit=10_000).fit_and_score("fashion-mnist", "pixels")[0] is not None


def test_seeds_of_a_verdict_are_those_of_the_rules_where_the_profile_wants_them(tiny):
    assert tiny.claim_seeds("C8") == tiny.n_seeds == 2
    full = replace(tiny, full_seeds=True)
    assert (full.claim_seeds("C8"), full.claim_seeds("C9")) == (100, 30)
    assert load_study("small").full_seeds and not load_study("offline").full_seeds


def test_keys_hold_what_shapes_a_head_and_no_more(tiny, trainings):
    """Settings of the profile, of maps, of other claims: no head is trained again for these."""
    tiny.train("fashion-mnist", "pixels")
    for changes in (dict(umap_points=7), dict(full_seeds=True), dict(default_backbone="x"),
                    dict(vit_and_resnet=("a", "b")), dict(kmeans_only=("y",))):
        tiny.train("fashion-mnist", "pixels", **changes)
    assert len(trainings) == 1


def test_a_first_image_that_is_black_does_not_spoil_the_scale(tiny):
    found = tiny.features("fashion-mnist", "pixels")
    features = np.array(found.features)
    features[0] = 0
    black = replace(found, features=features)
    run = run_heads(tiny, black, black)
    np.testing.assert_allclose(run.scaled(features), scale_features(features), rtol=1e-5)


def test_protocol_split_fits_on_train_and_scores_both(tiny, monkeypatch):
    images = load_dataset("fashion-mnist", "test")
    halves = {"train": images.subset(slice(600, 1200)), "test": images.subset(slice(0, 300))}

    monkeypatch.setattr("tsp_utils.study.profile.load_images", lambda name, split, n: halves[split])
    study = replace(tiny, protocol="split")
    run = study.train("fashion-mnist", "pixels")
    assert set(run.table["scored"]) == {"test", "train"} and len(run.table) == 8
    assert run.settings["n"] == 600 and run.settings["protocol"] == "split"
    fit, score = study.fit_and_score("fashion-mnist", "pixels")
    expected = KMeans(10, n_init=1, random_state=0).fit(scale_features(fit.features)).labels_
    assert (run.kmeans_clusters(fit.features)[0] == expected).mean() > 0.998
    for split, found in (("train", fit), ("test", score)):
        rows = run.table[run.table.scored == split].query("method == 'head' and seed == 1")
        metrics = clustering_metrics(found.labels, run.head_clusters(found.features)[1])
        assert rows["acc"].item() == pytest.approx(100 * metrics["acc"])
    assert "fitted on train, scored on test" in study.caption("fashion-mnist", "pixels")


def full_disk(self, mode="r", *args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_cache_is_one_sentence_and_leaves_nothing(tiny, monkeypatch):
    found = tiny.features("fashion-mnist", "pixels")
    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*TSP_CACHE") as refused:
        run_heads(tiny, found, found)
    assert "\n" not in str(refused.value)
    assert not list(Path(os.environ["TSP_CACHE"]).rglob("heads/*.npz"))
    assert not tiny.run_dir.exists()


def test_a_read_only_cache_is_one_sentence(tiny, monkeypatch):
    found = tiny.features("fashion-mnist", "pixels")
    mkdir = Path.mkdir

    def read_only(self, *args, **kwargs):
        if self.name == "heads":
            raise OSError(errno.EROFS, "Read-only file system")
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OSError, match=r"written \(Read-only file system\).*TSP_CACHE"):
        run_heads(tiny, found, found)


def test_a_figure_stands_beside_its_numbers(tiny):
    import matplotlib.pyplot as plt
    figure, _ = plt.subplots()
    tiny.save_figure(figure, "03_test", pd.DataFrame({"x": [1, 2], "y": [0.123456789, 3]}), "what")
    plt.close(figure)
    folder = tiny.run_dir / "figures"
    assert (folder / "03_test.csv").read_text() == "x,y\n1,0.123457\n2,3\n"
    assert (folder / "03_test.png").read_bytes().startswith(b"\x89PNG")
