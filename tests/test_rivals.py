"""Each rival's loss against a plain float64 reference, its trainer against the core's."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax
from scipy.stats import ttest_ind
from sklearn.metrics import mutual_info_score
from toys import CENTERS, CLASSES, FEATURES, NEIGHBORS

from tsp_utils import clustering_metrics, init_heads, train_heads
from tsp_utils.systems.other_losses import Step
from tsp_utils.systems.rivals import RIVALS, CosineHeads, DECHeads, train_rival

S, C, B, D = 2, 4, 12, 6
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, S, B, D))
WEIGHT = RNG.standard_normal((S, C, D))


def assert_loss_is(method, reference, **step):
    """The library's loss in float64, [S], is that of reference(p, q, x) of each seed."""
    x, y, weight = map(torch.as_tensor, (X, Y, WEIGHT))
    a, b = weight @ x.mT, weight @ y.mT  # logits [S, C, B]
    found = RIVALS[method].loss(a, b, Step(None, x.flatten(0, 1), x, y, **step))
    p, q = (softmax(logits.mT.numpy(), 2) for logits in (a, b))
    np.testing.assert_allclose(found, list(map(reference, p, q, X)))


def entropy(p):
    return -(p * np.log(p)).sum()


def apart(p, q):
    """-mean_b log sum_c p_bc q_bc."""
    return -np.mean(np.log((p * q).sum(1)))


def columns_apart(p, q):
    """-mean_c log softmax over c' of the cosine of column c of p with column c' of q."""
    return -np.mean(np.diag(log_softmax(unit(p.T) @ unit(q.T).T, axis=1)))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def similarities(rows):
    return np.clip(unit(rows) @ unit(rows).T, 1e-6, 1 - 1e-6)


def scan(p, q, _, entropy_weight=5):
    return apart(p, q) - entropy_weight * entropy(p.mean(0))


def tsp(p, q, _):
    return scan(p, q, _, entropy_weight=3)


def iic(p, q, _):
    joint = (p.T @ q + q.T @ p) / (2 * B)
    return -(joint * np.log(joint / np.outer(joint.sum(1), joint.sum(0)))).sum()


def pica(p, q, _):
    return columns_apart(p, q) - 2 * entropy(p.mean(0))


def cc(p, q, _):
    columns, total = unit(np.concatenate([p, q], 1).T), 0  # [2C, B]
    for i in range(2 * C):
        others = [j for j in range(2 * C) if j != i]
        cosines = columns[others] @ columns[i]
        total -= log_softmax(cosines)[others.index((i + C) % (2 * C))]
    return total / (2 * C) - entropy(p.mean(0)) - entropy(q.mean(0))


def nnm(p, q, x):
    nearest = (unit(x) @ unit(x).T - 2 * np.eye(B)).argmax(1)  # of the batch
    return sum(apart(p, other) + columns_apart(p, other) for other in (q, p[nearest])) - (
        5 * entropy(p.mean(0)))


def dccm(p, q, _):
    alike = similarities(p) > 0.95
    graph = sum(np.where(alike, -np.log(s), -np.log(1 - s)).mean()
                for s in (similarities(p), similarities(q)))
    return graph + 5 * np.mean(p.max(1) * -np.log(q[np.arange(B), p.argmax(1)]))


@pytest.mark.parametrize("reference", [scan, tsp, iic, pica, cc, nnm, dccm])
def test_a_loss_is_that_of_its_paper(reference):
    assert_loss_is(reference.__name__, reference)


def test_iic_of_certain_predictions_is_scikit_learns_mutual_information():
    clusters = RNG.integers(0, C, B)
    hard = torch.full((S, C, B), -1e4, dtype=torch.float64)
    hard[:, clusters, np.arange(B)] = 1e4
    found = RIVALS["iic"].loss(hard, hard, None)
    np.testing.assert_allclose(found, [-mutual_info_score(clusters, clusters)] * S, rtol=1e-6)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_dac_judges_the_pairs_that_its_thresholds_choose(progress):
    def reference(p, *_):
        s = similarities(p).ravel()
        upper, lower = s > 0.95 - 0.45 * progress, s <= 0.455 + 0.045 * progress
        return np.concatenate([-np.log(s[upper]), -np.log(1 - s[lower & ~upper])]).mean()

    assert_loss_is("dac", reference, progress=progress)


def test_dec_is_the_kl_divergence_to_its_sharpened_self():
    heads, features = DECHeads(FEATURES, 5, [0, 1]).double(), FEATURES.astype(np.float64)
    log_q = heads(torch.as_tensor(features[None, :40].repeat(2, 0))).mT
    found = RIVALS["dec"].loss(log_q, None, Step(heads, torch.as_tensor(features))).detach()
    for s, parts in enumerate(zip(heads.weight, heads.bias, heads.centers, strict=True)):
        weight, bias, centers = (part.detach().numpy() for part in parts)
        q = 1 / (1 + cdist(features @ weight.T + bias, centers, "sqeuclidean"))  # Eq. 1, by hand
        q /= q.sum(1, keepdims=True)
        p = (q**2 / q.sum(0))[:40]
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(found[s], (p * np.log(p / q[:40])).sum(1).mean(), rtol=1e-6)


def test_dec_pulls_as_clustpys_does():
    """Its loss is ours plus a constant, the target's entropy: the gradients agree."""
    theirs = pytest.importorskip("clustpy.deep.dec", reason="needs a C compiler: pip install "
                                 "--no-deps clustpy, as .ci/run does")
    heads, x = DECHeads(FEATURES, 5, [0]), torch.as_tensor(FEATURES)
    log_q = heads(x[None]).mT
    RIVALS["dec"].loss(log_q, None, Step(heads, x)).sum().backward()
    centers = heads.centers[0].detach().clone().requires_grad_()
    z = (x @ heads.weight[0].T + heads.bias[0]).detach()
    q = theirs._dec_predict(centers, z, 1.0, None)
    torch.testing.assert_close(log_q[0].T.exp().detach(), q.detach(), rtol=1e-4, atol=1e-6)
    theirs._dec_compression_loss_fn(q).backward()
    torch.testing.assert_close(heads.centers.grad[0], centers.grad, rtol=1e-3, atol=1e-6)


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


def test_secu_moves_the_own_centre_alone_and_lifts_clusters_that_are_too_small():
    def loss_of(x, step):
        return RIVALS["secu"].loss(heads(x).mT, heads(x).mT, step)

    heads = CosineHeads(CENTERS[:1], [0])
    x = torch.as_tensor(FEATURES[None, :64])
    cosines = torch.as_tensor(unit(FEATURES[:64]) @ unit(CENTERS[0]).T) / 0.05
    expected = torch.nn.functional.cross_entropy(cosines, cosines.argmax(1))
    assert loss_of(x, Step(heads, x[0])).item() == pytest.approx(expected.item(), rel=1e-5)
    # One cluster alone is anybody's: the centres of the others get no gradient at all.
    mine = torch.as_tensor(FEATURES[heads.predict(FEATURES)[0] == 2][None, :50])
    step = Step(heads, mine[0])
    loss_of(mine, step).backward()
    assert (heads.weight.grad[0].norm(dim=1) > 0).tolist() == [False, False, True, False, False]
    for _ in range(200):
        loss_of(mine, step)
    dual = step.memory["dual"][0]
    assert (dual >= 0).all() and (dual[[0, 1, 3, 4]] > dual[2]).all()


def test_the_trainer_is_the_cores_for_tsp():
    heads = init_heads(FEATURES, 5, [0, 1], centers=CENTERS)
    train_heads(heads, FEATURES, NEIGHBORS, max_epochs=3, min_steps=0, batch_size=64,
                learning_rate=3e-3, progress=False)
    ours, _ = train_rival("tsp", FEATURES, NEIGHBORS, CENTERS, [0, 1], learning_rate=3e-3,
                          n_steps=27, batch_size=64, progress=False)
    torch.testing.assert_close(dict(ours.state_dict()), dict(heads.state_dict()), rtol=1e-3,
                               atol=1e-4)


@pytest.mark.parametrize("method", RIVALS)
def test_every_rival_trains_alone_as_among_others_and_lowers_its_loss(method):
    def train(seeds, n_steps=60):
        return train_rival(method, FEATURES, NEIGHBORS, CENTERS[seeds], seeds, n_steps=n_steps,
                           learning_rate=1e-3, sharpness=10.0, batch_size=64, progress=False)

    (heads, loss), (alone, alone_loss) = train([0, 1]), train([1])
    assert loss.shape == (2,) and np.isfinite(loss).all()
    np.testing.assert_allclose(loss[1], alone_loss[0], rtol=1e-3, atol=1e-4)
    clusters = alone.predict(FEATURES)[0]
    assert (heads.predict(FEATURES)[1] == clusters).mean() > 0.99
    if method not in ("dac", "dccm"):  # these leave the blobs for one cluster
        assert clustering_metrics(CLASSES, clusters)["acc"] > 0.6
    if method not in ("temi", "icbpl", "dac", "secu"):  # what these ask for changes on the way
        assert train([1], n_steps=600)[1] < alone_loss


def test_sharpness_multiplies_the_start():
    for sharpness in (1.0, 10.0):
        heads, _ = train_rival("scan", FEATURES, NEIGHBORS, CENTERS, [0, 1], learning_rate=0.0,
                               sharpness=sharpness, n_steps=1, progress=False)
        np.testing.assert_allclose(heads.weight.detach().norm(dim=2), sharpness / 4, rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"'skan' is not known; the nearest one is 'scan'"):
        train_rival("skan", FEATURES, NEIGHBORS, CENTERS, [0, 1])
    with pytest.raises(ValueError, match="batch of 4 is smaller than the 5 clusters"):
        train_rival("scan", FEATURES, NEIGHBORS, CENTERS, [0, 1], batch_size=4)


def test_the_page_of_the_published_code_is_its_record():
    page, record = ((Path(__file__).parent.parent / "docs" / f"official_rivals.{kind}").read_text()
                    for kind in ("md", "json"))
    record = json.loads(record)
    assert all(commit in page for commit in record["commits"].values())
    assert max(record["losses_apart"].values()) < 1e-5
    rows = pd.DataFrame(record["rows"])
    ours = rows[rows["arm"] == "ours"].set_index(["dataset", "backbone", "system"])
    arms = rows.groupby(["dataset", "backbone", "system", "arm"])
    for (*where, system, arm), found in arms:
        beside = ours.loc[(*where, system)].query("seed in @found.seed")
        found = found.query("seed in @beside.seed")
        acc, beside, loss, over_seeds = found["acc"], beside["acc"], found["loss"], len(found) > 1
        low, high = ttest_ind(acc, beside, equal_var=False).confidence_interval()
        cells = [", ".join(where), system, arm, str(len(found)),
                 f"{loss.mean():.3f}" + f" +- {loss.std():.3f}" * over_seeds,
                 f"{acc.mean():.2f}" + f" +- {acc.std():.2f}" * over_seeds,
                 "" if arm == "ours" else f"{acc.mean() - beside.mean():+.2f}"
                 + f" ({low:+.2f} to {high:+.2f})" * over_seeds,
                 f"{found['same'].mean():.1f}" if "start" in arm else ""]
        assert f"| {' | '.join(cells)} |" in page
    assert page.count("\n| cifar10") + page.count("\n| fashion-mnist") == len(arms)
