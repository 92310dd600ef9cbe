"""The backbone trained with a clustering loss: what C7 warns of and D1 recommends (Sec. 4.4).

One loop, `train_together`, for two kinds of networks: a whole backbone on images, and the last
blocks of a transformer on the tokens that enter them, which are computed once and kept.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from tsp_utils.backbones import Backbone
from tsp_utils.features import extract_features
from tsp_utils.heads import LinearHeads, draw_batches
from tsp_utils.losses import tsp_loss
from tsp_utils.neighbors import WEIGHTINGS, nearest_neighbors

TRAINED = ("nothing", "last block", "backbone")


def finetune(backbone, head: LinearHeads, images: np.ndarray, *, trained: str = "backbone",
             callback=None, **options):
    """Go on training a head, and with it the backbone, on Eq. 5; no label is read.

    backbone: a `Backbone`, which is copied; head: `LinearHeads` of one seed, trained in place;
    images uint8 [N, H, W, C]. trained "nothing" is the frozen arm: the head alone, as long. Norms
    stay in evaluation mode. `callback(epoch, backbone, head)` and options (but for `views`, which a
    whole backbone does not take) as in `train_together`. Returns the tuned copy. Raises ValueError
    for an unknown `trained`, several heads at once, fewer images than a batch.
    """
    if trained not in TRAINED:
        raise ValueError(f"{trained!r} cannot be trained; pass one of {', '.join(TRAINED)}.")
    network = WholeBackbone(backbone, trained)
    train_together(network, head, images, **options, callback=callback and (
        lambda epoch, network, head: callback(epoch, network.backbone, head)))
    return network.backbone


def eq5(head, x, neighbor_x, view_x, progress, entropy_weight: float = 3.0):
    """Eq. 5 on features [1, B, D]; TSP has no views."""
    return tsp_loss(head(x), head(neighbor_x), entropy_weight)[0]


def train_together(network, head: LinearHeads, inputs, *, loss: Callable = eq5, views=None,
                   scale: float = 1.0, learning_rate: float = 1e-5,
                   head_learning_rate: float = 1e-4, n_epochs: int = 3, batch_size: int = 256,
                   n_neighbors: int = 20, metric: str = "cosine", weighting: str = "gaussian",
                   refresh: bool = True, callback=None) -> None:
    """Train a head of one seed and what of a network learns on one loss, in place.

    network: gives `features(inputs)` float32 [N, D] of all inputs, and called with (inputs, rows)
    those of some, as a tensor with gradients; scale: the scalar by which the head's features were
    multiplied. loss(head, x, neighbours' x, views' x or None, share done) of [1, B, D] each; views
    [N, V, ...] of the inputs, of which one is drawn. Neighbours are drawn as `WEIGHTINGS`
    says; refresh searches them again before each epoch, in the space as it has
    become. callback(epoch, network, head) before the first epoch with 0, and after each.
    """
    if len(head.seeds) != 1:
        raise ValueError(f"{len(head.seeds)} heads would pull one backbone in as many directions; "
                         f"pass LinearHeads of one seed.")
    if len(inputs) < batch_size:
        raise ValueError(f"{len(inputs)} images are fewer than a batch of {batch_size}; pass more "
                         f"images or a smaller batch_size.")
    head.to(network.device)
    learned = [weight for weight in network.parameters() if weight.requires_grad]
    adam = torch.optim.Adam([dict(params=head.parameters(), lr=head_learning_rate)]
                            + [dict(params=learned, lr=learning_rate)] * bool(learned))
    rng, choice = (np.random.default_rng([head.seeds[0], stream]) for stream in (3, 5))
    n_steps = len(inputs) // batch_size
    if callback is not None:
        callback(0, network, head)
    for epoch in range(n_epochs):
        if epoch == 0 or (refresh and learned):
            found = nearest_neighbors(network.features(inputs) * np.float32(scale), n_neighbors,
                                      metric)
            weights = WEIGHTINGS[weighting](found)
        batches = draw_batches(found, weights, [rng], batch_size, n_steps)
        for step, pairs in enumerate(batches, epoch * n_steps):
            rows = pairs[0].numpy()  # [2, B]
            drawn = () if views is None else (
                views[rows[0], choice.integers(0, views.shape[1], batch_size)],)
            x = network(inputs, rows.reshape(-1), *drawn) * scale  # [2B or 3B, D]
            parts = [part[None] for part in x.split(batch_size)]
            value = loss(head, *parts, *[None] * (3 - len(parts)), step / (n_epochs * n_steps))
            adam.zero_grad(set_to_none=True)
            value.sum().backward()
            adam.step()
        if callback is not None:
            callback(epoch + 1, network, head)
    head.cpu()


class WholeBackbone:
    """A copy of a backbone of which nothing, the last block or all learns; inputs are images."""

    def __init__(self, backbone: Backbone, trained: str):
        self.backbone, self.device = copy.deepcopy(backbone), backbone.device
        self.model = self.backbone.model.requires_grad_(False)
        parts = {"nothing": list, "last block": self._last_block, "backbone": lambda: [self.model]}
        for part in parts[trained]():
            part.requires_grad_()
        self.frozen = trained == "nothing"

    def parameters(self):
        return self.model.parameters()

    def features(self, images) -> np.ndarray:
        self.known = extract_features(self.backbone, images, progress=False)
        return self.known

    def __call__(self, images, rows) -> torch.Tensor:
        if self.frozen:
            return torch.from_numpy(self.known[rows]).to(self.device)
        x = self.backbone.prepare(images[rows]).to(self.device)
        with autocast(self.backbone):
            return self.model(x).float()

    def _last_block(self) -> list:
        """A ViT's last block and final norm, or a ResNet's last stage."""
        if hasattr(self.model, "blocks"):
            return [self.model.blocks[-1], *(getattr(self.model, name) for name in (
                "norm", "fc_norm") if hasattr(self.model, name))]
        if not hasattr(self.model, "layer4"):
            raise ValueError(f"{self.backbone.name} has no last block; pass a transformer or a "
                             f"ResNet, or train another part.")
        return [self.model.layer4]


class LastBlocks(nn.Module):
    """The last n blocks of a vision transformer, a copy that can learn; a mean's norm stays.

    tokens(images uint8 [N, H, W, C]) -> what enters them, [N, T, D]; features(tokens) -> [N, D]:
    together the backbone's own features. n = 0: nothing learns.
    """

    def __init__(self, backbone: Backbone, n: int):
        super().__init__()
        model = backbone.model
        if not hasattr(model, "blocks") or n > len(model.blocks):
            raise ValueError(f"{backbone.name} has no {n} last blocks; pass a vision transformer, "
                             f"and at most as many blocks as it has.")
        self.n, self.of, self.device = n, [backbone], backbone.device  # listed: no submodule
        self.blocks = nn.ModuleList(copy.deepcopy(list(model.blocks)[len(model.blocks) - n :]))
        self.norm = copy.deepcopy(model.norm)
        self.requires_grad_(n > 0)

    @torch.inference_mode()
    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """What `Backbone.prepare` gave, [N, 3, S, S] -> [N, T, D] in the backbone's dtype."""
        backbone, parts = self.of[0], []
        model = backbone.model
        for rows in x.split(256):
            with autocast(backbone):
                found = model._pos_embed(model.patch_embed(rows.to(self.device)))
                found = model.norm_pre(model.patch_drop(found))
                for block in list(model.blocks)[: len(model.blocks) - self.n]:
                    found = block(found)
            parts.append(found.to(backbone.dtype).cpu())
        return torch.cat(parts).clone()  # a tensor of its own, outside inference mode

    def forward(self, tokens: torch.Tensor, rows=None, *more: torch.Tensor) -> torch.Tensor:
        """Features [B, D] of all tokens, or of some rows and then of more tokens."""
        if rows is not None:
            tokens = torch.cat([tokens[rows], *more]).to(self.device)
        with autocast(self.of[0]):
            for block in self.blocks:
                tokens = block(tokens)
            found = self.of[0].model.forward_head(self.norm(tokens), pre_logits=True)
        return found.float()

    @torch.no_grad()
    def features(self, tokens: torch.Tensor) -> np.ndarray:
        """Features of all tokens, float32 [N, D], without gradients."""
        return torch.cat([self(rows.to(self.device)).cpu()
                          for rows in tokens.split(1024)]).numpy()


def autocast(backbone: Backbone):
    """bfloat16 where the backbone computes in it."""
    return torch.autocast(backbone.device.type, torch.bfloat16, backbone.dtype == torch.bfloat16)
