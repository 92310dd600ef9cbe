"""The last blocks alone: the same features, the same steps as the whole network's fine-tuning."""

import copy

import numpy as np
import pytest
import torch

from experiments import finetuning_map
from experiments.finetuning_map import LOSSES, RUNS, _of_seed, augmented
from tsp_utils import init_heads, load_dataset, scale_features
from tsp_utils.backbones import load_backbone
from tsp_utils.features import extract_features
from tsp_utils.paths import shipped_records
from tsp_utils.systems.finetune import LastBlocks, finetune, train_together
from tsp_utils.systems.icbpl import ICBPLHeads

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = load_dataset("fashion-mnist", "test").images[:300]
COLORED = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, 3)  # 32 px, three channels


@pytest.fixture(scope="module")
def start():
    backbone = load_backbone("vit_nano_cpu", "cpu", dtype="float32")
    raw = extract_features(backbone, IMAGES, progress=False)
    features = scale_features(raw)
    return backbone, features, float(np.linalg.norm(features[0]) / np.linalg.norm(raw[0]))


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_trunk_and_tail_are_the_backbone(start, n):
    backbone, features, scale = start
    tail = LastBlocks(backbone, n)
    found = tail.features(tail.tokens(backbone.prepare(IMAGES)))
    np.testing.assert_allclose(found * scale, features, rtol=1e-3, atol=1e-4)


def test_one_block_learns_as_in_finetune(start):
    """The same draws, losses and steps: `finetune` with its last block is the reference."""
    backbone, features, scale = start
    heads = init_heads(features, 5, seeds=[0])
    settings = dict(scale=scale, learning_rate=3e-4, n_epochs=2, batch_size=64)
    theirs = copy.deepcopy(heads)
    tuned = finetune(backbone, theirs, IMAGES, trained="last block", **settings)
    tail, ours = LastBlocks(backbone, 1), copy.deepcopy(heads)
    tokens = tail.tokens(backbone.prepare(IMAGES))
    train_together(tail, ours, tokens, **settings)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(tail.features(tokens),
                               extract_features(tuned, IMAGES, progress=False), atol=0.02)
    assert not np.allclose(tail.features(tokens) * scale, features, atol=0.02)  # it did move


def test_frozen_moves_the_head_alone_and_the_backbone_never(start):
    backbone, features, scale = start
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    centers = init_heads(features, 5, seeds=[0, 1]).weight.detach().numpy()
    head = _of_seed(ICBPLHeads(centers, [0, 1]), 1)
    assert head.seeds == (1,) and head.weight.shape[0] == 1
    for n, moves in ((0, False), (2, True)):
        tail, own = LastBlocks(backbone, n), copy.deepcopy(head)
        tokens = tail.tokens(backbone.prepare(IMAGES))
        views = torch.stack([tail.tokens(augmented(COLORED, backbone, seed))
                             for seed in range(2)], 1)
        train_together(tail, own, tokens, views=views, scale=scale, learning_rate=1e-3,
                       n_epochs=1, batch_size=64, **LOSSES["icbpl"])
        assert not torch.equal(own.weight, head.weight)
        found = tail.features(tokens) * scale
        assert np.allclose(found, features, atol=1e-3) != moves
    after = backbone.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="resnet_nano_cpu has no 1 last blocks; pass a vision"):
        LastBlocks(load_backbone("resnet_nano_cpu", "cpu"), 1)
    with pytest.raises(ValueError, match="has no 9 last blocks"):
        LastBlocks(load_backbone("vit_nano_cpu", "cpu"), 9)


def test_views_are_other_pictures_of_the_same_image(start):
    backbone, _, _ = start
    one, other, again = (augmented(COLORED[:8], backbone, seed) for seed in (0, 1, 0))
    assert one.shape == (8, 3, 32, 32)
    torch.testing.assert_close(one, again)
    assert not torch.allclose(one, other, atol=0.1)


def test_the_records_that_ship_are_of_these_sources_and_complete():
    records = shipped_records("finetuning_map")
    assert {record["code"] for record in records} == {finetuning_map.code_of_the_map()}
    found = [(r["loss"], r["n_blocks"], r["learning_rate"], r["source"]) for r in records]
    for *cell, n_seeds in RUNS:
        assert found.count(tuple(cell)) == n_seeds
    assert all([e["epoch"] for e in r["epochs"]] == [0, 1, 2, 3] for r in records)
    assert finetuning_map.N_SEEDS == 5
