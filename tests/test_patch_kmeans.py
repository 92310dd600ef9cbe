"""The network of patches: against a plain loop, on disk, learned small, and the one that ships."""

import inspect
import math

import numpy as np
import pytest
import torch

from tsp_utils.networks.patch_kmeans import PatchKMeans, normalised_patches
from tsp_utils.pretraining.dictionary import _draw_patches, learn_patch_kmeans
from tsp_utils.pretraining.invariant import learn_invariant_patches

SMALL = dict(n_atoms=24, n_features=16, n_patches=4000, n_pca_images=600)


def structured_images(n: int, seed: int = 0) -> np.ndarray:
    """Coarse random blocks with fine noise: patches that have something to be learned."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 8, 8, 3)).repeat(4, 1).repeat(4, 2)  # [n, 32, 32, 3]
    return np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)


def as_batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def learned() -> PatchKMeans:
    return learn_patch_kmeans(structured_images(600), **SMALL)


def loop_activations(network: PatchKMeans, image: np.ndarray) -> np.ndarray:
    """One image [32, 32, 3], patch by patch and atom by atom in float64."""
    mean, whitener, atoms = (getattr(network, name).double().numpy()
                             for name in ("mean", "whitener", "atoms"))
    pooled = np.zeros((2, 2, len(atoms)))
    for y in range(27):
        for x in range(27):
            patch = image[y : y + 6, x : x + 6].astype(float).transpose(2, 0, 1).ravel()
            patch = (patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 10)
            z = (patch - mean) @ whitener
            d = np.array([math.sqrt(((z - atom) ** 2).sum()) for atom in atoms])
            pooled[int(y >= 14), int(x >= 14)] += np.maximum(0, d.mean() - d)
    return pooled.ravel()


def test_activations_and_features_equal_a_plain_loop():
    shapes = [(108,), (108, 108), (9, 108), (36,), (36,), (36, 5)]
    rng = np.random.default_rng(3)
    mean, whitener, atoms, centre, scale, axes = (
        torch.from_numpy(rng.normal(size=shape)) for shape in shapes)
    network = PatchKMeans(0.1 * mean, 0.3 * whitener, atoms, 10 * centre, 1 + scale**2, axes)
    images = structured_images(2, seed=5)
    images[1] = 120 + images[1] // 32  # low contrast, where the constant 10 decides
    images[1, :16] = 128  # flat patches, which the normalisation must survive
    expected = np.stack([loop_activations(network, image) for image in images])
    found = network.activations(as_batch(images)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-2)
    assert expected.std() > 10  # the tolerance is small beside what is compared
    features = (expected - network.centre.numpy()) / network.scale.numpy() @ network.axes.numpy()
    np.testing.assert_allclose(network(as_batch(images)).numpy(), features, rtol=1e-3, atol=0.1)


def test_patches_are_learned_from_as_they_are_looked_at():
    """What is drawn for the dictionary is among what an image is later cut into."""
    image = 120 + structured_images(1, seed=8) // 32
    drawn = _draw_patches(image, 40, np.random.default_rng(0))
    every = normalised_patches(as_batch(image), 6)[0]  # [729, 108]
    assert torch.cdist(drawn, every).amin(1).max() < 1e-2
    assert drawn.shape == (40, 108) and len(torch.unique(drawn, dim=0)) > 30


def test_save_and_load_keep_the_axes_within_half_a_step(learned, tmp_path):
    learned.save(tmp_path / "network.safetensors")
    loaded = PatchKMeans.load(tmp_path / "network.safetensors")
    step = learned.axes.abs().amax(0) / 127
    assert ((loaded.axes - learned.axes).abs() <= 0.501 * step).all()
    for name in ("mean", "whitener", "atoms"):  # half precision
        torch.testing.assert_close(getattr(loaded, name), getattr(learned, name), rtol=1e-3,
                                   atol=1e-4)
    assert torch.equal(loaded.centre, learned.centre) and torch.equal(loaded.scale, learned.scale)
    batch = as_batch(structured_images(50, seed=4))
    assert (loaded(batch) - learned(batch)).norm() < 0.02 * learned(batch).norm()

    loaded.save(tmp_path / "again.safetensors")  # what was rounded once stays
    torch.testing.assert_close(PatchKMeans.load(tmp_path / "again.safetensors").axes, loaded.axes)


def test_learned_features_are_finite_uncorrelated_and_ordered(learned):
    """Whole PCA on the images it was fitted on: columns uncorrelated, norms s^(1/2), falling."""
    images = structured_images(600)
    features = learned(as_batch(images)).numpy()
    assert features.shape == (600, 16) and np.isfinite(features).all()
    alone = learned(as_batch(images[3:4])).numpy()
    np.testing.assert_allclose(alone, features[3:4], rtol=1e-4, atol=1e-4)
    gram = features.T @ features
    norms = np.sqrt(np.diag(gram))
    assert np.abs(gram / np.outer(norms, norms) - np.eye(16)).max() < 0.02
    assert (np.diff(norms) < 1e-3 * norms[0]).all() and norms[0] > 1.1 * norms[-1]
    standardised = (learned.activations(as_batch(images)) - learned.centre) / learned.scale
    singular = np.linalg.svd(standardised.numpy(), compute_uv=False)[:16]
    np.testing.assert_allclose(norms, singular**0.5, rtol=0.03)


def test_same_seed_same_network_and_another_seed_another(learned):
    again = learn_patch_kmeans(structured_images(600), **SMALL)
    for name, value in learned.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-4)
    other = learn_patch_kmeans(structured_images(600), **SMALL, seed=1)
    assert not torch.allclose(other.atoms, learned.atoms, atol=1e-2)


@pytest.mark.parametrize("learn", [learn_patch_kmeans, learn_invariant_patches])
def test_learning_takes_images_and_no_labels_and_refuses_others_in_a_sentence(learn):
    parameters = inspect.signature(learn).parameters
    assert [p.name for p in parameters.values() if p.default is p.empty] == ["images"]
    assert not [name for name in parameters if "label" in name or "class" in name or name == "y"]
    with pytest.raises(ValueError, match=r"shape \(600, 28, 28, 1\); resize them to 32 px"):
        learn(np.zeros((600, 28, 28, 1), np.uint8))
    with pytest.raises(ValueError, match=r"31 images are too few .* at least 32 images"):
        learn(structured_images(31), n_features=16)
