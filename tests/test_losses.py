"""Eq. 5 against a straightforward float64 reference."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from tsp_utils import tsp_loss

RNG = np.random.default_rng(0)


def reference(logits, neighbor_logits, entropy_weight):
    p, q = softmax(logits, 1), softmax(neighbor_logits, 1)
    consistency = -np.mean([np.log(np.dot(p[i], q[i])) for i in range(len(p))])
    mean = p.mean(0)
    return consistency - entropy_weight * -np.sum(mean * np.log(mean))


@pytest.mark.parametrize("entropy_weight", [0.0, 3.0, 10.0])
def test_equals_the_float64_reference_for_every_head_of_a_stack(entropy_weight):
    logits, others = RNG.normal(0, 2, (2, 4, 32, 7))  # four heads, 32 samples, 7 clusters
    ours, parts = tsp_loss(torch.tensor(logits), torch.tensor(others), entropy_weight)
    torch.testing.assert_close(ours, parts["consistency"] - entropy_weight * parts["entropy"])
    expected = [reference(a, b, entropy_weight) for a, b in zip(logits, others, strict=True)]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_certain_and_uniform_predictions_by_hand():
    certain = torch.tensor([[50.0, 0], [0, 50.0]], dtype=torch.float64)
    _, parts = tsp_loss(certain, certain)
    assert parts["consistency"].item() == pytest.approx(0, abs=1e-12)
    assert parts["entropy"].item() == pytest.approx(np.log(2))
    _, parts = tsp_loss(torch.zeros(3, 5), torch.zeros(3, 5))
    assert parts["consistency"].item() == pytest.approx(np.log(5), rel=1e-6)
    assert parts["entropy"].item() == pytest.approx(np.log(5), rel=1e-6)


def test_the_gradient_survives_total_disagreement():
    """log(sum(p * q)) in float32 underflows here to log(0); the logsumexp does not."""
    logits = torch.tensor([[200.0, 0]], requires_grad=True)
    loss, _ = tsp_loss(logits, torch.tensor([[0, 200.0]]), 0.0)
    loss.backward()
    assert torch.isfinite(loss) and loss.item() == pytest.approx(200 - np.log(2), rel=1e-5)
    assert torch.isfinite(logits.grad).all()


def test_gradient_equals_finite_differences():
    logits = [torch.tensor(RNG.normal(size=(6, 4)), requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: tsp_loss(a, b)[0], logits)
