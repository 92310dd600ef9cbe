"""TSP on 10,000, 100,000 and 1,000,000 vectors: the table of docs/your_own_images_measured.md.

python -m benchmarks.many_images FOLDER, in the repository: vectors lie there meanwhile (1.5 GB per
million), mapped and not read. Every stage runs in a process of its own on one thread, so that
its seconds are the processor's and its memory is its own.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.bench import machine
from tsp_utils.files.paths import REPOSITORY

COUNTS, D, K, C, SEEDS = (10_000, 100_000, 1_000_000), 384, 20, 10, range(10)
QUERIES = 10_000  # of the exact search: its seconds are for all, by proportion
EPOCHS = 100


def write_vectors(path: Path, n: int) -> None:
    """C classes of 100 groups each, 32 axes wide, turned into D, float32 [n, D]."""
    rng = np.random.default_rng(0)
    groups = 3 * rng.standard_normal((C, 1, 32)) + 1.5 * rng.standard_normal((C, 100, 32))
    turn = np.linalg.qr(rng.standard_normal((D, 32)))[0].T  # [32, D]
    out = np.lib.format.open_memmap(path, "w+", np.float32, (n, D))
    for at in range(0, n, 10_000):
        chosen = groups.reshape(-1, 32)[rng.integers(0, 100 * C, len(out[at : at + 10_000]))]
        wide = (chosen + rng.standard_normal(chosen.shape)) @ turn
        out[at : at + 10_000] = wide + 0.1 * rng.standard_normal(wide.shape)


def stages(x: np.ndarray):
    """name -> what does that stage with vectors [N, D]; some return the seconds of all of it."""
    import faiss

    from tsp_utils.approximate import find_neighbors
    from tsp_utils.heads import init_heads, train_heads
    from tsp_utils.k_means import kmeans
    from tsp_utils.neighbors import Neighbors
    from tsp_utils.scaling import scale_features

    n = len(x)

    def exact():
        unit = np.array(x)
        faiss.normalize_L2(unit)
        start = time.process_time()
        faiss.knn(unit[:QUERIES], unit, K + 1, faiss.METRIC_INNER_PRODUCT)
        return (time.process_time() - start) * n / QUERIES

    def heads():  # which neighbours they are makes no difference to the time
        rng = np.random.default_rng(1)
        neighbors = Neighbors(rng.integers(0, n, (n, K)),
                              np.sort(rng.random((n, K), np.float32) + 1, 1), "cosine")
        taken = []
        for epochs in (1, 2):
            start = time.process_time()
            train_heads(init_heads(x, C, SEEDS, "random"), x, neighbors, max_epochs=epochs,
                        min_steps=1, progress=False)
            taken.append(time.process_time() - start)
        return taken[0] + (EPOCHS - 1) * (taken[1] - taken[0])

    return {"scaling": lambda: scale_features(x), "neighbours, exact": exact,
            "neighbours, approximate": lambda: find_neighbors(x, K, search="approximate"),
            "K-means, one start": lambda: kmeans(x, C, [0]),
            f"ten heads, {EPOCHS} epochs": heads}


def measure(path: str, stage: str) -> None:
    """Print what a stage logged, its processor seconds and the most memory it took, in GB."""
    import logging

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("tsp_utils").setLevel(logging.INFO)
    x = np.load(path, mmap_mode="c")  # nothing is written, and torch warns of maps that are not so
    run, before, most, ended = stages(x)[stage], private_gb(), [0.0], threading.Event()

    def watch():
        while not ended.wait(0.05):
            most[0] = max(most[0], private_gb())

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.process_time()
    seconds = run()
    seconds = seconds if isinstance(seconds, float) else time.process_time() - start
    ended.set()
    watching.join()
    print(f"{seconds:.1f} {most[0] - before:.2f}")


def private_gb() -> float:
    """Memory of this process but for mapped files, as Linux counts it."""
    line = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return int(line.split()[0]) / 2**20


def main(folder: str) -> None:
    """Make the vectors, measure, print the table."""
    print(f"{machine()} One thread.\n", flush=True)
    names = list(stages(np.empty((0, D), np.float32)))
    print("| vectors of 384 | stage | processor seconds | GB |\n|---|---|---|---|")
    for n in COUNTS:
        path = Path(folder, f"{n}.npy")
        write_vectors(path, n)
        for name in names:
            code = f"from benchmarks import many_images as m; m.measure({str(path)!r}, {name!r})"
            one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            *said, found = subprocess.check_output(
                [sys.executable, "-c", code], cwd=REPOSITORY, text=True,
                env=os.environ | one).splitlines()
            print(f"| {n:,} | {name} | {' | '.join(found.split())} |", *said, flush=True)
        path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
