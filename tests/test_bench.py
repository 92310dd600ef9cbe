"""The benchmark at miniature sizes: every part says what it measured; no time is judged here."""

import math
import re

import numpy as np
import pytest

from benchmarks import bench, paper_mini
from tsp_utils.datasets import load_dataset
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


@pytest.mark.parametrize("name", paper_mini.TRAINED)
def test_bfloat16_changes_little_of_a_trained_network(name):
    images = load_dataset("fashion-mnist")
    found = paper_mini.bf16_against_float32(name, images.subset(slice(150)),
                                            images.subset(slice(150, 250)))
    assert 0 < found["mean"] <= found["largest"] < 5 and found["same"] > 95
    assert abs(found["knn"]) <= 2 and abs(found["consistency"]) <= 1 and found["knn_float32"] > 40


def test_a_speed_is_said_of_each_network_and_type():
    (float32, bfloat16) = paper_mini.speeds({"dino_vits16": 1}, rounds=1)
    assert "| float32 |" in float32 and "| bfloat16 |" in bfloat16
    assert all(0 < float(cell) < 1000 for cell in float32.split(" | ")[2:4])
