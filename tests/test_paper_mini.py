"""The central row by stages, on stand-ins: each gate is seen to pass, and to fail for its cause."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from readings import ROOT

from tsp_utils import backbones, datasets
from tsp_utils.__main__ import main
from tsp_utils.backbones import BACKBONES, Backbone, load_backbone
from tsp_utils.neighbors import label_consistency, nearest_neighbors
from tsp_utils.networks import weights
from tsp_utils.networks.registry import model_card
from tsp_utils.study import feature_sets, paper_mini, profile, training
from tsp_utils.study.feature_sets import load_vectors
from tsp_utils.study.published import TABLE_1

STAGES = ["weights", "forward parity", "features", "k-NN", "label consistency", "K-means, split",
          "head, split", "K-means, all", "head, all"]
SMALL = ["n_seeds=4", "max_epochs=1", "min_steps=5", "batch_size=32"]
COMMAND = ["paper-mini", "--set", *SMALL]
N_IMAGES = {"train": 36, "test": 33}  # of three colours
ROW = "dino_vits16"
pytestmark = pytest.mark.filterwarnings("ignore:Collapse", "ignore:Number of distinct")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images of three colours and random weights in the official files' places, and a cache."""
    root, rng = tmp_path_factory.mktemp("stand-ins"), np.random.default_rng(0)
    for split, n in N_IMAGES.items():
        for i in range(n):
            path = root / "data" / "cifar10" / split / f"c{i % 3}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            color = 60 + 120 * (np.arange(3) == i % 3)
            pixels = (color + rng.integers(-20, 20, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(path)
    (root / "data" / "weights").mkdir()
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(),
               root / "data" / "weights" / BACKBONES[ROW].file)
    return root


@pytest.fixture
def stand_ins(made, tmp_path, monkeypatch):
    """`made` where it is looked for, its count as the published one, its result as the paper's."""
    point_to(monkeypatch, made / "data")
    monkeypatch.setenv("TSP_CACHE", str(made / "cache"))
    monkeypatch.setattr(profile, "runs_dir", lambda: tmp_path / "runs")
    expect(monkeypatch, **N_IMAGES)
    monkeypatch.setattr(paper_mini, "TABLE_1", [replace(row, acc=100.0, acc_std=1.0)
                                                if row.n == 10 else row for row in TABLE_1])
    return tmp_path


def point_to(monkeypatch, data) -> None:
    monkeypatch.setenv("TSP_DATA", str(data))


def expect(monkeypatch, **n_images) -> None:
    monkeypatch.setitem(datasets.DATASETS, "cifar10",
                        replace(datasets.DATASETS["cifar10"], splits=n_images))


def pass_parity(monkeypatch):
    """At once, and the network is the one that made features before."""
    monkeypatch.setattr(paper_mini, "load_backbone", feature_sets._backbone)
    monkeypatch.setattr(paper_mini, "seeded_backbone", lambda name: None)
    monkeypatch.setattr(paper_mini, "departure", lambda backbone, side: 0.0)


# Each departure, planted: what is done to our code or to the files, and the first gate that fails.


def row(**changes):
    return lambda monkeypatch, _: monkeypatch.setitem(BACKBONES, ROW,
                                                      replace(BACKBONES[ROW], **changes))


def network(change):
    """A change of every network after its weights were loaded."""
    def plant(monkeypatch, _):
        load = weights.load_model

        def changed(*args):
            model = load(*args)
            change(model)
            return model

        monkeypatch.setattr(backbones, "load_model", changed)

    return plant


def average_tokens(model):
    model.global_pool = "avg"


def leave_out_positions(model):
    torch.nn.init.zeros_(model.pos_embed)


def swap_red_and_blue(monkeypatch, _):
    prepare = Backbone.prepare
    monkeypatch.setattr(Backbone, "prepare", lambda self, images: prepare(
        self, np.ascontiguousarray(images[..., ::-1]) if isinstance(images, np.ndarray)
        else [image[..., ::-1] for image in images]))


def without_antialiasing(monkeypatch, _):
    resize = torch.nn.functional.interpolate
    monkeypatch.setattr(backbones.F, "interpolate",
                        lambda *args, antialias, **options: resize(*args, **options))


def file_with(name, value):
    """Another weights file: one tensor of it is changed. Few images, since all are seen anew."""
    def plant(monkeypatch, folder):
        data = Path(os.environ["TSP_DATA"])
        state = torch.load(data / "weights" / BACKBONES[ROW].file)
        state[name] = value(state[name])
        (folder / "data" / "weights").mkdir(parents=True)
        torch.save(state, folder / "data" / "weights" / BACKBONES[ROW].file)
        for split in N_IMAGES:
            for path in sorted((data / "cifar10" / split).rglob("00*.png")):
                to = folder / "data" / path.relative_to(data)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)
        point_to(monkeypatch, folder / "data")
        expect(monkeypatch, train=10, test=10)
        monkeypatch.setattr(feature_sets, "_backbone", load_backbone)  # which keeps the other file

    return plant


def images_missing(monkeypatch, _):
    expect(monkeypatch, train=36, test=50)


def labels(change):
    """Another order of the test images' labels."""
    def plant(monkeypatch, _):
        load = profile.load_images

        def changed(dataset, split, n_images=None):
            images = load(dataset, split, n_images)
            return images if split == "train" else replace(images, labels=change(images.labels))

        monkeypatch.setattr(profile, "load_images", changed)

    return plant


def lengths_by_class(monkeypatch, _):
    extract = profile.extract

    def changed(*args):
        found = extract(*args)
        return replace(found, features=(found.features + 3) * 10.0 ** found.labels[:, None])

    monkeypatch.setattr(profile, "extract", changed)


def one_center(protocol):
    def plant(monkeypatch, _):
        kmeans = training.kmeans

        def changed(x, n_clusters, seeds, **options):
            found = kmeans(x, n_clusters, seeds, **options)
            if len(x) != N_IMAGES[protocol]:
                return found
            return replace(found, centers=np.repeat(found.centers[:, :1], n_clusters, 1))

        monkeypatch.setattr(training, "kmeans", changed)

    return plant


def heads_not_from_kmeans(protocol):
    def plant(monkeypatch, _):
        new = training.init_heads

        def changed(features, *args):
            heads = new(features, *args)
            if len(features) == N_IMAGES[protocol]:
                torch.nn.init.zeros_(heads.weight)
            return heads

        monkeypatch.setattr(training, "init_heads", changed)

    return plant


def shuffled(y):
    return np.random.default_rng(0).permutation(y)


DEPARTURES = {
    "the tokens averaged, in place of the class token": ("forward parity", network(average_tokens)),
    "average pooling asked of timm, which then has other names":
        ("weights", row(options={"global_pool": "avg"})),
    "no normalisation": ("forward parity", row(mean=(0.0,) * 3, std=(1.0,) * 3)),
    "mean and deviation 0.5 in place of ImageNet's":
        ("forward parity", row(mean=(0.5,) * 3, std=(0.5,) * 3)),
    "bilinear in place of bicubic": ("forward parity", row(interpolation="bilinear")),
    "bicubic without antialiasing": ("forward parity", without_antialiasing),
    "red and blue swapped": ("forward parity", swap_red_and_blue),
    "images left at 32 px, positions not interpolated":
        ("weights", row(input_size=32, options={"img_size": 32})),
    "positions left out": ("forward parity", network(leave_out_positions)),
    "a third of the test images missing": ("features", images_missing),
    "a file whose last norm is zero": ("features", file_with("norm.weight", torch.zeros_like)),
    "a file whose patches weigh nothing":
        ("k-NN", file_with("patch_embed.proj.weight", torch.zeros_like)),
    "test labels shuffled": ("k-NN", labels(shuffled)),
    "test classes in another order": ("k-NN", labels(lambda y: (y + 1) % 3)),
    "an offset in common, and each class ten times as long as the last":
        ("label consistency", lengths_by_class),
    "K-means that finds one centre, train split": ("K-means, split", one_center("train")),
    "heads that do not start from K-means, train split":
        ("head, split", heads_not_from_kmeans("train")),
    "K-means that finds one centre, test split": ("K-means, all", one_center("test")),
    "heads that do not start from K-means, test split":
        ("head, all", heads_not_from_kmeans("test")),
}


def test_every_gate_passes_where_nothing_departs(stand_ins, capsys, made):
    assert main(COMMAND) == 0
    (file,) = (stand_ins / "runs").glob("paper-mini*/paper_mini.json")
    written = json.loads(file.read_text())
    assert [(gate["stage"], gate["passed"]) for gate in written["gates"]] == [
        (stage, True) for stage in STAGES]
    assert "torch" in written["versions"] and "forward parity: pass" in capsys.readouterr().out


@pytest.mark.parametrize("departure", DEPARTURES)
def test_a_planted_departure_fails_first_at_its_gate(stand_ins, monkeypatch, departure):
    gate, plant = DEPARTURES[departure]
    plant(monkeypatch, stand_ins)
    if STAGES.index(gate) > 1:  # behind parity, whose network takes its seconds
        pass_parity(monkeypatch)
    assert first_to_fail() == gate


def first_to_fail() -> str | None:
    gates, stages = [], paper_mini.paper_mini(" ".join(SMALL))
    try:
        gates = list(stages)
    except ValueError as error:
        assert "does not fit dino_vits16" in str(error) and "\n" not in str(error)
        return "weights"  # refused before a gate could be said
    assert [gate.stage for gate in gates] == STAGES[:len(gates)]
    assert all(gate.passed for gate in gates[:-1])
    return None if gates[-1].passed else gates[-1].stage


def test_the_page_has_every_gate_and_the_departures_as_they_are_planted_here():
    page = (ROOT / "docs" / "paper_mini.md").read_text()
    cells = [re.split(r" +\| +", line.strip("| ")) for line in page.splitlines() if "|" in line]
    assert {stage.split(",")[0] for stage in STAGES} <= {cell[0].split(",")[0] for cell in cells}
    found = {cell[0]: cell[1] for cell in cells if cell[0] in DEPARTURES}
    assert found == {name: gate for name, (gate, _) in DEPARTURES.items()}


def test_the_floors_are_the_bundled_dictionarys():
    knn = model_card("patch_kmeans")["knn"]["cifar10, train to test"]
    found = load_vectors("cifar10", "patch_kmeans")
    share = label_consistency(nearest_neighbors(found.features, 20, "inner"), found.labels)[-1]
    assert list(paper_mini.FLOORS.values()) == [round(knn, 1), round(100 * share, 1)]


def test_fewer_images_are_for_the_record(stand_ins, capsys, monkeypatch):
    pass_parity(monkeypatch)
    monkeypatch.setattr(paper_mini, "TABLE_1", TABLE_1)  # the paper's, from which these are far
    few = ["n_images=33", *SMALL]
    assert main(["paper-mini", "--set", *few]) == 3
    said = capsys.readouterr().out
    assert "k-NN: for the record" in said and "K-means, split: DEPARTS" in said
    assert "head, split" not in said
    assert main(["paper-mini", "--go-on", "--set", *few]) == 3
    assert "head, all: DEPARTS" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["backbones=dino_vitb16", "datasets=fashion-mnist"])
def test_what_the_paper_has_no_row_of_is_refused_before_anything_is_fetched(other):
    with pytest.raises(ValueError, match="leave datasets and backbones out"):
        next(paper_mini.paper_mini(other))


# As a user meets it: one sentence, and the same command goes on.


def raises(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("stage, where", zip(STAGES, [
    (paper_mini, "load_backbone"), (paper_mini, "departure"), (profile, "extract"),
    (paper_mini, "knn_accuracy"), (paper_mini, "label_consistency"), (training, "kmeans"),
    (training, "train_heads")], strict=False))
def test_ctrl_c_in_a_stage_is_one_sentence_and_the_same_command_goes_on(
        stand_ins, made, left_by, monkeypatch, capsys, tmp_path, stage, where):
    pass_parity(monkeypatch)
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "cache"))
    if (made / "cache" / "features").exists():  # K-means and heads are made here in any case
        shutil.copytree(made / "cache" / "features", tmp_path / "cache" / "features")
    with monkeypatch.context() as planted:
        planted.setattr(*where, raises(KeyboardInterrupt))
        assert left_by(*COMMAND) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (  # after bars, if there were any
        "stopped: what was finished is kept; the same command goes on") and "Traceback" not in err
    assert re.findall(r"^(\w.*): pass", out, re.M) == STAGES[:STAGES.index(stage)]
    assert left_by(*COMMAND) == 0
    assert re.findall(r"^(\w.*): pass", capsys.readouterr().out, re.M) == STAGES


def full_disk(monkeypatch, _):
    monkeypatch.setattr(Path, "replace", raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))


def half_a_file(monkeypatch, folder):
    file_with("cls_token", torch.zeros_like)(monkeypatch, folder)
    path = folder / "data" / "weights" / BACKBONES[ROW].file
    path.write_bytes(path.read_bytes()[:-5000])


def another_hash(monkeypatch, folder):
    file_with("cls_token", torch.zeros_like)(monkeypatch, folder)
    (folder / "data" / "weights" / f"{BACKBONES[ROW].file}.sha256").write_text("0" * 64)


def no_weights(error):
    def plant(monkeypatch, folder):
        point_to(monkeypatch, folder / "data")
        monkeypatch.setattr("tsp_utils.networks.weights.check_reachable", lambda url: None)
        monkeypatch.setattr(torch.hub, "download_url_to_file", raises(error))

    return plant


@pytest.mark.parametrize("fault, sentence", [
    (no_weights(OSError("Network is unreachable")), r"the network and the free space, or put"),
    (no_weights(OSError(errno.ENOSPC, "No space left on device")),
     r"No space left on device.*: check the network and the free space"),
    (half_a_file, r"pretrain\.pth is truncated or not a weights file: fetch or save it again"),
    (another_hash, r"is not the file that was downloaded: delete it, to fetch it again"),
    (full_disk, r"cannot be written \(No space left on device\); make it writable, with"),
    (lambda monkeypatch, _: monkeypatch.setattr(paper_mini, "knn_accuracy", raises(
        MemoryError("Unable to allocate 2 GiB"))), r"^error: Unable to allocate 2 GiB$"),
], ids=["no network", "full disk, download", "half a file", "another hash", "full disk", "memory"])
def test_a_bad_start_is_one_sentence_and_the_same_command_goes_on(
        stand_ins, left_by, monkeypatch, fault, sentence):
    pass_parity(monkeypatch)
    monkeypatch.setattr(paper_mini, "load_backbone", load_backbone)
    with monkeypatch.context() as planted:
        fault(planted, stand_ins)
        code = left_by(*COMMAND)
    assert re.search(sentence, code) and code.startswith("error: ") and "\n" not in code
    assert first_to_fail() is None
