"""The house: who may import whom, how large it is, and that a wheel holds all of it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tsp_utils.datasets import DATASETS

ROOT = Path(__file__).resolve().parent.parent
# Lines that there may be: lower them where something was deleted. The aim is 1,600 on top and
# 5,500 in all.
MOST_ON_TOP, MOST_IN_ALL, MOST_OF_THE_METHOD, MOST_A_FILE = 2_450, 7_575, 900, 300
METHOD = ("features", "scaling", "neighbors", "k_means", "losses", "heads", "metrics")


def test_the_doors_are_those_of_pyproject():
    """Layers as data flows, folders that know the top alone, only `study` knows them all."""
    lint = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "Rooms KEPT" in done.stdout, done


def test_the_package_does_not_grow():
    package = ROOT / "tsp_utils"
    lines = {path.relative_to(package).as_posix(): len(path.read_text("utf-8").splitlines())
             for path in package.rglob("*.py")}
    top = {path: n for path, n in lines.items() if "/" not in path and not path.startswith("__")}
    method = sum(lines[f"{name}.py"] for name in METHOD)
    largest = ", ".join(f"{path} {lines[path]}" for path in sorted(lines, key=lines.get)[:-9:-1])
    said = (f"{sum(top.values()):,} lines on top, {method} of them the method, "
            f"{sum(lines.values()):,} in all; the largest: {largest}")
    print(said)
    assert sum(top.values()) <= MOST_ON_TOP and max(top.values()) <= MOST_A_FILE, said
    assert method <= MOST_OF_THE_METHOD and sum(lines.values()) <= MOST_IN_ALL, said


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package as pip puts it among others, without a clone; with a folder beside it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"  # a copy: a build leaves files that the next one would take in
    shutil.copytree(ROOT / "tsp_utils", source / "tsp_utils", ignore=lambda *_: ["__pycache__"])
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, "."],
                   cwd=source, check=True, capture_output=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site",
                    next(place.glob("*.whl"))], check=True, capture_output=True)
    shutil.rmtree(source)
    (place / "photos").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 64, (30, 32, 32, 3), np.uint8)):
        Image.fromarray(image + np.uint8(60 * (i % 3))).save(place / "photos" / f"{i}.png")
    return place


def outside(place: Path, *arguments) -> subprocess.CompletedProcess:
    """Python with the installed package, in a folder that is no clone, with a home of its own."""
    plain = {key: value for key, value in os.environ.items()
             if not key.startswith(("TSP_", "XDG_"))} | {"PYTHONPATH": str(place / "site")}
    home = dict.fromkeys(("HOME", "USERPROFILE", "LOCALAPPDATA"), str(place / "home"))
    return subprocess.run([sys.executable, *arguments], cwd=place, text=True, capture_output=True,
                          env=plain | home)


def test_a_wheel_holds_the_rooms_and_what_ships(installed):
    package = ROOT / "tsp_utils"
    wanted = [*package.rglob("*.py"), *package.rglob("*.yaml"), package / "py.typed",
              *(package / "bundled").rglob("*.*"), package / "folder" / "page.html.jinja"]
    assert all((installed / "site" / path.relative_to(ROOT)).exists() for path in wanted)


def test_an_installed_package_serves_a_folder_and_an_estimator(installed):
    done = outside(installed, "-m", "tsp_utils", "cluster", "photos", "--n-clusters", "3")
    assert done.returncode == 0, done.stderr
    assert (installed / "clusters" / "photos" / "report.html").exists()
    code = ("import numpy as np, tsp_utils as t; from tsp_utils import paths\n"
            "x = np.random.default_rng(0).standard_normal((60, 8)).astype('float32')\n"
            "print(t.__file__, paths.cache_dir(), t.load_study().n_seeds,"
            " len(t.TSPClustering(3, random_state=0, min_steps=10).fit_predict(x)))")
    done = outside(installed, "-c", code)
    file, cache, seeds, n = done.stdout.split()
    assert (Path(file).is_relative_to(installed / "site") and seeds == "10" and n == "60"
            and Path(cache).is_relative_to(installed / "home") and Path(cache).is_dir()), done
    made = {path.name for path in installed.iterdir()} - {"site", "home", "photos", "clusters"}
    assert all(name.endswith(".whl") for name in made)


def test_an_installed_package_takes_vectors_in_and_keeps_evidence(installed):
    """In the user's own folder, and without the notebooks: as in Colab."""
    x, y = np.ones((10_000, 384), np.float16), np.repeat(np.arange(10, dtype=np.uint8), 1000)
    card = {"dataset": "cifar10", "split": "test", "backbone": "dino_vits16",
            "classes": json.dumps(DATASETS["cifar10"].classes), "weights_sha256": "0f" * 32,
            "sha256": hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()}
    save_file({"features": x, "labels": y}, installed / "sent.safetensors", card)
    done = outside(installed, "-m", "tsp_utils", "bundle-vectors", "sent.safetensors")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(installed / "home")
    code = ("import tsp_utils as t; study = t.load_study()\n"
            "cell = t.Evidence('C2', 'a cell', '', '', 'all', 1, 0, acc=(1.0, 2.0))\n"
            "t.save_evidence(study, '02', [cell])\n"
            "print(study.backbone_for('cifar10'), *t.read_evidence(study)[0].acc)")
    done = outside(installed, "-c", code)
    assert done.stdout == "dino_vits16 1.0 2.0\n", done
    (installed / "sent.safetensors").unlink()
    shutil.rmtree(installed / "runs")


@pytest.mark.parametrize("command", ["refresh", "reproduce", "figures"])
def test_what_wants_a_clone_says_so(installed, command):
    done = outside(installed, "-m", "tsp_utils", command)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "this is an installed package" in done.stderr
