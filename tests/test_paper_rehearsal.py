"""`paper` end to end, and the first lessons under `paper-mini`, on stand-ins in official formats.

A few images of colours and noise, random weights: their numbers mean nothing; that they run, what
they write and how they end do.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from tsp_utils.files.paths import REPOSITORY
from tsp_utils.study.claims import CLAIMS
from tsp_utils.study.ledger import COLUMNS
from tsp_utils.study.profile import load_study
from tsp_utils.study.staleness import notebook_paths

# Classes, pixels, images of a split. ViT-B sees each at 224 px, and the cache keeps a vector by
# what its image holds: so sets of one size share their images, and splits all but OWN of theirs.
# 96 px, STL-10's own size, would be half as many images again.
SETS = {"cifar10": (10, 32, 64), "cifar100-20": (20, 32, 64), "cifar100": (100, 32, 110),
        "stl10": (10, 32, 64)}
OWN = 2
WEIGHTS = {"dino_deitsmall16_pretrain.pth": "vit_small_patch16_224",
           "dino_vitbase16_pretrain.pth": "vit_base_patch16_224",
           "dino_resnet50_pretrain.pth": "resnet50"}
SMALL = ["n_images=110", "n_seeds=2", "max_epochs=1", "min_steps=5", "umap_points=60",
         "full_seeds=false"]


def write_images(data, name: str, n_classes: int, size: int, n: int) -> None:
    """Both splits of a set, in class folders: colours and noise."""
    for split, first in (("train", 0), ("test", OWN)):
        for i in range(first, first + n):
            rng = np.random.default_rng([size, i])
            color = np.random.default_rng(i % 10).integers(0, 256, 3)
            pixels = np.clip(color + rng.normal(0, 40, (size, size, 3)), 0, 255).astype(np.uint8)
            path = data / name / split / f"class{i % n_classes:03d}" / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process that finds the stand-ins, and a cache of its own."""
    root = tmp_path_factory.mktemp("paper")
    for name, kind in SETS.items():
        write_images(root / "data", name, *kind)
    (root / "data" / "weights").mkdir()
    for file, architecture in WEIGHTS.items():
        torch.save(timm.create_model(architecture, num_classes=0).state_dict(),
                   root / "data" / "weights" / file)
    return os.environ | {"TSP_DATA": str(root / "data"), "TSP_CACHE": str(root / "cache")}


@pytest.fixture(scope="module")
def rehearsal(environment):
    """The finished run: its folder, and the process that made it."""
    done = subprocess.run(
        [sys.executable, "-m", "tsp_utils", "reproduce", "--profile", "paper", "--set", *SMALL],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    folder = load_study(" ".join(["paper", *SMALL])).run_dir
    yield folder, done
    shutil.rmtree(folder, ignore_errors=True)


def test_every_notebook_runs_and_the_end_is_a_comparison(rehearsal):
    folder, done = rehearsal
    assert done.returncode == 3, done.stderr[-3000:]  # random weights are far from the paper
    assert "with the 95 % Welch interval" in done.stdout
    assert "heads lie beyond one point" in done.stdout
    for path in notebook_paths():
        assert (folder / path.name).exists() and path.stem in done.stdout


def test_the_tables_have_the_papers_rows_and_the_ledger_its_scope(rehearsal):
    folder, _ = rehearsal
    table = pd.read_csv(folder / "figures" / "table1.csv")
    assert set(table["dataset"]) == set(SETS) and table["backbone"].nunique() == 3
    compared = pd.read_csv(folder / "figures" / "08_against_paper.csv")
    assert (compared["stage"] == "head").sum() == 9  # 3 networks x CIFAR-10, -100-20, STL-10
    assert (compared["stage"] == "K-means").sum() == 3
    claims = pd.read_csv(folder / "figures" / "claims.csv")
    assert list(claims.columns) == list(COLUMNS) and list(claims["id"]) == [c.id for c in CLAIMS]
    own = claims["id"].isin(["C0", "C1", "C3", "C8", "C9", "C10", "C12"])
    assert set(claims.loc[own, "scope"]) == {"same claim"}


def test_the_first_lessons_run_under_paper_mini(environment, tmp_path):
    """01 to 03, as they are offered in Colab; features and heads are those that `paper` left."""
    for path in (*notebook_paths()[1:4], REPOSITORY / "notebooks" / "checks.py"):
        shutil.copy(path, tmp_path)
    profile = " ".join(["paper-mini", *SMALL])
    folder = load_study(profile).run_dir
    run = ("import sys, pathlib; from tsp_utils.study.runner import reproduce\n"
           "print(*(step.what for step in reproduce(sys.argv[1], True, pathlib.Path(sys.argv[2]))"
           " if step.ended))")
    try:
        done = subprocess.run([sys.executable, "-c", run, profile, str(tmp_path)], cwd=REPOSITORY,
                              env=environment, capture_output=True, text=True, check=False)
        assert done.stdout == "ran ran ran\n", done.stderr[-3000:]
        table = pd.read_csv(folder / "figures" / "03_table1.csv")
        assert set(table["backbone"]) == {"dino_vits16"} and set(table["protocol"]) == {"split"}
        assert len(list((folder / "claims").glob("03_C0_*"))) == 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
