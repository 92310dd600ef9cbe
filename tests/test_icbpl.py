"""ICBPL's pieces: the simplex, the discrepancy, the start, the terms."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from toys import CENTERS, FEATURES

from tsp_utils.systems.icbpl import ICBPLHeads, mmd2, simplex_centers


@pytest.mark.parametrize(("n_clusters", "dim"), [(2, None), (3, 2), (10, None), (10, 64),
                                                  (100, 99)])
def test_the_simplex_is_regular(n_clusters, dim):
    corners = simplex_centers(n_clusters, dim)
    assert corners.shape == (n_clusters, dim or n_clusters - 1)
    cosines = np.where(np.eye(n_clusters), 1, -1 / (n_clusters - 1))
    np.testing.assert_allclose(corners @ corners.T, cosines, atol=1e-6)


def test_too_few_dimensions_or_clusters_and_unknown_terms_are_refused():
    with pytest.raises(ValueError, match="10 centres with equal angles need 9 dimensions and the "
                                         "embedding has 8; pass 9 or more"):
        simplex_centers(10, 8)
    with pytest.raises(ValueError, match="pass 2 clusters or more"):
        simplex_centers(1)
    with pytest.raises(ValueError, match="no term size; its weights are mmd, neighbor, view"):
        ICBPLHeads(CENTERS, [0, 1], size=1.0)


def test_the_discrepancy_is_that_of_scikit_learns_kernels_and_0_of_a_set_with_itself():
    rng = np.random.default_rng(0)
    z, corners = rng.standard_normal((2, 15, 4)), simplex_centers(5)
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    found = mmd2(torch.as_tensor(z), torch.as_tensor(corners))
    for s in range(2):
        both = np.concatenate([z[s], np.tile(corners, (3, 1))])  # 15 of each, as the issue says
        squared = ((both[:, None] - both) ** 2).sum(2)
        width = squared.sum() / (30 * 29) / 4  # mean over ordered pairs of different members, / 4
        kernel = sum(rbf_kernel(both, gamma=1 / (width * 2**k)) for k in range(5))
        expected = kernel[:15, :15].mean() + kernel[15:, 15:].mean() - 2 * kernel[:15, 15:].mean()
        assert found[s].item() == pytest.approx(expected, rel=1e-10)
    corners = torch.as_tensor(corners)
    tiled = corners.repeat(4, 1)
    crowded = torch.where(torch.arange(20)[:, None] < 8, corners[0], tiled)  # eight of twenty
    apart = [mmd2(points, corners).item() for points in (tiled, crowded, corners[:1].repeat(20, 1))]
    assert apart[0] == pytest.approx(0, abs=1e-12) and 0.01 < apart[1] < apart[2]


def test_the_start_sends_each_k_means_centre_to_its_corner():
    heads, centers = ICBPLHeads(CENTERS, [0, 1]), torch.as_tensor(CENTERS)
    torch.testing.assert_close(heads.embed(centers), heads.corners.expand(2, 5, 4), rtol=1e-4,
                               atol=1e-4)
    assert (heads(centers).argmax(-1) == torch.arange(5)).all()
    wide = ICBPLHeads(CENTERS, [0, 1], dim=12)
    assert wide.embed(torch.as_tensor(FEATURES)).shape == (2, 600, 12)


def test_the_loss_is_the_sum_of_its_weighted_terms():
    x, y, v = (torch.as_tensor(FEATURES[i : i + 50]).expand(2, 50, 16) for i in (0, 50, 100))
    terms = ("mmd", "neighbor", "view", "center")

    def loss(*weights, v=v, **settings):
        heads = ICBPLHeads(CENTERS, [0, 1], **dict(zip(terms, weights, strict=True)))
        return heads.loss(x, y, v, **settings).detach()

    mmd, neighbor, view, center = (loss(*row) for row in np.eye(4))
    torch.testing.assert_close(loss(1.0, 2.0, 3.0, 4.0), mmd + 2 * neighbor + 3 * view + 4 * center)
    heads = ICBPLHeads(CENTERS, [0, 1])
    for other, found in ((y, neighbor), (v, view)):
        apart = (heads.embed(x) - heads.embed(other)).square().sum(-1).mean(-1)
        torch.testing.assert_close(found, apart.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(center, (1 - heads(x).amax(-1)).mean(-1).detach())
    # No views where there are no images, and no nearest centre before the warm-up is over.
    torch.testing.assert_close(loss(1.0, 2.0, 3.0, 4.0, v=None, progress=0.1), mmd + 2 * neighbor)
