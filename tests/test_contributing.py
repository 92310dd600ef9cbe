"""CONTRIBUTING's worked examples: each applied to a copy of the package, its check run there."""

import json
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

# Runs [folder of a package, check] pairs, each in a process of its own that has not seen the
# package, and has what the package imports already: that takes most of the seconds.
RUN = """
import json, os, sys, traceback
import faiss, matplotlib.pyplot, numpy, pandas, safetensors.torch, sklearn.cluster, timm, torch
for place, check in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.chdir(place)
        sys.path.insert(0, place)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            exec(check, {"__name__": "__main__"})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def copy_to(place: Path) -> Path:
    shutil.copytree(ROOT / "tsp_utils", place / "tsp_utils",
                    ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    os.symlink(ROOT / "tsp_utils" / "bundled", place / "tsp_utils" / "bundled")
    return place


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, tuple[Path, int, int, str]]:
    """Title -> changed copy, status of the check in a plain and in that copy, what was said."""
    root = tmp_path_factory.mktemp("copies")
    plain, runs = copy_to(root / "plain"), []
    for i, (_, diff, check) in enumerate(EXAMPLES):
        changed = copy_to(root / str(i))
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=changed, check=True)
        runs += [(str(plain), check), (str(changed), check)]
    own = {"TSP_DATA": str(root / "data"), "TSP_CACHE": str(root / "cache"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", RUN], input=json.dumps(runs), text=True,
                          capture_output=True, env=os.environ | own, cwd=root)
    status = [int(line) for line in done.stdout.split()]
    assert len(status) == len(runs), done.stderr
    return {title: (root / str(i), *status[2 * i:2 * i + 2], done.stderr)
            for i, (title, *_) in enumerate(EXAMPLES)}


def test_every_kind_of_change_has_an_example():
    kinds = ("loss", "weighting", "backbone", "data set", "head", "claim", "figure", "cache")
    assert all(kind in title for kind, (title, *_) in zip(kinds, EXAMPLES, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("title, diff", [example[:2] for example in EXAMPLES],
                         ids=[title for title, *_ in EXAMPLES])
def test_the_example_takes_the_files_and_does_what_it_says(title, diff, ended):
    files = re.findall(r"^\+\+\+ b/(.+)$", diff, re.M)
    assert sum(file.endswith(".py") for file in files) == 1
    assert len(files) == (2 if "the profile" in title else 1)
    changed, without, with_it, said = ended[title]
    assert without != 0, "the check holds without the change"
    assert with_it == 0, said
    lint = [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml",
            *(changed / file for file in files if file.endswith(".py"))]
    linted = subprocess.run(lint, text=True, capture_output=True)
    assert linted.returncode == 0, linted.stdout
