"""The projection on what views keep: its formulas, the network by a plain loop, learned small."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_patch_kmeans import as_batch, structured_images

from tsp_utils.backbones import load_backbone
from tsp_utils.networks.invariant_patches import InvariantPatches
from tsp_utils.pretraining.invariant import (
    _activations_of_views,
    between_within,
    learn_invariant_patches,
    projection,
)

SMALL = dict(n_atoms=12, n_features=16, n_patches=6000)
IMAGES = structured_images(600)


@pytest.fixture(scope="module")
def learned() -> InvariantPatches:
    return learn_invariant_patches(IMAGES, **SMALL)


@pytest.fixture(scope="module")
def few_views() -> np.ndarray:
    """Activations [60, 3, 7] of 60 images whose views differ most in the last directions."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(7, 7))
    own, by_view = rng.normal(size=(60, 1, 7)), rng.normal(size=(60, 3, 7))
    return (3 + own * np.linspace(2, -0.4, 7).clip(0) + by_view * np.linspace(0.2, 3, 7)) @ mixing


def weight_of_a_cell(cell: int, place: int, grid: int) -> float:
    """1 at the cell's centre, 0 at the next one's and beyond; a third of the map between them."""
    return max(0.0, 1 - abs((place + 0.5) - (cell + 0.5) * grid / 3) / (grid / 3))


def loop_activations(network: InvariantPatches, image: np.ndarray) -> np.ndarray:
    """One image [32, 32, 3], patch by patch and atom by atom in float64."""
    parts = []
    for size in (4, 8):
        filters = getattr(network, f"filters_{size}").double().numpy()
        offsets = getattr(network, f"offsets_{size}").double().numpy()
        grid = 33 - size
        pooled, weights = np.zeros((3, 3, len(filters))), np.zeros((3, 3))
        for y in range(grid):
            for x in range(grid):
                patch = image[y : y + size, x : x + size].astype(float).transpose(2, 0, 1).ravel()
                patch = (patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 10)
                active = np.maximum(0, filters @ patch - offsets)
                for a in range(3):
                    for b in range(3):
                        weight = weight_of_a_cell(a, y, grid) * weight_of_a_cell(b, x, grid)
                        pooled[a, b] += weight * active
                        weights[a, b] += weight
        roots = np.sqrt(pooled / weights[..., None]).ravel()
        parts.append((roots - roots.mean()) / roots.std())
    return np.concatenate(parts)


def test_activations_and_features_equal_a_plain_loop():
    rng = np.random.default_rng(3)
    draw = lambda *shape: torch.from_numpy(rng.normal(size=shape))  # noqa: E731
    network = InvariantPatches([0.1 * draw(5, 48), 0.1 * draw(4, 192)],
                               [0.2 + 0.05 * draw(5), 0.2 + 0.05 * draw(4)],
                               draw(81, 6))
    images = structured_images(2, seed=5)
    images[1] = 120 + images[1] // 32  # low contrast, where the constant 10 decides
    images[1, :16] = 128  # flat patches, which the normalisation must survive
    expected = np.stack([loop_activations(network, image) for image in images])
    np.testing.assert_allclose(network.activations(as_batch(images)), expected, atol=1e-4)
    features = expected @ network.axes.numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(network(as_batch(images)), features, atol=1e-4)


def test_an_image_gives_the_same_alone_or_in_a_batch_and_a_flat_one_is_finite(learned):
    images = structured_images(11, seed=2)
    images[10] = 77
    features = learned(as_batch(images))
    torch.testing.assert_close(features[3:4], learned(as_batch(images[3:4])), rtol=0, atol=1e-5)
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


def test_without_a_ridge_the_axes_are_those_of_linear_discriminant_analysis(few_views):
    """Each image a class: scikit-learn's axes, up to sign and one scale an axis."""
    axes = projection(*between_within([few_views]), n_axes=7, reg=0, power=0)
    classes = np.repeat(np.arange(60), 3)
    theirs = LinearDiscriminantAnalysis("eigen").fit(few_views.reshape(180, 7), classes).scalings_
    cosine = np.abs((axes * theirs).sum(0)) / np.linalg.norm(axes, axis=0) / np.linalg.norm(
        theirs[:, :7], axis=0)
    np.testing.assert_allclose(cosine, 1, atol=1e-9)


def test_axes_solve_the_eigenproblem_with_its_ridge_and_carry_the_power(few_views):
    s_b, s_w = between_within([few_views])
    ridged = s_w + 0.03 * np.linalg.eigvalsh(s_w)[-1] * np.eye(7)
    due = np.sort(np.linalg.eigvals(np.linalg.solve(ridged, s_b)).real)[::-1][:4]
    axes = projection(s_b, s_w, 4, reg=0.03, power=0)
    np.testing.assert_allclose(axes.T @ ridged @ axes, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(axes.T @ s_b @ axes, np.diag(due), atol=1e-9)
    powered = projection(s_b, s_w, 7, reg=0.03, power=0.25)
    np.testing.assert_allclose(np.abs(powered[:, :4]), np.abs(axes) * due**0.25, rtol=1e-6)
    least = np.linalg.eigvals(np.linalg.solve(ridged, s_b)).real.min()
    assert least < 0 and not powered[:, -1].any()  # clipped: nothing between images beside noise


def test_what_changes_within_an_image_is_left_out_and_what_differs_between_images_kept():
    rng = np.random.default_rng(0)
    views = np.concatenate([rng.normal(size=(300, 1, 1)).repeat(4, 1),  # an image's own
                            3 * rng.normal(size=(300, 4, 1))], 2)  # a view's own, and larger
    axis = projection(*between_within([views]), n_axes=1)[:, 0]
    assert abs(axis[0]) > 100 * abs(axis[1])


def test_an_unseen_image_finds_its_own_view_more_often_than_under_pca(learned):
    """Which 16 of the 216 dimensions of the same activations are kept is what differs."""
    pca = PCA(16, random_state=0).fit(learned.activations(as_batch(IMAGES)).numpy())
    unseen = structured_images(100, seed=9) // 4 + 90
    views = next(_activations_of_views(learned, unseen, 2, torch.Generator().manual_seed(3)))

    def own_first(x):
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return np.mean((x[:, 0] @ x[:, 1].T).argmax(1) == np.arange(100))

    ours = views @ learned.axes.numpy()
    theirs = pca.transform(views.reshape(200, 216)).reshape(100, 2, 16)
    assert own_first(ours) > own_first(theirs) + 0.1


def test_features_are_of_unit_length_and_survive_half_precision(learned, tmp_path):
    learned.save(tmp_path / "network.safetensors")
    batch = as_batch(structured_images(50, seed=4))
    before = learned(batch)
    torch.testing.assert_close(before.norm(dim=1), torch.ones(50))
    loaded = InvariantPatches.load(tmp_path / "network.safetensors")
    assert before.shape == (50, 16) and (loaded(batch) - before).norm(dim=1).max() < 0.01
    loaded.save(tmp_path / "again.safetensors")  # what was rounded once stays
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "network.safetensors").read_bytes()
    images = structured_images(50, seed=4)
    backbone = load_backbone("invariant_patches", "cpu", tmp_path / "network.safetensors")
    torch.testing.assert_close(backbone(images), loaded(batch))


def test_same_seed_same_network_and_another_seed_another(learned):
    stages = []
    again = learn_invariant_patches(IMAGES, **SMALL, on_stage=stages.append)
    for name, value in learned.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    other = learn_invariant_patches(IMAGES, **SMALL, seed=1)
    assert not torch.allclose(other.filters_4, learned.filters_4, atol=1e-2)
    assert stages == ["dictionaries", "activations and sums", "eigenproblem"]


def test_bad_input_is_refused_in_a_sentence(few_views):
    def refused(message, images=IMAGES, **more):
        with pytest.raises(ValueError, match=message) as caught:
            learn_invariant_patches(images, **SMALL | more)
        assert str(caught.value).count(". ") == 0

    refused("n_views is 1: pass at least 2", n_views=1)
    refused("300 axes are too many for 216 activations; pass fewer", n_features=300)
    flat = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 32, 32, 3))
    refused("200 images is of a single colour; pass images that show", flat)
    equal = np.repeat(few_views[:, :1], 3, 1).astype(np.float32)
    with pytest.raises(ValueError, match=r"are all equal: S_w is zero.*; pass views that differ"):
        projection(*between_within([equal]), n_axes=2)
    still = np.concatenate([few_views, np.zeros((60, 3, 1))], 2)
    with pytest.raises(ValueError, match=r"S_w is singular: .* pass reg above 0"):
        projection(*between_within([still]), n_axes=2, reg=0)


def test_weights_of_another_network_are_refused_with_the_command_that_learns_them(tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="python -m experiments learn-invariant"):
        load_backbone("invariant_patches", "cpu", tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match="computed in float32 only"):
        load_backbone("invariant_patches", "cpu", dtype="bfloat16")


def test_sizes_in_any_order_are_the_same_network_once_saved(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    learned = learn_invariant_patches(images, n_atoms=4, sizes=(10, 4), n_features=4,
                                      n_patches=400, n_views=2)
    learned.save(tmp_path / "network.safetensors")
    again = InvariantPatches.load(tmp_path / "network.safetensors")
    x = torch.from_numpy(images[:5]).permute(0, 3, 1, 2) / 255
    assert again.sizes == learned.sizes == [4, 10]
    torch.testing.assert_close(again(x), learned(x), rtol=0, atol=0.02)  # half precision
