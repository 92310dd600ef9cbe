"""The central row by stages, on stand-ins: every gate is reached, and stops or goes on."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tsp_utils.__main__ import main
from tsp_utils.study import paper_mini

STAGES = ["weights", "forward parity", "features", "k-NN", "label consistency", "K-means, split",
          "head, split", "K-means, all", "head, all"]
SMALL = ["n_images=60", "n_seeds=4", "max_epochs=1", "min_steps=5"]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Images of noise and random weights in the official files' places, and a run folder."""
    for i in range(120):
        path = tmp_path / "data" / "cifar10" / ("train", "test")[i % 2] / f"c{i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(path)
    (tmp_path / "data" / "weights").mkdir()
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(),
               tmp_path / "data" / "weights" / "dino_deitsmall16_pretrain.pth")
    monkeypatch.setenv("TSP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tsp_utils.study.profile.runs_dir", lambda: tmp_path / "runs")
    return tmp_path


def test_each_stage_says_what_it_expected_and_one_that_departs_ends_the_run(stand_ins, capsys):
    assert main(["paper-mini", "--set", *SMALL]) == 3
    out = capsys.readouterr().out
    assert "forward parity: pass" in out and "k-NN: for the record" in out
    (file,) = (stand_ins / "runs").glob("paper-mini*/paper_mini.json")
    written = json.loads(file.read_text())
    passed = {gate["stage"]: gate["passed"] for gate in written["gates"]}
    assert list(passed) == STAGES[:len(passed)] and False in passed.values()
    assert list(passed.values()).index(False) == len(passed) - 1 and "torch" in written["versions"]

    assert main(["paper-mini", "--go-on", "--set", *SMALL]) == 3  # what was made is read back
    again = json.loads(file.read_text())["gates"]
    assert [gate["stage"] for gate in again] == STAGES
    assert [gate["came"] for gate in again if gate["stage"] == "k-NN"] == [
        gate["came"] for gate in written["gates"] if gate["stage"] == "k-NN"]


def test_another_transform_departs_at_the_parity_stage(stand_ins, monkeypatch):
    monkeypatch.setattr(paper_mini, "departure", lambda backbone, side: 0.3)
    *_, last = paper_mini.paper_mini(" ".join(SMALL))
    assert (last.stage, last.passed) == ("forward parity", False)


def test_weights_that_do_not_fit_are_refused_before_any_stage(stand_ins):
    torch.save({"cls_token": torch.zeros(1)},
               stand_ins / "data" / "weights" / "dino_deitsmall16_pretrain.pth")
    with pytest.raises(ValueError, match="does not fit dino_vits16"):
        list(paper_mini.paper_mini())


@pytest.mark.parametrize("other", ["backbones=dino_vitb16", "datasets=fashion-mnist"])
def test_what_the_paper_has_no_row_of_is_refused_before_anything_is_fetched(other):
    with pytest.raises(ValueError, match="leave datasets and backbones out"):
        next(paper_mini.paper_mini(other))
