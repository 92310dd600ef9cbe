"""The benchmark at miniature sizes: every part says what it measured; no time is judged here."""

import math
import re

import numpy as np
import pytest

from benchmarks import bench
from tsp_utils.neighbors import nearest_neighbors
from tsp_utils.scaling import scale_features


@pytest.mark.filterwarnings("ignore:Collapse")  # a few steps on a few hundred samples
def test_the_table_has_a_row_each_with_finite_numbers():
    said = []
    bench.bench(said.append, n=600, n_images=32, memory_images=(300, 600),
                memory_backbone="pixels", profile="tiny")
    lines = "\n".join(said).splitlines()
    assert re.search(r"\d+ cores; .* torch \d.* bf16 through AMX: (yes|no)", lines[0])
    assert lines[2] == "| what | measured | aim | how |"
    assert "make reproduce" in lines[-1]
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [len(row) for row in rows] == [4] * 7
    for _, measured, _, _ in rows:
        numbers = [float(number) for number in re.findall(r"nan|inf|-?\d+\.?\d*", measured)]
        assert numbers and all(math.isfinite(number) for number in numbers), measured


def test_the_plain_way_draws_a_sample_and_one_of_its_neighbours():
    features = scale_features(bench.random_clusters(200))
    neighbors = nearest_neighbors(features, 5)
    mine, other = bench.Pairs(features, neighbors)[7]
    assert np.array_equal(mine, features[7])
    assert any(np.array_equal(other, features[j]) for j in neighbors.indices[7])
