"""A backbone by contrast: two views of an image agree, views of different images part.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020), Sec. 2.
What `invariant.py` solves for linear maps in closed form, a network learns here by gradients.
Images in, a backbone out; labels never enter.
"""

from dataclasses import dataclass
from functools import partial

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tsp_utils.pretraining.multi_crop import constant, random_colors, random_crops
from tsp_utils.pretraining.trainer import Trainer, groups_by_decay, warmed_up

OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
              "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class ContrastiveRecipe:
    """Everything that shapes a run; the learning rate's schedule runs over the budget."""

    architecture: str = "small_resnet"  # any timm network
    options: tuple = ()
    size: int = 24  # px of a view: about the scale at which a mean crop of 32 px was seen
    scale: tuple = (0.2, 1.0)  # share of the image's area
    batch_size: int = 1024  # images a step, two views each
    temperature: float = 0.1
    optimizer: str = "sgd"  # of OPTIMIZERS
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


class Contrastive(Trainer):
    """One run: backbone, projection head, optimiser; a step at a time."""

    def __init__(self, images, recipe: ContrastiveRecipe, seed: int = 0, device: str = "cpu",
                 dtype: torch.dtype = torch.float32, compiled: bool = False):
        if dist.is_initialized():
            raise ValueError("Learning by contrast takes one process; run it without torchrun.")
        super().__init__(images, recipe, seed, device, dtype)
        if recipe.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {recipe.optimizer!r}: pass sgd or adamw")
        self.backbone = timm.create_model(recipe.architecture, num_classes=0,
                                          **dict(recipe.options))
        self.network = self.with_head(self.backbone, recipe).to(
            device, memory_format=torch.channels_last)
        self.run_network = torch.compile(self.network) if compiled else self.network
        self.optimizer = OPTIMIZERS[recipe.optimizer](groups_by_decay(self.network),
                                                      weight_decay=recipe.weight_decay)
        self.generator = torch.Generator(device).manual_seed(seed)

    @staticmethod
    def with_head(backbone: nn.Module, recipe: ContrastiveRecipe) -> nn.Module:
        """Backbone and projection head, [B, 3, S, S] -> [B, n_outputs]."""
        return nn.Sequential(
            backbone, nn.Linear(backbone.num_features, recipe.hidden),
            nn.BatchNorm1d(recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, recipe.n_outputs))

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
        views = self.views(self.batch())
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            z = self.run_network(views)
        z = F.normalize(z.float(), dim=-1).unflatten(0, (2, -1))
        loss = nt_xent(z, recipe.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = warmed_up(progress, recipe.warmup, recipe.learning_rate, 0.0)
        self.optimizer.step()
        self.step_count += 1
        return loss.detach()


def pretrain_contrastive(images, recipe: ContrastiveRecipe, *, budget_images: int,
                         n_reports: int = 20, callback=None, **options) -> Contrastive:
    """Train a backbone within a budget of images seen; returns the run (`.backbone`, `.log`).

    images uint8 [N, H, W, 3], without labels. `callback(run, entry)` is called n_reports times, or
    after each step of fewer, for read-outs; options (seed, device, dtype, compiled) are
    `Contrastive`'s. The backbone is left ready to be used.
    Raises ValueError for a budget of 0 or images of another shape or type; RuntimeError for a run
    that diverged.
    """
    run = Contrastive(images, recipe, **options)
    for entry in run.steps(budget_images, n_reports):
        if entry and callback is not None:
            callback(run, entry)
    run.backbone.eval()
    return run
