"""Other processes of a test, forked from one that has imported what is slow to import."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(START)


def two_processes() -> ProcessPoolExecutor:
    """A pool of two, with the environment that this process has now."""
    if START == "forkserver":
        CONTEXT.set_forkserver_preload(["experiments.arms", "experiments.extract"])
    return ProcessPoolExecutor(2, CONTEXT, _settle, (dict(os.environ),))


def _settle(environment: dict) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
