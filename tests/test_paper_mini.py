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
    (root / "cache" / "features").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(),
               root / "data" / "weights" / BACKBONES[ROW].file)
    return root


@pytest.fixture
def stand_ins(made, tmp_path, monkeypatch):
    """`made` where it is looked for, its count as the published one, its result as the paper's."""
    monkeypatch.setenv("TSP_DATA", str(made / "data"))
    monkeypatch.setenv("TSP_CACHE", str(made / "cache"))
    monkeypatch.setattr(profile, "runs_dir", lambda: tmp_path / "runs")
    expect(monkeypatch, **N_IMAGES)
    monkeypatch.setattr(paper_mini, "TABLE_1", [replace(row, acc=100.0, acc_std=1.0)
                                                if row.n == 10 else row for row in TABLE_1])
    return tmp_path


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


def returning(where, name, change):
    """The function `where.name` returns change(what it found, *its arguments)."""
    function = getattr(where, name)
    return lambda monkeypatch, _: monkeypatch.setattr(where, name, lambda *args, **options: change(
        function(*args, **options), *args))


def network(change):
    """A change of every network after its weights were loaded."""
    def changed(model, *_):
        change(model)
        return model

    return returning(backbones, "load_model", changed)


def swap_red_and_blue(monkeypatch, _):
    prepare = Backbone.prepare
    monkeypatch.setattr(Backbone, "prepare", lambda self, images: prepare(
        self, np.ascontiguousarray(images[..., ::-1]) if isinstance(images, np.ndarray)
        else [image[..., ::-1] for image in images]))


def without_antialiasing(monkeypatch, _):
    resize = torch.nn.functional.interpolate
    monkeypatch.setattr(backbones.F, "interpolate",
                        lambda *args, antialias, **options: resize(*args, **options))


def file_with(name):
    """Another weights file: a tensor of it is zero. Few images, since all are seen anew."""
    def plant(monkeypatch, folder):
        data = Path(os.environ["TSP_DATA"])
        file = folder / "data" / "weights" / BACKBONES[ROW].file
        state = torch.load(data / "weights" / file.name)
        file.parent.mkdir(parents=True)
        torch.save(state | {name: torch.zeros_like(state[name])}, file)
        shutil.copytree(data / "cifar10", folder / "data" / "cifar10",
                        ignore=shutil.ignore_patterns("0[1-9]*.png"))
        monkeypatch.setenv("TSP_DATA", str(folder / "data"))
        expect(monkeypatch, train=10, test=10)
        monkeypatch.setattr(feature_sets, "_backbone", load_backbone)  # which keeps the other file

    return plant


def labels(change):
    """Another order of the test images' labels."""
    return returning(profile, "load_images", lambda images, _, split, *__: replace(
        images, labels=change(images.labels)) if split == "test" else images)


def lengths_by_class(found, *_):
    return replace(found, features=(found.features + 3) * 10.0 ** found.labels[:, None])


def one_center(protocol):
    return returning(training, "kmeans", lambda found, x, n_clusters, *_: replace(
        found, centers=found.centers[:, :1].repeat(n_clusters, 1)) if len(x) == N_IMAGES[protocol]
        else found)


def heads_not_from_kmeans(protocol):
    def changed(heads, features, *_):
        if len(features) == N_IMAGES[protocol]:
            torch.nn.init.zeros_(heads.weight)
        return heads

    return returning(training, "init_heads", changed)


DEPARTURES = {
    "the tokens averaged, in place of the class token":
        ("forward parity", network(lambda model: setattr(model, "global_pool", "avg"))),
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
    "positions left out":
        ("forward parity", network(lambda model: torch.nn.init.zeros_(model.pos_embed))),
    "a third of the test images missing":
        ("features", lambda monkeypatch, _: expect(monkeypatch, train=36, test=50)),
    "a file whose last norm is zero": ("features", file_with("norm.weight")),
    "a file whose patches weigh nothing": ("k-NN", file_with("patch_embed.proj.weight")),
    "test labels shuffled": ("k-NN", labels(np.random.default_rng(0).permutation)),
    "test classes in another order": ("k-NN", labels(lambda y: (y + 1) % 3)),
    "an offset in common, and each class ten times as long as the last":
        ("label consistency", returning(profile, "extract", lengths_by_class)),
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


def raises(error):
    def function(*_, **__):
        raise error

    return function


def test_ctrl_c_in_any_stage_is_one_sentence_and_the_same_command_goes_on(
        stand_ins, made, left_by, monkeypatch, capsys, tmp_path):
    pass_parity(monkeypatch)
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "cache"))  # K-means and heads are made here
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "features").symlink_to(made / "cache" / "features")

    def stages_passed():
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return re.findall(r"^(\w.*): pass", out, re.M), err.splitlines()[-1:]

    for n_passed, where in enumerate([
            (paper_mini, "load_backbone"), (paper_mini, "departure"), (profile, "extract"),
            (paper_mini, "knn_accuracy"), (paper_mini, "label_consistency"), (training, "kmeans"),
            (training, "train_heads")]):
        with monkeypatch.context() as planted:
            planted.setattr(*where, raises(KeyboardInterrupt))
            assert left_by(*COMMAND) == 130
        assert stages_passed() == (STAGES[:n_passed], [  # after bars, if there were any
            "stopped: what was finished is kept; the same command goes on"])
    assert left_by(*COMMAND) == 0
    assert stages_passed()[0] == STAGES


def no_network(monkeypatch, folder):
    monkeypatch.setenv("TSP_DATA", str(folder / "data"))
    monkeypatch.setattr("tsp_utils.networks.weights.check_reachable",
                        raises(OSError("Network is unreachable")))


@pytest.mark.parametrize("fault, sentence", [
    (no_network, r"Network is unreachable.*the network and the free space, or put"),
    (lambda monkeypatch, _: monkeypatch.setattr(Path, "replace", raises(
        OSError(errno.ENOSPC, "No space left on device"))),
     r"cannot be written \(No space left on device\); make it writable, with"),
    (lambda monkeypatch, _: monkeypatch.setattr(paper_mini, "knn_accuracy", raises(
        MemoryError("Unable to allocate 2 GiB"))), r"^error: Unable to allocate 2 GiB$"),
], ids=["no network", "full disk", "memory"])
def test_a_bad_start_is_one_sentence_and_the_same_command_goes_on(
        stand_ins, left_by, monkeypatch, fault, sentence):
    """What else can be wrong with a file of weights, test_backbones.py holds."""
    pass_parity(monkeypatch)
    monkeypatch.setattr(paper_mini, "load_backbone", load_backbone)
    with monkeypatch.context() as planted:
        fault(planted, stand_ins)
        code = left_by(*COMMAND)
    assert re.search(sentence, code) and code.startswith("error: ") and "\n" not in code
    assert first_to_fail() is None
