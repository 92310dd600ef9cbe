"""The head: its start, its training, its independence of the other heads."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs

from tsp_utils import clustering_metrics, init_heads, kmeans, nearest_neighbors, neighbor_weights
from tsp_utils import train_heads as train
from tsp_utils.heads import MLPHeads, best_head
from tsp_utils.neighbors import Neighbors
from tsp_utils.scaling import Scaler, scale_features

BLOBS, LABELS = make_blobs(600, 16, centers=5, cluster_std=3.0, random_state=0)
FEATURES = scale_features(BLOBS)
NEIGHBORS = nearest_neighbors(FEATURES, 10)


def train_heads(heads, **settings):
    settings = dict(max_epochs=20, min_steps=0, batch_size=64, learning_rate=1e-2) | settings
    return train(heads, FEATURES, NEIGHBORS, progress=False, **settings)


def test_scaling_is_one_scalar():
    ratio = FEATURES / BLOBS
    assert np.ptp(ratio) < 1e-5
    assert np.linalg.norm(FEATURES, axis=1).mean() == pytest.approx(math.sqrt(16), rel=1e-5)
    np.testing.assert_allclose(np.linalg.norm(scale_features(BLOBS, "l2"), axis=1), 4, rtol=1e-5)
    with pytest.raises(ValueError, match="All features are 0"):
        scale_features(np.zeros((4, 3)))


def test_a_scaler_scales_others_as_it_learned_from_the_fitted_ones():
    scaler = Scaler().fit(BLOBS)
    assert scaler.scale_ == pytest.approx(4 / np.linalg.norm(BLOBS, axis=1).mean())
    np.testing.assert_allclose(scaler.transform(BLOBS[:7] * 3), 3 * FEATURES[:7], rtol=1e-5)
    black = np.vstack([np.zeros((1, 16)), BLOBS])  # a first row of zeros spoils nothing
    np.testing.assert_allclose(Scaler().fit(black).transform(black)[1:],
                               BLOBS * 4 / np.linalg.norm(black, axis=1).mean(), rtol=1e-5)
    for size in (1e-35, 1e25, 1e200):  # float64 beyond what float32 holds
        np.testing.assert_allclose(scale_features(BLOBS * size), FEATURES, rtol=1e-5)
    tiny, huge = np.float32(BLOBS) * np.float32(1e-36), np.float32(BLOBS) * np.float32(1e30)
    np.testing.assert_allclose(scale_features(huge), FEATURES, rtol=1e-4)
    assert np.linalg.norm(scale_features(tiny), axis=1).mean() == pytest.approx(4, rel=1e-3)
    assert Scaler("l2").fit(BLOBS).scale_ == Scaler("raw").fit(BLOBS).scale_ == 1
    with pytest.raises(ValueError, match="'unit' is not known; pass mean-norm, raw, l2"):
        Scaler("unit")


def test_raw_features_are_no_second_name_of_the_input():
    features = FEATURES.copy()
    scaled = scale_features(features, "raw")
    scaled += 1
    np.testing.assert_array_equal(features, FEATURES)


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


@pytest.mark.parametrize("loss", [
    lambda a, b: other_loss(a, b)[0],  # no terms
    lambda a, b: (other_loss(a, b)[0].mean(), {}),  # one value for all heads
    lambda a, b: (other_loss(a, b)[0], {"p": a}),  # a term of another shape
    lambda a, b: (other_loss(a, b)[0].detach(), {}),  # nothing to learn from
])
def test_a_loss_of_another_contract_is_refused_in_one_sentence(loss):
    heads = init_heads(FEATURES, 5, seeds=[0, 1])
    with pytest.raises(ValueError, match=r"returns its value \[S\] and its terms by.*S = 2") as no:
        train_heads(heads, loss=loss)
    assert "\n" not in str(no.value)


def test_a_head_whose_loss_is_no_number_is_never_the_best():
    assert best_head([2.0, np.nan, 1.0, -np.inf]) == 2
    with pytest.raises(ValueError, match=r"no finite number.*lower learning_rate"):
        best_head([np.nan, np.nan])
    heads = init_heads(FEATURES, 5, seeds=[0])
    with pytest.warns(UserWarning, match="head of seed 0 is no finite number"):
        train_heads(heads, loss=lambda a, b: (other_loss(a, b)[0] * torch.nan, {}), max_epochs=1)


@pytest.mark.parametrize("settings, sentence", [
    (dict(entropy_weight=math.inf), "entropy_weight is inf; pass 0 or more"),
    (dict(entropy_weight=-1.0), "entropy_weight is -1.0"),
    (dict(entropy_weight=math.nan), "entropy_weight is nan"),
    (dict(learning_rate=0.0), "learning_rate is 0.0; pass a number above 0"),
    (dict(learning_rate=math.inf), "learning_rate is inf"),
    (dict(batch_size=0), "batch_size is 0; pass 1 or more"),
    (dict(max_epochs=0), "max_epochs is 0 and min_steps 0, with which nothing is trained"),
    (dict(max_epochs=-1), "max_epochs is -1"),
])
def test_settings_that_cannot_train_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_heads(init_heads(FEATURES, 5, seeds=[0]), **settings)


def test_k_means_start_is_appendix_a():
    heads = init_heads(FEATURES, 5, seeds=[3, 4])
    for s, seed in enumerate([3, 4]):
        centers = KMeans(5, n_init=1, random_state=seed).fit(FEATURES).cluster_centers_
        for c, center in enumerate(centers):
            expected = center / (np.linalg.norm(center) * math.sqrt(16))
            np.testing.assert_allclose(heads.weight[s, c].detach(), expected, rtol=1e-4, atol=1e-6)
    assert (heads.bias == 0).all()


def test_first_predictions_are_nearly_uniform():
    proba = init_heads(FEATURES, 5, seeds=[0]).predict_proba(FEATURES)
    assert proba.shape == (1, 600, 5) and proba.min() > 0.05 and proba.max() < 0.6


def test_random_start_has_the_row_norm_asked_for():
    for norm in (None, 0.5):
        heads = init_heads(FEATURES, 5, [0, 1], init="random", row_norm=norm)
        expected = 0.25 if norm is None else norm  # 1 / sqrt(16)
        np.testing.assert_allclose(heads.weight.detach().norm(dim=2), expected, rtol=1e-5)
    assert not torch.allclose(heads.weight[0], heads.weight[1])


def test_a_seed_gives_the_same_head_alone_or_among_others():
    together = init_heads(FEATURES, 5, seeds=range(4))
    train_heads(together)
    alone = init_heads(FEATURES, 5, seeds=[2])
    train_heads(alone)
    torch.testing.assert_close(together.weight[2], alone.weight[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.weight[1], together.weight[2], atol=1e-3)


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
        samples = rng.permutation(600)[: 9 * 64]
        u = rng.random(9 * 64, np.float32)
        for batch in range(9):
            i = samples[batch * 64 : (batch + 1) * 64]
            j = [NEIGHBORS.indices[a, min(np.searchsorted(cumulative[a], r * cumulative[a, -1],
                                                          side="right"), 9)]
                 for a, r in zip(i, u[batch * 64 : (batch + 1) * 64], strict=True)]
            p, q = layer(x[i]).softmax(1), layer(x[j]).softmax(1)
            mean = p.mean(0)
            loss = -(p * q).sum(1).log().mean() + 3 * (mean * mean.log()).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
    torch.testing.assert_close(heads.weight[0], layer.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(heads.bias[0], layer.bias, rtol=1e-3, atol=1e-4)


def test_neighbours_are_drawn_with_their_weights():
    from tsp_utils.heads import draw_pairs

    weights = np.tile(np.float32([0.5, 0.3, 0.2, 0.0]), (1000, 1))
    indices = np.tile(np.arange(4) + 1000, (1000, 1))
    rng = np.random.default_rng(0)
    drawn = np.concatenate([draw_pairs(rng, indices, weights.cumsum(1), 1000)[1]
                            for _ in range(50)])
    shares = np.bincount(drawn - 1000, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2, 0], atol=0.01)
    assert shares[3] == 0


def test_a_draw_that_rounding_brings_up_to_the_whole_sum_is_the_last_neighbour():
    from tsp_utils.heads import draw_pairs

    class Highest:
        permutation = staticmethod(np.arange)

        @staticmethod
        def random(n, dtype):
            return np.ones(n, dtype)

    cumulative = np.tile(np.float32([0.5, 0.8, 1.0]), (4, 1))
    samples, neighbors = draw_pairs(Highest, np.tile([7, 8, 9], (4, 1)), cumulative, 4)
    assert list(samples) == [0, 1, 2, 3] and list(neighbors) == [9, 9, 9, 9]


def test_training_finds_the_blobs_and_records_its_curves():
    heads = init_heads(FEATURES, 5, seeds=[0, 1, 2])
    history = train_heads(heads, max_epochs=40)
    curves = history.arrays()
    assert all(curve.shape == (40, 3) for curve in curves.values())
    assert (curves["loss"][-1] < curves["loss"][0] - 1).all()
    np.testing.assert_allclose(curves["loss"], curves["consistency"] - 3 * _batch_entropy(curves),
                               rtol=1e-6)
    for s in range(3):
        assert clustering_metrics(LABELS, heads.predict(FEATURES)[s])["acc"] > 0.9


def _batch_entropy(curves):
    """The loss holds the mean entropy of the batches, the curve the entropy of the epoch's mean."""
    entropy = (curves["consistency"] - curves["loss"]) / 3
    assert (entropy <= curves["entropy"] + 1e-5).all()  # concavity
    return entropy


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
    heads = MLPHeads(16, 5, seeds=[0, 1], n_hidden=8)
    x = torch.randn(7, 16)
    for s in range(2):
        inner = torch.relu(x @ heads.hidden.weight[s].T + heads.hidden.bias[s])
        expected = inner @ heads.weight[s].T + heads.bias[s]
        torch.testing.assert_close(heads(x)[s], expected, rtol=1e-4, atol=1e-5)
    default = torch.nn.Linear(16, 4000).weight.detach()  # the same law as torch's own layers
    ours = MLPHeads(16, 5, seeds=[0], n_hidden=4000).hidden.weight.detach()
    assert float(ours.std()) == pytest.approx(float(default.std()), rel=0.02)
    assert float(ours.abs().max()) <= 0.25 == 1 / math.sqrt(16)


def test_a_head_with_a_hidden_layer_learns_and_is_the_same_alone_or_among_others():
    together, alone = MLPHeads(16, 5, seeds=[0, 1]), MLPHeads(16, 5, seeds=[1])
    curves = train_heads(together, max_epochs=30).arrays()
    train_heads(alone, max_epochs=30)
    assert (curves["loss"][-1] < curves["loss"][0] - 0.5).all()
    torch.testing.assert_close(together.weight[1], alone.weight[0], rtol=1e-3, atol=1e-4)
    assert clustering_metrics(LABELS, together.predict(FEATURES)[0])["acc"] > 0.7
