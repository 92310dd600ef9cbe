"""Each rival's loss against a plain float64 reference, its trainer against the core's."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.datasets import make_blobs
from sklearn.metrics import mutual_info_score

from tsp_utils import clustering_metrics, init_heads, kmeans, nearest_neighbors, train_heads
from tsp_utils.scaling import scale_features
from tsp_utils.systems.rivals import RIVALS, CosineHeads, DECHeads, Step, train_rival

pytestmark = pytest.mark.usefixtures("one_thread")

S, C, B, D = 2, 4, 12, 6
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, S, B, D))
WEIGHT = RNG.standard_normal((S, C, D))
BLOBS, LABELS = make_blobs(600, 16, centers=5, cluster_std=3.0, random_state=0)
FEATURES = scale_features(BLOBS)
NEIGHBORS = nearest_neighbors(FEATURES, 10)
CENTERS = kmeans(FEATURES, 5, [0, 1]).centers


def logits(x):
    return np.einsum("sbd,scd->sbc", x, WEIGHT)  # [S, B, C]


def ours(method, x=X, y=Y, heads=None, **step):
    """The library's loss in float64, [S]; logits of plain linear heads unless heads are given."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if heads is None:
        a, b = (torch.as_tensor(logits(v.numpy())).mT for v in (x, y))
    else:
        a, b = heads(x).mT, heads(y).mT
    found = RIVALS[method].loss(a, b, Step(heads, x.flatten(0, 1), x, y, **step))
    assert found.shape == (S,)
    return found.detach().numpy()


def entropy(p):
    return -(p * np.log(p)).sum()


def columns_apart(p, q):
    """-mean_c log softmax over c' of the cosine of column c of p with column c' of q."""
    unit_p, unit_q = p / np.linalg.norm(p, axis=0), q / np.linalg.norm(q, axis=0)
    return -np.mean(np.diag(log_softmax(unit_p.T @ unit_q, axis=1)))


def each_seed(reference):
    return [reference(logits(X)[s], logits(Y)[s], s) for s in range(S)]


def test_scan_and_tsp_are_eq_5_with_their_lambdas():
    def reference(a, b, _):
        p, q = softmax(a, 1), softmax(b, 1)
        return -np.mean(np.log((p * q).sum(1))), entropy(p.mean(0))

    for method, weight in (("scan", 5), ("tsp", 3)):
        expected = [c - weight * h for c, h in each_seed(reference)]
        np.testing.assert_allclose(ours(method), expected)


def test_iic_is_the_mutual_information_of_the_two_assignments():
    def reference(a, b, _):
        joint = softmax(a, 1).T @ softmax(b, 1) / B
        joint = (joint + joint.T) / 2
        return -(joint * np.log(joint / np.outer(joint.sum(1), joint.sum(0)))).sum()

    np.testing.assert_allclose(ours("iic"), each_seed(reference))
    # With certain predictions it is scikit-learn's mutual information of the labels.
    clusters = RNG.integers(0, C, B)
    hard = torch.full((S, C, B), -1e4, dtype=torch.float64)
    hard[:, clusters, np.arange(B)] = 1e4
    found = RIVALS["iic"].loss(hard, hard, None)
    np.testing.assert_allclose(found, [-mutual_info_score(clusters, clusters)] * S, rtol=1e-6)


def test_pica_and_cc_set_columns_apart():
    def pica(a, b, _):
        p, q = softmax(a, 1), softmax(b, 1)
        return columns_apart(p, q) - 2 * entropy(p.mean(0))

    np.testing.assert_allclose(ours("pica"), each_seed(pica))

    def cc(a, b, _):
        p, q = softmax(a, 1), softmax(b, 1)
        columns = np.concatenate([p, q], 1).T  # [2C, B]
        columns /= np.linalg.norm(columns, axis=1, keepdims=True)
        total = 0
        for i in range(2 * C):
            others = [j for j in range(2 * C) if j != i]
            cosines = columns[others] @ columns[i]
            total -= log_softmax(cosines)[others.index((i + C) % (2 * C))]
        return total / (2 * C) - entropy(p.mean(0)) - entropy(q.mean(0))

    np.testing.assert_allclose(ours("cc"), each_seed(cc))


def test_nnm_matches_the_drawn_and_the_nearest_of_the_batch():
    def reference(a, b, s):
        unit = X[s] / np.linalg.norm(X[s], axis=1, keepdims=True)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        local = a[cosines.argmax(1)]
        p = softmax(a, 1)
        total = -5 * entropy(p.mean(0))
        for other in (softmax(b, 1), softmax(local, 1)):
            total += -np.mean(np.log((p * other).sum(1))) + columns_apart(p, other)
        return total

    np.testing.assert_allclose(ours("nnm"), each_seed(reference))


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_dac_judges_the_pairs_that_its_thresholds_choose(progress):
    def reference(a, _, __):
        p = softmax(a, 1)
        unit = p / np.linalg.norm(p, axis=1, keepdims=True)
        s = np.clip(unit @ unit.T, 1e-6, 1 - 1e-6)
        upper, lower = 0.95 - 0.45 * progress, 0.455 + 0.045 * progress
        costs = [-np.log(v) if v > upper else -np.log(1 - v)
                 for v in s.ravel() if v > upper or v <= lower]
        return np.mean(costs)

    np.testing.assert_allclose(ours("dac", progress=progress), each_seed(reference))
    s_all = 0.95 - 0.45, 0.455 + 0.045
    assert s_all[0] == pytest.approx(s_all[1])  # at the end every pair counts


def test_dccm_adds_its_graph_and_its_labels():
    def reference(a, b, _):
        p, q = softmax(a, 1), softmax(b, 1)
        graphs = []
        for found in (p, q):
            unit = found / np.linalg.norm(found, axis=1, keepdims=True)
            graphs.append(np.clip(unit @ unit.T, 1e-6, 1 - 1e-6))
        alike = graphs[0] > 0.95
        graph = sum(np.where(alike, -np.log(s), -np.log(1 - s)).mean() for s in graphs)
        y = p.argmax(1)
        return graph + 5 * np.mean(p.max(1) * -np.log(q[np.arange(B), y]))

    np.testing.assert_allclose(ours("dccm"), each_seed(reference))


def test_dec_is_the_kl_divergence_to_its_sharpened_self():
    heads = DECHeads(FEATURES, 5, [0, 1]).double()
    batch = torch.as_tensor(FEATURES[None, :40].repeat(2, 0)).double()
    all_of_them = torch.as_tensor(FEATURES).double()
    log_q = heads(batch).mT
    found = RIVALS["dec"].loss(log_q, None, Step(heads, all_of_them)).detach()
    for s in range(2):
        def soft(x, s=s):  # Eq. 1, by hand
            z = x @ heads.weight[s].detach().numpy().T + heads.bias[s].detach().numpy()
            d = ((z[:, None] - heads.centers[s].detach().numpy()) ** 2).sum(2)
            q = 1 / (1 + d)
            return q / q.sum(1, keepdims=True)

        q, f = soft(FEATURES[:40].astype(float)), soft(FEATURES.astype(float)).sum(0)
        p = q**2 / f
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(found[s], (p * np.log(p / q)).sum(1).mean(), rtol=1e-6)


def test_dec_pulls_as_clustpys_does():
    """Its loss is ours plus a constant, the target's entropy: the gradients agree."""
    clustpy_dec = pytest.importorskip("clustpy.deep.dec", reason="needs a C compiler: pip install "
                                      "--no-deps clustpy, as .ci/run does")
    heads = DECHeads(FEATURES, 5, [0])
    x = torch.as_tensor(FEATURES)
    log_q = heads(x[None]).mT
    RIVALS["dec"].loss(log_q, None, Step(heads, x)).sum().backward()
    mine = heads.centers.grad[0].clone()
    centers = heads.centers[0].detach().clone().requires_grad_()
    z = (x @ heads.weight[0].T + heads.bias[0]).detach()
    q = clustpy_dec._dec_predict(centers, z, 1.0, None)
    torch.testing.assert_close(log_q[0].T.exp().detach(), q.detach(), rtol=1e-4, atol=1e-6)
    clustpy_dec._dec_compression_loss_fn(q).backward()
    torch.testing.assert_close(mine, centers.grad, rtol=1e-3, atol=1e-6)


def test_temi_weighs_the_pointwise_information_of_student_and_teacher():
    heads = init_heads(FEATURES, 5, [0, 1], centers=CENTERS).double()
    x, y = (torch.as_tensor(FEATURES[i : i + 30][None].repeat(2, 0)).double() for i in (0, 30))
    found = RIVALS["temi"].loss(heads(x).mT, heads(y).mT, Step(heads, x[0], x, y)).detach()
    p, q = (softmax(heads(v).detach().numpy() / 0.1, 2) for v in (x, y))  # teacher = student still
    for s in range(2):
        prior = np.concatenate([p[s], q[s]]).mean(0)
        weight = (p[s] * q[s]).sum(1)
        pmi = np.log(((p[s] * q[s]) ** 0.6 / prior).sum(1))
        np.testing.assert_allclose(found[s], -np.mean(weight * pmi), rtol=1e-6)


def test_secu_moves_the_own_centre_and_no_other():
    heads = CosineHeads(CENTERS[:1], [0])
    x = torch.as_tensor(FEATURES[None, :64])
    step = Step(heads, x[0], x, x)
    value = RIVALS["secu"].loss(heads(x).mT, heads(x).mT, step)
    cosines = torch.nn.functional.cosine_similarity(
        x[0][:, None], heads.weight[0][None], dim=2) / 0.05
    y = cosines.argmax(1)
    assert value.item() == pytest.approx(
        torch.nn.functional.cross_entropy(cosines, y).item(), rel=1e-5)
    # One cluster alone is anybody's: the centres of the others get no gradient at all.
    mine = torch.as_tensor(FEATURES[heads.predict(FEATURES)[0] == 2][None, :20])
    heads.zero_grad()
    RIVALS["secu"].loss(heads(mine).mT, heads(mine).mT, Step(heads, mine[0])).backward()
    moved = heads.weight.grad[0].norm(dim=1) > 0
    assert moved.tolist() == [False, False, True, False, False]


def test_secu_lifts_a_cluster_that_is_too_small():
    heads = CosineHeads(CENTERS[:1], [0])
    x = torch.as_tensor(FEATURES[heads.predict(FEATURES)[0] == 2][None, :50])
    step = Step(heads, x[0])
    for _ in range(200):
        RIVALS["secu"].loss(heads(x).mT, heads(x).mT, step)
    dual = step.memory["dual"][0]
    assert (dual >= 0).all() and (dual[[0, 1, 3, 4]] > dual[2]).all()


def test_the_trainer_is_the_cores_for_tsp():
    heads = init_heads(FEATURES, 5, [0, 1], centers=CENTERS)
    train_heads(heads, FEATURES, NEIGHBORS, max_epochs=3, min_steps=0, batch_size=64,
                learning_rate=3e-3, progress=False)
    ours, _ = train_rival("tsp", FEATURES, NEIGHBORS, CENTERS, [0, 1], learning_rate=3e-3,
                          n_steps=27, batch_size=64, progress=False)
    torch.testing.assert_close(ours.weight, heads.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.bias, heads.bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", RIVALS)
def test_every_rival_trains_alone_as_among_others_and_lowers_its_loss(method):
    settings = dict(learning_rate=1e-3, sharpness=10.0, batch_size=64, progress=False)
    heads, loss = train_rival(method, FEATURES, NEIGHBORS, CENTERS, [0, 1], n_steps=60, **settings)
    assert loss.shape == (2,) and np.isfinite(loss).all()
    alone, alone_loss = train_rival(method, FEATURES, NEIGHBORS, CENTERS[1:], [1], n_steps=60,
                                    **settings)
    np.testing.assert_allclose(loss[1], alone_loss[0], rtol=1e-3, atol=1e-4)
    assert (heads.predict(FEATURES)[1] == alone.predict(FEATURES)[0]).mean() > 0.99
    if method not in ("dac", "dccm"):  # these leave the blobs for one cluster
        assert clustering_metrics(LABELS, alone.predict(FEATURES)[0])["acc"] > 0.6
    if method not in ("temi", "icbpl", "dac", "secu"):  # what these ask for changes on the way
        _, longer = train_rival(method, FEATURES, NEIGHBORS, CENTERS, [0, 1], n_steps=600,
                                **settings)
        assert longer.mean() < loss.mean()


def test_sharpness_multiplies_the_start():
    for sharpness in (1.0, 10.0):
        heads, _ = train_rival("scan", FEATURES, NEIGHBORS, CENTERS, [0, 1], learning_rate=0.0,
                               sharpness=sharpness, n_steps=1, progress=False)
        torch.testing.assert_close(heads.weight.detach().norm(dim=2),
                                   torch.full((2, 5), sharpness / 4))


def test_bad_input():
    with pytest.raises(ValueError, match=r"'skan' is not known; the nearest one is 'scan'"):
        train_rival("skan", FEATURES, NEIGHBORS, CENTERS, [0, 1])
    with pytest.raises(ValueError, match="batch of 4 is smaller than the 5 clusters"):
        train_rival("scan", FEATURES, NEIGHBORS, CENTERS, [0, 1], batch_size=4)
