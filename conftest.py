"""What every test in tests/ and every nbval kernel of notebooks/ needs."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent

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
