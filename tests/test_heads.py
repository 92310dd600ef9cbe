"""The head: its start, its training, its independence of the other heads."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs

from tsp_utils import clustering_metrics, init_heads, kmeans, nearest_neighbors, neighbor_weights
from tsp_utils import train_heads as train
from tsp_utils.heads import MLPHeads, best_head, draw_pairs
from tsp_utils.k_means import _kmeans_on, _lloyd
from tsp_utils.neighbors import Neighbors
from tsp_utils.scaling import Scaler, scale_features

BLOBS, LABELS = make_blobs(600, 16, centers=5, cluster_std=3.0, random_state=0)
FEATURES = scale_features(BLOBS)
NEIGHBORS = nearest_neighbors(FEATURES, 10)


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
    with pytest.raises(ValueError, match="All features are 0"):
        scale_features(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="'unit' is not known; pass mean-norm, raw, l2"):
        Scaler("unit")


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


@pytest.mark.parametrize("settings, sentence", [
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
    (dict(loss=lambda a, b: (other_loss(a, b)[0].detach(), {})), CONTRACT),  # nothing to learn
])
def test_settings_and_losses_that_cannot_train_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        train_heads(init_heads(FEATURES, 5, seeds=[0, 1]), **settings)
    assert "\n" not in str(refused.value)


def test_k_means_of_torch_is_scikit_learns_from_the_same_start():
    """What runs on a GPU, here on the CPU."""
    rng = np.random.default_rng(0)
    start = FEATURES[rng.choice(600, 5, replace=False)]
    theirs = KMeans(5, init=start, n_init=1).fit(FEATURES)
    centers, clusters, inertia = _lloyd(torch.from_numpy(FEATURES), torch.from_numpy(start), 0.0)
    np.testing.assert_allclose(centers, theirs.cluster_centers_, rtol=1e-3, atol=1e-4)
    assert (clusters == theirs.labels_).mean() > 0.99
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-4)
    far = start.copy()
    far[0] = 100  # nobody's nearest centre: it takes a far sample and ends with some
    _, clusters, _ = _lloyd(torch.from_numpy(FEATURES), torch.from_numpy(far), 0.0)
    assert len(np.unique(clusters)) == 5
    runs = _kmeans_on("cpu", FEATURES, 5, [0, 1], n_init=10)
    best = KMeans(5, n_init=10, random_state=0).fit(FEATURES).inertia_
    assert runs.inertia.min() == pytest.approx(best, rel=1e-2) and runs.centers.shape == (2, 5, 16)


def test_k_means_start_is_appendix_a_and_predicts_nearly_uniformly():
    heads = init_heads(FEATURES, 5, seeds=[3, 4])
    for weight, seed in zip(heads.weight.detach(), heads.seeds, strict=True):
        centers = KMeans(5, n_init=1, random_state=seed).fit(FEATURES).cluster_centers_
        expected = centers / (np.linalg.norm(centers, axis=1, keepdims=True) * math.sqrt(16))
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)
    assert (heads.bias == 0).all()
    proba = heads.predict_proba(FEATURES)
    assert proba.shape == (2, 600, 5) and proba.min() > 0.05 and proba.max() < 0.6


def test_random_start_has_the_row_norm_asked_for():
    for norm in (None, 0.5):
        heads = init_heads(FEATURES, 5, [0, 1], init="random", row_norm=norm)
        expected = 0.25 if norm is None else norm  # 1 / sqrt(16)
        np.testing.assert_allclose(heads.weight.detach().norm(dim=2), expected, rtol=1e-5)
    assert not torch.allclose(heads.weight[0], heads.weight[1])


@pytest.mark.parametrize("make", [
    lambda seeds: init_heads(FEATURES, 5, seeds), lambda seeds: MLPHeads(16, 5, seeds)])
def test_a_head_learns_and_is_the_same_alone_or_among_others(make):
    together, alone = make(range(4)), make([2])
    loss = train_heads(together, max_epochs=30).curves["loss"]
    train_heads(alone, max_epochs=30)
    torch.testing.assert_close(together.weight[2], alone.weight[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together.weight[1], together.weight[2], atol=1e-3)
    assert (loss[-1] < loss[0] - 0.5).all()
    assert clustering_metrics(LABELS, alone.predict(FEATURES)[0])["acc"] > 0.7


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


def test_a_draw_that_rounding_brings_up_to_the_whole_sum_is_the_last_neighbour():
    highest = SimpleNamespace(permutation=np.arange, random=np.ones)
    cumulative = np.tile(np.float32([0.5, 0.8, 1.0]), (4, 1))
    pairs = draw_pairs(highest, np.tile([7, 8, 9], (4, 1)), cumulative, 4)
    np.testing.assert_array_equal(pairs, [[0, 1, 2, 3], [9, 9, 9, 9]])


def test_training_finds_the_blobs_and_records_its_curves():
    heads = init_heads(FEATURES, 5, seeds=[0, 1, 2])
    curves = train_heads(heads, max_epochs=40).curves
    assert all(curve.shape == (40, 3) for curve in curves.values())
    assert (curves["loss"][-1] < curves["loss"][0] - 1).all()
    of_batches = (curves["consistency"] - curves["loss"]) / 3  # the curve's: of the epoch's mean
    assert (of_batches <= curves["entropy"] + 1e-5).all()  # concavity
    np.testing.assert_allclose(of_batches, curves["entropy"], rtol=0.05)
    for clusters in heads.predict(FEATURES):
        assert clustering_metrics(LABELS, clusters)["acc"] > 0.9


def test_at_least_min_steps_whatever_n():
    history = train_heads(init_heads(FEATURES, 5, [0]), max_epochs=1, min_steps=30)
    assert len(history.curves["loss"]) == 4  # 9 steps an epoch


def test_no_entropy_term_collapses_and_says_so():
    heads = init_heads(FEATURES, 5, seeds=[0], init="random")
    with pytest.warns(UserWarning, match=r"seed 0 ended with \d of 5 clusters"):
        train_heads(heads, entropy_weight=0.0, max_epochs=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_heads(init_heads(FEATURES, 5, seeds=[0]))


def test_bad_input():
    with pytest.raises(ValueError, match="cannot make 700 clusters"):
        kmeans(FEATURES, 700, [0])
    with pytest.raises(ValueError, match="only 1 distinct"):
        kmeans(np.ones((50, 4), np.float32), 2, [0])
    with pytest.raises(ValueError, match="k-means or random"):
        init_heads(FEATURES, 5, [0], init="zeros")
    few = Neighbors(NEIGHBORS.indices[:5], NEIGHBORS.distances[:5], "cosine")
    with pytest.raises(ValueError, match="neighbours of 5"):
        train(init_heads(FEATURES, 5, [0]), FEATURES, few)


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
