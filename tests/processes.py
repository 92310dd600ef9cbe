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
    import datetime

    import torch
    import torch.distributed.distributed_c10d as distributed

    distributed.default_pg_timeout = datetime.timedelta(minutes=1)  # where the other one failed
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
