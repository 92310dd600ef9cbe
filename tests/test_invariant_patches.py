"""The projection on what views keep: its formulas, the network by hand, learned small."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from test_patch_kmeans import hard_images, patches_by_hand, structured_images

from tsp_utils.backbones import load_backbone
from tsp_utils.networks.invariant_patches import InvariantPatches
from tsp_utils.pretraining.dictionary import to_float
from tsp_utils.pretraining.invariant import (
    activations_of_views,
    between_within,
    learn_invariant_patches,
    projection,
)

SMALL = dict(n_atoms=12, n_features=16, n_patches=6000)
IMAGES = structured_images(600)


@pytest.fixture(scope="module")
def learned() -> InvariantPatches:
    stages = []
    network = learn_invariant_patches(IMAGES, **SMALL, on_stage=stages.append)
    assert stages == ["dictionaries", "activations and sums", "eigenproblem"]
    return network


@pytest.fixture(scope="module")
def few_views() -> np.ndarray:
    """Activations [60, 3, 7] of 60 images whose views differ most in the last directions."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(7, 7))
    own, by_view = rng.normal(size=(60, 1, 7)), rng.normal(size=(60, 3, 7))
    return (3 + own * np.linspace(2, -0.4, 7).clip(0) + by_view * np.linspace(0.2, 3, 7)) @ mixing


def activations_by_hand(network: InvariantPatches, image: np.ndarray) -> np.ndarray:
    """A cell's weight is 1 at its centre, and 0 at the next one's and beyond: a third away."""
    parts = []
    for size in (4, 8):
        filters, offsets = (getattr(network, f"{name}_{size}").double().numpy()
                            for name in ("filters", "offsets"))
        active = np.maximum(0, patches_by_hand(image, size) @ filters.T - offsets)
        grid, centres = 33 - size, np.arange(-0.5, 4)  # also of cells beyond the edges
        weights = np.stack([np.interp((np.arange(grid) + 0.5) * 3 / grid, centres, cell)
                            for cell in np.eye(5)[1:4]])  # [3, grid]
        weights /= weights.sum(1, keepdims=True)
        pooled = np.einsum("ay,bx,yxf->abf", weights, weights, active.reshape(grid, grid, -1))
        roots = np.sqrt(pooled).ravel()
        parts.append((roots - roots.mean()) / roots.std())
    return np.concatenate(parts)


def test_activations_and_features_equal_those_by_hand():
    rng = np.random.default_rng(3)
    filters_4, filters_8, offsets_4, offsets_8, axes = (
        torch.from_numpy(rng.normal(size=shape)) for shape in ((5, 48), (4, 192), 5, 4, (81, 6)))
    network = InvariantPatches([0.1 * filters_4, 0.1 * filters_8],
                               [0.2 + 0.05 * offsets_4, 0.2 + 0.05 * offsets_8], axes)
    expected = np.stack([activations_by_hand(network, image) for image in hard_images()])
    np.testing.assert_allclose(network.activations(to_float(hard_images())), expected, atol=1e-4)
    features = expected @ network.axes.numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(network(to_float(hard_images())), features, atol=1e-4)


def test_an_image_gives_the_same_alone_or_in_a_batch_and_a_flat_one_is_finite(learned):
    images = structured_images(11, seed=2)
    images[10] = 77
    features = learned(to_float(images))
    torch.testing.assert_close(features[3:4], learned(to_float(images[3:4])), rtol=0, atol=1e-5)
    assert features.isfinite().all()


def test_scatters_are_those_of_their_definition(few_views):
    s_w = np.mean([np.cov(views.T) for views in few_views], 0)
    s_b = np.cov(few_views.mean(1).T) - s_w / 3
    for dtype, within in ((np.float64, 1e-12), (np.float32, 1e-5)):
        views = few_views.astype(dtype)
        found = between_within([views[:7], views[7:8], views[8:]])
        for one, due in zip(found, (s_b, s_w), strict=True):
            assert one.dtype == np.float64
            np.testing.assert_allclose(one, due, atol=within * np.abs(due).max())


@pytest.mark.parametrize("reg", [0, 0.03])
def test_axes_solve_fishers_eigenproblem_with_its_ridge_and_carry_the_power(few_views, reg):
    s_b, s_w = between_within([few_views])
    ridged = s_w + reg * np.linalg.eigvalsh(s_w)[-1] * np.eye(7)
    due = np.sort(np.linalg.eigvals(np.linalg.solve(ridged, s_b)).real)[::-1]
    axes = projection(s_b, s_w, 4, reg, power=0)
    np.testing.assert_allclose(axes.T @ ridged @ axes, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(axes.T @ s_b @ axes, np.diag(due[:4]), atol=1e-9 * due[0])
    powered = projection(s_b, s_w, 7, reg, power=0.25)
    np.testing.assert_allclose(np.abs(powered[:, :4]), np.abs(axes) * due[:4]**0.25, rtol=1e-6)
    assert due[-1] < 0 and not powered[:, -1].any()  # clipped: nothing between images beside noise


def test_an_unseen_image_finds_its_own_view_more_often_than_under_pca(learned):
    """Which 16 of the 216 dimensions of the same activations are kept is what differs."""
    pca = PCA(16, random_state=0).fit(learned.activations(to_float(IMAGES)).numpy())
    unseen = structured_images(100, seed=9) // 4 + 90
    views = next(activations_of_views(learned, unseen, 2, torch.Generator().manual_seed(3)))

    def own_first(x):
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return np.mean((x[:, 0] @ x[:, 1].T).argmax(1) == np.arange(100))

    theirs = pca.transform(views.reshape(200, 216)).reshape(100, 2, 16)
    assert own_first(views @ learned.axes.numpy()) > own_first(theirs) + 0.1


def test_features_are_of_unit_length_and_survive_half_precision(learned, tmp_path):
    file, again = tmp_path / "network.safetensors", tmp_path / "again.safetensors"
    images = structured_images(50, seed=4)
    before = learned(to_float(images))
    torch.testing.assert_close(before.norm(dim=1), torch.ones(50))
    learned.save(file)
    loaded = load_backbone("invariant_patches", "cpu", file)
    assert before.shape == (50, 16) and (loaded(images) - before).norm(dim=1).max() < 0.01
    loaded.model.save(again)  # what was rounded once stays
    assert again.read_bytes() == file.read_bytes()


def test_sizes_in_any_order_are_the_same_network_once_saved(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    learned = learn_invariant_patches(images, n_atoms=4, sizes=(10, 4), n_features=4,
                                      n_patches=400, n_views=2)
    learned.save(tmp_path / "network.safetensors")
    again = InvariantPatches.load(tmp_path / "network.safetensors")
    assert again.sizes == learned.sizes == [4, 10]
    x = to_float(images[:5])
    torch.testing.assert_close(again(x), learned(x), rtol=0, atol=0.02)  # half precision


def test_bad_input_is_refused_in_a_sentence(few_views):
    def refused(message, images=IMAGES, **more):
        with pytest.raises(ValueError, match=message) as caught:
            learn_invariant_patches(images, **SMALL | more)
        assert str(caught.value).count(". ") == 0

    refused("n_views is 1: pass at least 2", n_views=1)
    flat = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 32, 32, 3))
    refused("200 images is of a single colour; pass images that show", flat)
    equal = np.repeat(few_views[:, :1], 3, 1).astype(np.float32)
    still = np.concatenate([few_views, np.zeros((60, 3, 1))], 2)
    for views, n_axes, message in (
            (few_views, 8, "8 axes are too many for 7 activations; pass fewer"),
            (equal, 2, r"are all equal: S_w is zero.*; pass views that differ"),
            (still, 2, r"S_w is singular: .* pass reg above 0")):
        with pytest.raises(ValueError, match=message):
            projection(*between_within([views]), n_axes, reg=0)
