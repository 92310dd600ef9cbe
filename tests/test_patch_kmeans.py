"""The network of patches: against plain formulas, on disk, learned small; and what both share."""

import inspect

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.spatial.distance import cdist

from tsp_utils.backbones import load_backbone
from tsp_utils.networks.patch_kmeans import PatchKMeans, normalised_patches
from tsp_utils.pretraining.dictionary import _draw_patches, learn_patch_kmeans, to_float
from tsp_utils.pretraining.invariant import learn_invariant_patches

SMALL = dict(n_atoms=24, n_features=16, n_patches=4000, n_pca_images=600)


def structured_images(n: int, seed: int = 0) -> np.ndarray:
    """Coarse random blocks with fine noise: patches that have something to be learned."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 8, 8, 3)).repeat(4, 1).repeat(4, 2)  # [n, 32, 32, 3]
    return np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)


def hard_images() -> np.ndarray:
    images = structured_images(2, seed=5)
    images[1] = 120 + images[1] // 32  # low contrast, where the constant 10 decides
    images[1, :16] = 128  # flat patches, which the normalisation must survive
    return images


def patches_by_hand(image: np.ndarray, size: int) -> np.ndarray:
    """Patches of one image [32, 32, 3], normalised in float64: [(33 - size)^2, 3 size^2]."""
    patches = sliding_window_view(image.astype(float), (size, size), (0, 1)).reshape(
        -1, 3 * size**2)
    patches = patches - patches.mean(1, keepdims=True)
    return patches / np.sqrt(patches.var(1, ddof=1, keepdims=True) + 10)


@pytest.fixture(scope="module")
def learned() -> PatchKMeans:
    return learn_patch_kmeans(structured_images(600), **SMALL)


def activations_by_hand(network: PatchKMeans, image: np.ndarray) -> np.ndarray:
    mean, whitener, atoms = (getattr(network, name).double().numpy()
                             for name in ("mean", "whitener", "atoms"))
    d = cdist((patches_by_hand(image, 6) - mean) @ whitener, atoms)
    active = np.maximum(0, d.mean(1, keepdims=True) - d).reshape(27, 27, -1)
    halves = slice(14), slice(14, None)
    return np.concatenate([active[y, x].sum((0, 1)) for y in halves for x in halves])


def test_activations_and_features_equal_those_by_hand():
    shapes = [(108,), (108, 108), (9, 108), (36,), (36,), (36, 5)]
    rng = np.random.default_rng(3)
    mean, whitener, atoms, centre, scale, axes = (
        torch.from_numpy(rng.normal(size=shape)) for shape in shapes)
    network = PatchKMeans(0.1 * mean, 0.3 * whitener, atoms, 10 * centre, 1 + scale**2, axes)
    images = hard_images()
    expected = np.stack([activations_by_hand(network, image) for image in images])
    found = network.activations(to_float(images)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-2)
    assert expected.std() > 10  # the tolerance is small beside what is compared
    features = (expected - network.centre.numpy()) / network.scale.numpy() @ network.axes.numpy()
    np.testing.assert_allclose(network(to_float(images)), features, rtol=1e-3, atol=0.1)


def test_patches_are_learned_from_as_they_are_looked_at():
    """What is drawn for the dictionary is among what an image is later cut into."""
    image = 120 + structured_images(1, seed=8) // 32
    drawn = _draw_patches(image, 40, np.random.default_rng(0))
    every = normalised_patches(to_float(image), 6)[0]  # [729, 108]
    assert torch.cdist(drawn, every).amin(1).max() < 1e-2
    assert drawn.shape == (40, 108) and len(torch.unique(drawn, dim=0)) > 30


def test_save_and_load_keep_the_axes_within_half_a_step(learned, tmp_path):
    learned.save(tmp_path / "network.safetensors")
    loaded = PatchKMeans.load(tmp_path / "network.safetensors")
    step = learned.axes.abs().amax(0) / 127
    assert ((loaded.axes - learned.axes).abs() <= 0.501 * step).all()
    assert torch.equal(loaded.centre, learned.centre) and torch.equal(loaded.scale, learned.scale)
    for name in ("mean", "whitener", "atoms"):  # half precision
        torch.testing.assert_close(getattr(loaded, name), getattr(learned, name), rtol=1e-3,
                                   atol=1e-4)
    loaded.save(tmp_path / "again.safetensors")  # what was rounded once stays
    torch.testing.assert_close(PatchKMeans.load(tmp_path / "again.safetensors").axes, loaded.axes)


def test_learned_features_are_uncorrelated_and_an_image_s_own(learned):
    """Whole PCA on the images it was fitted on: columns uncorrelated, norms s^(1/2), falling."""
    images = structured_images(600)
    features = learned(to_float(images)).numpy()
    np.testing.assert_allclose(learned(to_float(images[3:4])), features[3:4], rtol=1e-4, atol=1e-4)
    gram = features.T @ features
    norms = np.sqrt(np.diag(gram))
    assert np.abs(gram / np.outer(norms, norms) - np.eye(16)).max() < 0.02
    standardised = (learned.activations(to_float(images)) - learned.centre) / learned.scale
    singular = np.linalg.svd(standardised.numpy(), compute_uv=False)[:16]
    np.testing.assert_allclose(norms, singular**0.5, rtol=0.03)


@pytest.mark.parametrize("learn, settings, atoms, rtol", [
    (learn_patch_kmeans, SMALL, "atoms", 1e-4),
    (learn_invariant_patches, dict(n_atoms=12, n_features=16, n_patches=2000), "filters_4", 1e-3)])
def test_same_seed_same_network_and_another_seed_another(learn, settings, atoms, rtol):
    one, again, other = (learn(structured_images(100), **settings, seed=i) for i in (0, 0, 1))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=rtol, atol=1e-4)
    assert not torch.allclose(getattr(other, atoms), getattr(one, atoms), atol=1e-2)


@pytest.mark.parametrize("learn", [learn_patch_kmeans, learn_invariant_patches])
def test_learning_takes_images_and_no_labels_and_refuses_others_in_a_sentence(learn):
    parameters = inspect.signature(learn).parameters
    assert [p.name for p in parameters.values() if p.default is p.empty] == ["images"]
    assert not [name for name in parameters if "label" in name or "class" in name or name == "y"]
    with pytest.raises(ValueError, match=r"shape \(600, 28, 28, 1\); resize them to 32 px"):
        learn(np.zeros((600, 28, 28, 1), np.uint8))
    with pytest.raises(ValueError, match=r"31 images are too few .* at least 32 images"):
        learn(structured_images(31), n_features=16)


@pytest.mark.parametrize("name, command", [("patch_kmeans", "learn-patches"),
                                           ("invariant_patches", "learn-invariant")])
def test_weights_of_another_network_are_refused_with_the_command_that_learns_them(
        name, command, tmp_path):
    (path := tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"not a dictionary of patches .*experiments {command}"):
        load_backbone(name, "cpu", path)
    with pytest.raises(ValueError, match="computed in float32 only"):
        load_backbone(name, "cpu", dtype="bfloat16")
