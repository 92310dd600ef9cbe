"""SCAN's and TEMI's published training code on the bundled vectors, beside ours.

python -m experiments official-rivals FOLDER, where FOLDER/scan is a clone of
wvangansbeke/Unsupervised-Classification and FOLDER/temi one of HHU-MMBS/TEMI-official-BMVC2023.
Their code is run and nothing of it is kept here. Each of `ARMS` is their code with parts exchanged
for ours, up to all that differ: what an arm moves, that part does. What had to be changed to run
it, and what came out: docs/official_rivals.md.
"""

import contextlib
import importlib
import io
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import torch
import yaml

from tsp_utils.cache import versions
from tsp_utils.files.paths import write_json
from tsp_utils.heads import draw_batches, init_heads
from tsp_utils.metrics import clustering_metrics
from tsp_utils.neighbors import Neighbors, uniform_weights
from tsp_utils.study.against_paper import welch_interval
from tsp_utils.study.head_comparison import FeaturesToCluster
from tsp_utils.study.profile import load_study
from tsp_utils.systems import other_losses
from tsp_utils.systems.rivals import train_rival

SETS = (("cifar10", "patch_kmeans"), ("cifar10", "vit_nano_cpu"), ("fashion-mnist", "vit_nano_cpu"))
RATE, EPOCHS, BATCH = 1e-4, 25, {"tsp": 128, "scan": 128, "temi": 256}
PUBLISHED, OURS, SHARED = "as published", "ours", "our head, start, Adam, shared weights"
ARMS = {"tsp": (), "scan": (PUBLISHED, "our start", "our start, draws, Adam"),
        "temi": (PUBLISHED, "our head", "our head, start", "our head, start, Adam", SHARED)}
ARM_SEEDS = 1  # of the arms between theirs and ours
MODULES = {"scan": "utils.train_utils utils.common_config losses.losses models.models",
           "temi": "train_main model_builders.multi_head losses.multihead_losses"}
README = ("--precomputed --disable_ddp --loader Vectors --knn_path none --loss TEMI --loss-args "
          f"beta=0.6 --max_momentum_teacher 0.996 --lr {RATE} --min_lr {RATE} --saveckp_freq 0 "
          f"--warmup_teacher_temp_epochs 0 --epochs {EPOCHS} --batch_size {BATCH['temi']}")
logger = logging.getLogger(__name__)


def official_rivals(folder: str) -> Path:
    """Train theirs, ours and TSP on three feature sets, ten seeds; writes and prints the table."""
    path = Path(__file__).parent.parent / "docs" / "official_rivals.json"
    clones = {name: import_clone(name, Path(folder, name)) for name in MODULES}
    study = load_study("offline")
    apart = losses_apart(**clones)
    if max(apart.values()) > 1e-5:
        raise RuntimeError(f"On random logits our losses are not theirs, they differ by {apart}.")
    record = dict(made_with=versions(), commits={name: it.commit for name, it in clones.items()},
                  losses_apart=apart, epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE,
                  n_neighbors=study.n_neighbors)
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before["rows"] if before | record == before else []  # a run that was stopped goes on
    data = {where: FeaturesToCluster(study, *study.fit_and_score(*where)) for where in SETS}
    for seed, where in itertools.product(study.seeds, SETS):
        found = dict(zip(("dataset", "backbone"), where, strict=True))
        if not any(row | found | dict(arm=OURS, seed=seed) == row for row in rows):
            rows += [found | row for row in rows_of(data[where], clones, seed)]
            write_json(path, record | {"rows": rows}, indent=0)
            logger.info("seed %d of %s under %s: done", seed, *where)
    print(table(pd.DataFrame(rows)))
    return path


def rows_of(data: FeaturesToCluster, clones, seed: int):
    """One row an arm and seed: final loss, acc in percent, percent of samples clustered as ours."""
    def scored(clusters):
        return 100 * clustering_metrics(data.fit.labels, clusters)["acc"]

    for system, arms in ARMS.items():
        heads, loss = train_rival(
            system, data.fitted, data.neighbors, data.centers[[seed]], [seed], progress=False,
            learning_rate=RATE, batch_size=BATCH[system],
            n_steps=EPOCHS * (len(data.fitted) // BATCH[system]))
        ours = heads.predict(data.fitted)[0]
        yield dict(system=system, arm=OURS, seed=seed, loss=float(loss[0]), acc=scored(ours))
        for arm in arms:
            seeds = data.study.seeds if arm == SHARED else [seed]
            if seed >= (1 if arm == SHARED else ARM_SEEDS) and arm != PUBLISHED:
                continue
            train = train_scan if system == "scan" else train_temi
            loss, *found = train(clones[system], data, seeds, arm)  # found: [S, N] each
            for at, clusters, last in zip(seeds, found[0], found[-1], strict=True):
                row = dict(system=system, arm=arm, seed=at, loss=loss, acc=scored(clusters))
                if system == "temi":  # judged by its teacher; ours by its student
                    row["student_acc"] = scored(last)
                if at == seed:
                    row["same"] = 100 * float((last == ours).mean())
                yield row


def train_scan(scan, data, seeds, arm):
    """Their head, loss, optimiser and `scan_train` -> final loss, clusters [1, N]."""
    p = scan.config | {"update_cluster_head_only": True}
    if "Adam" in arm:
        p["optimizer_kwargs"] = {"lr": RATE}  # without weight decay
    torch.manual_seed(*seeds)
    model = scan.models.ClusteringModel({"backbone": torch.nn.Identity(),
                                         "dim": data.fitted.shape[1]}, p["num_classes"])
    if "start" in arm:
        start(model.cluster_head[0], data, *seeds)
    criterion, values = scan.losses.SCANLoss(**p["criterion_kwargs"]), []
    criterion.register_forward_hook(lambda _, __, found: values.append(found[0].item()))
    optimizer = scan.common_config.get_optimizer(p, model, True)
    batches = Batches(data, seeds[0], p["batch_size"], lambda a, b: {"anchor": a, "neighbor": b},
                      with_itself="draws" not in arm)
    with quietly_on_cpu():
        for epoch in range(EPOCHS):
            scan.common_config.adjust_learning_rate(p, optimizer, epoch)
            scan.train_utils.scan_train(batches, model, criterion, optimizer, epoch, True)
    return np.mean(values[-len(values) // 10:]), clusters_of(model.cluster_head, data)


def train_temi(temi, data, seeds, arm):
    """Their `train_dino`, whole -> final loss, clusters [S, N] of the teacher, of the student."""
    main, parts, models, next_seed = temi.train_main, temi.multi_head, [], itertools.cycle(seeds)
    combine = main.TeacherStudentCombo

    def linear(in_dim, out_dim, **_):
        head = torch.nn.Linear(in_dim, out_dim)
        torch.nn.init.trunc_normal_(head.weight, std=0.02)  # as their own layers start
        torch.nn.init.zeros_(head.bias)
        return start(head, data, next(next_seed)) if "start" in arm else head

    options = [*README.split(), "--seed", str(seeds[0]), "--num_heads", str(len(seeds)),
               "--out_dim", str(data.fit.n_clusters), "--embed_dim", str(data.fitted.shape[1])]
    options += ("--warmup_epochs 0 --weight_decay 0 --weight_decay_end 0" if "Adam" in arm
                else f"--warmup_epochs {EPOCHS // 5}").split()
    with quietly_on_cpu() as patches, tempfile.TemporaryDirectory() as out:
        for where, name, new in (
                (main.loaders, "Vectors", lambda **_: data.fitted),
                (torch.utils.data, "DataLoader",
                 lambda *_, **__: Batches(data, seeds[0], BATCH["temi"], lambda *ab: (ab, None))),
                (main, "TeacherStudentCombo",
                 lambda **both: models.append(combine(**both)) or models[-1]),
                (parts.MultiHead, "forward", lambda self, x: [head(x) for head in self.heads]),
                (parts, "DINOHead", parts.DINOHead if arm == PUBLISHED else linear)):
            patches.enter_context(mock.patch.object(where, name, new, create=name == "Vectors"))
        args = main.get_args_parser().parse_args([*options, "--output_dir", out])
        main.train_dino(main.process_args(args), mock.MagicMock())
        log = Path(out, "log.txt").read_text().splitlines()[-max(EPOCHS // 10, 1):]
    halves = models[0].teacher, models[0].student
    return (np.mean([json.loads(line)["train_loss"] for line in log]),
            *(clusters_of(half.head.heads, data) for half in halves))


class Batches:
    """A loader for their loops, an iteration an epoch; pairs are drawn as `train_rival` draws."""

    def __init__(self, data, seed: int, batch_size: int, as_batch, with_itself: bool = False):
        found = data.neighbors
        if with_itself:  # as SCAN's own search leaves it
            itself = np.arange(len(found.indices))[:, None]
            found = Neighbors(np.concatenate([itself, found.indices], 1),
                              np.pad(found.distances, ((0, 0), (1, 0))), found.metric)
        self.x, self.as_batch, self.n = data.fitted, as_batch, len(data.fitted) // batch_size
        self.rows = draw_batches(found, uniform_weights(found), [np.random.default_rng([seed, 2])],
                                 batch_size, EPOCHS * self.n)

    def __len__(self):
        return self.n

    def __iter__(self):
        return (self.as_batch(*torch.from_numpy(self.x[rows[0].numpy()]))
                for rows in itertools.islice(self.rows, self.n))


def start(head: torch.nn.Linear, data, seed: int) -> torch.nn.Linear:
    """Our start of this seed, put into a linear head of theirs."""
    ours = init_heads(data.fitted, data.fit.n_clusters, [seed], centers=data.centers[[seed]])
    head.weight.data.copy_(ours.weight.data[0])
    head.bias.data.zero_()
    return head


@torch.no_grad()
def clusters_of(heads, data) -> np.ndarray:
    return np.stack([head(torch.from_numpy(data.fitted)).argmax(1).numpy() for head in heads])


@contextlib.contextmanager
def quietly_on_cpu():
    """Their calls to a GPU do nothing and their prints go nowhere; more can be entered."""
    with contextlib.ExitStack() as patches, warnings.catch_warnings(action="ignore"):
        patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for where in (torch.Tensor, torch.nn.Module):
            patches.enter_context(mock.patch.object(where, "cuda", lambda self, *_, **__: self))
        patches.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda: None))
        yield patches


def import_clone(name: str, folder: Path) -> SimpleNamespace:
    """The modules of a clone that are run, with its commit and SCAN's settings for CIFAR-10."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; clone the repository there.")
    sys.modules["torch._six"] = mock.MagicMock(string_classes=str)
    for unneeded in ("clip", "torch.utils.tensorboard"):
        sys.modules[unneeded] = mock.MagicMock()
    for module in list(sys.modules):
        if module.split(".")[0] in ("utils", "losses"):  # which both clones have
            del sys.modules[module]
    with mock.patch.object(sys, "path", [str(folder), *sys.path]), warnings.catch_warnings(
            action="ignore"):
        found = {module.split(".")[-1]: importlib.import_module(module)
                 for module in MODULES[name].split()}
    commit = subprocess.check_output(["git", "-C", folder, "rev-parse", "HEAD"], text=True).strip()
    config = folder / "configs" / "scan" / "scan_cifar10.yml"
    return SimpleNamespace(commit=commit, **found, config=yaml.safe_load(
        config.read_text()) if config.exists() else None)


def losses_apart(scan, temi) -> dict[str, float]:
    """Largest difference of their losses and ours on two random batches, one after the other.

    TEMI's features here are logits, and its mean of t is put where ours starts: at the first
    batch's.
    """
    their_scan, their_temi = scan.losses.SCANLoss(5.0), temi.multihead_losses.TEMI(
        beta=0.6, num_heads=1, out_dim=10, batchsize=64, warmup_teacher_temp=0.1, teacher_temp=0.1,
        warmup_teacher_temp_epochs=0, nepochs=1)
    batches = 0.3 * torch.randn(2, 2, 64, 10, generator=torch.Generator().manual_seed(0))
    their_temi.pk[0] = (batches[0] / 0.1).softmax(-1).mean((0, 1))
    step, apart = other_losses.Step(torch.nn.Identity(), None), []  # type: ignore[arg-type]
    for logits in batches:
        step.x, step.neighbor_x = logits[:, None]
        both, (a, b) = [logits.flatten(0, 1)], logits[:, None].mT
        apart.append([float((other_losses.scan(a, b, None) - their_scan(*logits)[0]).abs()),
                      float((other_losses.temi(a, b, step) - their_temi(both, both, 0)).abs())])
    return dict(zip(("scan", "temi"), np.max(apart, 0).tolist(), strict=True))


def table(rows: pd.DataFrame) -> str:
    """Markdown, a row an arm: +- is the standard deviation over seeds, the interval Welch's.

    Ours of the same seeds is taken off, others are left out; the last column: percent of samples
    clustered as ours.
    """
    lines = ["| vectors | system | code | seeds | final loss | ACC | ACC less ours | as ours |",
             "|---" * 8 + "|"]
    arms = rows.groupby(["dataset", "backbone", "system", "arm"], sort=False)
    for (*where, system, arm), of in arms:
        ours = arms.get_group((*where, system, OURS))
        of, ours = of[of["seed"].isin(ours["seed"])], ours[ours["seed"].isin(of["seed"])]["acc"]
        less, spread = f"{of['acc'].mean() - ours.mean():+.2f}", ["", ""]
        if len(of) > 1:
            spread = [f" +- {of['loss'].std():.3f}", f" +- {of['acc'].std():.2f}"]
            ends = welch_interval(*of["acc"].agg(["mean", "std", "count"]),
                                  *ours.agg(["mean", "std", "count"]))[1:]
            less += " ({:+.2f} to {:+.2f})".format(*ends)
        lines.append(f"| {', '.join(where)} | {system} | {arm} | {len(of)} | "
                     f"{of['loss'].mean():.3f}{spread[0]} | {of['acc'].mean():.2f}{spread[1]} | "
                     f"{'' if arm == OURS else less} | "
                     f"{format(of['same'].mean(), '.1f') if 'start' in arm else ''} |")
    return "\n".join(lines)
