"""Fine-tuning: what is named moves and nothing else; the last blocks alone as the whole network."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import experiments.finetuning as finetuning_runs
from experiments import collapse, finetuning_map
from experiments.finetuning import head_of
from experiments.finetuning_map import LOSSES, RUNS, augmented
from tsp_utils import LinearHeads, init_heads, load_dataset, scale_features
from tsp_utils.backbones import load_backbone
from tsp_utils.features import extract_features
from tsp_utils.files.paths import shipped_records
from tsp_utils.losses import tsp_loss
from tsp_utils.neighbors import nearest_neighbors
from tsp_utils.systems.finetune import LastBlocks, finetune, train_together
from tsp_utils.systems.icbpl import ICBPLHeads

IMAGES = load_dataset("fashion-mnist", "test").images[:300]
COLORED = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, 3)  # 32 px, three channels


def vit():
    return load_backbone("vit_nano_cpu", "cpu", dtype="float32")


@pytest.fixture(scope="module")
def start():
    backbone = vit()
    raw = extract_features(backbone, IMAGES, progress=False)
    features = scale_features(raw)
    return SimpleNamespace(backbone=backbone, features=features,
                           heads=init_heads(features, 5, seeds=[0]),
                           scale=float(np.linalg.norm(features[0]) / np.linalg.norm(raw[0])))


def tuned(start, **settings):
    """A fine-tuned copy of the backbone, and of the head."""
    head = copy.deepcopy(start.heads)
    backbone = finetune(start.backbone, head, IMAGES, **dict(
        scale=start.scale, learning_rate=3e-4, n_epochs=1, batch_size=64) | settings)
    return backbone, head


def moved(before, after) -> set[str]:
    theirs = after.model.state_dict()
    return {name for name, value in before.model.state_dict().items()
            if not torch.equal(value, theirs[name])}


@pytest.fixture
def small_runs(monkeypatch, tmp_path, own_folders):
    """Both experiments on a few clothes, which write into tmp_path."""
    def load(name, split):
        return load_dataset("fashion-mnist", "test").subset(
            slice(0, 400) if split == "train" else slice(400, 480))

    arms = {"frozen": (1, dict(trained="nothing")), "sheep": (1, dict(white_sheep=True)),
            "no entropy": (1, dict(learning_rate=1e-3, entropy_weight=0.0))}
    variants = {"frozen": (1, dict(trained="nothing", n_epochs=1)), "1e-4": (1, dict(n_epochs=1))}
    for module, values in (
            (finetuning_runs, dict(load_dataset=load, N_SEEDS=1, MAP_POINTS=50, VARIANTS=variants)),
            (collapse, dict(N_EPOCHS=2, ARMS=arms, shipped_records=lambda name: [],
                            source_images=lambda: load("", "train").images[:256]))):
        for name, value in dict(values, N_IMAGES=256, bundled_dir=lambda: tmp_path).items():
            monkeypatch.setattr(module, name, value)
    (tmp_path / "readouts").mkdir()


@pytest.mark.parametrize("trained, first, others", [
    ("nothing", "", ()), ("last block", "blocks.3.", ("norm", "fc_norm")),
    ("backbone", "blocks.0.", ("",))])  # and all others
def test_what_is_named_moves_and_nothing_else(start, trained, first, others):
    backbone, head = tuned(start, trained=trained)
    assert not torch.equal(head.weight, start.heads.weight)
    names = moved(start.backbone, backbone)
    assert any(name.startswith(first) for name in names) == (trained != "nothing")
    assert all(name.startswith((first, *others)) for name in names)
    assert moved(start.backbone, vit()) == set()


def test_the_loss_falls_further_than_with_a_frozen_backbone(start):
    def loss_after(trained):
        # at a rate of 1e-3 it depends on the last digits where it ends, and so on the processor
        backbone, head = tuned(start, trained=trained, n_epochs=8)
        x = extract_features(backbone, IMAGES, progress=False) * np.float32(start.scale)
        nearest = nearest_neighbors(x, 20).indices[:, 0]
        with torch.no_grad():
            logits = head(torch.from_numpy(x))[0]
            return float(tsp_loss(logits, logits[nearest])[0])

    assert loss_after("backbone") < loss_after("nothing") - 0.1


def test_same_seed_same_result_and_read_outs_before_and_after_each_epoch(start):
    seen = []
    one, other = (tuned(start, callback=lambda epoch, *_: seen.append(epoch))[1]
                  for _ in range(2))
    assert seen == [0, 1] * 2
    torch.testing.assert_close(one.weight, other.weight)


def test_bad_input_is_one_sentence(start):
    dictionary, resnet = (load_backbone(name, "cpu") for name in ("patch_kmeans",
                                                                  "resnet_nano_cpu"))
    two = LinearHeads(np.zeros((2, 5, 128)), [0, 1])
    for ask, said in (
            (lambda: finetune(start.backbone, two, IMAGES), "2 heads would pull one backbone"),
            (lambda: tuned(start, trained="head"), "'head' cannot be trained; pass one of nothing"),
            (lambda: tuned(start, batch_size=512), "300 images are fewer than a batch of 512"),
            (lambda: finetune(dictionary, start.heads, IMAGES, trained="last block"),
             "patch_kmeans has no last block; pass a transformer"),
            (lambda: LastBlocks(resnet, 1), "resnet_nano_cpu has no 1 last blocks; pass a vision"),
            (lambda: LastBlocks(start.backbone, 9), "has no 9 last blocks")):
        with pytest.raises(ValueError, match=said):
            ask()


def test_full_runs_share_their_start_and_are_resumed(monkeypatch, tmp_path, small_runs):
    frozen, learned = records = json.loads(finetuning_runs.run_finetuning().read_text())
    assert [record["variant"] for record in records] == ["frozen", "1e-4"]
    assert frozen["epochs"][0] == learned["epochs"][0]  # the same start
    before, after = zip(*([epoch["consistency"] for epoch in record["epochs"]]
                          for record in records), strict=True)
    assert before[0] == after[0] and before[1] != after[1]
    assert (tmp_path / "readouts" / "finetuning_map.safetensors").exists()
    monkeypatch.setattr("tsp_utils.cache.entries.made_with", None)  # any run would fail
    assert json.loads(finetuning_runs.run_finetuning().read_text()) == records


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_trunk_and_tail_are_the_backbone(start, n):
    tail = LastBlocks(start.backbone, n)
    found = tail.features(tail.tokens(start.backbone.prepare(IMAGES)))
    np.testing.assert_allclose(found * start.scale, start.features, rtol=1e-3, atol=1e-4)


def test_one_block_learns_as_in_finetune(start):
    """The same draws, losses and steps: `finetune` with its last block is the reference."""
    backbone, theirs = tuned(start, trained="last block", n_epochs=2)
    tail, ours = LastBlocks(start.backbone, 1), copy.deepcopy(start.heads)
    tokens = tail.tokens(start.backbone.prepare(IMAGES))
    train_together(tail, ours, tokens, scale=start.scale, learning_rate=3e-4, n_epochs=2,
                   batch_size=64)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-2, atol=1e-3)
    found = tail.features(tokens)
    np.testing.assert_allclose(found, extract_features(backbone, IMAGES, progress=False), atol=0.02)
    assert not np.allclose(found * start.scale, start.features, atol=0.02)  # it did move


@pytest.mark.parametrize("n, moves", [(0, False), (2, True)])
def test_frozen_moves_the_head_alone_and_the_backbone_never(start, n, moves):
    centers = init_heads(start.features, 5, seeds=[0, 1]).weight.detach().numpy()
    head = head_of(ICBPLHeads(centers, [0, 1]), 1)
    assert head.seeds == (1,) and head.weight.shape[0] == 1
    tail, own = LastBlocks(start.backbone, n), copy.deepcopy(head)
    tokens = tail.tokens(start.backbone.prepare(IMAGES))
    one, other, again = (tail.tokens(augmented(COLORED, start.backbone, seed))
                         for seed in (0, 1, 0))
    assert torch.equal(one, again) and not torch.allclose(one, other, atol=0.1)
    train_together(tail, own, tokens, views=torch.stack([one, other], 1), scale=start.scale,
                   learning_rate=1e-3, n_epochs=1, batch_size=64, **LOSSES["icbpl"])
    assert not torch.equal(own.weight, head.weight)
    assert np.allclose(tail.features(tokens) * start.scale, start.features, atol=1e-3) != moves
    assert moved(start.backbone, vit()) == set()


def test_the_records_that_ship_are_of_these_sources_and_complete():
    records = shipped_records("finetuning_map")
    assert {record["code"] for record in records} == {finetuning_map.code_of_the_map()}
    found = [(r["loss"], r["n_blocks"], r["learning_rate"], r["source"]) for r in records]
    for *cell, n_seeds in RUNS:
        assert found.count(tuple(cell)) == n_seeds
    assert all([e["epoch"] for e in r["epochs"]] == [0, 1, 2, 3] for r in records)
    assert finetuning_map.N_SEEDS == 5
    assert {record["code"] for record in shipped_records("finetuning")} == {
        finetuning_runs.code_of_the_runs()}


def test_the_records_of_longer_runs_are_of_these_sources_and_start_alike():
    """Ten of the runs that `collapse` names have been made, on a GPU."""
    records = shipped_records("collapse")
    assert {record["code"] for record in records} == {collapse.code_of_the_sweep()}
    made = [(record["variant"], record["seed"]) for record in records]
    assert made == [(name, seed) for name, n in {
        "frozen": 3, "1e-4": 3, "1e-5": 3, "1e-5, lambda = 0": 1}.items() for seed in range(n)]
    for record in records:
        n_seeds, options = collapse.ARMS[record["variant"]]
        assert record["seed"] < n_seeds and record["options"] == options
        assert [e["epoch"] for e in record["epochs"]] == list(range(collapse.N_EPOCHS + 1))
    starts = {record["seed"]: record["epochs"][0] for record in records[:3]}
    assert all(record["epochs"][0] == starts[record["seed"]] for record in records)


@pytest.mark.filterwarnings("ignore:Collapse")
def test_longer_runs_take_what_ships_and_make_what_does_not(monkeypatch, tmp_path, small_runs):
    frozen, sheep, free = records = json.loads(collapse.run_collapse("vit_nano_cpu").read_text())
    assert [[epoch["epoch"] for epoch in record["epochs"]] for record in records] == [
        [0, 1, 2], [0, 1], [0, 1, 2]]  # as many steps
    assert frozen["epochs"][0] == sheep["epochs"][0] == free["epochs"][0]
    assert frozen["epochs"][-1]["consistency"] == frozen["epochs"][0]["consistency"]
    assert free["epochs"][-1]["consistency"] != free["epochs"][0]["consistency"]
    monkeypatch.setattr(collapse, "shipped_records", lambda name: records)
    monkeypatch.setattr(collapse, "_run", None)  # any run would fail
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(collapse, "code_of_the_sweep", lambda: frozen["code"])
    assert json.loads(collapse.run_collapse("vit_nano_cpu").read_text()) == records
