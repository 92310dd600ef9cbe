"""Maps: our neighbours in place of UMAP's own search, threads as they were; and the figures.

Of many classes what cannot be read is left out, and no colour is used twice.
"""

import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tsp_utils import maps, plots
from tsp_utils.files.paths import REPOSITORY
from tsp_utils.study.figures import plot_finetuning_map, plot_heads


def test_umap_takes_our_neighbours_for_its_own_search(own_folders):
    from umap import UMAP

    features = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    settings = dict(metric="cosine", random_state=0, n_epochs=1)
    with pytest.warns(UserWarning):  # of no transform of new points, and of one thread for a seed
        ours = UMAP(precomputed_knn=maps._umap_neighbors(features), **settings).fit(features)
        theirs = UMAP(**settings).fit(features)
    assert abs(ours.graph_ - theirs.graph_).max() < 1e-4
    chosen, points = maps.umap_points(features, 200)
    assert len(set(chosen)) == 200 and points.shape == (200, 2)


THREADS = """
import numpy as np, torch
from threadpoolctl import threadpool_info
from tsp_utils.maps import umap_points

def threads():
    found = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
    return found | {"torch": torch.get_num_threads()}

features = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
for attempt, n_threads in enumerate((3, 1)):
    torch.set_num_threads(n_threads)
    before = threads()
    umap_points(features, 60, seed=attempt)  # another seed, or it would be read from the cache
    after = threads()
    assert {pool: after[pool] for pool in before} == before, (before, after)
    if attempt == 0:
        import numba
        numba.set_num_threads(1)
assert numba.get_num_threads() == 1
try:
    umap_points(features[:2], 60)  # the same where a map fails
except ValueError:
    assert threads() == after and numba.get_num_threads() == 1
    print("refused")
from pathlib import Path
from umap import umap_
kept = Path(umap_.smooth_knn_dist.stats.cache_path)  # on disk, for the next process
assert list(kept.glob("*smooth_knn_dist*.nbc")), kept
"""


def test_a_map_leaves_the_threads_of_the_process_as_they_were(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", THREADS], cwd=REPOSITORY,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TSP_CACHE": str(tmp_path)},
                          text=True, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout == "refused\n", done.stderr


@pytest.fixture
def ax():
    yield plt.figure().gca()
    plt.close("all")


@pytest.mark.parametrize("n, named", [(20, True), (100, False)])
def test_a_map_has_a_colour_a_class_and_a_legend_that_fits(ax, n, named):
    names = [f"class {c}" for c in range(n)]
    plots.plot_map(np.zeros((n, 2)), np.arange(n), names, ax)
    assert len({tuple(group.get_facecolor()[0]) for group in ax.collections}) == n
    shown = [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []
    assert shown == (names if named else [])


@pytest.mark.parametrize("n, named", [(10, True), (100, False)])
def test_a_confusion_is_in_percent_of_each_class_with_clusters_in_their_classes_order(ax, n, named):
    counts = np.roll(np.diag(np.full(n, 7)), 1, axis=1)  # cluster c + 1 is class c
    names = [f"class {c}" for c in range(n)]
    plots.plot_confusion(counts, names, np.roll(np.arange(n), 1), ax)
    np.testing.assert_array_equal(ax.collections[0].get_array().reshape(n, n), 100 * np.eye(n))
    assert [text.get_text() for text in ax.get_yticklabels()] == (names if named else [])
    assert len(ax.texts) == (n * n if named else 0)


def test_heads_are_drawn_in_the_order_given(ax):
    order = ["tsp", "scan", "k-means", "gmm"]
    table = pd.DataFrame(dict(method=["scan", "tsp", "k-means", "gmm"],
                              acc_mean=[30.0, 31.0, 28.0, np.nan],
                              acc_std=[1.0, np.nan, 2.0, np.nan]))
    plot_heads(table, order, ax, bound=50.0)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "TSP", "SCAN", "K-means", "Gaussian mixture"]
    assert list(ax.get_yticks()) == [3, 2, 1, 0]
    assert [text.xy[1] for text in ax.texts if text.get_text() == "not run"] == [0]
    drawn = {round(line.get_xdata()[0], 1) for line in ax.lines if len(line.get_xdata()) == 1}
    assert {30.0, 31.0, 28.0} <= drawn


def test_the_map_of_fine_tuning_leaves_gaps(ax):
    cells = pd.DataFrame(dict(row=["TSP", "ICBPL"], column=["1 block", "2 blocks"], n=[1, 5],
                              d=[0.5, -1.5]))
    plot_finetuning_map(cells, "d", ["1 block", "2 blocks"], ax)
    texts = [text.get_text() for text in ax.texts if text.get_text()]
    assert sorted(texts) == ["+0.5\nn = 1", "-1.5\nn = 5"]
