"""The pretraining arms of the source ablation (C6): recipe, images and budget of each, by name.

All arms of a size see the same number of images. Labels are read by the read-outs alone.
"""

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save
from torch.utils.flop_counter import FlopCounterMode

import tsp_utils.networks.small_resnet  # noqa: F401  (timm learns its name)
from experiments.contrastive import Contrastive, ContrastiveRecipe, pretrain_contrastive
from tsp_utils.cache import code_of, hardware, versions
from tsp_utils.datasets import load_dataset
from tsp_utils.devices import find_device, gains_from_bf16
from tsp_utils.files.paths import runs_dir, write_json, write_whole
from tsp_utils.files.unknown_names import unknown
from tsp_utils.neighbors import knn_accuracy
from tsp_utils.networks.weights import attention
from tsp_utils.pretraining.dino import Dino, DinoRecipe, Network
from tsp_utils.pretraining.run import pretrain_dino
from tsp_utils.study.feature_sets import draw_rows, spread_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """One pretraining run: what is learned, from which images, for how long."""

    recipe: DinoRecipe | ContrastiveRecipe
    data: tuple[str, ...]  # whose train splits are joined
    budget_images: int  # images seen
    n_images: int | None = None  # drawn once by seed 0, without labels; None: all
    seed: int = 0  # of the run: weights, order, crops

    @property
    def source(self) -> str:
        images = "all images" if self.n_images is None else f"{self.n_images:,} images"
        return f"{' and '.join(self.data)}, train split, {images}"


SOURCE, TARGET = ("tinyimagenet32",), ("cifar10",)
N_REPORTS = 20  # read-outs of a run
MINI_IMAGES, NANO_IMAGES, NANO_CPU_IMAGES, PAPER_IMAGES = 1_600_000, 512_000, 512_000, 5_000_000
CONTRAST_IMAGES = 6_246_400  # two views each: about ten minutes of an H100 for all four arms
LONG_CONTRAST_IMAGES = 16_384_000  # five minutes of an H200
VIT = dict(patch_size=4, img_size=32, dynamic_img_size=True)
# Small batches for as many steps as they allow, and batch norm in the head.
NANO = DinoRecipe("vit_tiny_patch16_224",
                  tuple((VIT | dict(embed_dim=128, depth=6, num_heads=4)).items()),
                  (("drop_path_rate", 0.1),), batch_size=256, head_norm=True)
RESNET_NANO = replace(NANO, architecture="small_resnet", options=tuple(dict(
    layers=(3, 2, 3, 2), channels=(20, 40, 80, 160)).items()))
# On CPU cores: global crops of 24 px, about the scale at which a mean crop was seen, cost half; a
# run this short needs batch norm in the head, a quicker teacher and larger local crops to learn.
NANO_CPU = replace(
    NANO, options=tuple((VIT | dict(embed_dim=128, depth=4, num_heads=4,
                                    global_pool="avg")).items()),
    local_options=(), global_size=24, local_size=12, n_local=2, global_scale=(0.4, 1.0),
    local_scale=(0.15, 0.4), batch_size=128, learning_rate=2e-3, momentum=(0.99, 1.0),
    teacher_temperature=(0.04, 0.04), n_outputs=2048, hidden=512, bottleneck=128, head_norm=True)
# C4's smaller ViT, and C1's and C5's ResNet; parity as above.
PICO_CPU = replace(NANO_CPU, options=tuple((dict(NANO_CPU.options) | dict(
    embed_dim=64, num_heads=2)).items()))
RESNET_NANO_CPU = replace(NANO_CPU, architecture="small_resnet", options=tuple(dict(
    layers=(1, 1, 2, 1), channels=(24, 48, 96, 192)).items()))
# A GPU's minutes are short, too: the same changes on ViT-Ti/4, with more crops and outputs.
MINI = replace(NANO_CPU, options=tuple((VIT | dict(global_pool="avg")).items()), batch_size=512,
               learning_rate=7.5e-4, n_local=4, n_outputs=4096, hidden=1024, bottleneck=256)
RESNET_MINI = replace(MINI, architecture="small_resnet", options=tuple(dict(
    layers=(3, 3, 1, 2), channels=(48, 96, 192, 384)).items()))
# The same two networks by contrast instead of DINO, which learns more of a GPU's few minutes.
RESNET_CONTRAST = ContrastiveRecipe("small_resnet", RESNET_MINI.options)
# Longer, at the temperature with which SimCLR learned on CIFAR-10 (Chen et al., App. B.9).
RESNET_CONTRAST_LONG = replace(RESNET_CONTRAST, temperature=0.5)
VIT_CONTRAST = ContrastiveRecipe(MINI.architecture, MINI.options, optimizer="adamw",
                                 learning_rate=1e-3, weight_decay=0.05, warmup=0.1)
# The paper's size; CIFAR-10's 32-px images are enlarged by the crops themselves.
PAPER_VIT_S = DinoRecipe("vit_small_patch16_224",
                         (("img_size", 224), ("dynamic_img_size", True)),
                         (("drop_path_rate", 0.1),), global_size=224, local_size=96, n_local=8,
                         batch_size=512, n_outputs=65_536, hidden=2048)


METHODS = {DinoRecipe: "DINO (Caron et al. 2021)",
           ContrastiveRecipe: "contrast of two views (SimCLR, Chen et al. 2020)"}


def _paced(arm: Arm) -> Arm:
    """The recipe with a momentum for a run of so few steps.

    Along the cosine to 1 a momentum of 1 - 8 / steps leaves e^-4 of the teacher's random start;
    in a short run the recipe's own would leave most of it.
    """
    if isinstance(arm.recipe, ContrastiveRecipe):
        return arm  # it has no teacher
    steps, (start, end) = arm.budget_images / arm.recipe.batch_size, arm.recipe.momentum
    return replace(arm, recipe=replace(arm.recipe, momentum=(min(start, 1 - 8 / steps), end)))


def _arms() -> dict[str, Arm]:
    """All arms; those of a size differ in images (or network), never in images seen."""
    short = {"4k": 4_000, "12k": 12_500}
    arms = {
        "vit_mini": Arm(MINI, SOURCE, MINI_IMAGES),
        "resnet_mini": Arm(RESNET_MINI, SOURCE, MINI_IMAGES),
        "vit_mini_cifar10": Arm(MINI, TARGET, MINI_IMAGES),
        "vit_mini_cifar10_4k": Arm(MINI, TARGET, MINI_IMAGES, short["4k"]),
        "resnet_mini_cifar10": Arm(RESNET_MINI, TARGET, MINI_IMAGES),
        "vit_mini_short": Arm(replace(NANO, options=tuple(VIT.items())), SOURCE, NANO_IMAGES),  # C4
    }
    arms |= {
        "resnet_contrast": Arm(RESNET_CONTRAST, SOURCE, CONTRAST_IMAGES),
        "resnet_contrast_cifar10": Arm(RESNET_CONTRAST, TARGET, CONTRAST_IMAGES),
        "resnet_contrast_cifar10_long": Arm(RESNET_CONTRAST_LONG, TARGET, LONG_CONTRAST_IMAGES),
        "resnet_contrast_cifar10_4k": Arm(RESNET_CONTRAST, TARGET, CONTRAST_IMAGES, short["4k"]),
        "vit_contrast": Arm(VIT_CONTRAST, SOURCE, CONTRAST_IMAGES),
    }
    nano = {
        "vit_nano": Arm(NANO, SOURCE, NANO_IMAGES),
        "resnet_nano": Arm(RESNET_NANO, SOURCE, NANO_IMAGES),
        "vit_nano_cifar10": Arm(NANO, TARGET, NANO_IMAGES),
        "vit_nano_union": Arm(NANO, SOURCE + TARGET, NANO_IMAGES),
    } | {f"vit_nano_cifar10_{tag}": Arm(NANO, TARGET, NANO_IMAGES, n) for tag, n in short.items()}
    for name, arm in nano.items():
        arms |= {name if seed == 0 else f"{name}_s{seed}": replace(arm, seed=seed)
                 for seed in range(3)}
    for tag, share in (("4k", 25), ("12k", 8), ("", 2)):  # as many epochs as the source's arm
        name = "vit_nano_cifar10" + (f"_{tag}" if tag else "")
        arms[f"{name}_epochs"] = replace(nano[name], budget_images=NANO_IMAGES // share)
    arms |= {
        "vit_nano_cpu": Arm(NANO_CPU, SOURCE, NANO_CPU_IMAGES),
        "vit_nano_cpu_cifar10_4k": Arm(NANO_CPU, TARGET, NANO_CPU_IMAGES, short["4k"]),
        "vit_nano_cpu_cifar10_4k_epochs": Arm(NANO_CPU, TARGET, NANO_CPU_IMAGES // 25, short["4k"]),
        "vit_pico_cpu": Arm(PICO_CPU, SOURCE, NANO_CPU_IMAGES),  # C4: the smaller
        "resnet_nano_cpu": Arm(RESNET_NANO_CPU, SOURCE, NANO_CPU_IMAGES),  # C1, C5
        "vits16_cifar10": Arm(PAPER_VIT_S, TARGET, PAPER_IMAGES),  # Figs 4b, 6 and 7a
    }
    return {name: _paced(arm) for name, arm in arms.items()}


ARMS = _arms()


def find_arm(name: str) -> Arm:
    """The arm of that name. Raises ValueError for an unknown one."""
    if name in ARMS:
        return ARMS[name]
    raise ValueError(unknown("pretraining arm", name, ARMS))


def arm_images(arm: Arm) -> np.ndarray:
    """The arm's images, uint8 [N, H, W, 3]; a subset is one prefix of one permutation."""
    images = np.concatenate([load_dataset(name, "train").images for name in arm.data])
    if arm.n_images is None:
        return images
    return images[draw_rows(len(images), arm.n_images)]


def pretrain_arm(name: str, out_dir: Path | None = None) -> Path:
    """Pretrain one arm, or finish it from its checkpoint; returns its folder.

    An arm by contrast takes minutes, is not resumed, and is learned by one process.
    On a CPU only the arms named `_cpu` end within hours; the others are begun with a warning.
    Under `torchrun` every process takes its share of each batch, the first one writes, and nothing
    is resumed: `torchrun --nproc-per-node 4 -m experiments pretrain NAME`. Leaves the teacher's
    backbone at the start and at a quarter, half and all of the budget (fp16 safetensors), the log
    with its kNN read-outs, and the checkpoint. Needs the arm's images, and Tiny-ImageNet's val
    split for the read-outs.
    """
    arm = find_arm(name)
    n_processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    if n_processes > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            return pretrain_arm(name, out_dir)
        finally:
            dist.destroy_process_group()
    first = n_processes == 1 or dist.get_rank() == 0
    folder = Path(out_dir) if out_dir else runs_dir() / "pretrain" / name
    folder.mkdir(parents=True, exist_ok=True)
    images, by_dino = arm_images(arm), isinstance(arm.recipe, DinoRecipe)
    code = code_of(*((pretrain_dino, Dino, Network) if by_dino else
                     (pretrain_contrastive, Contrastive)))
    device = find_device()
    dtype = torch.bfloat16 if gains_from_bf16(torch.device(device)) else torch.float32
    if device == "cpu" and "_cpu" not in name:
        logger.warning("The arm %s wants a GPU: on CPU cores it takes days.", name)
    if n_processes > 1 and not by_dino:
        raise ValueError(f"The arm {name} is learned by one process; run it without torchrun.")
    checkpoint = folder / "checkpoint.pt"
    if n_processes > 1:
        if first and checkpoint.exists():
            logger.warning("%s is not read: many processes do not resume.", checkpoint)
        checkpoint = None
    marks = {0.25: folder / "quarter.safetensors", 0.5: folder / "half.safetensors"}
    if checkpoint and checkpoint.exists():  # resumed: what is past stays as it is
        marks = {share: path for share, path in marks.items() if not path.exists()}
    read_out = KnnReadout() if first else None
    if first and not (start := folder / "start.safetensors").exists():
        save_backbone(_untrained(arm), start)

    def callback(run: Dino | Contrastive, entry: dict) -> None:
        entry["knn_tinyimagenet_val"] = read_out(run)
        logger.info("%s: %s", name, json.dumps(entry))
        done = entry["images_seen"] / arm.budget_images
        for share in [mark for mark in marks if done >= mark]:
            path = marks.pop(share)
            if done < share + 2 / N_REPORTS:
                save_backbone(run.backbone, path)
            else:
                logger.warning("%s is gone, and the run is past it: it stays so.", path.name)

    torch.backends.cudnn.benchmark = True  # the shapes of a run never change
    gflop, most = gflop_per_image(arm), n_processes * matrix_rate(device, dtype)
    with attention(fused=device != "cpu"):
        run = (pretrain_dino if by_dino else pretrain_contrastive)(
            images, arm.recipe, budget_images=arm.budget_images, seed=arm.seed, device=device,
            dtype=dtype, compiled=device == "cuda", n_reports=N_REPORTS,
            callback=callback if first else None, **dict(checkpoint=checkpoint) if by_dino else {})
    if not first:
        return folder
    save_backbone(run.backbone, folder / "final.safetensors")
    a_second = run.images_seen / run.seconds
    log = {
        "name": name, "method": METHODS[type(arm.recipe)], "source": arm.source,
        "source_sha256": hashlib.sha256(np.ascontiguousarray(images)).hexdigest(),
        "n_source_images": len(images), "images_seen": run.images_seen,
        "seed": arm.seed, "recipe": asdict(run.recipe), "minutes": round(run.seconds / 60, 1),
        "images_per_second, read-outs included": round(a_second),
        "gflop_per_image": round(gflop, 3),
        "share_of_the_matrix_rate": round(a_second * gflop / most, 4),
        "hardware": hardware(device) + (f", {n_processes} processes" if n_processes > 1 else ""),
        "dtype": str(dtype).removeprefix("torch."), "versions": versions(),
        "code_sha256": code,
        "finished": time.strftime("%Y-%m-%d"), "log": run.log,
    }
    write_json(folder / "log.json", log, indent=1)
    return folder


class KnnReadout:
    """Weighted kNN accuracy on Tiny-ImageNet: 8,000 train images vote on 2,000 of val, percent."""

    def __init__(self):
        bank, query = load_dataset("tinyimagenet32", "train"), load_dataset("tinyimagenet32", "val")
        self.bank = bank.subset(spread_rows(len(bank), 8_000))
        self.query = query.subset(spread_rows(len(query), 2_000))

    def __call__(self, run: Dino | Contrastive) -> float:
        bank, query = (encode(run, images.images) for images in (self.bank, self.query))
        accuracy = knn_accuracy(bank, self.bank.labels, query, self.query.labels)
        return round(100 * accuracy, 2)


@torch.inference_mode()
def encode(run: Dino | Contrastive, images: np.ndarray) -> np.ndarray:
    """Features float32 [N, D] of uint8 [N, H, W, 3] by the backbone as it is.

    At the network's own input size, where it has one.
    """
    backbone, recipe = run.backbone, run.recipe
    size = dict(recipe.options).get("img_size", images.shape[1])
    mean, std = (torch.tensor(v, device=run.device).view(1, 3, 1, 1)
                 for v in (recipe.mean, recipe.std))
    backbone.eval()
    features = []
    for start in range(0, len(images), 500):
        x = torch.from_numpy(images[start : start + 500]).to(run.device).permute(0, 3, 1, 2)
        with torch.autocast(run.device.type, torch.bfloat16, run.dtype == torch.bfloat16):
            x = x.float() / 255
            if x.shape[-1] != size:
                x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)
            features.append(backbone((x - mean) / std).float().cpu())
    backbone.train()
    return torch.cat(features).numpy()


def _untrained(arm: Arm) -> torch.nn.Module:
    """The network that an arm starts from, as `Dino` makes it."""
    with torch.random.fork_rng():
        torch.manual_seed(arm.seed)
        return timm.create_model(arm.recipe.architecture, num_classes=0, **dict(
            arm.recipe.options), **dict(getattr(arm.recipe, "local_options", ())))


def save_backbone(backbone: torch.nn.Module, path: Path) -> None:
    """A network in fp16, as `load_backbone` reads it."""
    state = {key: value.half() if value.is_floating_point() else value
             for key, value in backbone.state_dict().items()}
    state = {key: value.contiguous().cpu() for key, value in state.items()}
    write_whole(path, lambda file: file.write(save(state)))


def gflop_per_image(arm: Arm) -> float:
    """Of a training step, both networks with their heads, forward and backward: 10^9 an image."""
    with attention(fused=False), torch.device("meta"):  # shapes alone, nothing is computed
        recipe, network = arm.recipe, _untrained(arm)
        if isinstance(recipe, ContrastiveRecipe):  # two views, one network
            with FlopCounterMode(display=False) as counted:
                Contrastive.with_head(network, recipe)(
                    torch.empty(2, 3, recipe.size, recipe.size)).sum().backward()
            return counted.get_total_flops() / 1e9
        network = Network(network, recipe)
        crops = [torch.empty(n, 3, size, size) for n, size in (
            (2, recipe.global_size), (recipe.n_local, recipe.local_size)) if n]
        with FlopCounterMode(display=False) as counted:
            with torch.no_grad():
                network(crops[0])  # the teacher
            network(*crops).sum().backward()
    return counted.get_total_flops() / 1e9


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """What one device reaches in a product of two large matrices, 10^9 operations a second."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)  # a GPU is quicker with constants
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # read, so that a GPU has ended
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9
