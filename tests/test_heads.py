"""Eq. 5, and the head: its start, its training, its independence of the other heads."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.cluster import KMeans
from toys import BLOBS, CLASSES, FEATURES, NEIGHBORS

from tsp_utils import clustering_metrics, init_heads, kmeans, neighbor_weights, tsp_loss
from tsp_utils import train_heads as train
from tsp_utils.heads import best_head, draw_pairs
from tsp_utils.k_means import _kmeans_on, _lloyd
from tsp_utils.neighbors import Neighbors
from tsp_utils.scaling import Scaler, scale_features
from tsp_utils.systems.mlp_heads import MLPHeads

RNG = np.random.default_rng(0)


def loss_by_hand(logits, neighbor_logits, entropy_weight):
    p, q = softmax(logits, 1), softmax(neighbor_logits, 1)
    consistency = -np.mean([np.log(np.dot(p[i], q[i])) for i in range(len(p))])
    mean = p.mean(0)
    return consistency - entropy_weight * -np.sum(mean * np.log(mean))


@pytest.mark.parametrize("entropy_weight", [0.0, 3.0])
def test_equals_a_float64_loop_for_every_head_of_a_stack(entropy_weight):
    logits, others = RNG.normal(0, 2, (2, 4, 32, 7))  # four heads, 32 samples, 7 clusters
    ours, parts = tsp_loss(torch.tensor(logits), torch.tensor(others), entropy_weight)
    torch.testing.assert_close(ours, parts["consistency"] - entropy_weight * parts["entropy"])
    expected = [loss_by_hand(a, b, entropy_weight) for a, b in zip(logits, others, strict=True)]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_the_gradient_is_that_of_finite_differences_and_survives_total_disagreement():
    """log(sum(p * q)) in float32 underflows here to log(0); the logsumexp does not."""
    logits = torch.tensor([[200.0, 0]], requires_grad=True)
    loss, _ = tsp_loss(logits, torch.tensor([[0, 200.0]]), 0.0)
    loss.backward()
    assert torch.isfinite(loss) and loss.item() == pytest.approx(200 - np.log(2), rel=1e-5)
    assert torch.isfinite(logits.grad).all()
    logits = [torch.tensor(RNG.normal(size=(6, 4)), requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: tsp_loss(a, b)[0], logits)


def train_heads(heads, **settings):
    settings = dict(max_epochs=20, min_steps=0, batch_size=64, learning_rate=1e-2) | settings
    return train(heads, FEATURES, NEIGHBORS, progress=False, **settings)


def test_scaling_is_one_scalar_learned_from_the_fitted_features():
    assert np.ptp(FEATURES / BLOBS) < 1e-5
    assert np.linalg.norm(FEATURES, axis=1).mean() == pytest.approx(math.sqrt(16), rel=1e-5)
    np.testing.assert_allclose(np.linalg.norm(scale_features(BLOBS, "l2"), axis=1), 4, rtol=1e-5)
    scaler = Scaler().fit(BLOBS)
    assert scaler.scale_ == pytest.approx(4 / np.linalg.norm(BLOBS, axis=1).mean())
    np.testing.assert_allclose(scaler.transform(BLOBS[:7] * 3), 3 * FEATURES[:7], rtol=1e-5)
    black = np.vstack([np.zeros((1, 16)), BLOBS])  # a first row of zeros spoils nothing
    np.testing.assert_allclose(scale_features(black)[1:],
                               BLOBS * 4 / np.linalg.norm(black, axis=1).mean(), rtol=1e-5)
    assert Scaler("l2").fit(BLOBS).scale_ == Scaler("raw").fit(BLOBS).scale_ == 1
    assert not np.shares_memory(scale_features(FEATURES, "raw"), FEATURES)


@pytest.mark.parametrize("dtype, size", [
    (np.float64, 1e-35), (np.float64, 1e25), (np.float64, 1e200),  # beyond what float32 holds
    (np.float32, 1e-36), (np.float32, 1e30)])
def test_features_of_any_magnitude_are_scaled_alike(dtype, size):
    scaled = scale_features(BLOBS.astype(dtype) * dtype(size))
    np.testing.assert_allclose(scaled, FEATURES, rtol=1e-5, atol=1e-6)


def other_loss(logits, neighbor_logits, entropy_weight=3.0):
    """Cross-entropy between neighbours: of the contract, and another loss."""
    p, log_q = logits.softmax(-1), neighbor_logits.log_softmax(-1)
    value = -(p * log_q).sum(-1).mean(-1)
    return value, {"agreement": -value}


def test_the_loss_that_is_public_is_the_one_that_trains(monkeypatch):
    """Replaced in its module, or passed: both train other heads, and the same ones."""
    plain, passed, replaced = (init_heads(FEATURES, 5, seeds=[0]) for _ in range(3))
    train_heads(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no entropy term: it may collapse
        curves = train_heads(passed, loss=other_loss).curves
        monkeypatch.setattr("tsp_utils.losses.tsp_loss", other_loss)
        train_heads(replaced)
    assert not torch.allclose(plain.weight, passed.weight, atol=1e-2)
    torch.testing.assert_close(passed.weight, replaced.weight)
    np.testing.assert_allclose(curves["agreement"], -curves["loss"], rtol=1e-6)


def test_a_head_whose_loss_is_no_number_is_never_the_best():
    assert best_head([2.0, np.nan, 1.0, -np.inf]) == 2
    with pytest.raises(ValueError, match=r"no finite number.*lower learning_rate"):
        best_head([np.nan, np.nan])
    heads = init_heads(FEATURES, 5, seeds=[0])
    with pytest.warns(UserWarning, match="head of seed 0 is no finite number"):
        train_heads(heads, loss=lambda a, b: (other_loss(a, b)[0] * torch.nan, {}), max_epochs=1)


CONTRACT = r"returns its value \[S\] and its terms by.*S = 2"


@pytest.mark.parametrize("ask, sentence", [
    *((lambda bad=bad: train_heads(init_heads(FEATURES, 5, seeds=[0, 1]), **bad), sentence)
      for bad, sentence in [
        (dict(entropy_weight=math.inf), "entropy_weight is inf; pass 0 or more"),
        (dict(entropy_weight=-1.0), "entropy_weight is -1.0"),
        (dict(entropy_weight=math.nan), "entropy_weight is nan"),
        (dict(learning_rate=0.0), "learning_rate is 0.0; pass a number above 0"),
        (dict(learning_rate=math.inf), "learning_rate is inf"),
        (dict(batch_size=0), "batch_size is 0; pass 1 or more"),
        (dict(max_epochs=0), "max_epochs is 0 and min_steps 0, with which nothing is trained"),
        (dict(max_epochs=-1), "max_epochs is -1"),
        (dict(loss=lambda a, b: other_loss(a, b)[0]), CONTRACT),  # no terms
        (dict(loss=lambda a, b: (other_loss(a, b)[0].mean(), {})), CONTRACT),  # one value for all
        (dict(loss=lambda a, b: (other_loss(a, b)[0], {"p": a})), CONTRACT),  # a term's other shape
        (dict(loss=lambda a, b: (other_loss(a, b)[0].detach(), {})), CONTRACT)]),  # no gradient
    (lambda: kmeans(FEATURES, 700, [0]), "cannot make 700 clusters"),
    (lambda: kmeans(np.ones((50, 4), np.float32), 2, [0]), "only 1 distinct"),
    (lambda: init_heads(FEATURES, 5, [0], init="zeros"), "k-means or random"),
    (lambda: train(init_heads(FEATURES, 5, [0]), FEATURES, Neighbors(
        NEIGHBORS.indices[:5], NEIGHBORS.distances[:5], "cosine")), "neighbours of 5"),
    (lambda: scale_features(np.zeros((4, 3))), "All features are 0"),
    (lambda: Scaler("unit"), "'unit' is not known; pass mean-norm, raw, l2"),
])
def test_what_cannot_be_trained_is_refused_in_one_sentence(ask, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        ask()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tolerance", [0.0, 1e-4, 3e-3, 0.1])
def test_k_means_of_torch_ends_where_scikit_learns_does(tolerance):
    """What runs on a GPU, which looks at every tenth iteration alone whether it stands."""
    start = FEATURES[np.random.default_rng(0).choice(600, 5, replace=False)]
    theirs = KMeans(5, init=start, n_init=1, tol=tolerance, algorithm="lloyd").fit(FEATURES)
    centers, clusters, inertia = _lloyd(torch.from_numpy(FEATURES), torch.from_numpy(start),
                                        tolerance * FEATURES.var(0).mean())
    np.testing.assert_allclose(centers, theirs.cluster_centers_, rtol=1e-3, atol=1e-4)
    assert (clusters == theirs.labels_).mean() > 0.99
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-4)


def test_the_best_of_ten_starts_is_scikit_learns():
    runs = _kmeans_on("cpu", FEATURES, 5, [0, 1], n_init=10)
    best = KMeans(5, n_init=10, random_state=0).fit(FEATURES).inertia_
    assert runs.inertia.min() == pytest.approx(best, rel=1e-2)


def test_starts_are_those_of_appendix_a_and_predict_nearly_uniformly():
    heads = init_heads(FEATURES, 5, seeds=[3, 4])
    for weight, seed in zip(heads.weight.detach(), heads.seeds, strict=True):
        centers = KMeans(5, n_init=1, random_state=seed).fit(FEATURES).cluster_centers_
        expected = centers / (np.linalg.norm(centers, axis=1, keepdims=True) * math.sqrt(16))
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)
    assert (heads.bias == 0).all()
    proba = heads.predict_proba(FEATURES)
    assert proba.shape == (2, 600, 5) and proba.min() > 0.05 and proba.max() < 0.6
    for asked, norm in ((None, 0.25), (0.5, 0.5)):  # a random start: 1 / sqrt(16), or as asked
        random = init_heads(FEATURES, 5, [0, 1], init="random", row_norm=asked)
        np.testing.assert_allclose(random.weight.detach().norm(dim=2), norm, rtol=1e-5)
    assert not torch.allclose(random.weight[0], random.weight[1])


@pytest.mark.parametrize("make", [
    lambda seeds: init_heads(FEATURES, 5, seeds), lambda seeds: MLPHeads(16, 5, seeds)])
def test_a_head_learns_and_is_the_same_alone_or_among_others(make):
    together, alone = make(range(4)), make([2])
    loss = train_heads(together, max_epochs=30).curves["loss"]
    train_heads(alone, max_epochs=30)
    torch.testing.assert_close(together.weight[2], alone.weight[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together.weight[1], together.weight[2], atol=1e-3)
    assert (loss[-1] < loss[0] - 0.5).all()


def test_training_equals_a_plain_loop_with_nn_linear():
    """One seed, written again with nn.Linear and nothing batched, on the same draws."""
    heads = init_heads(FEATURES, 5, seeds=[7])
    layer = torch.nn.Linear(16, 5)
    layer.weight.data, layer.bias.data = heads.weight[0].detach().clone(), torch.zeros(5)
    train_heads(heads, max_epochs=3)

    adam = torch.optim.Adam(layer.parameters(), lr=1e-2)
    rng, x = np.random.default_rng([7, 2]), torch.from_numpy(FEATURES)
    cumulative = neighbor_weights(NEIGHBORS).cumsum(1)
    for _ in range(3):
        pairs = draw_pairs(rng, NEIGHBORS.indices, cumulative, 9 * 64)
        for i, j in pairs.reshape(2, 9, 64).swapaxes(0, 1):
            p, q = layer(x[i]).softmax(1), layer(x[j]).softmax(1)
            mean = p.mean(0)
            loss = -(p * q).sum(1).log().mean() + 3 * (mean * mean.log()).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
    torch.testing.assert_close(heads.weight[0], layer.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(heads.bias[0], layer.bias, rtol=1e-3, atol=1e-4)


def test_a_neighbour_of_each_sample_is_drawn_with_its_weight():
    weights = np.tile(np.float32([0.5, 0.3, 0.2, 0.0]), (1000, 1))
    indices, rng = np.arange(4000).reshape(1000, 4), np.random.default_rng(0)
    samples, drawn = np.hstack([draw_pairs(rng, indices, weights.cumsum(1), 1000)
                                for _ in range(50)])
    np.testing.assert_array_equal(drawn // 4, samples)
    np.testing.assert_array_equal(np.bincount(samples), 50)
    shares = np.bincount(drawn % 4, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2, 0], atol=0.01)
    assert shares[3] == 0
    # A draw that rounding brings up to the whole sum is the last neighbour.
    highest = SimpleNamespace(permutation=np.arange, random=np.ones)
    cumulative = np.tile(np.float32([0.5, 0.8, 1.0]), (4, 1))
    pairs = draw_pairs(highest, np.tile([7, 8, 9], (4, 1)), cumulative, 4)
    np.testing.assert_array_equal(pairs, [[0, 1, 2, 3], [9, 9, 9, 9]])


def test_training_finds_the_blobs_and_records_its_curves():
    heads = init_heads(FEATURES, 5, seeds=[0, 1, 2])
    curves = train_heads(heads, max_epochs=40).curves
    assert all(curve.shape == (40, 3) for curve in curves.values())
    of_batches = (curves["consistency"] - curves["loss"]) / 3  # the curve's: of the epoch's mean
    assert (of_batches <= curves["entropy"] + 1e-5).all()  # concavity
    np.testing.assert_allclose(of_batches, curves["entropy"], rtol=0.05)
    for clusters in heads.predict(FEATURES):
        assert clustering_metrics(CLASSES, clusters)["acc"] > 0.9
    least = train_heads(init_heads(FEATURES, 5, [0]), max_epochs=1, min_steps=30)
    assert len(least.curves["loss"]) == 4  # 9 steps an epoch


def test_no_entropy_term_collapses_and_says_so():
    heads = init_heads(FEATURES, 5, seeds=[0], init="random")
    with pytest.warns(UserWarning, match=r"seed 0 ended with \d of 5 clusters"):
        train_heads(heads, entropy_weight=0.0, max_epochs=60, learning_rate=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_heads(init_heads(FEATURES, 5, seeds=[0]))


def test_a_head_with_a_hidden_layer_is_torchs():
    heads, x = MLPHeads(16, 5, seeds=[0, 1], n_hidden=8), torch.randn(7, 16)
    for s in range(2):
        inner = torch.relu(x @ heads.hidden.weight[s].T + heads.hidden.bias[s])
        expected = inner @ heads.weight[s].T + heads.bias[s]
        torch.testing.assert_close(heads(x)[s], expected, rtol=1e-4, atol=1e-5)
    default = torch.nn.Linear(16, 4000).weight.detach()  # the same law as torch's own layers
    ours = MLPHeads(16, 5, seeds=[0], n_hidden=4000).hidden.weight.detach()
    assert float(ours.std()) == pytest.approx(float(default.std()), rel=0.02)
    assert float(ours.abs().max()) <= 0.25 == 1 / math.sqrt(16)
