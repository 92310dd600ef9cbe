"""Agreement itself in place of its logarithm, as in CONTRIBUTING's example of another loss."""

DRAW = "gaussian"  # neighbours by Eq. 4, as TSP draws them


def loss(a, b, step):
    """-mean_i <p_i, p_j> - 3 H(mean_i p_i); logits a and b [S, C, B], returns [S]."""
    p, q = a.softmax(1), b.softmax(1)
    agreement = (p * q).sum(1).mean(-1)  # [S]
    mean = p.mean(-1)  # [S, C]
    entropy = -(mean * mean.log()).sum(1)  # [S]
    return -agreement - 3 * entropy
