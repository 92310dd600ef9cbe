"""DINO: the loss, centre and teacher by hand; crops; exact resume; two processes; bad input."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import two_processes
from scipy.special import log_softmax, softmax

from experiments.arms import encode
from tsp_utils.datasets import load_dataset
from tsp_utils.neighbors import knn_accuracy
from tsp_utils.pretraining import dino
from tsp_utils.pretraining.dino import Dino, DinoRecipe, schedule
from tsp_utils.pretraining.multi_crop import multi_crop, random_colors, random_crops
from tsp_utils.pretraining.run import _warn_of_collapse, load_run, pretrain_dino, save_run

TINY = DinoRecipe(
    architecture="vit_tiny_patch16_224",
    options=(("patch_size", 8), ("img_size", 32), ("dynamic_img_size", True), ("embed_dim", 32),
             ("depth", 2), ("num_heads", 2)),
    n_local=2, batch_size=16, n_outputs=64, hidden=48, bottleneck=16)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)


def test_loss_is_eq_1_by_a_float64_loop_and_by_hand():
    rng = np.random.default_rng(0)
    student, teacher, center = rng.normal(size=(5, 3, 7)), rng.normal(size=(2, 3, 7)), np.arange(7.)
    p_t, log_p_s = softmax((teacher - center) / 0.04, -1), log_softmax(student / 0.1, -1)
    terms = [-np.sum(p_t[t, i] * log_p_s[v, i])
             for t in range(2) for v in range(5) if v != t for i in range(3)]
    ours = dino.dino_loss(*map(torch.tensor, (student, teacher, center)), 0.1, 0.04)
    assert ours.item() == pytest.approx(np.mean(terms), rel=1e-9)

    sure = torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]]])  # and a student that knows nothing: log 2
    loss = dino.dino_loss(torch.zeros(2, 1, 2), sure, torch.zeros(2), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)


def test_center_and_teacher_by_hand():
    center = torch.tensor([1.0, 0.0])
    dino.update_center(center, torch.tensor([[[2.0, 4.0]], [[4.0, 0.0]]]), momentum=0.9)
    torch.testing.assert_close(center, torch.tensor([0.9 + 0.3, 0.2]))
    teacher, student = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    torch.nn.init.constant_(teacher.weight, 1.0)
    torch.nn.init.constant_(student.weight, 5.0)
    dino.update_teacher(teacher, student, momentum=0.75)
    assert teacher.weight.flatten().tolist() == [2.0, 2.0]


def test_schedules_at_their_ends():
    start, warm, end = (schedule(DinoRecipe(), p) for p in (0.0, 0.05, 1.0))
    assert start["learning_rate"] == 0 and warm["learning_rate"] == pytest.approx(5e-4 * 4)
    assert end["learning_rate"] == pytest.approx(1e-6)
    for name, ends in dict(weight_decay=(0.04, 0.4), momentum=(0.996, 1.0),
                           teacher_temperature=(0.04, 0.07)).items():
        assert (start[name], end[name]) == pytest.approx(ends)


def test_crops_are_drawn_and_flipped_one_by_one_with_the_areas_asked_for():
    """Channels of x- and y-coordinates tell each crop's width, height and flip."""
    line = (torch.arange(64) + 0.5) / 64
    image = torch.stack([line.expand(64, 64), line[:, None].expand(64, 64), torch.zeros(64, 64)])
    crops = random_crops(image.expand(2000, 3, 64, 64), 16, (0.05, 0.3), torch.Generator())
    width = (crops[:, 0, 8, 12] - crops[:, 0, 8, 4]) * 2  # negative where flipped
    height = (crops[:, 1, 12, 8] - crops[:, 1, 4, 8]) * 2
    area, ratio = width.abs() * height, width.abs() / height
    assert area.min() > 0.045 and area.max() < 0.31
    assert area.mean() == pytest.approx(0.175, abs=0.01)
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.35
    assert 0.4 < (width > 0).float().mean() < 0.6
    assert crops.std(0).mean() > 0.05  # one draw a sample

    large = random_crops(image.expand(500, 3, 64, 64), 16, (0.3, 1.0), torch.Generator())
    width = (large[:, 0, 8, 12] - large[:, 0, 8, 4]).abs() * 2
    assert math.sqrt(0.3 * 3 / 4) - 0.02 < width.min() and 0.95 < width.max() < 1.02


def test_colors_stay_in_range_and_differ_by_sample_and_views_are_view_major():
    x = torch.from_numpy(IMAGES[:1]).permute(0, 3, 1, 2).expand(64, 3, 32, 32) / 255
    y = random_colors(x, torch.Generator().manual_seed(0), 0.5, 0.2)
    assert y.min() >= 0 and y.max() <= 1
    assert len(y.flatten(1).unique(dim=0)) > 50
    grey = (y - y.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 0.05 < grey.float().mean() < 0.4  # p 0.2
    groups = multi_crop(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), TINY, torch.Generator())
    assert [tuple(g.shape) for g in groups] == [(10, 3, 32, 32), (10, 3, 16, 16)]


def assert_same_weights(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_eight_steps_equal_four_and_a_stop_and_four(tmp_path):
    recipe = replace(TINY, local_options=(("drop_path_rate", 0.2),), head_norm=True)

    def run_to(steps, run):
        while run.step_count < steps:
            run.step(run.step_count / 8)
        return run

    straight = run_to(8, Dino(IMAGES, recipe, seed=3))
    save_run(run_to(4, Dino(IMAGES, recipe, seed=3)), tmp_path / "run.pt")
    torch.manual_seed(99)  # whatever happened in between
    resumed = Dino(IMAGES, recipe, seed=3)
    load_run(resumed, tmp_path / "run.pt")
    run_to(8, resumed)
    assert_same_weights(straight.student, resumed.student)
    assert_same_weights(straight.teacher, resumed.teacher)
    assert torch.equal(straight.center, resumed.center)


def _joint_and_split(path, groups, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank,
                                         world_size=2)
    run = Dino(IMAGES, TINY, seed=0, dtype=torch.float64)
    mine = [torch.cat([view.chunk(2)[rank] for view in group.chunk(n)])
            for group, n in zip(groups, (2, TINY.n_local), strict=True)]
    for step in range(3):
        run.step(0.3 + step / 10, mine)
    torch.distributed.destroy_process_group()
    return run.student.state_dict(), run.center


def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    alone = Dino(IMAGES, TINY, seed=0, dtype=torch.float64)
    groups = [group.double() for group in multi_crop(alone.batch(), TINY, alone.generator)]
    for step in range(3):
        alone.step(0.3 + step / 10, groups)
    with two_processes() as both:
        (weights, center), _ = both.map(partial(_joint_and_split, tmp_path / "meet", groups),
                                        range(2))
    torch.testing.assert_close(center, alone.center, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights, alone.student.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("progress", "steps", "moves"), [
    (0.1, 2, False),  # in the warm-up, 32 of 40 images seen
    (0.1, 4, True), (0.6, 1, True)])  # past the first epoch; past the warm-up
def test_prototypes_rest_for_an_epoch_or_the_warm_up_whichever_is_shorter(progress, steps, moves):
    run = Dino(IMAGES, replace(TINY, warmup=0.5, head_norm=True))
    before = run.student.head.last.weight.clone()
    for _ in range(steps):
        run.step(progress)
    assert torch.equal(run.student.head.last.weight, before) != moves


def test_a_toy_run_learns():
    """Without labels its features come to know the classes; the student to know its image."""
    data = load_dataset("fashion-mnist", "test").subset(slice(0, 4000))
    images = np.repeat(np.pad(data.images, ((0, 0), (2, 2), (2, 2), (0, 0))), 3, axis=3)
    recipe = replace(
        TINY, options=(*TINY.options[:3], ("embed_dim", 96), ("depth", 2), ("num_heads", 3),
                       ("global_pool", "avg")),
        global_scale=(0.5, 1.0), local_scale=(0.2, 0.5), batch_size=64, n_outputs=256, hidden=256,
        bottleneck=64, learning_rate=4e-3, momentum=(0.97, 1.0), head_norm=True,
        teacher_temperature=(0.04, 0.04))

    def knn(run):
        return knn_accuracy(encode(run, images[::2]), data.labels[::2])

    untrained = knn(Dino(images, recipe))
    run = pretrain_dino(images, recipe, budget_images=16_000, n_reports=10)
    assert knn(run) > untrained + 0.03
    loss = np.array([entry["loss"] for entry in run.log])
    entropy = np.array([entry["teacher_entropy"] for entry in run.log])
    assert loss[-2:].mean() < loss.max() - 0.05  # once the outputs are spread, the loss falls
    assert (entropy - loss)[-2:].mean() > (entropy - loss)[:2].mean()  # what it knows of the image


def test_a_collapse_is_said(caplog):
    run = Dino(IMAGES, TINY)
    run.step(0.5)
    health = run.health()
    _warn_of_collapse({"images_seen": 16} | health, TINY)
    assert not caplog.text
    assert 0.5 * math.log(64) < health["teacher_entropy"] <= math.log(64)
    assert 0.01 < health["feature_spread"] < 1 / math.sqrt(32)

    run.last_teacher = torch.tensor([9.0] + 63 * [0.0]).expand_as(run.last_teacher)
    for parameter in run.teacher.backbone.parameters():
        parameter.zero_()
    run.teacher.backbone.norm.bias.data.fill_(1.0)  # one output and vector for every image
    health = run.health()
    assert health["teacher_entropy"] < 0.1 and health["feature_spread"] < 1e-6
    _warn_of_collapse({"images_seen": 32} | health, TINY)
    assert "Collapse after 32 images" in caplog.text


@pytest.mark.parametrize("architecture", ["vit", "resnet10t", "mobilenetv3_small_050"])
def test_any_timm_network_trains_to_its_budget_and_looking_at_it_changes_nothing(architecture):
    recipe = TINY if architecture == "vit" else replace(TINY, architecture=architecture, options=())
    seen = []
    one, many = (pretrain_dino(IMAGES, recipe, budget_images=64, n_reports=n, callback=look)
                 for n, look in ((1, None), (4, lambda run, entry: seen.append(run.images_seen))))
    assert one.step_count == 4 and seen == [16, 32, 48, 64]
    assert (len(one.log), len(many.log)) == (1, 4)
    assert all(math.isfinite(entry["loss"]) for entry in many.log)
    assert_same_weights(one.teacher, many.teacher)
    assert not many.teacher.head.last.weight.requires_grad
    lengths = many.student.head.last.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_the_log_has_the_rate_of_the_batches_there_were():
    run = pretrain_dino(IMAGES, replace(TINY, batch_size=80, warmup=0.0), budget_images=40)
    assert run.log[0]["learning_rate"] == TINY.learning_rate * len(IMAGES) / 256


@pytest.mark.parametrize("images, changed, budget, sentence", [
    (IMAGES, {}, 0, "budget is empty"),
    (IMAGES[:1], {}, 10, "1 image is too few"),
    (IMAGES[:, :4, :4], {}, 10, "do not fit patches of 8"),
    (IMAGES[..., :1], {}, 10, "resize them first"),
    (IMAGES / 255, {}, 10, "are float64; pass uint8"),
    (IMAGES, dict(options=TINY.options[1:], local_size=24), 10, "patches of 16 px"),  # timm's own
])
def test_bad_input_is_refused(images, changed, budget, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain_dino(images, replace(TINY, **changed), budget_images=budget)


def test_a_checkpoint_goes_on_only_with_what_it_was_made_with(tmp_path):
    file = tmp_path / "run.pt"
    made = dict(images=IMAGES, recipe=TINY, budget_images=64, checkpoint=file)
    assert pretrain_dino(**made).images_seen == 64
    before = file.read_bytes()
    for changed, sentence in (
            (dict(budget_images=640), "budget = "), (dict(seed=1), "seed = "),
            (dict(images=255 - IMAGES), "images = "), (dict(dtype=torch.bfloat16), "dtype = "),
            (dict(recipe=replace(TINY, bottleneck=8)), "bottleneck = '16' and this run has '8'")):
        with pytest.raises(ValueError, match=f"was made with {sentence}"):
            pretrain_dino(**made | changed)
    assert file.read_bytes() == before
    pretrain_dino(**made, callback=lambda *_: pytest.fail("trained again"))
    file.write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a checkpoint of this trainer"):
        pretrain_dino(**made)


def test_a_full_disk_or_divergence_harms_no_checkpoint(tmp_path, monkeypatch):
    path, run = tmp_path / "run.pt", Dino(IMAGES, TINY)
    save_run(run, path)
    before, save, written = path.read_bytes(), torch.save, []

    def full(block):  # the system's error, which torch.save covers with one of its own
        written.append(len(block))
        if sum(written) > 10_000:
            raise OSError(28, "No space left on device")
        return len(block)

    with monkeypatch.context() as patched, pytest.raises(OSError, match=(
            r"cannot be written \(No space left on device\); .* with some space left")):
        patched.setattr(torch, "save", lambda state, _: save(state, SimpleNamespace(
            write=full, flush=lambda: None)))
        save_run(run, path)
    next(run.student.parameters()).data[0] = math.nan
    with pytest.raises(RuntimeError, match="run diverged: after 0 images"):
        save_run(run, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError, match="lower learning_rate"):
        pretrain_dino(IMAGES, replace(TINY, learning_rate=1e30), budget_images=320)


def test_a_network_that_cannot_be_compiled_is_trained_without(monkeypatch, caplog):
    def broken(network):
        def run(*_):
            raise RuntimeError("no C++ compiler")
        return run

    monkeypatch.setattr(torch, "compile", broken)
    run = pretrain_dino(IMAGES, TINY, budget_images=64, compiled=True)
    assert run.step_count == 4 and "goes on without it" in caplog.text
    assert_same_weights(run.teacher, pretrain_dino(IMAGES, TINY, budget_images=64).teacher)
