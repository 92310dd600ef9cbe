"""The arms: fair by the rules, made by one command, resumed, read back; and their read-outs."""

import json
import math
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from processes import two_processes
from scipy.linalg import eigh
from sklearn.neighbors import NearestNeighbors
from torch.utils.flop_counter import FlopCounterMode
from toys import made_of, three_blobs

import experiments.arms as arms
import experiments.dictionary_arms as dictionary_arms
import experiments.invariant_arms as invariant_arms
from experiments.arms import ARMS, Arm, arm_images, find_arm, gflop_per_image, pretrain_arm
from experiments.dictionary_arms import DICTIONARY_ARMS, learn_dictionary_arms
from experiments.invariant_arms import RIDGES, learn_invariant_arms, learn_with_a_chosen_ridge
from tsp_utils.backbones import BackboneSpec
from tsp_utils.datasets import ImageDataset
from tsp_utils.files.paths import REPOSITORY, shipped_records
from tsp_utils.networks.weights import load_model
from tsp_utils.pretraining.dino import Dino, DinoRecipe, schedule
from tsp_utils.pretraining.invariant import activations_of_views, learn_filters
from tsp_utils.study.frozen_evaluation import balanced_rows, read_out, small_pool_consistency
from tsp_utils.study.profile import load_study

TINY = DinoRecipe(options=(("patch_size", 8), ("img_size", 32), ("dynamic_img_size", True),
                           ("embed_dim", 32), ("depth", 1), ("num_heads", 2)),
                  n_local=2, batch_size=16, n_outputs=64, hidden=32, bottleneck=16, head_norm=True)


def images_of(name, split, *_, **__) -> ImageDataset:
    """40 images of 4 classes; another seed a set and split."""
    rng = np.random.default_rng(sum(map(ord, name + split)))
    return ImageDataset(name, split, rng.integers(0, 256, (40, 32, 32, 3), np.uint8),
                        np.arange(40) % 4, tuple("abcd"))


@pytest.fixture
def small_world(monkeypatch, own_folders):
    monkeypatch.setattr(arms, "load_dataset", images_of)
    monkeypatch.setitem(ARMS, "tiny", Arm(TINY, ("cifar10",), 320))


@pytest.fixture
def few_steps(monkeypatch):
    """Read-outs whose heads train little."""
    monkeypatch.setattr("tsp_utils.study.frozen_evaluation.load_study",
                        lambda name: load_study(f"{name} max_epochs=1 min_steps=10"))


def cost(recipe: DinoRecipe) -> tuple[int, int]:
    """Parameters and forward FLOPs for one 32-px image, by torch's own counter."""
    with torch.device("meta"):
        network = timm.create_model(recipe.architecture, num_classes=0, **dict(recipe.options))
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32, device="meta"))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


@pytest.mark.parametrize("size", ["MINI", "NANO", "NANO_CPU"])
def test_parity_of_vit_and_resnet(size):
    """The rules: parameters within 10 %, FLOPs within 25 %, and the recipe is the same."""
    vit, resnet = getattr(arms, size), getattr(arms, f"RESNET_{size}")
    (vit_parameters, vit_flops), (parameters, flops) = cost(vit), cost(resnet)
    assert abs(parameters / vit_parameters - 1) < 0.10
    assert abs(flops / vit_flops - 1) < 0.25
    assert replace(resnet, architecture=vit.architecture, options=vit.options) == vit


@pytest.mark.parametrize("arm", ["vit_mini", "resnet_mini", "vit_nano", "resnet_nano",
                                 "vit_nano_cpu", "vit_pico_cpu", "resnet_nano_cpu",
                                 "vits16_cifar10"])
def test_every_recipe_takes_steps(arm):
    """At its own crops and network, with a small batch and head: the learned weights move."""
    recipe = replace(ARMS[arm].recipe, batch_size=2, n_outputs=64, hidden=32, warmup=0.0)
    run = Dino(images_of("cifar10", "train").images[:4], recipe)
    before = [p.clone() for p in run.student.backbone.parameters()]
    assert torch.isfinite(run.step(0.3))
    if "resnet" in arm:  # a branch that starts at zero lets what is in it move a step later
        run.step(0.6)
    moved = [not torch.equal(a, b)
             for a, b in zip(before, run.student.backbone.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_the_stem_keeps_the_resolution():
    network = timm.create_model("small_resnet", num_classes=0, layers=(1, 1, 1, 1),
                                channels=(8, 16, 24, 32))
    assert network.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 32, 4, 4)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 32)
    with pytest.raises(ValueError, match="no published weights"):
        timm.create_model("small_resnet", pretrained=True)


def test_arms_of_a_size_see_the_same_number_of_images():
    for start, budget in (("vit_mini", ARMS["vit_mini"].budget_images), ("vit_nano", 512_000),
                          ("resnet_nano", 512_000), ("vit_pico_cpu", 512_000)):
        assert {arm.budget_images for name, arm in ARMS.items() if name.startswith(start)
                and not name.endswith(("_short", "_epochs"))} == {budget}
    assert ARMS["vit_mini_short"].budget_images == 512_000
    # equal epochs: as often over its images as the source's arm over its 100,000
    for name, n_images in (("cifar10_4k", 4_000), ("cifar10_12k", 12_500),
                           ("cpu_cifar10_4k", 4_000)):
        budget = ARMS[f"vit_nano_{name}_epochs"].budget_images
        assert budget / n_images == pytest.approx(512_000 / 100_000, rel=0.01)
    assert {ARMS[f"resnet_nano{s}"].seed for s in ("", "_s1", "_s2")} == {0, 1, 2}
    # and the dictionaries' have the ratios of the rules
    for name, data, n_images in (
            ("source", "tinyimagenet32", None), ("target 4,000", "cifar10", 4_000),
            ("target 12,500", "cifar10", 12_500), ("target 50,000", "cifar10", None)):
        arm, fewer = DICTIONARY_ARMS[name]
        assert (ARMS[arm].data[0], ARMS[arm].n_images, fewer) == (data, n_images, 1)
    assert DICTIONARY_ARMS["target 4,000, equal epochs"] == (DICTIONARY_ARMS["target 4,000"][0], 25)
    with pytest.raises(ValueError, match="'vit_nan' is not known; the nearest one is 'vit_nano'"):
        find_arm("vit_nan")


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items()
                                  if isinstance(arm.recipe, DinoRecipe)])
def test_no_teacher_keeps_its_random_start(name):
    """Eq. 2 leaves the product of the momenta of the starting weights in the exported teacher."""
    arm = ARMS[name]
    n_steps = arm.budget_images // arm.recipe.batch_size
    left = math.prod(schedule(arm.recipe, step / n_steps)["momentum"] for step in range(n_steps))
    assert left < 0.02 and n_steps >= 80


def test_subsets_are_drawn_once_without_labels_and_lie_in_one_another(small_world):
    base = Arm(TINY, ("cifar10",), 1)
    few, more, everything = (arm_images(replace(base, n_images=n)) for n in (8, 20, None))
    assert few.shape == (8, 32, 32, 3) and len(everything) == 40
    rows = {image.tobytes() for image in more}
    assert {image.tobytes() for image in few} < rows <= {i.tobytes() for i in everything}
    assert np.array_equal(few, arm_images(replace(base, n_images=8, seed=5)))
    union = arm_images(replace(base, data=("tinyimagenet32", "cifar10")))
    assert len(union) == 80 and np.array_equal(union[40:], everything)


MARKS = ["final.safetensors", "half.safetensors", "quarter.safetensors"]


def some_rate(*_) -> float:
    """In place of `matrix_rate`, which multiplies for seconds."""
    return 1e3


def test_an_arm_leaves_weights_and_a_log_and_is_trained_once(small_world, tmp_path, monkeypatch):
    fused = timm.layers.use_fused_attn()
    folder = pretrain_arm("tiny", tmp_path / "tiny")
    assert timm.layers.use_fused_attn() == fused  # a choice for the process, put back
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.pt", "log.json", "start.safetensors", *MARKS}
    log = json.loads((folder / "log.json").read_text())
    assert log["images_seen"] == 320 and log["n_source_images"] == 40
    assert log["source"] == "cifar10, train split, all images"
    assert log["images_per_second, read-outs included"] > 0
    assert log["gflop_per_image"] > 0 and 0 < log["share_of_the_matrix_rate"] < 1
    assert all(0 <= entry["knn_tinyimagenet_val"] <= 100 for entry in log["log"])
    written = [(folder / mark).read_bytes() for mark in MARKS]
    assert len(set(written)) == 3

    start = safetensors.torch.load_file(folder / "start.safetensors")
    teacher = Dino(images_of("cifar10", "train").images, TINY).teacher.backbone
    torch.testing.assert_close(start, dict(teacher.half().state_dict()), rtol=0, atol=0)
    spec = BackboneSpec("tiny", "vit_tiny_patch16_224", dict(TINY.options), "bundled")
    network = load_model(spec, folder / "final.safetensors").eval()
    run = torch.load(folder / "checkpoint.pt", weights_only=True)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, run["teacher"][f"backbone.{key}"], rtol=1e-3, atol=1e-4)

    monkeypatch.setattr("tsp_utils.pretraining.dino.Dino.step", None)  # any step would fail
    monkeypatch.setattr(arms, "matrix_rate", some_rate)
    pretrain_arm("tiny", folder)
    assert [(folder / mark).read_bytes() for mark in MARKS] == written


def _one_of_two(rank, folder, port):
    """What torchrun does: the same command in two processes that find each other."""
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    arms.load_dataset, arms.matrix_rate = images_of, some_rate
    ARMS["tiny"] = Arm(TINY, ("cifar10",), 64)
    pretrain_arm("tiny", folder)


def test_two_processes_of_torchrun_make_one_arm(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with two_processes() as both:
        list(both.map(_one_of_two, range(2), [tmp_path] * 2, [port] * 2))
    assert {path.name for path in tmp_path.iterdir()} == {"log.json", "start.safetensors", *MARKS}
    assert json.loads((tmp_path / "log.json").read_text())["images_seen"] == 64  # not 64 each


def test_a_missing_quarter_is_not_filled_later(small_world, tmp_path, monkeypatch, caplog):
    def stop(self, run):
        if run.images_seen >= 240:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(arms, "matrix_rate", some_rate)
    trained = arms.pretrain_dino
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(arms.KnnReadout, "__call__", stop)
        patched.setattr(arms, "pretrain_dino", lambda *a, **k: trained(*a, **k, save_every_s=0))
        pretrain_arm("tiny", tmp_path)
    (tmp_path / "quarter.safetensors").unlink()
    pretrain_arm("tiny", tmp_path)
    assert not (tmp_path / "quarter.safetensors").exists() and "is gone" in caplog.text
    assert (tmp_path / "half.safetensors").exists()


def test_networks_of_a_size_of_their_own_see_images_at_that_size():
    recipe = replace(TINY, options=(("patch_size", 8), ("img_size", 64), *TINY.options[2:]))
    run = Dino(images_of("cifar10", "train").images, recipe)
    seen = []
    run.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(list(inputs[0].shape)))
    assert arms.encode(run, images_of("cifar10", "test").images).shape == (40, 32)
    assert seen == [[40, 3, 64, 64]]


def test_the_operations_of_an_image_are_about_the_arithmetics_and_a_real_steps():
    """Estimates made without a counter: docs' for ViT-S; ViT-Ti's by hand, two a product.

    416 tokens count (teacher 2 x 37 once, student 2 x 37 and 4 x 10 three times), each 12 blocks
    of 12 x 192^2 products (4.42 GFLOP) and attention (0.11); 20 views pass a head of 2.56 M (0.10).
    """
    for name, expected in (("vit_mini", 4.63), ("vits16_cifar10", 115)):
        assert gflop_per_image(ARMS[name]) == pytest.approx(expected, rel=0.05)
    run = Dino(images_of("cifar10", "train").images, TINY)
    with FlopCounterMode(display=False) as counted:
        run.step(0.5)  # which has crops and the loss, too
    a_step = counted.get_total_flops() / TINY.batch_size / 1e9
    assert gflop_per_image(Arm(TINY, ("cifar10",), 320)) == pytest.approx(a_step, rel=0.1)


def same_labels_by_scikit_learn(found, k) -> float:
    """Percent of the k nearest neighbours that have the sample's own label."""
    index = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(found.features)
    near = index.kneighbors(found.features, return_distance=False)[:, 1:]
    return 100 * (found.labels[near] == found.labels[:, None]).mean()


def test_read_out_of_separable_and_of_shuffled_labels(few_steps, own_folders):
    found = three_blobs(noise=0.5)
    record = read_out(found, n_seeds=2)
    assert record["head"]["acc"] == record["k-means"]["acc"] == [100.0, 100.0]
    assert record["knn_leave_one_out"] == 100 and record["n"] == 300
    shuffled = made_of(found.features, np.random.default_rng(1).permutation(found.labels))
    record = read_out(shuffled, n_seeds=2)
    assert [record["consistency"][str(k)] for k in (1, 5, 20)] == pytest.approx(
        [same_labels_by_scikit_learn(shuffled, k) for k in (1, 5, 20)], abs=0.01)
    assert max(record["head"]["acc"]) < 60


def test_dictionaries_are_learned_once_and_written_whole(small_world, few_steps, tmp_path,
                                                         monkeypatch):
    settings = dict(n_atoms=8, n_patches=2_000, n_features=4, n_pca_images=40)
    two = {name: DICTIONARY_ARMS[name] for name in ("source", "target 4,000, equal epochs")}
    for name, value in dict(load_dataset=images_of, SETTINGS=settings, DICTIONARY_ARMS=two,
                            bundled_dir=lambda: tmp_path / "bundled").items():
        monkeypatch.setattr(dictionary_arms, name, value)
    path = learn_dictionary_arms(n_seeds=2, n_heads=2)
    records, before = json.loads(path.read_text()), path.read_bytes()
    assert [record["settings"]["n_patches"] for record in records] == [2_000, 2_000, 80, 80]
    assert all(len(record["head"]["acc"]) == 2 for record in records)
    assert records[0]["head"] != records[1]["head"]  # seeds are runs of their own
    monkeypatch.setattr(dictionary_arms, "arm_images", None)  # any learning would fail
    assert learn_dictionary_arms(n_seeds=2, n_heads=2).read_bytes() == before


def test_invariant_arms_draw_their_images_anew_and_are_learned_once(small_world, few_steps,
                                                                     tmp_path, monkeypatch):
    settings = dict(n_atoms=4, n_patches=2_000, n_features=4, n_views=120)
    learned_from = []
    for name, value in dict(load_dataset=images_of, SETTINGS=settings, bundled_dir=lambda: tmp_path,
                            INVARIANT_ARMS={"source 30": (30, 0, 2), "union": (10, 30, 1)},
                            learn_with_a_chosen_ridge=lambda images, **kwargs: learned_from.append(
                                images) or learn_with_a_chosen_ridge(images, **kwargs)).items():
        monkeypatch.setattr(invariant_arms, name, value)
    invariant_arms._images.cache_clear()
    path = learn_invariant_arms(n_heads=2, n_jobs=1)
    records, before = json.loads(path.read_text()), path.read_bytes()
    assert [(r["arm"], r["seed"], len(r["head"]["acc"])) for r in records] == [
        ("source 30", 0, 2), ("source 30", 1, 2), ("union", 0, 2)]
    a, b, union = ({image.tobytes() for image in images} for images in learned_from)
    source, target = ({image.tobytes() for image in images_of(name, "train").images}
                      for name in ("tinyimagenet32", "cifar10"))
    assert a != b and a | b <= source and len(a) == len(b) == 30
    assert len(union & source) == 10 and len(union & target) == 30
    learned_from.clear()  # a key has what a function holds
    monkeypatch.setattr(invariant_arms, "_learn_and_read_out", None)  # any learning would fail
    assert learn_invariant_arms(n_heads=2, n_jobs=1).read_bytes() == before
    invariant_arms._images.cache_clear()


def test_the_ridge_is_chosen_on_images_that_the_axes_have_not_seen():
    """Against the definitions written out, in float64: scatter by loops, scipy's eigenvectors."""
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    images = images // 4 + images[:, :1, :1] // 2  # each has a colour of its own
    network, ratios = learn_with_a_chosen_ridge(images, n_atoms=4, n_patches=3_000, n_features=5,
                                                n_views=240, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        learn_filters(images, 4, 4, 3_000, generator)
        order = torch.randperm(60, generator=generator).numpy()
        fit, held = (next(activations_of_views(network, images[rows], 4, generator)).astype(float)
                     for rows in (order[6:], order[:6]))

    def scatter(views):
        within = sum(np.cov(one.T) for one in views) / len(views)
        return np.cov(views.mean(1).T) - within / 4, within

    def axes_of(s_b, s_w, ridge):
        values, axes = eigh(s_b, s_w + ridge * np.linalg.eigvalsh(s_w)[-1] * np.eye(len(s_w)))
        return values[:-6:-1], axes[:, :-6:-1]

    (b_fit, w_fit), (b_held, w_held) = scatter(fit), scatter(held)
    for ridge in RIDGES:
        axes = axes_of(b_fit, w_fit, ridge)[1]
        assert ratios[ridge] == pytest.approx(np.mean(
            [(v @ b_held @ v) / (v @ w_held @ v) for v in axes.T]), rel=1e-3)
    assert len(set(ratios.values())) == len(RIDGES)
    values, axes = axes_of(0.9 * b_fit + 0.1 * b_held, 0.9 * w_fit + 0.1 * w_held,
                           max(ratios, key=ratios.get))
    expected = axes * np.maximum(values, 0) ** 0.25
    cosines = (F.normalize(network.axes, dim=0).numpy()
               * expected / np.linalg.norm(expected, axis=0)).sum(0)
    assert np.abs(cosines) == pytest.approx(np.ones(5), abs=1e-4)


def test_small_pools_are_balanced_and_their_consistency_is_scikit_learns():
    found = three_blobs()
    rows = balanced_rows(found.labels, seed=4)
    assert np.bincount(found.labels[rows]).tolist() == [50, 50, 50] and len(set(rows)) == 150
    shares, pool = small_pool_consistency(found), made_of(found.features[rows], found.labels[rows])
    assert shares[4] == pytest.approx(same_labels_by_scikit_learn(pool, 20), abs=0.01)
    assert small_pool_consistency(pool) == pytest.approx([shares[4]])


def test_the_dictionaries_that_ship_are_of_the_code_that_is_here():
    assert {record["code"] for record in shipped_records("dictionaries")} == {
        dictionary_arms.code_of_the_arms()}


def test_the_invariant_arms_that_ship_are_whole_and_of_the_code_that_is_here():
    records = shipped_records("invariant_arms")
    assert {record["code"] for record in records} == {invariant_arms.code_of_the_invariant_arms()}
    assert [(r["n_source"], r["n_target"], r["seed"]) for r in records] == [
        (n_source, n_target, seed) for n_source, n_target, n_seeds
        in invariant_arms.INVARIANT_ARMS.values() for seed in range(n_seeds)]
    page = (REPOSITORY / "docs" / "closed_form.md").read_text()
    source = [r for r in records if r["n_source"] == 100_000]
    assert all(max(r["ratios"], key=r["ratios"].get) == "1e-05" for r in source)
    kmeans, heads = ([np.mean(r[name]["acc"]) for r in source] for name in ("k-means", "head"))
    assert (f"is {np.mean([r['consistency']['20'] for r in source]):.1f}, and K-means has "
            f"{np.mean(kmeans):.1f} ± {np.std(kmeans, ddof=1):.1f} ACC and heads "
            f"{np.mean(heads):.1f} ± {np.std(heads, ddof=1):.1f}.") in " ".join(page.split())
