"""The benchmark at miniature sizes: every part says what it measured; no time is judged here."""

import math
import re

import numpy as np
import pytest
import torch

from benchmarks import bench
from tsp_utils.losses import tsp_loss
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


def test_the_plain_way_is_the_same_task():
    features = scale_features(bench.random_clusters(200))
    neighbors = nearest_neighbors(features, 5)
    pairs = bench.Pairs(features, neighbors)
    for i in (0, 7):
        mine, other = pairs[i]
        assert np.array_equal(mine, features[i])
        assert any(np.array_equal(other, features[j]) for j in neighbors.indices[i])
    logits = torch.randn(2, 9, 4)
    p, q = logits.softmax(-1)
    mean = p.mean(0)
    plain = -(p * q).sum(1).log().mean() + 3 * (mean * mean.log()).sum()
    torch.testing.assert_close(plain, tsp_loss(*logits)[0])
