"""Eq. 5, the clustering loss: neighbours agree, clusters stay in use."""

import math

import torch


def loss_terms(logits: torch.Tensor, neighbor_logits: torch.Tensor):
    """The two terms of Eq. 5, before lambda weighs them.

    logits and neighbor_logits [..., B, C]: of B samples and of one neighbour of each. Returns
    consistency [...] = -mean_i log <p_i, p_j>, and entropy [...] = H(mean_i p_i) in nats.
    The inner product is taken as logsumexp(log p_i + log p_j): no clamp, no lost gradient.
    """
    # Classes before samples: torch's softmax over a short last axis is twenty times slower.
    log_p = logits.mT.contiguous().log_softmax(-2)  # [..., C, B]
    log_q = neighbor_logits.mT.contiguous().log_softmax(-2)
    consistency = -(log_p + log_q).logsumexp(-2).mean(-1)  # [...]
    log_mean = log_p.logsumexp(-1) - math.log(logits.shape[-2])  # [..., C]
    entropy = -(log_mean.exp() * log_mean).sum(-1)  # [...]
    return consistency, entropy


def tsp_loss(logits: torch.Tensor, neighbor_logits: torch.Tensor, entropy_weight: float = 3.0):
    """Eq. 5: L = -E_i E_{j ~ P(.|i)} log <p_i, p_j> - lambda H(E_i p_i).

    Shapes as in `loss_terms`; returns [...]. The draw j ~ P(.|i) of Eq. 4 is the caller's.
    """
    consistency, entropy = loss_terms(logits, neighbor_logits)
    return consistency - entropy_weight * entropy
