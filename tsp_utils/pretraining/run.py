"""A whole run of DINO within a budget: its checkpoints, and what ends it."""

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tsp_utils.files.paths import write_whole
from tsp_utils.pretraining.dino import Dino, DinoRecipe
from tsp_utils.pretraining.trainer import diverged

logger = logging.getLogger(__name__)


def pretrain_dino(images, recipe: DinoRecipe, *, budget_images: int, checkpoint=None,
                  save_every_s: float = 60, n_reports: int = 20, callback=None, **options) -> Dino:
    """Train a backbone by DINO within a budget; returns the run (`.teacher.backbone`, `.log`).

    Under torchrun with an initialised process group each process takes its share of every batch;
    batch norm then sees the joint batch on CUDA, and its own share elsewhere.

    images uint8 [N, H, W, 3], without labels. The budget is images seen; schedules run over it.
    Options (seed, device, dtype, compiled) are `Dino`'s.
    `checkpoint` names a file that is resumed from if it is there and saved to every
    save_every_s seconds. `callback(run, entry)` is called n_reports times, for read-outs. A
    collapse (teacher's mean output or features without spread) is a logged warning.
    Raises ValueError for a budget of 0, too few or too small images, a checkpoint of other
    settings; RuntimeError for a run that diverged.
    """
    run = Dino(images, recipe, **options)
    run.budget = f"{budget_images} images"
    if checkpoint is not None and Path(checkpoint).exists():
        load_run(run, checkpoint)
    saved = time.perf_counter()
    for entry in run.steps(budget_images, n_reports):
        if entry:
            entry.update(**run.health(), **run.now)
            _warn_of_collapse(entry, recipe)
            if callback is not None:
                callback(run, entry)
        if checkpoint is not None and time.perf_counter() - saved > save_every_s:
            save_run(run, checkpoint)
            saved = time.perf_counter()
    if checkpoint is not None:
        save_run(run, checkpoint)
    return run


def _warn_of_collapse(entry: dict, recipe: DinoRecipe) -> None:
    few = entry["teacher_entropy"] < 0.2 * math.log(recipe.n_outputs)
    flat = entry["feature_spread"] < 1e-3
    if few or flat:
        logger.warning(
            "Collapse after %d images: entropy of the teacher's mean output %.2f of at most %.2f "
            "nats, spread of the features %.4f; look at temperatures, centring and crop scales.",
            entry["images_seen"], entry["teacher_entropy"], math.log(recipe.n_outputs),
            entry["feature_spread"])


def save_run(run: Dino, path: Path) -> None:
    """Write the whole state, then move it into place: the last good one always survives.

    Raises RuntimeError, and writes nothing, for weights that are no numbers any more.
    """
    if not all(bool(weights.isfinite().all()) for weights in run.student.parameters()):
        raise diverged(run.images_seen)
    state = {"settings": _settings(run), "student": run.student.state_dict(),
             "teacher": run.teacher.state_dict(), "center": run.center,
             "adam": run.adam.state_dict(), "generator": run.generator.get_state(),
             "rng": torch.get_rng_state(), "step_count": run.step_count,
             "seconds": run.seconds, "log": run.log}
    if run.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(run.device)
    write_whole(Path(path), lambda file: torch.save(state, file))


def load_run(run: Dino, path: Path) -> None:
    """Continue from `save_run`'s file. Raises ValueError for one made with other settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ours = state["settings"], _settings(run)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this trainer ({error}); delete it or "
                         f"name another file.") from error
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ValueError(f"{path} was made with {key} = {theirs.get(key)!r} and this run "
                             f"has {value!r}; name another file or use the same settings.")
    run.student.load_state_dict(state["student"])
    run.teacher.load_state_dict(state["teacher"])
    run.adam.load_state_dict(state["adam"])
    run.center.copy_(state["center"])
    run.generator.set_state(state["generator"].cpu())
    torch.set_rng_state(state["rng"].cpu())
    if "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu(), run.device)
    run.step_count, run.seconds, run.log = (
        state["step_count"], state["seconds"], state["log"])


def _settings(run: Dino) -> dict:
    plain = {key: str(value) for key, value in asdict(run.recipe).items()}
    return plain | {"seed": str(run.seed), "images": run.content, "budget": run.budget,
                    "device": run.device.type, "dtype": str(run.dtype)}
