"""The search for very many samples, held against the exact one."""

import logging
import warnings

import faiss
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from benchmarks import many_images
from tsp_utils import TSPClustering, approximate, find_neighbors, nearest_neighbors
from tsp_utils.heads import init_heads, train_heads
from tsp_utils.neighbors import METRICS

N, ALONE, TWINS = 26_000, 100, 60  # enough for lists; some far from all, then all alike
rng = np.random.default_rng(0)
X = rng.standard_normal((N, 16)) + 2 * rng.standard_normal((50, 16))[rng.integers(0, 50, N)]
X[-ALONE - TWINS : -TWINS] *= 1000
X[-TWINS:] = X[0]
X = X.astype(np.float32)


def in_common(exact, found) -> float:
    """The mean share of the neighbours [N, K] of one search that the other has, too."""
    return np.mean([np.isin(*pair).mean() for pair in zip(exact, found, strict=True)])


@pytest.mark.parametrize("metric", METRICS)
def test_nearly_all_neighbours_are_found_at_their_exact_distances(metric, caplog):
    caplog.set_level(logging.INFO, "tsp_utils")
    exact, found = nearest_neighbors(X, 10, metric), find_neighbors(X, 10, metric,
                                                                    search="approximate")
    assert ("lists each" in caplog.text) == (metric != "inner")  # which no lists serve
    assert found.indices.shape == (N, 10) and found.metric == metric
    assert found.indices.min() >= 0 and (found.indices != np.arange(N)[:, None]).all()
    assert in_common(exact.indices[:-TWINS], found.indices[:-TWINS]) > 0.985  # of twins any will do
    same = exact.indices == found.indices
    np.testing.assert_allclose(found.distances[same], exact.distances[same], rtol=1e-4, atol=1e-6)
    if metric != "inner":
        assert not found.distances[-TWINS:].any() and (np.diff(found.distances) > -1e-3).all()


def test_rows_whose_lists_hold_too_few_are_searched_among_all(monkeypatch):
    exact, search = nearest_neighbors(X, 10), faiss.IndexIVFFlat.search

    def poor(index, x, k):
        scores, found = search(index, x, k)
        found[::100, -3:] = -1
        return scores, found

    monkeypatch.setattr(faiss.IndexIVFFlat, "search", poor)
    found = find_neighbors(X, 10, search="approximate").indices
    rows = [row for at in range(0, N, 4096) for row in range(at, min(at + 4096, N - TWINS), 100)]
    assert found.min() >= 0 and in_common(exact.indices[rows], found[rows]) > 0.999


@pytest.mark.parametrize("metric, scale", [("cosine", 1e25), ("euclidean", 1e-25)])
def test_huge_and_tiny_features_have_the_same_neighbours(metric, scale):
    usual, found = (find_neighbors(x, 10, metric, search="approximate")
                    for x in (X[:-TWINS], X[:-TWINS].astype(float) * scale))
    assert in_common(usual.indices, found.indices) > 0.98
    of = scale if metric == "euclidean" else 1
    np.testing.assert_allclose(np.median(found.distances), of * np.median(usual.distances),
                               rtol=1e-3)


def test_many_samples_at_equal_distances_are_served_by_lists(caplog):
    caplog.set_level(logging.INFO, "tsp_utils")
    bits = np.random.default_rng(1).integers(0, 2, (N, 24)).astype(np.float32)
    found = find_neighbors(bits, 10, "euclidean", search="approximate")
    assert "lists each" in caplog.text
    exact = np.sort(cdist(bits[:500], bits))[:, 1:11]  # the sample itself comes first
    assert (found.distances[:500] <= exact + 1e-5).mean() > 0.97


@pytest.mark.parametrize("x, k", [
    (X[:, :0], 10), (X[:, 0], 10), (X, 10.5), (X, N), (np.where(X[5] == X, np.nan, X), 10)])
def test_what_the_exact_search_refuses_is_refused_alike(x, k):
    said = []
    for search in ("exact", "approximate"):
        with pytest.raises(ValueError) as refused:
            find_neighbors(x, k, search=search)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_many_samples_and_no_others_are_searched_so(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "tsp_utils")
    find_neighbors(X[:2000], 10, search="approximate")  # too few for lists
    find_neighbors(X[:2000], 10)
    monkeypatch.setattr(approximate, "EXACT_UP_TO", N - 200)
    find_neighbors(X, 10, search="exact")
    assert not caplog.records
    quick = dict(n_init=1, max_epochs=1, min_steps=1, random_state=0, device="cpu")
    with warnings.catch_warnings(action="ignore"):
        TSPClustering(3, **quick).fit(X[:2000])
        assert not caplog.records
        TSPClustering(3, **quick).fit(X[: -ALONE - TWINS + 100])
    assert "lists each" in caplog.text
    with pytest.raises(ValueError, match="neighbor_search is 'near'; pass one of auto, exact"):
        TSPClustering(3, neighbor_search="near").fit(X[:100])


def test_heads_train_on_a_map_as_on_an_array(tmp_path):
    x = np.ascontiguousarray(X[:300])
    np.save(tmp_path / "x.npy", x)
    mapped, heads = np.load(tmp_path / "x.npy", mmap_mode="c"), []
    for features in (x, mapped):
        heads.append(init_heads(x, 3, [0, 1], "random"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Collapse")
            train_heads(heads[-1], features, nearest_neighbors(x, 5), max_epochs=3, min_steps=1,
                        batch_size=32, progress=False)
    np.testing.assert_array_equal(*(h.weight.detach().numpy() for h in heads))


@pytest.mark.filterwarnings("ignore:Collapse")  # a few steps on a few vectors
def test_every_stage_of_the_table_runs(tmp_path):
    many_images.write_vectors(tmp_path / "x.npy", 120)
    x = np.load(tmp_path / "x.npy", mmap_mode="c")
    assert x.shape == (120, many_images.D) and np.isfinite(x).all() and len(np.unique(x[:, 0])) > 99
    for stage in many_images.stages(x).values():
        stage()
