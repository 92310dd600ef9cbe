"""Heads with a hidden layer, against which the linear head is measured (claim C10)."""

import math

import numpy as np
import torch

from tsp_utils.heads import LinearHeads


class MLPHeads(LinearHeads):
    """S heads with one hidden layer of H units: hidden [S, H, D] and [S, H], then a linear head.

    What Sec. 3.2 advises against (claim C10). Starts from torch's default law, a seed a head:
    Appendix A has no start for several layers.
    """

    def __init__(self, dim: int, n_clusters: int, seeds, n_hidden: int = 128):
        rngs = [np.random.default_rng([seed, 4]) for seed in seeds]
        super().__init__(np.stack([rng.uniform(-1, 1, (n_clusters, n_hidden)) for rng in rngs])
                         / math.sqrt(n_hidden), seeds)
        self.hidden = LinearHeads(np.stack([rng.uniform(-1, 1, (n_hidden, dim)) for rng in rngs])
                                  / math.sqrt(dim), seeds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.hidden(x).relu())
