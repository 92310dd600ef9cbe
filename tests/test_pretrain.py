"""DINO: the loss, centre and teacher by hand; crops; exact resume; two processes; bad input."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from tsp_utils.datasets import load_dataset
from tsp_utils.neighbors import knn_accuracy
from tsp_utils.pretraining.dino import (
    Dino,
    DinoRecipe,
    dino_loss,
    schedule,
    update_center,
    update_teacher,
)
from tsp_utils.pretraining.multi_crop import multi_crop, random_colors, random_crops
from tsp_utils.pretraining.run import _warn_of_collapse, load_run, pretrain_dino, save_run

TINY = DinoRecipe(
    architecture="vit_tiny_patch16_224",
    options=(("patch_size", 8), ("img_size", 32), ("dynamic_img_size", True), ("embed_dim", 32),
             ("depth", 2), ("num_heads", 2)),
    n_local=2, batch_size=16, n_outputs=64, hidden=48, bottleneck=16)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_loss_is_eq_1_by_a_float64_loop():
    rng = np.random.default_rng(0)
    student, teacher, center = rng.normal(size=(5, 3, 7)), rng.normal(size=(2, 3, 7)), np.arange(7.)

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p_t, p_s = softmax((teacher - center) / 0.04), softmax(student / 0.1)
    terms = [-np.sum(p_t[t, i] * np.log(p_s[v, i]))
             for t in range(2) for v in range(5) if v != t for i in range(3)]
    ours = dino_loss(*map(torch.tensor, (student, teacher, center)), 0.1, 0.04)
    assert ours.item() == pytest.approx(np.mean(terms), rel=1e-9)


def test_loss_by_hand():
    """Two views, two outputs, a teacher that is sure and a student that knows nothing: log 2."""
    teacher = torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]]])
    loss = dino_loss(torch.zeros(2, 1, 2), teacher, torch.zeros(2), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)


def test_center_by_hand():
    center = torch.tensor([1.0, 0.0])
    update_center(center, torch.tensor([[[2.0, 4.0]], [[4.0, 0.0]]]), momentum=0.9)
    torch.testing.assert_close(center, torch.tensor([0.9 + 0.3, 0.2]))


def test_teacher_by_hand():
    teacher, student = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    torch.nn.init.constant_(teacher.weight, 1.0)
    torch.nn.init.constant_(student.weight, 5.0)
    update_teacher(teacher, student, momentum=0.75)
    assert teacher.weight.flatten().tolist() == [2.0, 2.0]


def test_schedules_at_their_ends():
    start, warm, end = (schedule(DinoRecipe(), p) for p in (0.0, 0.05, 1.0))
    assert start["learning_rate"] == 0 and warm["learning_rate"] == pytest.approx(5e-4 * 4)
    assert end["learning_rate"] == pytest.approx(1e-6)
    assert (start["weight_decay"], end["weight_decay"]) == pytest.approx((0.04, 0.4))
    assert (start["momentum"], end["momentum"]) == pytest.approx((0.996, 1.0))
    assert (start["teacher_temperature"], end["teacher_temperature"]) == pytest.approx((0.04, 0.07))


def test_crops_are_drawn_and_flipped_one_by_one():
    """On a horizontal ramp a crop's slope tells its width, its sign the flip."""
    ramp = torch.linspace(0, 1, 32).view(1, 1, 1, 32).expand(500, 3, 32, 32).contiguous()
    crops = random_crops(ramp, 16, (0.3, 1.0), torch.Generator().manual_seed(0))
    steps = crops[:, 0, 8].diff(dim=1).median(1).values  # width in pixels of the source, signed
    widths = steps.abs() * 31 / 2  # a crop of width w samples every 2 w pixels
    assert 0.4 < (steps > 0).float().mean() < 0.6  # flips
    assert widths.min() > math.sqrt(0.3 * 3 / 4) - 0.02 and widths.max() < 1.02
    assert crops.std(0).mean() > 0.05  # one draw a sample


def test_crop_areas_are_those_asked_for():
    """An image of x-coordinate and y-coordinate channels tells each crop's area."""
    line = (torch.arange(64) + 0.5) / 64
    image = torch.stack([line.expand(64, 64), line[:, None].expand(64, 64), torch.zeros(64, 64)])
    crops = random_crops(image.expand(2000, 3, 64, 64), 16, (0.05, 0.3), torch.Generator())
    width = (crops[:, 0, 8, 12] - crops[:, 0, 8, 4]).abs() * 2
    height = (crops[:, 1, 12, 8] - crops[:, 1, 4, 8]).abs() * 2
    area = width * height
    assert area.min() > 0.045 and area.max() < 0.31
    assert area.mean() == pytest.approx(0.175, abs=0.01)


def test_colors_stay_in_range_and_differ_by_sample():
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    y = random_colors(x[:1].expand(64, 3, 32, 32), torch.Generator().manual_seed(0), 0.5, 0.2)
    assert y.min() >= 0 and y.max() <= 1
    assert y.flatten(1).unique(dim=0).shape[0] > 50
    grey = (y - y.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 0.05 < grey.float().mean() < 0.4  # p 0.2


def test_views_are_view_major():
    groups = multi_crop(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), TINY, torch.Generator())
    assert [tuple(g.shape) for g in groups] == [(10, 3, 32, 32), (10, 3, 16, 16)]


@pytest.mark.parametrize("head_norm", [False, True])
def test_twenty_steps_equal_ten_and_a_stop_and_ten(tmp_path, head_norm):
    recipe = replace(TINY, local_options=(("drop_path_rate", 0.2),), head_norm=head_norm)

    def run(steps, resume=False):
        dino = Dino(IMAGES, recipe, seed=3)
        if resume:
            load_run(dino, tmp_path / "run.pt")
        while dino.step_count < steps:
            dino.step(dino.step_count / 20)
        return dino

    straight = run(20)
    run(10).save(tmp_path / "run.pt")
    torch.manual_seed(99)  # whatever happened in between
    resumed = run(20, resume=True)
    for a, b in ((straight.student, resumed.student), (straight.teacher, resumed.teacher)):
        for key, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[key]), key
    assert torch.equal(straight.center, resumed.center)


def _joint_and_split(rank, path, groups, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank,
                                         world_size=2)
    dino = Dino(IMAGES, TINY, seed=0, dtype=torch.float64)
    mine = [torch.cat([view.chunk(2)[rank] for view in group.chunk(n)])
            for group, n in zip(groups, (2, TINY.n_local), strict=True)]
    for step in range(3):
        dino.step(0.3 + step / 10, mine)
    if rank == 0:
        torch.save({"weights": dino.student.state_dict(), "center": dino.center}, out)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    alone = Dino(IMAGES, TINY, seed=0, dtype=torch.float64)
    groups = [group.double() for group in multi_crop(alone.batch(), TINY, alone.generator)]
    for step in range(3):
        alone.step(0.3 + step / 10, groups)
    mp.spawn(_joint_and_split, (str(tmp_path / "meet"), groups, tmp_path / "two.pt"), nprocs=2)
    two = torch.load(tmp_path / "two.pt")
    torch.testing.assert_close(two["center"], alone.center, rtol=1e-6, atol=1e-9)
    for key, value in alone.student.state_dict().items():
        torch.testing.assert_close(two["weights"][key], value, rtol=1e-5, atol=1e-7)


def test_budget_in_images_and_callback_without_labels():
    seen = []
    run = pretrain_dino(IMAGES, TINY, budget_images=320, n_reports=4,
                        callback=lambda run, entry: seen.append(entry["images_seen"]))
    assert run.images_seen == 320 and seen[-1] == 320 and 4 <= len(seen) <= 5
    assert all(math.isfinite(entry["loss"]) for entry in run.log)
    assert not run.teacher.head.last.weight.requires_grad
    lengths = run.student.head.last.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_prototypes_rest_for_an_epoch_or_the_warm_up_whichever_is_shorter():
    def moved(progress, steps):
        run = Dino(IMAGES, replace(TINY, warmup=0.5, head_norm=True))
        before = run.student.head.last.weight.clone()
        for _ in range(steps):
            run.step(progress)
        return not torch.equal(run.student.head.last.weight, before)

    assert not moved(0.1, 2)  # in the warm-up, 32 of 40 images seen
    assert moved(0.1, 4)  # past the first epoch
    assert moved(0.6, 1)  # past the warm-up


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_toy_run_learns(seed):
    """Without labels its features come to know the classes; the student to know its image."""
    data = load_dataset("fashion-mnist", "test").subset(slice(0, 4000))
    images = np.repeat(np.pad(data.images, ((0, 0), (2, 2), (2, 2), (0, 0))), 3, axis=3)
    recipe = replace(
        TINY, options=(("patch_size", 8), ("img_size", 32), ("dynamic_img_size", True),
                       ("embed_dim", 96), ("depth", 2), ("num_heads", 3), ("global_pool", "avg")),
        global_scale=(0.5, 1.0), local_scale=(0.2, 0.5), batch_size=64, n_outputs=256, hidden=256,
        bottleneck=64, learning_rate=4e-3, momentum=(0.97, 1.0), head_norm=True,
        teacher_temperature=(0.04, 0.04))
    x = (torch.from_numpy(images[::2]).permute(0, 3, 1, 2) / 255 - 0.45) / 0.226

    def knn(run):
        run.teacher.eval()
        with torch.inference_mode():
            features = run.teacher.backbone(x).numpy()
        run.teacher.train()
        return knn_accuracy(features, data.labels[::2])

    untrained = knn(Dino(images, recipe, seed=seed))
    run = pretrain_dino(images, recipe, budget_images=16_000, seed=seed, n_reports=10)
    assert knn(run) > untrained + 0.03
    loss = np.array([entry["loss"] for entry in run.log])
    entropy = np.array([entry["teacher_entropy"] for entry in run.log])
    assert loss[-2:].mean() < loss.max() - 0.05  # once the outputs are spread, the loss falls
    assert (entropy - loss)[-2:].mean() > (entropy - loss)[:2].mean()  # what it knows of the image


def test_a_collapse_is_said(caplog):
    dino = Dino(IMAGES, TINY)
    dino.step(0.5)
    entry = {"images_seen": 16} | dino.health()
    _warn_of_collapse(entry, TINY)
    assert not caplog.text
    assert 0.5 * math.log(64) < entry["teacher_entropy"] <= math.log(64)
    assert 0.01 < entry["feature_spread"] < 1 / math.sqrt(32)

    dino.last_teacher = torch.zeros_like(dino.last_teacher)
    dino.last_teacher[..., 5] = 9.0  # one output for every image
    for parameter in dino.teacher.backbone.parameters():
        parameter.zero_()
    dino.teacher.backbone.norm.bias.data.fill_(1.0)  # one vector for every image
    entry = {"images_seen": 32} | dino.health()
    assert entry["teacher_entropy"] < 0.1 and entry["feature_spread"] < 1e-6
    _warn_of_collapse(entry, TINY)
    assert "Collapse after 32 images" in caplog.text


@pytest.mark.parametrize("architecture", ["vit", "resnet10t", "mobilenetv3_small_050"])
def test_any_timm_network_trains(architecture):
    recipe = TINY if architecture == "vit" else replace(TINY, architecture=architecture, options=())
    run = pretrain_dino(IMAGES, recipe, budget_images=64, n_reports=1)
    assert run.step_count == 4 and math.isfinite(run.log[-1]["loss"])


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="budget is empty"):
        pretrain_dino(IMAGES, TINY, budget_images=0)
    with pytest.raises(ValueError, match="1 image is too few"):
        pretrain_dino(IMAGES[:1], TINY, budget_images=10)
    with pytest.raises(ValueError, match="do not fit patches of 8"):
        pretrain_dino(IMAGES[:, :4, :4], TINY, budget_images=10)
    with pytest.raises(ValueError, match="resize them first"):
        pretrain_dino(IMAGES[..., :1], TINY, budget_images=10)
    with pytest.raises(ValueError, match=r"are float64; pass uint8"):
        pretrain_dino(IMAGES / 255, TINY, budget_images=10)
    with pytest.raises(ValueError, match="do not fit patches of 16 px"):  # the network's own
        pretrain_dino(IMAGES, replace(TINY, options=TINY.options[1:], local_size=24),
                      budget_images=10)
    path = tmp_path / "run.pt"
    Dino(IMAGES, TINY).save(path)
    with pytest.raises(ValueError, match=r"bottleneck = '16' and this run has '8'"):
        Dino(IMAGES, replace(TINY, bottleneck=8)).load(path)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a checkpoint of this trainer"):
        Dino(IMAGES, TINY).load(path)


@pytest.mark.parametrize(("changed", "key"), [
    (dict(budget_images=640), "budget"), (dict(seed=1), "seed"),
    (dict(images=255 - IMAGES), "images"), (dict(dtype=torch.bfloat16), "dtype")])
def test_a_checkpoint_goes_on_only_with_what_it_was_made_with(tmp_path, changed, key):
    made = dict(images=IMAGES, recipe=TINY, budget_images=320, checkpoint=tmp_path / "run.pt")
    assert pretrain_dino(**made).images_seen == 320
    before = made["checkpoint"].read_bytes()
    with pytest.raises(ValueError, match=f"was made with {key} = "):
        pretrain_dino(**made | changed)
    assert made["checkpoint"].read_bytes() == before
    assert pretrain_dino(**made).step_count == 20  # finished, not trained again


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    pretrain_dino(IMAGES, TINY, budget_images=320, checkpoint=path)
    before = path.read_bytes()
    run = Dino(IMAGES, TINY)
    next(run.student.parameters()).data[0] = math.nan
    with pytest.raises(RuntimeError, match="run diverged: after 0 images"):
        save_run(run, path)
    assert path.read_bytes() == before
    with pytest.raises(RuntimeError, match="lower learning_rate"):
        pretrain_dino(IMAGES, replace(TINY, learning_rate=1e30), budget_images=320)


def test_looking_at_a_run_does_not_change_it():
    recipe = replace(TINY, architecture="resnet10t", options=())
    one, many = (pretrain_dino(IMAGES, recipe, budget_images=64, n_reports=n) for n in (1, 4))
    assert len(many.log) > len(one.log)
    for (key, a), b in zip(one.teacher.state_dict().items(), many.teacher.state_dict().values(),
                           strict=True):
        assert torch.equal(a, b), key


def test_a_network_that_cannot_be_compiled_is_trained_without(monkeypatch, caplog):
    def broken(network):
        def run(*_):
            raise RuntimeError("no C++ compiler")
        return run

    monkeypatch.setattr(torch, "compile", broken)
    run = pretrain_dino(IMAGES, TINY, budget_images=64, compiled=True)
    assert run.step_count == 4 and "goes on without it" in caplog.text
    plain = pretrain_dino(IMAGES, TINY, budget_images=64)
    assert all(torch.equal(a, b) for a, b in zip(run.teacher.parameters(),
                                                 plain.teacher.parameters(), strict=True))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    dino = Dino(IMAGES, TINY)
    save_run(dino, path)
    before = path.read_bytes()

    def full(state, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="the one before it was kept"):
        save_run(dino, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
