"""A backbone by contrast: two views of an image agree, views of different images part.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020), Sec. 2.
What `invariant.py` solves for linear maps in closed form, a network learns here by gradients.
Images in, a backbone out; labels never enter.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import timm
import torch
import torch.nn.functional as F
from torch import nn

from tsp_utils.pretraining.dino import check_images, cosine
from tsp_utils.pretraining.multi_crop import constant, random_colors, random_crops
from tsp_utils.pretraining.run import diverged


@dataclass(frozen=True)
class ContrastiveRecipe:
    """Everything that shapes a run; the learning rate's schedule runs over the budget."""

    architecture: str = "small_resnet"  # any timm network
    options: tuple = ()
    size: int = 24  # px of a view: about the scale at which a mean crop of 32 px was seen
    scale: tuple = (0.2, 1.0)  # share of the image's area
    batch_size: int = 1024  # images a step, two views each
    temperature: float = 0.1
    optimizer: str = "sgd"  # with Nesterov's momentum 0.9, or "adamw"
    learning_rate: float = 0.5  # after the warm-up; a cosine to 0
    weight_decay: float = 5e-4  # none on biases and norms
    warmup: float = 0.05  # share of the budget in which the rate rises
    hidden: int = 1024  # of the projection head
    n_outputs: int = 256
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)


def nt_xent(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Which of the other 2 B - 1 views shows the same image? Mean cross-entropy over the 2 B.

    z [2, B, O]: two views of B images, of unit length (Chen et al., Eq. 1).
    """
    n, flat = z.shape[1], z.flatten(0, 1)
    similarity = flat @ flat.T / temperature
    similarity = similarity.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device),
                                        float("-inf"))
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, partner)


class Contrastive:
    """One run: backbone, projection head, optimiser; a step at a time."""

    def __init__(self, images, recipe: ContrastiveRecipe, seed: int = 0, device: str = "cpu",
                 dtype: torch.dtype = torch.float32, compiled: bool = False):
        """images uint8 [N, H, W, 3]; dtype bfloat16 means autocast."""
        check_images(images)
        if recipe.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"unknown optimizer {recipe.optimizer!r}: pass sgd or adamw")
        self.recipe = replace(recipe, batch_size=min(recipe.batch_size, len(images)))
        self.device, self.dtype = torch.device(device), dtype
        torch.manual_seed(seed)
        self.backbone = timm.create_model(recipe.architecture, num_classes=0,
                                          **dict(recipe.options))
        self.network = self.with_head(self.backbone, recipe).to(
            device, memory_format=torch.channels_last)
        self.run_network = torch.compile(self.network) if compiled else self.network
        groups = [dict(params=[p for p in self.network.parameters() if p.ndim > 1]),
                  dict(params=[p for p in self.network.parameters() if p.ndim <= 1],
                       weight_decay=0.0)]
        self.optimizer = (
            torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
            if recipe.optimizer == "sgd" else
            torch.optim.AdamW(groups, weight_decay=recipe.weight_decay))
        self.generator = torch.Generator(device).manual_seed(seed)
        self.batches = self._batches(torch.as_tensor(images).permute(0, 3, 1, 2).to(device), seed)
        self.step_count, self.seconds, self.log = 0, 0.0, []

    @staticmethod
    def with_head(backbone: nn.Module, recipe: ContrastiveRecipe) -> nn.Module:
        """Backbone and projection head, [B, 3, S, S] -> [B, n_outputs]."""
        return nn.Sequential(
            backbone, nn.Linear(backbone.num_features, recipe.hidden),
            nn.BatchNorm1d(recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, recipe.n_outputs))

    @property
    def images_seen(self) -> int:
        return self.step_count * self.recipe.batch_size

    def _batches(self, images: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
        """uint8 [B, 3, H, W]: epoch e is a permutation drawn from seed and e, its rest left out."""
        size = self.recipe.batch_size
        for epoch in count():
            order = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            rows = torch.randperm(len(images), generator=order)[:len(images) // size * size]
            yield from (images[part] for part in rows.to(images.device).split(size))

    def views(self, images: torch.Tensor) -> torch.Tensor:
        """Two views of uint8 [B, 3, H, W], first all the first: [2B, 3, S, S], normalised."""
        x = (images.float() / 255).repeat(2, 1, 1, 1)
        x = random_colors(random_crops(x, self.recipe.size, self.recipe.scale, self.generator),
                          self.generator, 0.0, 0.0)
        mean, std = (constant(tuple(v), x.device).view(1, 3, 1, 1)
                     for v in (self.recipe.mean, self.recipe.std))
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)

    def step(self, progress: float) -> torch.Tensor:
        """One update at a share of the budget; the loss, detached."""
        recipe = self.recipe
        views = self.views(next(self.batches))
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            z = self.run_network(views)
        z = F.normalize(z.float(), dim=-1).unflatten(0, (2, -1))
        loss = nt_xent(z, recipe.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        rate = recipe.learning_rate * (
            progress / recipe.warmup if progress < recipe.warmup else
            cosine((progress - recipe.warmup) / (1 - recipe.warmup), 1.0, 0.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step_count += 1
        return loss.detach()


def pretrain_contrastive(images, recipe: ContrastiveRecipe | None = None, *, budget_images: int,
                         seed: int = 0, device: str = "cpu",
                         dtype: torch.dtype = torch.float32, compiled: bool = False,
                         n_reports: int = 20, callback=None) -> Contrastive:
    """Train a backbone within a budget of images seen; returns the run (`.backbone`, `.log`).

    images uint8 [N, H, W, 3], without labels. `callback(run, entry)` is called n_reports times, or
    after each step of fewer, for read-outs. The backbone is left ready to be used.
    Raises ValueError for a budget of 0 or images of another shape or type; RuntimeError for a run
    that diverged.
    """
    recipe = recipe or ContrastiveRecipe()
    if budget_images < 1:
        raise ValueError("The budget is empty; pass budget_images of at least 1.")
    run = Contrastive(images, recipe, seed, device, dtype, compiled)
    start = time.perf_counter()
    while (at := run.images_seen / budget_images) < 1:
        loss = run.step(at)
        share = run.images_seen / budget_images
        if share * n_reports >= len(run.log) + 1 or share >= 1:
            if not loss.isfinite():
                raise diverged(run.images_seen)
            run.seconds = time.perf_counter() - start
            run.log.append({"images_seen": run.images_seen, "seconds": round(run.seconds, 1),
                            "loss": float(loss)})
            if callback is not None:
                callback(run, run.log[-1])
    run.backbone.eval()
    return run
