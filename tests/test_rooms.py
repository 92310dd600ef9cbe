"""The house: who may import whom, its size, the wheel that holds it, the lists of its packages."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import make_api
import numpy as np
import pytest
import yaml
from PIL import Image
from readings import ROOT
from safetensors.numpy import save_file

import tsp_utils
from tsp_utils.datasets import DATASETS

# Lines that there may be: lower them where something was deleted. The aim is 7,000 in all.
MOST_ON_TOP, MOST_IN_ALL, MOST_OF_THE_METHOD, MOST_A_FILE = 1_600, 8_725, 900, 300
METHOD = ("features", "scaling", "neighbors", "k_means", "losses", "heads", "metrics")
# The sdist, and the wheel from what it unpacks to, as pip and build do it.
BUILD = """
import os, sys, tarfile
from setuptools import build_meta
place = sys.argv[1]
with tarfile.open(os.path.join(place, build_meta.build_sdist(place))) as sdist:
    sdist.extractall("unpacked", filter="data")
    os.chdir(os.path.join("unpacked", sdist.getnames()[0]))
build_meta.build_wheel(place)
"""
CONDA_NAMES = {"pytorch": "torch", "pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}


def test_the_doors_are_those_of_pyproject():
    """Layers as data flows, folders that know the top alone, only `study` knows them all."""
    lint = shutil.which("lint-imports", path=sysconfig.get_path("scripts"))
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
    """The package as pip puts it among others, from its sdist; with a folder beside it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"  # a copy: a build leaves files that the next one would take in
    shutil.copytree(ROOT / "tsp_utils", source / "tsp_utils", ignore=lambda *_: ["__pycache__"])
    for vectors in (source / "tsp_utils" / "bundled" / "vectors").iterdir():
        vectors.write_bytes(b"")  # most of the bytes that ship, and none that is read below
    for name in ("pyproject.toml", "MANIFEST.in", "docs/package.md", "LICENSE", "LICENSE-TEXT",
                 "CHANGELOG.md", "CITATION.cff"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD, place], cwd=source, check=True,
                   capture_output=True)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:  # what pip does with it
        wheel.extractall(place / "site")
    shutil.rmtree(source)
    (place / "photos").mkdir()
    # So few that the page needs no UMAP.
    for i, image in enumerate(np.random.default_rng(0).integers(0, 64, (24, 32, 32, 3), np.uint8)):
        Image.fromarray(image + np.uint8(60 * (i % 3))).save(place / "photos" / f"{i}.png")
    return place


def outside(place: Path, code: str) -> subprocess.CompletedProcess:
    """Python with the installed package, in a folder that is no clone, with a home of its own."""
    plain = {key: value for key, value in os.environ.items()
             if not key.startswith(("TSP_", "XDG_"))} | {"PYTHONPATH": str(place / "site")}
    home = dict.fromkeys(("HOME", "USERPROFILE", "WIN_PD_OVERRIDE_LOCAL_APPDATA"),
                         str(place / "home"))
    code = f"import tsp_utils as t; from tsp_utils.__main__ import console, main\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=place, text=True, capture_output=True,
                          env=plain | home)


def test_a_wheel_holds_the_rooms_and_what_ships(installed):
    package = ROOT / "tsp_utils"
    wanted = [*package.rglob("*.py"), *package.rglob("*.yaml"), package / "py.typed",
              *(package / "bundled").rglob("*.*"), package / "folder" / "page.html.jinja"]
    assert all((installed / "site" / path.relative_to(ROOT)).exists() for path in wanted)
    (entry,) = (installed / "site").glob("tsp_utils-*.dist-info/entry_points.txt")
    assert "tsp-utils = tsp_utils.__main__:console" in entry.read_text()
    (licences,) = (installed / "site").glob("tsp_utils-*.dist-info/licenses")
    assert {path.name for path in licences.iterdir()} == {"LICENSE", "LICENSE-TEXT"}


def test_an_installed_package_serves_a_folder_and_an_estimator(installed):
    done = outside(installed, (
        "import numpy as np; from tsp_utils.files import paths\n"
        "from tsp_utils.folder.cluster_folder import cluster_folder\n"
        "cluster_folder('photos', 3, n_init=2, max_epochs=3, min_steps=30)\n"
        "x = np.random.default_rng(0).standard_normal((60, 8)).astype('float32')\n"
        "print(t.__file__, paths.cache_dir(), t.__version__, t.load_study().n_seeds,"
        " len(t.TSPClustering(3, random_state=0, min_steps=10).fit_predict(x)))"))
    assert done.returncode == 0, done.stderr
    assert (installed / "clusters" / "photos" / "report.html").exists()
    file, cache, version, seeds, n = done.stdout.splitlines()[-1].split()
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert (Path(file).is_relative_to(installed / "site") and seeds == "10" and n == "60"
            and Path(cache).is_relative_to(installed / "home") and Path(cache).is_dir()), done
    made = {path.name for path in installed.iterdir()} - {"site", "home", "photos", "clusters"}
    assert all(name.endswith((".whl", ".tar.gz")) for name in made)


def test_an_installed_package_takes_vectors_in_and_keeps_evidence(installed):
    """In the user's own folder, and without the notebooks: as in Colab."""
    x, y = np.ones((10_000, 384), np.float16), np.repeat(np.arange(10, dtype=np.uint8), 1000)
    card = {"dataset": "cifar10", "split": "test", "backbone": "dino_vits16",
            "classes": json.dumps(DATASETS["cifar10"].classes), "weights_sha256": "0f" * 32,
            "sha256": hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()}
    save_file({"features": x, "labels": y}, installed / "sent.safetensors", card)
    done = outside(installed, (
        "main(['bundle-vectors', 'sent.safetensors'])\n"
        "study = t.load_study()\n"
        "cell = t.Evidence('C2', 'a cell', '', '', 'all', 1, 0, acc=(1.0, 2.0))\n"
        "t.save_evidence(study, '02', [cell])\n"
        "print(study.backbone_for('cifar10'), *t.read_evidence(study)[0].acc)"))
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert Path(first).is_relative_to(installed / "home") and last == "dino_vits16 1.0 2.0", done
    (installed / "sent.safetensors").unlink()
    shutil.rmtree(installed / "runs")


def test_what_wants_a_clone_says_so(installed):
    said = outside(installed, (
        "import sys\n"
        "for command in ('refresh', 'reproduce', 'figures'):\n"
        "    sys.argv = ['tsp-utils', command]\n"
        "    try:\n        console()\n    except SystemExit as left:\n"
        "        print(left.code)")).stdout.splitlines()
    assert len(said) == 3 and all(
        line.startswith("error: ") and "this is an installed package" in line for line in said)


def declared() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extras.pop("site")  # of make site alone, which no environment and no lock is for
    lines = sum(extras.values(), project["dependencies"])
    return dict(re.match(r"([\w-]+)(.*)", line).groups() for line in lines)


@pytest.mark.parametrize("file", ["environment.yml", "environment-cpu.yml"])
def test_conda_environments_name_the_same_packages_and_versions_and_say_why(file):
    text = (ROOT / file).read_text()
    entries = yaml.safe_load(text)["dependencies"]
    entries += entries.pop()["pip"]  # what conda-forge lacks comes last
    conda = dict(re.match(r"([\w-]+)(.*)", entry).groups() for entry in entries)
    conda.pop("python"), conda.pop("pip")
    assert {CONDA_NAMES.get(name, name): rest for name, rest in conda.items()} == declared()
    assert file != "environment.yml" or not re.search(r"^  - [^#\n]*>=[^#\n]*$", text, re.M)


def test_lock_pins_every_declared_package_for_three_systems_and_names_no_index():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([\w.-]+)==", lock, re.M))
    assert {name.lower().replace("_", "-") for name in declared()} <= {
        name.lower().replace("_", "-") for name in pinned}
    entries = [line for line in lock.splitlines() if not line.lstrip().startswith("#")]
    assert not re.search(r"://|file:|--index-url|--find-links|@", "\n".join(entries))
    for marker in ("linux", "win32", "darwin"):
        assert marker in lock, f"no line of requirements.lock is for {marker}"


def test_importing_loads_neither_torch_nor_what_takes_as_long():
    code = ("import sys, tsp_utils; assert not {'torch', 'numpy'} & sys.modules.keys()\n"
            "import tsp_utils.datasets; assert 'torch' not in sys.modules\n"
            # nor do networks of patches load timm, torchvision and torch's compiler
            "from tsp_utils.folder import cluster_folder, page\n"
            "tsp_utils.load_backbone('invariant_patches', 'cpu')\n"
            "assert not {'timm', 'torchvision', 'torch._dynamo'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_api_page_is_of_these_docstrings_and_every_name_has_one():
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run make api"
    assert not [name for name in tsp_utils.__all__ if callable(getattr(tsp_utils, name))
                and not getattr(tsp_utils, name).__doc__]
