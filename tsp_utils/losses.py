"""The clustering loss, Eq. 5: neighbours agree (log inner product), clusters stay in use (entropy).

A loss takes logits and neighbours' logits [S, B, C] (S heads, B samples in a batch, C clusters) and
returns its value [S] and its terms by name, each [S]: that is what `train_heads` trains on.
"""

import math

import torch


def tsp_loss(logits: torch.Tensor, neighbor_logits: torch.Tensor, entropy_weight: float = 3.0
             ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 5: L = -E_i E_{j ~ P(.|i)} log <p_i, p_j> - lambda H(E_i p_i), lambda = entropy_weight.

    logits and neighbor_logits [..., B, C]; the draw j ~ P(.|i) of Eq. 4 is the caller's. Returns L
    [...] in nats, and its terms: "consistency" = -mean_i log <p_i, p_j> and "entropy" =
    H(mean_i p_i) of the batch, both [...].
    """
    terms = dict(zip(("consistency", "entropy"), loss_terms(
        log_probabilities(logits), log_probabilities(neighbor_logits)), strict=True))
    return terms["consistency"] - entropy_weight * terms["entropy"], terms


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logits [..., B, C] -> log p, classes first: [..., C, B]."""
    # Torch's softmax over a short last axis is twenty times slower.
    return logits.mT.contiguous().log_softmax(-2)


def loss_terms(log_p: torch.Tensor, log_q: torch.Tensor):
    """The two terms of Eq. 5, before lambda weighs them.

    log_p and log_q [..., C, B], as from `log_probabilities`: of B samples and of one neighbour of
    each. Returns consistency [...] = -mean_i log <p_i, p_j>, and entropy [...] = H(mean_i p_i) in
    nats. The inner product is taken as logsumexp(log p_i + log p_j): no clamp, no lost gradient.
    """
    consistency = -(log_p + log_q).logsumexp(-2).mean(-1)  # [...]
    log_mean = log_p.logsumexp(-1) - math.log(log_p.shape[-1])  # [..., C]
    entropy = -(log_mean.exp() * log_mean).sum(-1)  # [...]
    return consistency, entropy
