"""Images and labels by name, from each official format, and what is said when one is bad."""

import gzip
import hashlib
import io
import os
import pickle
import re
import shutil
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from tsp_utils.datasets import DATASETS, ImageDataset, load_dataset
from tsp_utils.files.image_folders import ImageFiles
from tsp_utils.files.paths import bundled_dir, data_dir


def pixels(n, height=32, width=32, channels=3, seed=0):
    shape = (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(image: np.ndarray, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze()).save(path)


def refused(kind, *arguments, **options) -> str:
    """The one sentence with which a data set is refused."""
    with pytest.raises(kind) as error:
        load_dataset(*arguments, **options)
    assert re.fullmatch(r".+\.", str(error.value))
    return str(error.value)


def everything_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def tell_sums(source, folder: Path, monkeypatch):
    """Torchvision is told the true MD5 sums of the miniature files."""
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(source, attribute, [
            [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
            for name, _ in getattr(source, attribute)])


def write_cifar(root, monkeypatch, kind: str, **first_labels) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR's pickles with 3 images a file, whose labels start from `first_labels`, by key."""
    source = getattr(torchvision.datasets, kind)
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    files = [name for name, _ in source.train_list + source.test_list]
    images, labels = pixels(3 * len(files)), np.arange(3 * len(files)) % 10
    for i, name in enumerate(files):
        part = slice(3 * i, 3 * i + 3)
        entry = {"data": images[part].transpose(0, 3, 1, 2).reshape(3, -1)}  # channels first
        entry |= {key: (labels[part] + first).tolist() for key, first in first_labels.items()}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    content = pickle.dumps({"label_names": list(DATASETS["cifar10"].classes),
                            "fine_label_names": [f"fine {i}" for i in range(100)],
                            "coarse_label_names": [f"coarse {i}" for i in range(20)]})
    (folder / source.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": hashlib.md5(content).hexdigest()})
    tell_sums(source, folder, monkeypatch)
    return images, labels


def test_cifar_from_the_official_pickles_or_before_them_from_an_image_folder(tmp_path, monkeypatch):
    images, labels = write_cifar(tmp_path, monkeypatch, "CIFAR10", labels=0)
    train, test = (load_dataset("cifar10", split, tmp_path, download=False)
                   for split in ("train", "test"))
    assert np.array_equal(train.images, images[:15]) and np.array_equal(test.images, images[15:])
    assert np.array_equal(train.labels, labels[:15]) and train.labels.dtype == np.int64
    assert test.classes == DATASETS["cifar10"].classes and test.paths is None
    assert test.images.dtype == np.uint8 and test.images.flags["C_CONTIGUOUS"]
    image = pixels(1, seed=1)  # an image folder goes before torchvision's files
    save(image[0], tmp_path / "cifar10" / "test" / "0.png")
    mine = load_dataset("cifar10", "test", tmp_path)
    assert np.array_equal(mine.images, image) and mine.labels is None
    assert len(load_dataset("cifar10", "train", tmp_path)) == 15

    images, labels = write_cifar(
        tmp_path, monkeypatch, "CIFAR100", fine_labels=50, coarse_labels=0)
    fine, coarse = (load_dataset(name, "test", tmp_path) for name in ("cifar100", "cifar100-20"))
    assert np.array_equal(fine.images, images[3:]) and np.array_equal(coarse.images, images[3:])
    assert np.array_equal(fine.labels, labels[3:] + 50) and fine.classes[50] == "fine 50"
    assert np.array_equal(coarse.labels, labels[3:]) and coarse.classes[19] == "coarse 19"
    assert fine.fingerprint == coarse.fingerprint


def test_stl10_from_the_official_binaries(tmp_path, monkeypatch):
    (tmp_path / "stl10_binary").mkdir()
    images = pixels(4, 96, 96)
    for split in ("train", "test", "unlabeled"):  # column-major, channels first, labels from 1
        for kind, content in (("X", images.transpose(0, 3, 2, 1).tobytes()), ("y", b"\1\n\3\2")):
            (tmp_path / "stl10_binary" / f"{split}_{kind}.bin").write_bytes(content)
    tell_sums(torchvision.datasets.STL10, tmp_path / "stl10_binary", monkeypatch)
    for split in ("train", "test", "unlabeled"):
        dataset = load_dataset("stl10", split, tmp_path)
        assert np.array_equal(dataset.images, images)
        if split == "unlabeled":
            assert dataset.labels is None and dataset.classes == ()
        else:
            assert dataset.labels.tolist() == [0, 9, 2, 1] and dataset.labels.dtype == np.int64
            assert dataset.classes[2] == "car"


@pytest.mark.parametrize("ending, pack", [("", bytes), (".gz", gzip.compress)])
def test_fashion_mnist_train_from_torchvisions_folder_and_a_damaged_file_by_name(
        tmp_path, ending, pack):
    images, labels = pixels(5, 28, 28, 1), np.array([0, 9, 1, 2, 3], dtype=np.uint8)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, values in (("labels-idx1", labels), ("images-idx3", images[..., 0])):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        path = raw / f"train-{name}-ubyte{ending}"
        path.write_bytes(pack(header + values.tobytes()))
    dataset = load_dataset("fashion-mnist", "train", tmp_path, download=False)
    assert np.array_equal(dataset.images, images) and np.array_equal(dataset.labels, labels)
    path.write_bytes(path.read_bytes()[:-100])
    assert path.name in refused(OSError, "fashion-mnist", "train", tmp_path)


def test_fashion_mnist_test_is_bundled_as_its_readme_says():
    dataset, folder = load_dataset("fashion-mnist"), bundled_dir() / "fashion-mnist"
    assert dataset.images.shape == (10_000, 28, 28, 1) and dataset.images.dtype == np.uint8
    assert np.bincount(dataset.labels).tolist() == [1000] * 10
    assert dataset.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert dataset.classes[9] == "Ankle boot" and dataset.split == "test"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "Zalando" in (folder / "LICENSE").read_text(encoding="utf-8")
    for path in folder.glob("*.gz"):
        assert f"| `{path.name}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in readme


def test_class_folders_become_labels_and_folders_without_images_or_that_loop_do_not(tmp_path):
    images, folder = pixels(4), tmp_path / "set"
    for image, place in zip(images, ("b/0.png", "b/deeper/1.PNG", "a/2.png", "a/10.png"),
                            strict=True):
        save(image, folder / place)
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").touch()
    (folder / "a" / "again").symlink_to(folder)  # a loop is walked once
    dataset = load_dataset(folder)
    assert dataset.paths == ("a/10.png", "a/2.png", "b/0.png", "b/deeper/1.PNG")
    assert np.array_equal(dataset.images, images[[3, 2, 0, 1]])
    assert dataset.labels.tolist() == [0, 0, 1, 1] and dataset.classes == ("a", "b")
    assert dataset.split is None and dataset.name == "set"
    shutil.rmtree(folder / "a")
    for place in (folder, folder / "b"):  # one folder is all there is, or less: no classes
        dataset = load_dataset(str(place))
        assert np.array_equal(dataset.images, images[:2])
        assert dataset.labels is None and dataset.classes == ()


def test_named_folders_use_the_official_label_order(tmp_path, caplog):
    for name in ("truck", "airplane"):  # two of ten: the labels stay official
        save(pixels(1)[0], tmp_path / "cifar10" / "test" / name / "0.png")
    for name in ("Trouser", "T-shirt_top"):
        save(pixels(1, 28, 28, 1)[0], tmp_path / "fashion-mnist" / "train" / name / "0.png")
    cifar = load_dataset("cifar10", "test", tmp_path, download=False)
    assert "holds 2 images" in caplog.text and "10000" in caplog.text
    assert cifar.labels.tolist() == [0, 9] and cifar.classes == DATASETS["cifar10"].classes
    fashion = load_dataset("fashion-mnist", "train", tmp_path, download=False)
    assert fashion.labels.tolist() == [0, 1] and fashion.classes[0] == "T-shirt/top"
    assert fashion.images.shape == (2, 28, 28, 1)


def test_grey_palette_and_cmyk_images_are_read_alike(tmp_path):
    rgb, grey = pixels(1, 8, 8)[0], pixels(1, 8, 8)[0, ..., 0]
    save(grey, tmp_path / "0_grey.png")
    assert np.array_equal(load_dataset(tmp_path).images, grey[None, ..., None])
    Image.fromarray(grey).convert("P").save(tmp_path / "1_palette.png")
    save(rgb, tmp_path / "2_rgb.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "3_cmyk.jpg")
    images = load_dataset(tmp_path).images
    assert (images[:2] == grey[..., None]).all() and (images[2] == rgb).all()
    assert images[3, ..., 0].min() > 240 and images[3, ..., 1:].max() < 15  # red


def test_images_of_mixed_sizes_or_above_64_px_are_decoded_on_access(tmp_path):
    save(pixels(1, 64, 64)[0], tmp_path / "one size" / "0.png")
    assert load_dataset(tmp_path / "one size").images.shape == (1, 64, 64, 3)
    save(pixels(1, 65, 65)[0], tmp_path / "large" / "0.png")
    assert isinstance(load_dataset(tmp_path / "large").images, ImageFiles)
    mixed = tmp_path / "mixed"
    small, wide, grey = pixels(1)[0], pixels(1, 16, 32)[0], pixels(1, 65, 65, 1)[0]
    for image, place in ((small, "a/0.png"), (wide, "b/1.png"), (grey, "b/2.png")):
        save(image, mixed / place)
    dataset = load_dataset(mixed)
    assert isinstance(dataset.images, ImageFiles) and len(dataset) == 3
    assert np.array_equal(dataset.images[0], small) and np.array_equal(dataset.images[1], wide)
    assert dataset.images[-1].shape == (65, 65, 3) and (dataset.images[-1] == grey).all()
    assert isinstance(dataset.images[1:], ImageFiles) and len(list(dataset.images[1:])) == 2
    part = dataset.subset([2, 0])
    assert part.paths == ("b/2.png", "a/0.png") and np.array_equal(part.images[1], small)
    before = dataset.fingerprint
    save(wide + 1, mixed / "b" / "1.png")
    assert load_dataset(mixed).fingerprint != before


def test_fingerprint_follows_pixels_and_order_but_not_labels():
    images = pixels(1001, 2, 4)
    changed = images.copy()
    changed[1000, 1, 3, 1] ^= 1  # beyond the first chunk of a thousand
    first = ImageDataset("a", "test", images, np.zeros(1001, dtype=np.int64)).fingerprint
    assert ImageDataset("b", None, images.copy()).fingerprint == first
    for other in (changed, images[::-1], images.reshape(1001, 1, 8, 3)):
        assert ImageDataset("a", "test", other).fingerprint != first


@pytest.mark.parametrize("indices, chosen", [
    ([3, 1], [3, 1]), (np.arange(4) > 1, [2, 3]), (slice(2), [0, 1]), ([], [])])
def test_subset_takes_indices_masks_and_slices(indices, chosen):
    dataset = ImageDataset("a", "test", pixels(4), np.arange(4), tuple("wxyz"), tuple("0123"))
    part = dataset.subset(indices)
    assert part.labels.tolist() == chosen and part.paths == tuple(map(str, chosen))
    assert np.array_equal(part.images, dataset.images[chosen]) and part.classes == dataset.classes


def test_what_is_not_known_or_not_there_is_refused_with_what_to_pass(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "file.txt").write_text("no image")
    for kind, arguments, *said in [
        (ValueError, ("CIFAR-10",), "nearest one is 'cifar10'", *DATASETS),
        (ValueError, ("stl10", "val"), "train, test, unlabeled"),
        (ValueError, (tmp_path, "train"), "no split 'train'"),
        (FileNotFoundError, (tmp_path / "nowhere",), "does not exist"),
        (FileNotFoundError, (str(tmp_path / "texts" / "file.txt"),), "is a file"),
        (ValueError, (tmp_path / "texts",), "holds no images", "1 .txt"),
        (FileNotFoundError, ("tinyimagenet32", "val", tmp_path), "tinyimagenet32/val/<class>"),
    ]:
        message = refused(kind, *arguments)
        assert all(part in message for part in said), message


def test_a_folder_that_may_not_be_listed_is_named(tmp_path):
    save(pixels(1)[0], tmp_path / "a" / "0.png")
    (tmp_path / "closed").mkdir(mode=0o000)
    if os.access(tmp_path / "closed", os.R_OK):
        pytest.skip("this user may list any folder")
    assert "closed" in refused(OSError, tmp_path)


@pytest.mark.parametrize("size", [32, 96])  # larger ones are decoded on access
def test_truncated_and_false_images_are_named(tmp_path, size):
    for i in range(3):
        save(pixels(1, size, size, seed=i)[0], tmp_path / f"{i}.jpg")
    whole = (tmp_path / "1.jpg").read_bytes()
    for content in (whole[: len(whole) // 2], b"this is no JPEG", b""):
        (tmp_path / "1.jpg").write_bytes(content)
        with pytest.raises(OSError, match=r"1\.jpg.*\.$") as error:
            load_dataset(tmp_path).images[1]
        assert "BytesIO" not in str(error.value) and "\n" not in str(error.value)


def test_a_corrupt_pickle_is_named_and_kept(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR10", labels=0)
    bad = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    bad.write_bytes(bad.read_bytes()[:-1] + b"x")
    message = refused(OSError, "cifar10", "test", tmp_path)
    assert re.search(r"data_batch_2 in .* is corrupt", message) and "data_batch_1" not in message
    assert bad.exists()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name, file", [
    ("cifar10", "cifar-10-python.tar.gz"), ("cifar100-20", "cifar-100-python.tar.gz"),
    ("stl10", "stl10_binary.tar.gz"),
    ("fashion-mnist", "FashionMNIST/raw/train-images-idx3-ubyte.gz")])
def test_without_network_one_sentence_and_nothing_left(tmp_path, no_network, name, file):
    for root in (tmp_path, tmp_path / "new" / "data"):
        message = refused(ConnectionError, name, "train", root)
        assert "no network" in message and file in message and str(root) in message
    message = refused(FileNotFoundError, name, "train", tmp_path / "new", download=False)
    assert file in message and "download=True" in message
    assert everything_under(tmp_path) == set()
    (tmp_path / "file").touch()
    message = refused(OSError, name, "train", tmp_path / "file" / "data")
    assert f"Cannot write {name}" in message and "TSP_DATA" in message


class Response(io.BytesIO):
    """What urlopen returns."""

    url = length = None


@pytest.fixture
def packed(tmp_path_factory, monkeypatch):
    """The images of a miniature CIFAR-10, and torchvision's archive of it."""
    made = tmp_path_factory.mktemp("made")
    images, _ = write_cifar(made, monkeypatch, "CIFAR10", labels=0)
    path = shutil.make_archive(str(made / "all"), "gztar", made, "cifar-10-batches-py")
    content = Path(path).read_bytes()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    return images, content


def test_a_broken_download_leaves_what_was_there(tmp_path, monkeypatch, packed):
    images, content = packed
    mine = tmp_path / "cifar-10-batches-py" / "test_batch"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    before = everything_under(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(content[:100]))
    assert "corrupted" in refused(ConnectionError, "cifar10", "test", tmp_path)
    assert everything_under(tmp_path) == before and mine.read_bytes() == b"mine"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(content))
    new = tmp_path / "new"
    assert np.array_equal(load_dataset("cifar10", "test", new).images, images[15:])
    assert [path.name for path in new.iterdir()] == ["cifar-10-batches-py"]


def test_an_archive_put_there_by_hand_is_unpacked(tmp_path, packed, no_network):
    images, content = packed
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(content[:-10])
    assert f"{archive.name} is corrupt" in refused(OSError, "cifar10", "test", tmp_path)
    assert everything_under(tmp_path) == {archive.name}
    archive.write_bytes(content)
    assert np.array_equal(load_dataset("cifar10", "train", tmp_path).images, images[:15])
    assert archive.exists()


@pytest.mark.parametrize("name, split, n_classes", [("cifar10", "test", 10),
                                                    ("tinyimagenet32", "val", 200)])
def test_real_sets_are_whole_where_they_are(name, split, n_classes):
    if not (data_dir() / name / split).is_dir():
        pytest.skip(f"no {name}/{split} image folder in TSP_DATA (default data/)")
    dataset = load_dataset(name, split, download=False)
    assert dataset.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(dataset.labels).tolist() == [10_000 // n_classes] * n_classes
    assert dataset.classes == (DATASETS[name].classes or tuple(sorted(dataset.classes)))
    for i in (0, -1):  # cifar10: airplane and truck
        assert dataset.paths[i].startswith(f"{dataset.classes[dataset.labels[i]]}/")
