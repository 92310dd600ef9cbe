"""CONTRIBUTING's worked examples: each applied to a copy of the package, its check run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^### (.+?)\n.*?```diff\n(.*?)```\n\n```python\n(.*?)```", PAGE, re.S | re.M)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in ("plain", "changed", "user")}


@pytest.fixture
def run(places):
    """Run a check in a copy of the package, as it is or with a diff applied."""
    def run(check: str, diff: str = "") -> subprocess.CompletedProcess:
        place = places["changed" if diff else "plain"]
        shutil.rmtree(place / "tsp_utils", ignore_errors=True)
        shutil.copytree(ROOT / "tsp_utils", place / "tsp_utils", ignore=lambda folder, names: {
            "__pycache__", "bundled"} & set(names))
        os.symlink(ROOT / "tsp_utils" / "bundled", place / "tsp_utils" / "bundled")
        if diff:
            subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=place, check=True)
        own = {"TSP_DATA": str(places["user"] / "data"), "TSP_CACHE": str(places["user"] / "cache")}
        return subprocess.run([sys.executable, "-c", check], cwd=place, text=True,
                              capture_output=True, env=os.environ | own | {"PYTHONPATH": "."})

    return run


def test_every_kind_of_change_has_an_example():
    kinds = ("loss", "weighting", "backbone", "data set", "head", "claim", "figure", "cache")
    assert len(EXAMPLES) == len(kinds)
    assert all(kind in title for kind, (title, *_) in zip(kinds, EXAMPLES, strict=True))


@pytest.mark.parametrize("title, diff, check", EXAMPLES, ids=[title for title, *_ in EXAMPLES])
def test_the_example_takes_the_files_it_says_and_does_what_it_says(
        title, diff, check, run, places):
    files = re.findall(r"^\+\+\+ b/(.+)$", diff, re.M)
    assert sum(file.endswith(".py") for file in files) == 1
    assert len(files) == (2 if "the profile" in title else 1)
    assert run(check).returncode != 0, "the check holds without the change"
    done = run(check, diff)
    assert done.returncode == 0, done.stderr
    changed = [places["changed"] / file for file in files if file.endswith(".py")]
    lint = [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", *changed]
    linted = subprocess.run(lint, text=True, capture_output=True)
    assert linted.returncode == 0, linted.stdout
