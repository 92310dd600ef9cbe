"""What every test in tests/ and every nbval kernel of notebooks/ needs."""

import contextlib
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
sys.path += [str(ROOT / "docs"), str(ROOT / "notebooks")]  # scripts, and the lessons' checks

# Kernels start in notebooks/: relative folders would mean another place, and the package may not be
# installed (PYTHON=python).
for name in ("TSP_DATA", "TSP_CACHE"):
    if os.environ.get(name):
        os.environ[name] = os.path.abspath(os.environ[name])
paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
# nbval reads a cell's messages when the cell has ended, and only the first thousand are kept for
# it: bars that move ten times a second would push out the message that says "done".
os.environ.setdefault("TQDM_MININTERVAL", "5")
# Workers of pytest-xdist share the cores: threads that wait for each other cost more than they win.
if os.environ.get("PYTEST_XDIST_WORKER"):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def patiently(start, times: int = 3):
    """`start`, again where a kernel dies as it starts: two may be given one port at one moment."""
    def started(*arguments, **options):
        for left in reversed(range(times)):
            try:
                return start(*arguments, **options)
            except RuntimeError as error:
                if not left or "Kernel died" not in str(error):
                    raise

    return started


with contextlib.suppress(ImportError):  # a user's tests may do without notebooks
    import nbval.kernel

    nbval.kernel.start_new_kernel = patiently(nbval.kernel.start_new_kernel)


def pytest_collection_modifyitems(items):
    """The longest first, so that the other worker does all the rest meanwhile."""
    items.sort(key=lambda item: "test_paper_rehearsal" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small networks on a busy machine wait for their threads more than they compute."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """A cache and a run folder of the test's own: tmp_path's cache/ and runs/."""
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tsp_utils.study.profile.runs_dir", lambda: tmp_path / "runs")


@pytest.fixture
def left_by(monkeypatch):
    """What `python -m tsp_utils ARGUMENTS` exits with, in this process; a text is status 1."""
    def of(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["tsp_utils", *arguments])
        monkeypatch.delitem(sys.modules, "tsp_utils.__main__", raising=False)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as left:
            runpy.run_module("tsp_utils", run_name="__main__")
        return getattr(left.value, "code", left.value)  # Ctrl-C would end pytest

    return of


@pytest.fixture
def quick(own_folders, tmp_path, monkeypatch):
    """Runs on folders in tmp_path, whose estimator trains little unless it is told more."""
    from toys import QUICK

    from tsp_utils import TSPClustering

    monkeypatch.chdir(tmp_path)
    for room in ("cluster_folder", "page"):
        monkeypatch.setattr(f"tsp_utils.folder.{room}.TSPClustering",
                            partial(TSPClustering, **QUICK))


@pytest.fixture
def photos(tmp_path) -> Path:
    """24 clothes of 28 px: photos/000.png and on."""
    from toys import fill

    return fill(tmp_path / "photos")
