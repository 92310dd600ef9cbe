"""What every pretraining does: images in the order of epochs, steps within a budget, reports."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

import tsp_utils.networks.small_resnet  # noqa: F401  (timm learns its name)


class Trainer:
    """One run: its images, what it has seen of them and in what time. `step` is the subclass's."""

    def __init__(self, images, recipe, seed: int, device: str, dtype: torch.dtype):
        """images uint8 [N, H, W, 3]; dtype bfloat16 means autocast.

        Raises ValueError for images of another shape or type, and for fewer than two.
        """
        if getattr(images, "ndim", 0) != 4 or images.shape[3] != 3:
            raise ValueError("Pretraining takes images uint8 [N, H, W, 3] of one size; resize them "
                             "first.")
        if len(images) < 2:
            raise ValueError(f"{len(images)} image is too few to learn from; pass at least 2, and "
                             f"thousands for features of use.")
        if "uint8" not in str(images.dtype):
            raise ValueError(f"The images are {images.dtype}; pass uint8 in [0, 255].")
        self.recipe = replace(recipe, batch_size=min(recipe.batch_size, len(images)))
        self.seed, self.device, self.dtype = seed, torch.device(device), dtype
        self.images = torch.as_tensor(images).to(device).permute(0, 3, 1, 2).contiguous()
        self.step_count, self.seconds, self.log, self.epoch = 0, 0.0, [], -1
        torch.manual_seed(seed)  # of the networks that are made now

    @property
    def images_seen(self) -> int:
        return self.step_count * self.recipe.batch_size

    def batch(self) -> torch.Tensor:
        """The next batch uint8 [B, 3, H, W]: epoch e is a permutation drawn from seed and e."""
        size, n = self.recipe.batch_size, len(self.images)
        epoch, place = divmod(self.step_count, n // size)
        if epoch != self.epoch:  # to the device once an epoch: the host waits at each copy
            order = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(n, generator=order).to(self.device)
        rows = self.order[place * size:(place + 1) * size]
        if dist.is_initialized():  # each process its share
            rows = rows.tensor_split(dist.get_world_size())[dist.get_rank()]
        return self.images[rows]

    def steps(self, budget_images: int, n_reports: int) -> Iterator[dict | None]:
        """Steps until the budget is spent: yields None, or the log's new entry, n_reports times.

        Raises ValueError for a budget of 0, RuntimeError for a run that diverged.
        """
        if budget_images < 1:
            raise ValueError("The budget is empty; pass budget_images of at least 1.")
        start = time.perf_counter() - self.seconds
        while (at := self.images_seen / budget_images) < 1:
            loss, entry = self.step(at), None
            share = self.images_seen / budget_images
            due = share * n_reports >= len(self.log) + 1 or share >= 1
            if due and not loss.isfinite():  # a GPU is waited for
                raise diverged(self.images_seen)
            self.seconds = time.perf_counter() - start
            if due:
                entry = {"images_seen": self.images_seen, "seconds": round(self.seconds, 1),
                         "loss": float(loss)}
                self.log.append(entry)
            yield entry


def diverged(images_seen: int) -> RuntimeError:
    return RuntimeError(f"The run diverged: after {images_seen:,} images loss or weights are not "
                        f"finite; lower learning_rate. The last good checkpoint, if there is one, "
                        f"was kept.")


def groups_by_decay(network: nn.Module) -> list[dict]:
    """What learns, for an optimiser: weights, and biases and norms, which do not decay."""
    learned = [p for p in network.parameters() if p.requires_grad]
    return [dict(params=[p for p in learned if p.ndim > 1]),
            dict(params=[p for p in learned if p.ndim <= 1], weight_decay=0.0)]


def cosine(progress: float, start: float, end: float) -> float:
    """From start at 0 to end at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def warmed_up(progress: float, warmup: float, peak: float, end: float) -> float:
    """A rate that rises from 0 to its peak over the share warmup, then follows a cosine."""
    if progress < warmup:
        return peak * (progress / warmup)
    return cosine((progress - warmup) / (1 - warmup), peak, end)
