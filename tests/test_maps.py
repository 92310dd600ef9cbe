"""Maps: our neighbours in place of UMAP's own search, and threads as they were."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tsp_utils import maps, plots
from tsp_utils.paths import REPOSITORY


def test_umap_takes_our_neighbours_for_its_own_search():
    from umap import UMAP

    features = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    indices, distances = maps._umap_neighbors(features)
    with pytest.warns(UserWarning):  # of no transform of new points, and of one thread for a seed
        ours = UMAP(metric="cosine", random_state=0, precomputed_knn=(indices, distances),
                    n_epochs=1).fit(features)
        theirs = UMAP(metric="cosine", random_state=0, n_epochs=1).fit(features)
    assert abs(ours.graph_ - theirs.graph_).max() < 1e-4
    chosen, points = plots.umap_points(features, 200)
    assert len(set(chosen)) == 200 and points.shape == (200, 2)


THREADS = """
import warnings; warnings.simplefilter("ignore")
import sys, numpy as np, torch
from threadpoolctl import threadpool_info
from tsp_utils.plots import umap_points

def threads():
    found = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
    return found | {"torch": torch.get_num_threads()}

features = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
torch.set_num_threads(int(sys.argv[1]))
for attempt in range(2):
    before = threads()
    umap_points(features, 60)
    after = threads()
    assert {pool: after[pool] for pool in before} == before, (before, after)
    if attempt == 0:
        import numba
        numba.set_num_threads(1)
assert numba.get_num_threads() == 1
for bad in (features[:2], np.full_like(features, np.nan)):  # the same where a map fails
    try:
        umap_points(bad, 60)
    except ValueError:
        assert threads() == after and numba.get_num_threads() == 1
        print("refused")
"""


@pytest.mark.parametrize("before", ["1", "3"])
def test_a_map_leaves_the_threads_of_the_process_as_they_were(before):
    done = subprocess.run([sys.executable, "-c", THREADS, before], cwd=REPOSITORY, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          check=False)
    assert done.returncode == 0 and done.stdout == "refused\n" * 2, done.stderr
