"""DINO from scratch: multi-crop, student and momentum teacher, centring (Sec. 3.1, Eqs 1 to 3).

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021). Images in, a
backbone out; labels never enter. All images lie as one uint8 tensor on the device.
"""

import copy
import hashlib
import logging
from dataclasses import dataclass, replace

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from tsp_utils.pretraining.multi_crop import multi_crop
from tsp_utils.pretraining.trainer import Trainer, cosine, groups_by_decay, warmed_up

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DinoRecipe:
    """Everything that shapes a pretraining run; schedules run over the share of the budget used."""

    architecture: str = "vit_tiny_patch16_224"  # any timm network
    options: tuple = (("patch_size", 4), ("img_size", 32), ("dynamic_img_size", True))
    local_options: tuple = ()  # of the student alone, for example ("drop_path_rate", 0.1)
    global_size: int = 32  # px of the two global crops
    local_size: int = 16  # px of the local crops; a multiple of the patch
    n_local: int = 6  # local crops an image
    global_scale: tuple = (0.3, 1.0)  # share of the image's area
    local_scale: tuple = (0.05, 0.3)
    batch_size: int = 1024  # images a step, over all processes
    learning_rate: float = 5e-4  # a batch of 256, scaled linearly, after the warm-up
    final_learning_rate: float = 1e-6  # cosine
    warmup: float = 0.05  # share of the budget in which the rate rises
    weight_decay: tuple = (0.04, 0.4)  # cosine; none on biases and norms
    momentum: tuple = (0.996, 1.0)  # Eq. 2's lambda, cosine
    teacher_temperature: tuple = (0.04, 0.07)  # linear over the first `temperature_warmup`
    temperature_warmup: float = 0.2
    student_temperature: float = 0.1
    center_momentum: float = 0.9  # Eq. 3's m
    n_outputs: int = 8192  # of the projection head
    hidden: int = 1024  # of its two hidden layers
    bottleneck: int = 256
    head_norm: bool = False  # batch norm in the head: short runs leave the uniform start sooner
    max_gradient_norm: float = 3.0
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)


class ProjectionHead(nn.Module):
    """h of Sec. 3.1: three layers to a unit vector, then prototypes of unit length, [B,D] -> [B,O].

    The last layer is normalised by a parametrisation whose lengths stay 1.
    """

    def __init__(self, dim: int, recipe: DinoRecipe):
        super().__init__()
        norm = nn.BatchNorm1d if recipe.head_norm else nn.Identity
        self.mlp = nn.Sequential(
            nn.Linear(dim, recipe.hidden), norm(recipe.hidden), nn.GELU(),
            nn.Linear(recipe.hidden, recipe.hidden), norm(recipe.hidden), nn.GELU(),
            nn.Linear(recipe.hidden, recipe.bottleneck))
        for layer in self.mlp[::3]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last = weight_norm(nn.Linear(recipe.bottleneck, recipe.n_outputs, bias=False))
        lengths = self.last.parametrizations.weight.original0
        lengths.data.fill_(1)
        lengths.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """g = h o f: backbone and projection head over crops of any sizes."""

    def __init__(self, backbone: nn.Module, recipe: DinoRecipe):
        super().__init__()
        self.backbone = backbone
        width = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        self.head = ProjectionHead(width, recipe)

    def forward(self, *groups: torch.Tensor) -> torch.Tensor:
        """groups: crops [n, 3, S, S], one tensor a size -> logits [sum of n, O], in their order."""
        return self.head(torch.cat([self.backbone(group) for group in groups]))


def dino_loss(student: torch.Tensor, teacher: torch.Tensor, center: torch.Tensor,
              student_temperature: float, teacher_temperature: float) -> torch.Tensor:
    """Eq. 1: cross-entropy of every student view with each OTHER global view of the teacher.

    student [V, B, O] and teacher [2, B, O]: logits, the first two views global, in the same order;
    center [O] is subtracted from the teacher's (the paper's text adds it, DINO's code subtracts).
    Mean over the pairs of views and the batch (Eq. 1 sums, DINO's code averages).
    """
    targets = ((teacher.to(center.dtype) - center) / teacher_temperature).softmax(-1)  # [2, B, O]
    log_p = (student.to(center.dtype) / student_temperature).log_softmax(-1)  # [V, B, O]
    crossed = -torch.einsum("tbo,vbo->tv", targets, log_p) / student.shape[1]  # [2, V]
    return torch.cat([crossed[0, 1:], crossed[1, :1], crossed[1, 2:]]).mean()  # no mask: it waits


@torch.no_grad()
def update_center(center: torch.Tensor, teacher: torch.Tensor, momentum: float) -> None:
    """Eq. 3, in place: c <- m c + (1 - m) mean of the teacher's logits [2, B, O], all processes."""
    mean = teacher.to(center.dtype).mean((0, 1))
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    center.mul_(momentum).add_(mean, alpha=1 - momentum)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Eq. 2, in place: theta_t <- lambda theta_t + (1 - lambda) theta_s."""
    ours, theirs = list(teacher.parameters()), list(student.parameters())
    torch._foreach_mul_(ours, momentum)
    torch._foreach_add_(ours, theirs, alpha=1 - momentum)


def schedule(recipe: DinoRecipe, progress: float) -> dict[str, float]:
    """Learning rate, weight decay, momentum and teacher temperature at a share of the budget."""
    peak = recipe.learning_rate * recipe.batch_size / 256
    low, high = recipe.teacher_temperature
    return {
        "learning_rate": warmed_up(progress, recipe.warmup, peak, recipe.final_learning_rate),
        "weight_decay": cosine(progress, *recipe.weight_decay),
        "momentum": cosine(progress, *recipe.momentum),
        "teacher_temperature": high if progress >= recipe.temperature_warmup else (
            low + (high - low) * progress / recipe.temperature_warmup),
    }


class Dino(Trainer):
    """One run of `run.pretrain_dino`: student, teacher, centre, optimiser; resumable."""

    def __init__(self, images, recipe: DinoRecipe, seed: int = 0, device: str = "cpu",
                 dtype: torch.dtype = torch.float32, compiled: bool = False):
        super().__init__(images, recipe, seed, device, dtype)
        recipe, images = self.recipe, torch.as_tensor(images)
        self.budget = ""  # what the schedules run over, for a checkpoint to compare
        self.content = hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()[:16]
        backbone = timm.create_model(recipe.architecture, num_classes=0,
                                     **dict(recipe.options), **dict(recipe.local_options))
        _check_sizes(recipe, images, backbone)
        self.student = Network(backbone, recipe)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():  # the teacher drops nothing
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        if dist.is_initialized() and self.device.type == "cuda":  # one batch's statistics
            self.student, self.teacher = map(nn.SyncBatchNorm.convert_sync_batchnorm,
                                             (self.student, self.teacher))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.student.to(device, wide)
        self.teacher.to(device, wide)
        self.center = torch.zeros(recipe.n_outputs, device=device, dtype=wide)
        self.adam = torch.optim.AdamW(groups_by_decay(self.student))
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank:  # else all processes would drop the same paths
            torch.manual_seed(seed + 7919 * rank)
        self.generator = torch.Generator(device).manual_seed(seed + 7919 * rank)  # of the crops
        self.plain = self.student, self.teacher
        if dist.is_initialized():
            self.plain = DistributedDataParallel(self.student), self.teacher
        self.run_student, self.run_teacher = map(torch.compile, self.plain) if compiled else (
            self.plain)

    @property
    def backbone(self) -> nn.Module:
        """What the run is for: the teacher's."""
        return self.teacher.backbone

    def step(self, progress: float, groups: list[torch.Tensor] | None = None) -> torch.Tensor:
        """One update at a share of the budget; `groups` are this process's crops, else drawn."""
        self.now = now = schedule(self.recipe, progress)
        if groups is None:
            groups = multi_crop(self.batch(), self.recipe, self.generator)
        groups = [group.to(self.center.dtype) for group in groups]
        try:
            teacher, student = self._logits(groups)
        except Exception as error:
            if (self.run_student, self.run_teacher) == self.plain:
                raise
            logger.warning("torch.compile does not work here (%s); the run goes on without it.",
                           str(error).strip().split("\n")[0])
            self.run_student, self.run_teacher = self.plain
            teacher, student = self._logits(groups)
        n = len(groups[0]) // 2
        teacher, student = teacher.view(2, n, -1), student.view(-1, n, student.shape[-1])
        loss = dino_loss(student, teacher, self.center, self.recipe.student_temperature,
                         now["teacher_temperature"])
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        if self.images_seen < len(self.images) and progress < self.recipe.warmup:
            # the prototypes rest at first: for an epoch, or the warm-up where that is shorter
            self.student.head.last.parametrizations.weight.original1.grad = None
        nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.max_gradient_norm)
        for group, decay in zip(self.adam.param_groups, (now["weight_decay"], 0.0), strict=True):
            group.update(lr=now["learning_rate"], weight_decay=decay)
        self.adam.step()
        update_teacher(self.teacher, self.student, now["momentum"])
        update_center(self.center, teacher, self.recipe.center_momentum)
        self.step_count += 1
        self.last_teacher = teacher
        return loss.detach()

    def _logits(self, groups: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's of the global crops, the student's of all."""
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            with torch.no_grad():
                teacher = self.run_teacher(groups[0])
            return teacher, self.run_student(*groups)

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Figures of a collapse: entropy of the teacher's mean output (nats), feature spread.

        The spread is the mean standard deviation of unit-length features; 1 / sqrt(D) is the most.
        """
        p = ((self.last_teacher.float() - self.center.float())
             / self.recipe.teacher_temperature[1]).softmax(-1).mean((0, 1))
        x = multi_crop(self.batch()[:256], replace(self.recipe, n_local=0),
                       torch.Generator(self.device).manual_seed(0))[0]
        self.teacher.backbone.eval()  # else batch norm would learn from being looked at
        features = F.normalize(self.teacher.backbone(x.to(self.center.dtype)).float(), dim=-1)
        self.teacher.backbone.train()
        return {"teacher_entropy": float(-(p * p.clamp(min=1e-12).log()).sum()),
                "feature_spread": float(features.std(0).mean())}


def _check_sizes(recipe: DinoRecipe, images, backbone: nn.Module) -> None:
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    patch = max(patch) if isinstance(patch, tuple) else patch
    if min(images.shape[1:3]) < patch or recipe.local_size % patch or recipe.global_size % patch:
        raise ValueError(f"Images of {images.shape[1]} x {images.shape[2]} px and crops of "
                         f"{recipe.global_size} and {recipe.local_size} px do not fit patches of "
                         f"{patch} px; pass larger images, or crops that are multiples of it.")
