"""The backbone trained with the clustering loss: what claim C7 warns of (Sec. 4.4, Fig. 6)."""

import copy

import numpy as np
import torch

from tsp_utils.features import extract_features
from tsp_utils.heads import LinearHeads, draw_pairs
from tsp_utils.losses import tsp_loss
from tsp_utils.neighbors import nearest_neighbors, neighbor_weights

TRAINED = ("nothing", "last block", "backbone")


def finetune(backbone, head: LinearHeads, images: np.ndarray, *, scale: float = 1.0,
             trained: str = "backbone", learning_rate: float = 1e-5,
             head_learning_rate: float = 1e-4, n_epochs: int = 3, batch_size: int = 256,
             n_neighbors: int = 20, metric: str = "cosine", refresh: bool = True,
             entropy_weight: float = 3.0, callback=None):
    """Go on training a head, and with it the backbone, on Eq. 5; no label is read.

    backbone: a `Backbone`, which is copied; head: `LinearHeads` of one seed, trained in place;
    images uint8 [N, H, W, C]; scale: the scalar by which the head's features were multiplied.
    trained "nothing" is the frozen arm: the head alone, as long. refresh searches the neighbours
    again before each epoch, in the space as it has become; False keeps the first table. Norms stay
    in evaluation mode. `callback(epoch, backbone, head)` is called before the first epoch with 0
    and after each, for read-outs. Returns the tuned copy.
    Raises ValueError for several heads at once, an unknown `trained`, fewer images than a batch.
    """
    if len(head.seeds) != 1:
        raise ValueError(f"{len(head.seeds)} heads would pull one backbone in as many directions; "
                         f"pass LinearHeads of one seed.")
    if trained not in TRAINED:
        raise ValueError(f"{trained!r} cannot be trained; pass one of {', '.join(TRAINED)}.")
    if len(images) < batch_size:
        raise ValueError(f"{len(images)} images are fewer than a batch of {batch_size}; pass more "
                         f"images or a smaller batch_size.")
    network = copy.deepcopy(backbone)
    model = network.model.requires_grad_(False)
    learned = {"nothing": [], "last block": _last_block(model), "backbone": [model]}[trained]
    weights = [p.requires_grad_() for module in learned for p in module.parameters()]
    head.to(network.device)
    groups = [dict(params=head.parameters(), lr=head_learning_rate)]
    adam = torch.optim.Adam(groups + [dict(params=weights, lr=learning_rate)] * bool(weights))
    rng = np.random.default_rng([head.seeds[0], 3])
    n_pairs = len(images) // batch_size * batch_size
    if callback is not None:
        callback(0, network, head)
    for epoch in range(1, n_epochs + 1):
        if epoch == 1 or (refresh and weights):
            features = extract_features(network, images, progress=False) * np.float32(scale)
            neighbors = nearest_neighbors(features, n_neighbors, metric)
            cumulative = neighbor_weights(neighbors).cumsum(1)
        pairs = draw_pairs(rng, neighbors.indices, cumulative, n_pairs)  # [2, T * B]
        for rows in np.split(pairs, n_pairs // batch_size, axis=1):  # [2, B]
            if weights:
                x = network.prepare(images[rows.reshape(-1)]).to(network.device)
                with torch.autocast(network.device.type, torch.bfloat16,
                                    network.dtype == torch.bfloat16):
                    x = model(x)  # [2B, D]
                x = x.float() * scale
            else:
                x = torch.from_numpy(features[rows.reshape(-1)]).to(network.device)
            mine, others = head(x)[0].split(batch_size)  # [B, C] each
            adam.zero_grad(set_to_none=True)
            tsp_loss(mine, others, entropy_weight)[0].backward()
            adam.step()
        if callback is not None:
            callback(epoch, network, head)
    head.cpu()
    return network


def _last_block(model) -> list:
    """A ViT's last block and final norm, or a ResNet's last stage."""
    if hasattr(model, "blocks"):
        return [model.blocks[-1], *(getattr(model, name) for name in ("norm", "fc_norm")
                                    if hasattr(model, name))]
    return [model.layer4]
