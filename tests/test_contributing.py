"""CONTRIBUTING's worked examples: each applied to a copy of the package, its check run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readings import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^### (.+?)\n.*?```diff\n(.*?)```\n\n```python\n(.*?)```", PAGE, re.S | re.M)


def copy_to(place: Path) -> Path:
    shutil.copytree(ROOT / "tsp_utils", place / "tsp_utils", ignore=lambda folder, names: {
        "__pycache__", "bundled"} & set(names))
    os.symlink(ROOT / "tsp_utils" / "bundled", place / "tsp_utils" / "bundled")
    return place


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The package as it is, with a cache beside it for every check."""
    return copy_to(tmp_path_factory.mktemp("plain"))


def test_every_kind_of_change_has_an_example():
    kinds = ("loss", "weighting", "backbone", "data set", "head", "claim", "figure", "cache")
    assert len(EXAMPLES) == len(kinds)
    assert all(kind in title for kind, (title, *_) in zip(kinds, EXAMPLES, strict=True))


@pytest.mark.parametrize("title, diff, check", EXAMPLES, ids=[title for title, *_ in EXAMPLES])
def test_the_example_takes_the_files_and_does_what_it_says(title, diff, check, plain, tmp_path):
    def run(place: Path) -> subprocess.CompletedProcess:
        own = {"TSP_DATA": str(plain / "data"), "TSP_CACHE": str(plain / "cache")}
        return subprocess.run([sys.executable, "-c", check], cwd=place, text=True,
                              capture_output=True, env=os.environ | own | {"PYTHONPATH": "."})

    files = re.findall(r"^\+\+\+ b/(.+)$", diff, re.M)
    assert sum(file.endswith(".py") for file in files) == 1
    assert len(files) == (2 if "the profile" in title else 1)
    assert run(plain).returncode != 0, "the check holds without the change"
    changed = copy_to(tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=changed, check=True)
    done = run(changed)
    assert done.returncode == 0, done.stderr
    lint = [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml",
            *(changed / file for file in files if file.endswith(".py"))]
    linted = subprocess.run(lint, text=True, capture_output=True)
    assert linted.returncode == 0, linted.stdout
