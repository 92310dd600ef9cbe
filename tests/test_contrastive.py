"""Pretraining by contrast: the loss by a loop, views that belong together, runs that learn."""

import inspect
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from experiments import arms, contrastive
from experiments.arms import ARMS, Arm, encode, pretrain_arm
from experiments.contrastive import (
    Contrastive,
    ContrastiveRecipe,
    nt_xent,
    pretrain_contrastive,
)
from experiments.what_ships import VECTOR_BACKBONES
from tests.test_arms import images_of, some_rate
from tsp_utils.backbones import load_backbone
from tsp_utils.datasets import load_dataset
from tsp_utils.neighbors import knn_accuracy
from tsp_utils.study.profile import load_study
from tsp_utils.study.rungs import consistency

TINY = ContrastiveRecipe(options=(("layers", (1, 1, 1, 1)), ("channels", (8, 12, 16, 24))), size=16,
                         batch_size=16, hidden=32, n_outputs=16, learning_rate=0.1)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)


def test_the_loss_is_simclrs_eq_1_by_a_float64_loop():
    z = np.random.default_rng(0).normal(size=(2, 5, 7))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    flat, terms = z.reshape(10, 7), []
    for i in range(10):
        others = [j for j in range(10) if j != i]
        partner = others.index((i + 5) % 10)
        terms.append(-log_softmax(flat[others] @ flat[i] / 0.2)[partner])
    assert nt_xent(torch.tensor(z), 0.2).item() == pytest.approx(np.mean(terms), rel=1e-9)


def test_the_two_views_of_an_image_stand_a_batch_apart_and_each_is_drawn(monkeypatch):
    """Without crops, flips and colours both views are the image itself."""
    alike = Contrastive(np.repeat(IMAGES[:1], 16, axis=0), TINY)
    assert len({view.numpy().tobytes() for view in alike.views(alike.batch())}) == 32
    monkeypatch.setattr(contrastive, "random_colors", lambda x, *_: x)
    monkeypatch.setattr(contrastive, "random_crops",
                        lambda x, size, scale, generator: x[..., :size, :size])
    run = Contrastive(IMAGES, TINY)
    batch = run.batch()
    one, other = run.views(batch).chunk(2)
    assert torch.equal(one, other) and one.shape == (16, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (TINY.mean, TINY.std))
    torch.testing.assert_close(one[3] * std + mean, batch[3, :, :16, :16] / 255)


def test_an_epoch_shows_every_image_once_in_another_order():
    run, batches = Contrastive(IMAGES[:32], TINY), []
    for run.step_count in range(4):
        batches += [image.permute(1, 2, 0).numpy().tobytes() for image in run.batch()]
    assert batches[:32] != batches[32:]
    assert set(batches[:32]) == set(batches[32:]) == {image.tobytes() for image in IMAGES[:32]}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_rate_rises_and_falls_and_norms_do_not_decay(optimizer):
    run = Contrastive(IMAGES, replace(TINY, optimizer=optimizer, warmup=0.1, weight_decay=0.01))
    rates = []
    for progress in (0.0, 0.05, 0.1, 0.55, 1.0):
        run.step(progress)
        rates.append(run.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.05, 0], atol=1e-9)
    kernels, others = run.optimizer.param_groups
    assert (kernels["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert {p.ndim for p in others["params"]} == {1} and len(kernels["params"]) > 10


def test_its_own_network_is_known_without_another_import():
    code = "import timm, experiments.contrastive; timm.create_model('small_resnet')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_toy_run_learns_without_labels():
    assert "labels" not in inspect.signature(pretrain_contrastive).parameters
    data = load_dataset("fashion-mnist", "test").subset(slice(0, 3000))
    images = np.repeat(np.pad(data.images, ((0, 0), (2, 2), (2, 2), (0, 0))), 3, axis=3)
    recipe = replace(TINY, options=(("layers", (1, 1, 1, 1)), ("channels", (16, 24, 32, 48))),
                     batch_size=100, temperature=0.2)

    def knn(run):
        return knn_accuracy(encode(run, images[::2]), data.labels[::2])

    untrained = knn(Contrastive(images, recipe))
    run = pretrain_contrastive(images, recipe, budget_images=6_000, n_reports=4)
    assert knn(run) > untrained + 0.03
    assert run.log[-1]["loss"] < run.log[0]["loss"] < math.log(199)
    assert [entry["images_seen"] for entry in run.log] == [1500, 3000, 4500, 6000]


def test_a_seed_gives_the_same_weights_and_looking_changes_nothing():
    def weights(seed, **options):
        run = pretrain_contrastive(IMAGES, TINY, budget_images=48, seed=seed, **options)
        return torch.cat([v.detach().float().flatten() for v in run.backbone.state_dict().values()])

    plain = weights(0)
    looked = weights(0, n_reports=3, callback=lambda run, entry: encode(run, IMAGES))
    assert torch.equal(plain, looked) and not torch.equal(plain, weights(1))


def test_an_unknown_optimizer_is_refused():
    """What else is refused, `trainer.py` refuses, and DINO's tests hold."""
    with pytest.raises(ValueError, match="unknown optimizer 'adam': pass sgd or adamw"):
        Contrastive(IMAGES, replace(TINY, optimizer="adam"))


def test_an_arm_by_contrast_leaves_weights_that_load_and_a_log(monkeypatch, tmp_path):
    for place in ("experiments.arms", "tsp_utils.networks.registry"):
        monkeypatch.setattr(f"{place}.runs_dir", lambda: tmp_path)
    monkeypatch.setattr(arms, "load_dataset", images_of)
    monkeypatch.setattr(arms, "matrix_rate", some_rate)
    monkeypatch.setitem(ARMS, "tiny", Arm(TINY, ("cifar10",), 320))
    folder = pretrain_arm("tiny")
    assert {path.name for path in folder.iterdir()} == {
        "log.json", *(f"{m}.safetensors" for m in ("start", "quarter", "half", "final"))}
    log = json.loads((folder / "log.json").read_text())
    assert log["images_seen"] == 320 and "SimCLR" in log["method"] and log["gflop_per_image"] > 0
    run = pretrain_contrastive(images_of("cifar10", "train").images, TINY, budget_images=320)
    features = load_backbone("tiny")(IMAGES[:4])
    torch.testing.assert_close(torch.from_numpy(encode(run, IMAGES[:4])), features,
                               rtol=0.02, atol=0.02)  # the weights were written in fp16
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(arms.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(arms.dist, "get_rank", lambda: 0)
    with pytest.raises(ValueError, match="without torchrun"):
        pretrain_arm("tiny")


def test_the_resnets_by_contrast_differ_in_images_alone_and_the_vit_in_its_optimiser():
    contrasted = {name: arm for name, arm in ARMS.items()
                  if isinstance(arm.recipe, ContrastiveRecipe)}
    long, short = (contrasted.pop("resnet_contrast_cifar10_long"),
                   contrasted["resnet_contrast_cifar10"])
    assert long.data == short.data and long.budget_images > 2 * short.budget_images
    assert replace(long.recipe, temperature=short.recipe.temperature) == short.recipe
    assert len({arm.budget_images for arm in contrasted.values()}) == 1 < len(contrasted)
    vit = contrasted.pop("vit_contrast").recipe
    (resnet,) = {arm.recipe for arm in contrasted.values()}
    assert {name for name, value in vars(vit).items() if value != getattr(resnet, name)} == {
        "architecture", "options", "optimizer", "learning_rate", "weight_decay", "warmup"}
    assert (vit.options, resnet.options) == (ARMS["vit_mini"].recipe.options,
                                             ARMS["resnet_mini"].recipe.options)


def test_the_network_by_contrast_stands_above_all_others_that_ship():
    """Label consistency@20 of CIFAR-10's test images, from the vectors."""
    study = load_study("offline")
    found = {name: consistency(study.features("cifar10", name)) for name in VECTOR_BACKBONES}
    best = found.pop("resnet_contrast_cifar10")
    assert len(found) >= 7 and best > max(found.values()) + 10
