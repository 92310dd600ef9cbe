"""SCAN, NNM, TEMI, IIC and others: their clustering losses and constants, for a linear head.

A loss takes logits a and b [S, C, B] of S heads, classes before samples: of a batch and of one
drawn neighbour of each sample. In the systems that train on pixels b is an augmented view; on
frozen features the neighbour stands in for it, so these are analogues. It returns [S].
"""

import copy
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from tsp_utils.heads import LinearHeads
from tsp_utils.losses import log_probabilities, loss_terms, tsp_loss


@dataclass
class Step:
    """What a loss may ask for besides logits: features x [S, B, D] of the batch and of the drawn
    neighbours, the share of the training that is done, and a memory of its own."""

    heads: LinearHeads
    features: torch.Tensor  # all of them, [N, D]
    x: torch.Tensor = None
    neighbor_x: torch.Tensor = None
    progress: float = 0.0
    starts_epoch: bool = True
    memory: dict = field(default_factory=dict)


def scan(a, b, step):
    """-mean_i log <p_i, p_j> - 5 H(mean_i p_i), j uniform among the K nearest.

    SCAN: Van Gansbeke et al. (2020), Eq. 2, lambda = 5; its second step, self-labelling, is not
    part of it.
    """
    return tsp_loss(a.mT, b.mT, entropy_weight=5.0)[0]


def tsp(a, b, step):
    """Eq. 5 of Zhou and Zhang (2022), lambda = 3, j drawn by Eq. 4."""
    return tsp_loss(a.mT, b.mT)[0]


def nnm(a, b, step):
    """Sum over the drawn and the nearest neighbour within the batch, as j, of
    -mean_i log <p_i, p_j> - mean_c log softmax_c'(cos(p_.c, p'_.c'))_c, and -5 H(mean_i p_i).

    NNM: Dang et al. (2021): global and local matching, consistency and class contrastive
    loss. Its neighbours follow the features as they change; ours do not change.
    """
    unit = F.normalize(step.x, dim=-1)
    cosines = unit @ unit.mT  # [S, B, B]
    cosines.diagonal(dim1=1, dim2=2).fill_(-2)
    nearest = cosines.argmax(-1)  # [S, B]
    local = a.gather(2, nearest[:, None].expand_as(a))
    total = 0
    for other in (b, local):
        consistency, entropy = loss_terms(log_probabilities(a.mT), log_probabilities(other.mT))
        total = total + consistency + _match_columns(a.softmax(1), other.softmax(1))
    return total - 5 * entropy


def temi(a, b, step, beta=0.6, temperature=0.1, momentum=0.996):
    """-1/2 sum over both orders of w log sum_c (s_c(x) t_c(x'))^beta / m_c, with
    w = sum_c t_c(x) t_c(x'); s the student, t its moving average, m the running mean of t.

    TEMI: Adaloglou et al. (2023), beta = 0.6, temperature 0.1. Its fifty heads share
    their weights w; ours are independent runs, so each has its own.
    """
    if "teacher" not in step.memory:
        step.memory["teacher"] = copy.deepcopy(step.heads).requires_grad_(False)
    teacher = step.memory["teacher"]
    with torch.no_grad():
        for old, new in zip(teacher.parameters(), step.heads.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)
        log_t = [(teacher(x).mT / temperature).log_softmax(1) for x in (step.x, step.neighbor_x)]
        mean = torch.cat(log_t, 2).exp().mean(2)  # [S, C]
        running = step.memory.setdefault("mean", mean.clone()).lerp_(mean, 0.1)
        weight = (log_t[0] + log_t[1]).exp().sum(1)  # [S, B]
    log_s = [(logits / temperature).log_softmax(1) for logits in (a, b)]
    pmi = [(beta * (mine + other) - running.log()[..., None]).logsumexp(1)
           for mine, other in zip(log_s, reversed(log_t), strict=True)]  # [S, B]
    return -(weight * (pmi[0] + pmi[1])).mean(-1) / 2


def iic(a, b, step):
    """-I(P), P = (M + M^T) / 2 and M = mean_i p_i p_j^T: the mutual information of both clusters.

    IIC: Ji, Henriques and Vedaldi (2019), Eqs 2 and 3, without its over-clustering head.
    """
    joint = a.softmax(1) @ b.softmax(1).mT / a.shape[-1]  # [S, C, C]
    joint = ((joint + joint.mT) / 2).clamp_min(1e-12)
    margins = joint.sum(2, keepdim=True).log() + joint.sum(1, keepdim=True).log()
    return -(joint * (joint.log() - margins)).sum((1, 2))


def pica(a, b, step):
    """-mean_c log softmax_c'(cos(p_.c, p'_.c'))_c - 2 H(mean_i p_i): clusters as columns over the
    batch, alike in both views and unlike each other.

    PICA: Huang, Gong and Zhu (2020), its partition confidence loss, lambda = 2.
    """
    p = a.softmax(1)
    return _match_columns(p, b.softmax(1)) - 2 * _entropy(p.mean(-1))


def dac(a, b, step):
    """Mean over chosen pairs of -r log s - (1 - r) log(1 - s), s = cos(p_i, p_k) within the batch;
    r = 1 where s > 0.95 - t, 0 where s < 0.455 + 0.1 t, others left out; t grows until all count.

    DAC: Chang et al. (2017). It looks at no neighbour.
    """
    s = _pair_cosines(a)
    t = 0.45 * step.progress
    alike, unlike = s > 0.95 - t, s <= 0.455 + 0.1 * t
    chosen = alike | unlike
    cost = -torch.where(alike, s, 1 - s).log() * chosen
    return cost.sum((1, 2)) / chosen.sum((1, 2)).clamp_min(1)


def dccm(a, b, step):
    """Pseudo-graph: pairs of the batch with cos(p_i, p_k) > 0.95 are alike and all others unlike,
    in the batch and among the neighbours; pseudo-labels: 5 mean_i v_i (-log p_j[y_i]),
    y_i = argmax p_i, v_i = max p_i.

    DCCM: Wu et al. (2019), alpha = 5. Its third part, mutual information of a deep and
    a shallow layer, has no meaning on frozen features.
    """
    s = _pair_cosines(a)
    alike = s.detach() > 0.95
    graph = sum(-torch.where(alike, found, 1 - found).log().mean((1, 2))
                for found in (s, _pair_cosines(b)))
    confidence, y = a.detach().softmax(1).max(1)  # [S, B]
    labels = -b.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return graph + 5 * (confidence * labels).mean(-1)


def dec(a, b, step):
    """KL(t || q), t_ic = q_ic^2 / f_c over its sum, f_c = sum_i q_ic; a holds log q.

    DEC: Xie, Girshick and Farhadi (2016), Eqs 1 to 3. Its head is `rivals.DECHeads`. f is taken
    over all samples at the start of each epoch. No neighbour and no view.
    """
    if step.starts_epoch:
        with torch.no_grad():
            step.memory["f"] = step.heads(step.features).exp().sum(1)  # [S, C]
    log_q = a
    target = (2 * log_q.detach() - step.memory["f"].log()[..., None]).log_softmax(1)
    return (target.exp() * (target - log_q)).sum(1).mean(-1)


def cc(a, b, step):
    """Mean over the 2 C columns of -log softmax(cos / 1.0) of the other view's same column among
    all columns but itself, - H(mean_i p_i) - H(mean_j p_j).

    Contrastive clustering, the cluster term: Li et al. (2021), temperature 1; no instance term.
    """
    p, q = a.softmax(1), b.softmax(1)
    columns = F.normalize(torch.cat([p, q], 1), dim=-1)  # [S, 2C, B]
    cosines = columns @ columns.mT
    c = p.shape[1]
    cosines = cosines - torch.diag_embed(torch.full_like(cosines[:, 0], torch.inf))
    own = torch.arange(2 * c, device=a.device)
    matched = cosines.log_softmax(2)[:, own, own.roll(c)]
    return -matched.mean(1) - _entropy(p.mean(-1)) - _entropy(q.mean(-1))


SECU_TEMPERATURE = 0.05  # of the softmax over cosines


def secu(a, b, step, bound=0.4, dual_rate=0.1):
    """-mean log softmax(z / 0.05)[y], z = cos(x, w), over the batch and its neighbours; only the
    centre w_y learns, the others stand still. y = argmax_c z_c + d_c on the batch, d the dual
    variables of "each cluster has at least 0.4 N / C samples".

    SeCu: Qian (2023), with its size constraint. a and b come from `rivals.CosineHeads`; the rate of
    d is ours.
    """
    c = a.shape[1]
    dual = step.memory.setdefault("dual", a.new_zeros(a.shape[:2]))  # [S, C]
    y = (a.detach() * SECU_TEMPERATURE + dual[..., None]).argmax(1)  # [S, B]
    own = F.one_hot(y, c).mT.bool()  # [S, C, B]
    dual.add_(dual_rate * (bound / c - own.float().mean(-1))).clamp_min_(0)
    stable = [torch.where(own, z, z.detach()).log_softmax(1) for z in (a, b)]
    return -sum(torch.where(own, z, 0).sum(1).mean(-1) for z in stable) / 2


def icbpl(a, b, step):
    """MMD to fixed centres, neighbour pull, nearest centre: see `icbpl.ICBPLHeads.loss`."""
    return step.heads.loss(step.x, step.neighbor_x, progress=step.progress)


def _match_columns(p, q):
    """-mean_c log softmax_c'(cos(p_c, q_c'))_c over the batch; p and q [S, C, B]."""
    cosines = F.normalize(p, dim=-1) @ F.normalize(q, dim=-1).mT  # [S, C, C]
    return -cosines.log_softmax(2).diagonal(dim1=1, dim2=2).mean(1)


def _entropy(p):
    return -(p * p.clamp_min(1e-30).log()).sum(1)


def _pair_cosines(logits):
    """cos(p_i, p_k) of all pairs of a batch, inside (0, 1): [S, C, B] -> [S, B, B]."""
    unit = F.normalize(logits.softmax(1), dim=1)
    return (unit.mT @ unit).clamp(1e-6, 1 - 1e-6)
