"""Fine-tuning: the frozen arm moves nothing, the others what they name, and the loss falls."""

import json

import numpy as np
import pytest
import torch

import experiments.finetuning as finetuning_runs
from tsp_utils import LinearHeads, init_heads, load_dataset, scale_features
from tsp_utils.backbones import load_backbone
from tsp_utils.features import extract_features
from tsp_utils.losses import tsp_loss
from tsp_utils.neighbors import nearest_neighbors
from tsp_utils.systems.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = load_dataset("fashion-mnist", "test").images[:300]


@pytest.fixture(scope="module")
def start():
    backbone = load_backbone("vit_nano_cpu", "cpu", dtype="float32")
    raw = extract_features(backbone, IMAGES, progress=False)
    features = scale_features(raw)
    scale = float(np.linalg.norm(features[0]) / np.linalg.norm(raw[0]))
    return backbone, init_heads(features, 5, seeds=[0]), features, scale


def copy_of(heads):
    copy = LinearHeads(heads.weight.detach(), heads.seeds)
    copy.bias.data = heads.bias.detach().clone()
    return copy


def moved(before, after) -> set[str]:
    theirs = after.model.state_dict()
    return {name for name, value in before.model.state_dict().items()
            if not torch.equal(value, theirs[name])}


@pytest.mark.parametrize("trained", ["nothing", "last block", "backbone"])
def test_what_is_named_moves_and_nothing_else(start, trained):
    backbone, heads, _, scale = start
    head = copy_of(heads)
    tuned = finetune(backbone, head, IMAGES, scale=scale, trained=trained, learning_rate=1e-3,
                     n_epochs=1, batch_size=64)
    assert not torch.equal(head.weight, heads.weight)
    names = moved(backbone, tuned)
    if trained == "nothing":
        assert names == set()
    elif trained == "last block":
        assert names and all(name.startswith(("blocks.3.", "norm", "fc_norm")) for name in names)
    else:
        assert {name for name in names if name.startswith("blocks.0.")}
    assert moved(backbone, load_backbone("vit_nano_cpu", "cpu", dtype="float32")) == set()


def test_the_loss_falls_further_than_with_a_frozen_backbone(start):
    backbone, heads, features, scale = start

    def loss_after(trained):
        head = copy_of(heads)
        # at 1e-3 it depends on the last digits where it ends, and so on the processor
        tuned = finetune(backbone, head, IMAGES, scale=scale, trained=trained, learning_rate=3e-4,
                         n_epochs=8, batch_size=64)
        x = extract_features(tuned, IMAGES, progress=False) * np.float32(scale)
        nearest = nearest_neighbors(x, 20).indices[:, 0]
        with torch.no_grad():
            logits = head(torch.from_numpy(x))[0]
            return float(tsp_loss(logits, logits[nearest])[0])

    assert loss_after("backbone") < loss_after("nothing") - 0.1


def test_same_seed_same_result_and_read_outs_before_and_after_each_epoch(start):
    backbone, heads, _, scale = start
    seen, weights = [], []
    for _ in range(2):
        head = copy_of(heads)
        finetune(backbone, head, IMAGES, scale=scale, n_epochs=2, batch_size=64,
                 callback=lambda epoch, *_: seen.append(epoch))
        weights.append(head.weight.detach().clone())
    assert seen == [0, 1, 2] * 2
    torch.testing.assert_close(weights[0], weights[1])


def test_bad_input_is_one_sentence(start):
    backbone, heads, _, _ = start
    with pytest.raises(ValueError, match="2 heads would pull one backbone"):
        finetune(backbone, LinearHeads(np.zeros((2, 5, 128)), [0, 1]), IMAGES)
    with pytest.raises(ValueError, match="'head' cannot be trained; pass one of nothing"):
        finetune(backbone, heads, IMAGES, trained="head")
    with pytest.raises(ValueError, match="300 images are fewer than a batch of 512"):
        finetune(backbone, heads, IMAGES, batch_size=512)


def test_full_runs_share_their_start_and_are_resumed(monkeypatch, tmp_path):
    def load(name, split):
        return load_dataset("fashion-mnist", "test").subset(
            slice(0, 400) if split == "train" else slice(400, 600))

    for name, value in dict(load_dataset=load, N_IMAGES=300, N_SEEDS=1, MAP_POINTS=50,
                            bundled_dir=lambda: tmp_path).items():
        monkeypatch.setattr(finetuning_runs, name, value)
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(finetuning_runs, "VARIANTS", {
        "frozen": (1, dict(trained="nothing", n_epochs=1)), "1e-4": (1, dict(n_epochs=1))})
    (tmp_path / "readouts").mkdir()
    records = json.loads(finetuning_runs.run_finetuning().read_text())
    assert [r["variant"] for r in records] == ["frozen", "1e-4"]
    assert records[0]["epochs"][0] == records[1]["epochs"][0]  # the same start
    assert records[0]["epochs"][0]["consistency"] == records[0]["epochs"][1]["consistency"]
    assert records[1]["epochs"][0]["consistency"] != records[1]["epochs"][1]["consistency"]
    assert (tmp_path / "readouts" / "finetuning_map.safetensors").exists()
    monkeypatch.setattr("tsp_utils.cache.entries.made_with", None)  # any run would fail
    again = json.loads(finetuning_runs.run_finetuning().read_text())
    assert again == records
