"""Rungs of feature quality: the laws by hand, the read-out, and that simulated ones stay out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from readings import ROOT
from toys import three_blobs

import tsp_utils as tsp
from experiments import labelled, quality
from tsp_utils.datasets import ImageDataset
from tsp_utils.estimator import rate_for
from tsp_utils.files.paths import shipped_records
from tsp_utils.study import rungs


def test_a_shift_moves_the_means_apart_and_leaves_what_lies_within():
    found = three_blobs()
    better = rungs.shifted(found, 2.0)
    for c in range(3):
        rows = found.labels == c
        before, after = found.features[rows], better.features[rows]
        np.testing.assert_allclose(after - after.mean(0), before - before.mean(0), atol=1e-4)
        np.testing.assert_allclose(after.mean(0) - better.features.mean(0),
                                   3 * (before.mean(0) - found.features.mean(0)), atol=1e-4)
    assert better.backbone == "simulated_shift_2_made up" and (better.labels == found.labels).all()


def test_a_move_goes_to_the_mean_of_the_nearest_images_of_one_class():
    found, k = three_blobs(60), 4
    x, y = found.features, found.labels
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)  # brute force
    np.fill_diagonal(distance, np.inf)
    right = [x[np.argsort(np.where(y == c, row, np.inf))[:k]].mean(0)
             for c, row in zip(y, distance, strict=True)]
    np.testing.assert_allclose(rungs.moved(found, 0.0, k).features, right, atol=1e-5)
    wrong = []
    for c, row in zip(y, distance, strict=True):
        other = y[np.argmin(np.where(y != c, row, np.inf))]
        wrong.append(x[np.argsort(np.where(y == other, row, np.inf))[:k]].mean(0))
    np.testing.assert_allclose(rungs.moved(found, 1.0, k).features, wrong, atol=1e-5)


@pytest.mark.parametrize("climb", [
    lambda found: [rungs.shifted(found, s) for s in rungs.SHIFTS],
    lambda found: [rungs.moved(found, s) for s in rungs.SHARES]])
def test_each_law_climbs_to_neighbours_that_agree(climb):
    found = three_blobs(noise=6.0)
    ladder = [rungs.consistency(rung) for rung in climb(found)]
    assert ladder == sorted(ladder) and ladder[-1] > 70 > rungs.consistency(found)


def test_a_class_with_too_few_images_is_refused_by_name():
    found = three_blobs(30)
    few = replace(found, labels=np.where(found.labels == 2, 1, found.labels))
    few.labels[:5] = 2
    with pytest.raises(ValueError, match="class c has 5 images; pass n_neighbors below"):
        rungs.moved(few, 0.1, 5)


def test_merged_classes_are_those_that_are_the_largest_of_no_cluster():
    labels = np.array([0] * 6 + [1] * 4 + [2] * 5)
    clusters = np.array([0] * 6 + [0] * 4 + [1, 1, 1, 2, 2])  # 1 merged into 0, 2 split
    assert rungs.classes_found(labels, clusters) == 2
    assert rungs.classes_found(labels, labels) == 3


def test_a_rung_whose_clusters_are_the_classes_is_read_out_so(own_folders):
    found = rungs.moved(three_blobs(noise=1.0), 0.0)
    study = replace(tsp.load_study("tiny"), n_seeds=3, max_epochs=0, min_steps=200,
                    batch_size=100, learning_rate=1e-2)
    read = rungs.read_rung(study, found)
    assert read["head"]["acc"] == read["k-means"]["acc"] == [100.0] * 3
    assert read["head"]["classes_found"] == read["n_used"] == [3] * 3
    assert read["consensus"] == 100 and len(read["loss"]) == 3
    assert read["agreement"] == rungs.consistency(found)  # its clusters are the classes


def test_rungs_that_saw_labels_are_marked_and_are_in_no_profile():
    records, marked = shipped_records("quality"), ("simulated", "labelled")
    assert {record["kind"] for record in records} == {"real", *marked}
    for record in records:
        said = [kind for kind in marked if record["backbone"].startswith(f"{kind}_")]
        assert said == [record["kind"]] * (record["kind"] in marked)
    for profile in ("offline", "small", "paper"):
        assert not [b for b in tsp.load_study(profile).backbones if b.startswith(marked)]


def test_the_records_are_of_the_code_that_is_here():
    study = tsp.load_study("offline")
    assert {(record["setting"], record["code"]) for record in shipped_records("quality")} == {
        (name, quality.code_of_a_rung(replace(study, **changes)))
        for name, changes in quality.SETTINGS.items()}


def test_records_of_rungs_that_are_not_here_are_kept(monkeypatch, tmp_path, own_folders):
    """Weights that do not ship, a package that is missing: what was measured stays."""
    shipped = shipped_records("quality")
    (tmp_path / "readouts").mkdir()
    monkeypatch.setattr(quality, "bundled_dir", lambda: tmp_path)
    monkeypatch.setattr(quality, "rungs", lambda: iter(()))
    assert json.loads(quality.climb().read_text()) == shipped
    here = tsp.load_study("offline").features("cifar10", "patch_kmeans")  # of the same content
    monkeypatch.setattr(quality, "rungs", lambda: iter([("real", here)]))
    again = json.loads(quality.climb().read_text())
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, shipped)) != again
    assert {(r["dataset"], r["backbone"]) for r in again[:5]} == {("cifar10", "patch_kmeans")}


def test_a_network_learns_the_labels_it_is_given_and_is_read_without_its_classifier(
        monkeypatch, tmp_path):
    y = np.arange(90) % 3  # three colours
    noise = np.random.default_rng(0).integers(-40, 40, (90, 32, 32, 3))
    pixels = (150 * np.eye(3)[y][:, None, None] + 50 + noise).astype(np.uint8)
    made = ImageDataset("toys", "train", pixels, y, tuple("abc"))
    monkeypatch.setattr(labelled, "load_dataset", lambda *_: made)
    monkeypatch.setattr(labelled, "runs_dir", lambda: tmp_path)
    monkeypatch.setattr(labelled, "MARKS", (16, 640))
    monkeypatch.setattr(labelled, "BATCH", 16)
    *paths, log = labelled.learn_from_labels()
    assert [path.name for path in paths] == ["resnet_nano_cpu_16.pt", "resnet_nano_cpu_640.pt"]
    first, last = json.loads(log.read_text())["log"]
    assert first["images_seen"] == 16 and last["top1_val"] > 90 > first["top1_val"]
    network = labelled.load_labelled(640)
    assert network(pixels[:2]).shape == (2, 192) and network.name == "labelled_resnet_nano_0k"
    state = torch.load(paths[-1])
    assert not [name for name in state if name.startswith("fc.")]
    assert torch.equal(network.model.conv1.weight, state["conv1.weight"])


def test_the_page_of_the_budget_is_the_records_and_the_rule():
    page = (ROOT / "docs" / "budget.md").read_text("utf-8")
    study, summed, alike = tsp.load_study("offline"), {"real": [], "simulated": []}, []
    known = {(r["dataset"], r["backbone"], r["setting"]): r for r in shipped_records("quality")}
    for r in shipped_records("budget"):
        assert r["code"] == quality.code_of_a_rung(study)
        late, where = list(r["late"].values()), (r["dataset"], r["backbone"])
        rate = rate_for(late[0])
        alike.append((late[0] <= 1 / 8) == (late[1] <= 1 / 20))
        assert set(map(float, r["acc"])) == {1e-4, rate}
        start = known[*where, "the study's"]["k-means"]["acc"]
        cells = [f"{np.mean(acc):.1f} ± {np.std(acc, ddof=1):.1f}"
                 for acc in (start, r["acc"]["0.0001"], r["acc"][f"{rate:g}"])]
        cells[2] = "the same" if rate == 1e-4 else cells[2]
        taken = f"{100 * r['late']['0.0001']:.2f} | {rate:.0e}".replace("e-0", "e-")
        row = f"| {r['dataset']}, `{r['backbone']}` | {r['n']:,} | {taken} | {' | '.join(cells)} |"
        assert row in page
        tenfold = known.get((*where, "rate 1e-3"), {"head": {"acc": np.nan}})["head"]["acc"]
        summed[r["kind"]].append([np.mean(acc) for acc in (
            start, r["acc"]["0.0001"], r["acc"][f"{rate:g}"], tenfold)] + [rate])
    real, control = (np.array(rows)[:, :4] for rows in summed.values())
    tenfolds, none = ([row[4] for row in rows].count(1e-3) for rows in summed.values())
    assert f"On {tenfolds} real rungs 1e-3 is taken" in page and none == 0
    assert f"says the same on {sum(alike)} of the {len(alike)} rungs" in page
    means, ahead = real.mean(0), (real > real[:, :1]).sum(0)
    assert f"| mean ACC | {' | '.join(f'{mean:.1f}' for mean in means)} |" in page
    assert f"above K-means | | {ahead[1]} | {ahead[2]} | {ahead[3]} |" in page
    change = real[:, 2] - real[:, 1]
    assert f"{len(real)} real ones, and {len(control)} simulated" in page
    assert f"over a point on {(change > 1).sum()} real rungs" in page
    assert (change < -1).sum() == 1 and f"on one, by {-change.min():.1f}." in page
    assert "goes from {1:.1f} to {2:.1f}.".format(*control.mean(0)) in page
    away = control[:, 2] - control[:, 1]
    assert f"loses {-away.min():.1f} points, the best gains {away.max():.1f}." in page
