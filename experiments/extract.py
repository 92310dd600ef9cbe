"""Features of a data set by several GPUs, or processes: each makes its share of the batches.

torchrun --nproc-per-node 8 -m experiments extract cifar10 train dino_vitb16
"""

import os

import torch
import torch.distributed as dist

from tsp_utils.backbones import load_backbone
from tsp_utils.datasets import load_dataset
from tsp_utils.features import cached_features
from tsp_utils.files.paths import cache_dir


def extract(dataset: str, split: str, backbone: str, batch_size: int = 256):
    """Features in the cache, as `cached_features` alone would make them; returns its folder."""
    rank, n_ranks, local = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    images = load_dataset(dataset, split)
    network = load_backbone(backbone, f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    if n_ranks > 1:
        dist.init_process_group("gloo")  # nothing but the end is agreed on: vectors go by the cache
        share = [i for i in range(len(images)) if i // batch_size % n_ranks == rank]
        if share:  # fewer batches than processes
            cached_features(network, images.subset(share), None, batch_size, not rank,
                            maker=f"{rank}_of_{n_ranks}")
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        cached_features(network, images, batch_size=batch_size)  # all: is anything lacking?
    return cache_dir() / "features"
