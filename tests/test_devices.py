"""Placement, waits and number formats of a GPU, as far as a CPU can show them.

`simulated_device` computes on the CPU, refuses what CUDA refuses and counts what a GPU waits for.
"""

import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import two_processes
from simulated_device import Device
from test_pretrain import IMAGES, TINY
from toys import CENTERS, FEATURES, NEIGHBORS

import experiments.extract
from tsp_utils import backbones, cache, features, init_heads, nearest_neighbors
from tsp_utils import train_heads as train
from tsp_utils.backbones import load_backbone
from tsp_utils.datasets import ImageDataset
from tsp_utils.heads import LinearHeads
from tsp_utils.k_means import _kmeans_on, _lloyd
from tsp_utils.losses import tsp_loss
from tsp_utils.neighbors import METRICS
from tsp_utils.pretraining.dino import Dino
from tsp_utils.pretraining.multi_crop import constant
from tsp_utils.systems.finetune import finetune
from tsp_utils.systems.rivals import RIVALS, train_rival

pytestmark = pytest.mark.usefixtures("one_thread")


def more_waits(work, few, many) -> Counter:
    """How much oftener the device waits in many steps than in few."""
    found = []
    for steps in (few, many):
        with Device() as device:
            work(steps)
        assert device.waits, "nothing came to the device"
        found.append(device.waits)
    found[1].subtract(found[0])
    return +found[1]


def train_heads(batch_size, epochs=2, device="sim", **settings):
    heads = init_heads(FEATURES, 5, [0, 1], centers=CENTERS)
    train(heads, FEATURES, NEIGHBORS, max_epochs=epochs, min_steps=0, batch_size=batch_size,
          device=device, progress=False, **settings)
    return heads


def test_a_step_of_the_heads_waits_for_nothing_and_an_epoch_for_its_rows_and_curves():
    assert not more_waits(train_heads, 300, 50)  # 2 and 12 steps an epoch
    assert more_waits(lambda epochs: train_heads(300, epochs), 2, 3) == {
        "to the device": 1, "from the device": 5}
    with Device():
        there = train_heads(50)
    assert torch.equal(there.weight, train_heads(50, device="cpu").weight)


PLANTED = {
    "item": lambda p: p.sum().item(),
    "cpu": lambda p: p.cpu(),
    "if": lambda p: p.sum() if p.sum() > 0 else 0,
    "mask": lambda p: p[p > 0.5],
    "nonzero": lambda p: (p > 0.5).nonzero(),
    "a constant of the host": lambda p: p * torch.tensor([2.0], device=p.device),
}


def planted(wait):
    def loss(own, others):
        wait(own.detach().softmax(-1))
        return tsp_loss(own, others)
    return loss


@pytest.mark.parametrize("wait", PLANTED.values(), ids=PLANTED)
def test_what_waits_in_a_step_is_seen(wait):
    more = more_waits(lambda size: train_heads(size, loss=planted(wait)), 300, 150)
    assert sum(more.values()) == 2 * (4 - 2)  # epochs, steps


def test_a_tensor_of_the_host_among_those_of_the_device_is_refused():
    with Device(), pytest.raises(RuntimeError, match="tensor of the CPU among"):
        train_heads(300, loss=planted(lambda p: p + torch.ones(5)))


@pytest.mark.parametrize("method", RIVALS)
def test_a_step_of_a_rival_waits_for_nothing(method):
    def run(n_steps):
        return train_rival(method, FEATURES, NEIGHBORS, CENTERS, [0, 1], n_steps=n_steps,
                           batch_size=50, device="sim", progress=False)

    assert not more_waits(run, 1, 12)  # one epoch


def test_k_means_reads_back_whether_it_stands_at_every_tenth_iteration():
    start = CENTERS[0]

    def run(n):  # never stands
        _lloyd(torch.as_tensor(FEATURES, device="sim"), torch.as_tensor(start, device="sim"), -1, n)

    assert not more_waits(run, 1, 9)
    assert more_waits(run, 9, 40) == {"aten::_local_scalar_dense": 4}
    with Device():
        there = _kmeans_on("sim", FEATURES, 5, [0, 1], n_init=2)
    np.testing.assert_array_equal(there.centers,
                                  _kmeans_on("cpu", FEATURES, 5, [0, 1], n_init=2).centers)


def test_clusters_without_samples_take_the_farthest_in_turn():
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    start = torch.tensor([[50.0], [1.0], [60.0]])  # only the second has any; 9 is farthest, then 0
    centers, *_ = _lloyd(x, start, -1.0, max_iter=1)  # or 2, which is as far
    assert centers[0] == 9 and centers[1] == 3 and centers[2] in (0, 2)


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_of_the_device_are_faisss(metric):
    """9,000 samples: two blocks of products."""
    x = np.random.default_rng(0).standard_normal((9_000, 6)).astype(np.float32) + 0.5
    with Device() as device:
        there = nearest_neighbors(x, 20, metric, device="sim")
    here = nearest_neighbors(x, 20, metric)
    assert device.waits == {"to the device": 1, "from the device": 2}
    same = there.indices == here.indices  # but for equals that float32 orders by its last digit
    assert same.mean() > 1 - 1e-4
    np.testing.assert_allclose(there.distances[same], here.distances[same], rtol=1e-5)
    points = x.astype(np.float64)
    if metric == "cosine":
        points /= np.linalg.norm(points, axis=1, keepdims=True)

    def compared(found):  # what the search ordered by, in float64
        near = points[found.indices]
        if metric == "euclidean":
            return np.linalg.norm(points[:, None] - near, axis=2)
        return (points[:, None] * near).sum(2)

    np.testing.assert_allclose(compared(there), compared(here), rtol=1e-5, atol=1e-6)


def test_neighbours_of_the_device_are_searched_again_where_float32_cannot_tell_them_apart():
    x = FEATURES[:300] + np.float32(1e4)
    with Device():
        there = nearest_neighbors(x, 5, "euclidean", device="sim")
    here = nearest_neighbors(x, 5, "euclidean")
    np.testing.assert_array_equal(there.indices, here.indices)
    np.testing.assert_array_equal(there.distances, here.distances)


def at_once(*_):
    """In place of a pool: a dispatch mode is of one thread."""
    return nullcontext(SimpleNamespace(submit=lambda function, *arguments: SimpleNamespace(
        result=lambda: function(*arguments))))


@pytest.fixture
def extracting(monkeypatch):
    """Extraction in one thread, and without inference mode, which tensors of a test cannot take."""
    monkeypatch.setattr(features, "ThreadPoolExecutor", at_once)
    monkeypatch.setattr(backbones.Backbone, "encode",
                        torch.no_grad()(backbones.Backbone.encode.__wrapped__))


def network_there(name="vit_nano_cpu"):
    backbone = load_backbone(name, "cpu", dtype="float32")
    return backbones.Backbone(backbone.spec, backbone.model, torch.device("sim", 0), torch.float32)


@pytest.mark.parametrize("name", ["vit_nano_cpu", "resnet_nano_cpu", "patch_kmeans", "pixels"])
def test_extraction_brings_a_batch_there_and_its_vectors_back(name, extracting):
    here = features.extract_features(load_backbone(name, "cpu", dtype="float32"), IMAGES, 8, False)

    def run(n):
        found = features.extract_features(network_there(name), IMAGES[:n], 8, progress=False)
        np.testing.assert_allclose(found, here[:n], rtol=1e-3, atol=1e-4)

    more = more_waits(run, 16, 40)
    constants = 0 if name == "pixels" else 2  # mean and std
    assert more == {"to the device": 3 * (1 + constants), "from the device": 3}


def test_a_step_of_fine_tuning_brings_its_images_there_and_reads_nothing_back(extracting):
    def run(batch_size):
        head = LinearHeads(np.zeros((1, 5, 128), np.float32), [0])
        finetune(network_there(), head, IMAGES, n_epochs=1, batch_size=batch_size, n_neighbors=5)

    assert more_waits(run, 20, 10) == {"to the device": 3 * (4 - 2)}  # and mean and std


@pytest.mark.parametrize("recipe", [TINY, replace(TINY, head_norm=True)])
def test_a_step_of_dino_waits_for_nothing_and_an_epoch_for_its_order(recipe, monkeypatch):
    here = Dino(IMAGES, recipe)
    expected = [float(here.step(0.3)) for _ in range(4)]
    constant.cache_clear()
    generator = torch.Generator
    with Device() as device:
        with monkeypatch.context() as patch:  # random numbers of the device are the CPU's here
            patch.setattr(torch, "Generator", lambda device="cpu": generator())
            run = Dino(IMAGES, recipe, device="sim")
        losses = [run.step(0.3)]
        device.waits.clear()  # constants of the crops, copied there once a process
        losses += [run.step(0.3)]
        assert run.step_count == len(IMAGES) // TINY.batch_size and not device.waits
        losses += [run.step(0.3), run.step(0.3)]  # the next epoch
        assert device.waits == {"to the device": 1}
        np.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=1e-4)
    constant.cache_clear()


@pytest.mark.parametrize(("bf16", "dtype", "expected"), [
    (True, "auto", torch.bfloat16), (False, "auto", torch.float32),
    (True, "float32", torch.float32), (False, "bfloat16", torch.bfloat16)])
def test_a_gpu_without_bfloat16_computes_in_float32(bf16, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    network = load_backbone("vit_mini_random", "auto", dtype=dtype)
    assert network.dtype == expected and network.device == torch.device("cuda")
    assert load_backbone("patch_kmeans", "cuda:1").dtype == torch.float32  # at all times
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert [cache.hardware(name) for name in ("cuda", "cuda:1")] == [
        "name of cuda", "name of cuda:1"]
    assert "CPU cores" in cache.hardware("cpu")


def test_under_bfloat16_vectors_weights_gradients_and_centre_stay_in_float32():
    network, seen = load_backbone("vit_nano_cpu", "cpu", dtype="bfloat16"), []
    network.model.blocks[0].attn.qkv.register_forward_hook(
        lambda module, given, found: seen.append((module.weight.dtype, found.dtype)))
    assert network(IMAGES[:4]).dtype == torch.float32
    assert seen == [(torch.float32, torch.bfloat16)]
    run = Dino(IMAGES, TINY, dtype=torch.bfloat16)
    assert run.step(0.3).dtype == torch.float32 and run.last_teacher.dtype == torch.bfloat16
    kept = [run.center, *run.student.parameters(), *run.teacher.parameters(),
            *(p.grad for p in run.student.parameters() if p.grad is not None)]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def _extract(rank, folder):
    os.environ |= {"TSP_CACHE": str(folder / "two"), "RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1"}
    asked, kept = [], features.cached_features
    experiments.extract.cached_features = lambda network, images, *others, **named: (
        asked.append(len(images)), kept(network, images, *others, **named))[1]
    for n, port in zip((150, 20), (folder / "ports").read_text().split(), strict=True):
        os.environ["MASTER_PORT"] = port
        experiments.extract.load_dataset = lambda *_, n=n: toy(n)
        experiments.extract.extract("toy", "test", "vit_pico_cpu", batch_size=32)
    return asked


def toy(n):
    images = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), np.uint8)
    return ImageDataset("toy", "test", images)


def test_two_processes_extract_their_shares_and_the_same_bytes_as_one(tmp_path):
    """Five batches, and then one, which leaves nothing for the second process."""
    first = 29_500 + 2 * (os.getpid() % 500)
    (tmp_path / "ports").write_text(f"{first} {first + 1}")
    with two_processes() as both:
        assert list(both.map(_extract, range(2), [tmp_path] * 2)) == [[86, 150, 20, 20], [64]]
    network = load_backbone("vit_pico_cpu", "cpu")
    (rows,) = (tmp_path / "two" / "features").glob("*.f32")
    for n in (150, 20):
        alone, both = (features.cached_features(network, toy(n), folder, 32, progress=False)
                       for folder in (tmp_path / "one", rows.parent))
        assert both.tobytes() == alone.tobytes()
    assert rows.stat().st_size == 170 * 64 * 4  # and nothing was made twice
