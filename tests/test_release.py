"""What a release is made of: one version, one address, hosted workflows that call what exists."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from readings import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8"))
             for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
STEPS = [step["run"] for flow in WORKFLOWS.values() for job in flow["jobs"].values()
         for step in job["steps"] if "run" in step]


def test_citation_and_changelog_are_of_this_version():
    (version, date), *_ = re.findall(r"^## \[([\d.]+)\] - (\S+)$",
                                     (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert version == PROJECT["version"] == str(CITATION["version"])
    assert date == str(CITATION["date-released"])


@pytest.fixture
def copy(tmp_path):
    """The texts of the repository, where `make links` can do no harm."""
    for path in (*ROOT.glob("*.md"), ROOT / "CITATION.cff", ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    for name in ("docs", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8")
            for path in folder.rglob("*.*") if path.suffix in (".md", ".cff", ".ipynb")}


def links(folder: Path, address: str) -> subprocess.CompletedProcess:
    page, own = folder / "pyproject.toml", (ROOT / "pyproject.toml").read_text("utf-8")
    page.write_text(own.replace(PROJECT["urls"]["Repository"], address), "utf-8")
    done = subprocess.run([sys.executable, folder / "docs" / "links.py"], text=True,
                          capture_output=True)
    page.write_text(own, "utf-8")
    return done


def test_every_place_names_the_address_of_pyproject_now(copy):
    assert CITATION["repository-code"] == PROJECT["urls"]["Repository"]
    assert f"git clone {PROJECT['urls']['Repository']} " in texts(copy)["README.md"]
    done = links(copy, PROJECT["urls"]["Repository"])
    assert (done.returncode, done.stdout) == (0, ""), "run make links"


def test_another_address_leaves_nothing_of_the_one_before(copy):
    old, new = PROJECT["urls"]["Repository"], "https://github.com/some-one/tsp.study"
    (copy / "notebooks" / "99_colab.ipynb").write_text(f"%pip install git+{old}.git\n{old}2/x")
    before = texts(copy)
    assert links(copy, new).returncode == 0
    filled = texts(copy)
    assert filled.pop("notebooks/99_colab.ipynb") == f"%pip install git+{new}.git\n{old}2/x"
    slug = old.removeprefix("https://github.com/")
    assert not [name for name, text in filled.items() if slug in text]
    assert new in filled["CITATION.cff"] and f"git clone {new} " in filled["README.md"]
    assert f"[![ci]({new}/actions/workflows/ci.yml/badge.svg)]" in filled["README.md"]
    assert "/github/some-one/tsp.study/blob/main/notebooks/99_colab.ipynb)" in filled["README.md"]
    assert links(copy, new).stdout == ""  # once is enough
    links(copy, old)
    assert texts(copy) == before


def test_an_address_that_is_none_is_refused(copy):
    before = texts(copy)
    done = links(copy, "github.com/someone/tsp")
    assert done.returncode and done.stderr.startswith("error: Repository in pyproject.toml is")
    assert texts(copy) == before


def test_hosted_pythons_are_those_of_the_package():
    matrix = WORKFLOWS["ci"]["jobs"]["quick"]["strategy"]["matrix"]["python"]
    low, high = (int(minor) for minor in re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
    assert matrix == [f"3.{minor}" for minor in range(low, high)]


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("bash") is None,
                    reason="needs make and bash")
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_a_hosted_workflow_calls_what_is_here(step):
    """Its shell can be read, its make targets can be planned, its files are there."""
    def call(*command):
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)

    assert call("bash", "-n", "-c", step).returncode == 0
    for line in re.findall(r"^make .+$", step, re.M):
        done = call("bash", "-c", line.replace("make", "make -n", 1))
        assert done.returncode == 0, done.stderr
    for path in re.findall(r"(?:tests/|\.ci/|requirements)[\w./]+", step):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (?!build|twine)(\w+)", step):
        assert call(sys.executable, "-c", f"import {module}").returncode == 0, module
