"""Images and labels by name, from each official format, and what is said when one is bad."""

import gzip
import hashlib
import io
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from tsp_utils.datasets import DATASETS, ImageDataset, load_dataset
from tsp_utils.image_folders import IMAGE_SUFFIXES, ImageFiles
from tsp_utils.paths import REPOSITORY, bundled_dir, data_dir


def pixels(n, height=32, width=32, channels=3, seed=0):
    shape = (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(image: np.ndarray, path: Path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze()).save(path, **options)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def one_sentence(error) -> str:
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def everything_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ---- miniature sets in the official formats ------------------------------------------------


def write_cifar(root, monkeypatch, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR's pickles with 3 images a file; torchvision is told their true MD5 sums."""
    import torchvision.datasets

    source = getattr(torchvision.datasets, kind)
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    files = [name for name, _ in source.train_list + source.test_list]
    images = pixels(3 * len(files))
    labels = np.arange(3 * len(files)) % 10
    for i, name in enumerate(files):
        part = slice(3 * i, 3 * i + 3)
        rows = images[part].transpose(0, 3, 1, 2).reshape(3, -1)  # [3, 3*32*32], channels first
        entry = {"data": rows}
        if kind == "CIFAR10":
            entry["labels"] = labels[part].tolist()
        else:
            entry["fine_labels"] = (labels[part] + 50).tolist()
            entry["coarse_labels"] = labels[part].tolist()
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    meta = {"label_names": list(DATASETS["cifar10"].classes)}
    if kind == "CIFAR100":
        meta = {
            "fine_label_names": [f"fine {i}" for i in range(100)],
            "coarse_label_names": [f"coarse {i}" for i in range(20)],
        }
    meta_path = folder / source.meta["filename"]
    meta_path.write_bytes(pickle.dumps(meta, protocol=2))
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(source, attribute)]
        monkeypatch.setattr(source, attribute, [[name, md5(folder / name)] for name in names])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(meta_path)})
    return images, labels


def pack_cifar(root, monkeypatch) -> bytes:
    """Turn the unpacked miniature under `root` into torchvision's archive; returns its bytes."""
    import torchvision.datasets

    source = torchvision.datasets.CIFAR10
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(root / source.base_folder, source.base_folder)
    for path in (root / source.base_folder).iterdir():
        path.unlink()
    (root / source.base_folder).rmdir()
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    return buffer.getvalue()


def write_idx(path: Path, values: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_cifar10_from_the_official_pickles(tmp_path, monkeypatch):
    images, labels = write_cifar(tmp_path, monkeypatch, "CIFAR10")
    train = load_dataset("cifar10", "train", tmp_path, download=False)
    test = load_dataset("cifar10", "test", tmp_path, download=False)
    assert np.array_equal(train.images, images[:15]) and np.array_equal(test.images, images[15:])
    assert np.array_equal(train.labels, labels[:15]) and train.labels.dtype == np.int64
    assert test.classes == DATASETS["cifar10"].classes and test.paths is None
    assert test.images.dtype == np.uint8 and test.images.flags["C_CONTIGUOUS"]


def test_cifar100_has_fine_and_coarse_labels(tmp_path, monkeypatch):
    images, labels = write_cifar(tmp_path, monkeypatch, "CIFAR100")
    fine = load_dataset("cifar100", "test", tmp_path)
    coarse = load_dataset("cifar100-20", "test", tmp_path)
    assert np.array_equal(fine.images, images[3:]) and np.array_equal(coarse.images, images[3:])
    assert np.array_equal(fine.labels, labels[3:] + 50) and fine.classes[50] == "fine 50"
    assert np.array_equal(coarse.labels, labels[3:]) and coarse.classes[19] == "coarse 19"
    assert fine.fingerprint == coarse.fingerprint


def test_stl10_from_the_official_binaries(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = pixels(4, 96, 96)
    for split in ("train", "test", "unlabeled"):  # column-major, channels first
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes(bytes([1, 10, 3, 2]))  # labels from 1
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(STL10, attribute)]
        monkeypatch.setattr(STL10, attribute, [[name, md5(folder / name)] for name in names])
    for split in ("train", "test"):
        dataset = load_dataset("stl10", split, tmp_path)
        assert np.array_equal(dataset.images, images)
        assert dataset.labels.tolist() == [0, 9, 2, 1] and dataset.labels.dtype == np.int64
        assert dataset.classes[2] == "car"
    unlabeled = load_dataset("stl10", "unlabeled", tmp_path)
    assert np.array_equal(unlabeled.images, images) and unlabeled.labels is None
    assert unlabeled.fingerprint == dataset.fingerprint


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_train_from_torchvisions_folder(tmp_path, suffix):
    images, labels = pixels(5, 28, 28, 1), np.array([0, 9, 1, 2, 3], dtype=np.uint8)
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw / f"train-images-idx3-ubyte{suffix}", images[..., 0])
    write_idx(raw / f"train-labels-idx1-ubyte{suffix}", labels)
    dataset = load_dataset("fashion-mnist", "train", tmp_path, download=False)
    assert np.array_equal(dataset.images, images) and np.array_equal(dataset.labels, labels)
    path = raw / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="train-images-idx3-ubyte") as error:
        load_dataset("fashion-mnist", "train", tmp_path)
    one_sentence(error)


def test_fashion_mnist_test_is_bundled():
    dataset = load_dataset("fashion-mnist")
    assert dataset.images.shape == (10_000, 28, 28, 1) and dataset.images.dtype == np.uint8
    assert np.bincount(dataset.labels).tolist() == [1000] * 10
    assert dataset.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert dataset.classes[9] == "Ankle boot" and dataset.split == "test" and len(dataset) == 10_000


def test_bundled_files_match_their_readme():
    folder = bundled_dir() / "fashion-mnist"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "Zalando" in (folder / "LICENSE").read_text(encoding="utf-8")
    for path in folder.glob("*.gz"):
        assert f"| `{path.name}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in readme


# ---- image folders -------------------------------------------------------------------------


def test_class_folders_become_labels(tmp_path):
    images = pixels(4)
    save(images[0], tmp_path / "b" / "0.png")
    save(images[1], tmp_path / "b" / "deeper" / "1.PNG")
    save(images[2], tmp_path / "a" / "2.png")
    save(images[3], tmp_path / "a" / "10.png")
    for junk in (".complete", "a/Thumbs.db", "a/.hidden.png", ".cache/x.png", "notes/readme.txt"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).write_bytes(b"junk")
    dataset = load_dataset(tmp_path)
    assert dataset.paths == ("a/10.png", "a/2.png", "b/0.png", "b/deeper/1.PNG")
    assert np.array_equal(dataset.images, images[[3, 2, 0, 1]])
    assert dataset.labels.tolist() == [0, 0, 1, 1] and dataset.classes == ("a", "b")
    assert dataset.split is None and dataset.name == tmp_path.name


@pytest.mark.parametrize("places", [["0.png", "1.png"], ["images/0.png", "images/1.png"]])
def test_a_folder_without_classes_has_no_labels(tmp_path, places):
    images = pixels(2)
    for image, place in zip(images, places, strict=True):
        save(image, tmp_path / place)
    dataset = load_dataset(str(tmp_path))
    assert np.array_equal(dataset.images, images)
    assert dataset.labels is None and dataset.classes == ()


def test_named_folders_use_the_official_label_order(tmp_path, caplog):
    for name in ("truck", "airplane"):  # two of ten: the labels stay official
        save(pixels(1)[0], tmp_path / "cifar10" / "test" / name / "0.png")
    for name in ("Trouser", "T-shirt_top"):
        save(pixels(1, 28, 28, 1)[0], tmp_path / "fashion-mnist" / "train" / name / "0.png")
    with caplog.at_level(logging.WARNING):
        cifar = load_dataset("cifar10", "test", tmp_path, download=False)
    assert "holds 2 images" in caplog.text and "10000" in caplog.text
    assert cifar.labels.tolist() == [0, 9] and cifar.classes == DATASETS["cifar10"].classes
    fashion = load_dataset("fashion-mnist", "train", tmp_path, download=False)
    assert fashion.labels.tolist() == [0, 1] and fashion.classes[0] == "T-shirt/top"
    assert fashion.images.shape == (2, 28, 28, 1)


def test_an_image_folder_goes_before_torchvisions_files(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    image = pixels(1, seed=1)[0]
    save(image, tmp_path / "cifar10" / "test" / "0.png")
    dataset = load_dataset("cifar10", "test", tmp_path)
    assert np.array_equal(dataset.images, image[None]) and dataset.labels is None
    assert len(load_dataset("cifar10", "train", tmp_path)) == 15


def test_every_mode_is_read(tmp_path):
    rgb = pixels(1, 8, 8)[0]
    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "0_grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(tmp_path / "1_sixteen_bit.png")
    Image.fromarray(np.dstack([grey, grey])).save(tmp_path / "2_grey_alpha.png")
    only_grey = load_dataset(tmp_path).images
    assert only_grey.shape == (3, 8, 8, 1) and (only_grey[..., 0] == grey).all()

    Image.fromarray(rgb).save(tmp_path / "3_rgb.png")
    Image.fromarray(np.dstack([rgb, grey])).save(tmp_path / "4_rgba.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "5_cmyk.jpg")
    Image.fromarray(grey).convert("P").save(tmp_path / "6_palette.gif")
    images = load_dataset(tmp_path).images
    assert images.shape == (7, 8, 8, 3)
    assert (images[:3] == grey[..., None]).all()
    assert (images[3:5] == rgb).all()
    assert images[5, ..., 0].min() > 240 and images[5, ..., 1:].max() < 15  # red
    assert (images[6] == grey[..., None]).all()


def test_exif_rotation_is_applied(tmp_path):
    image = np.zeros((16, 32, 3), dtype=np.uint8)
    image[:, 16:] = 255  # white on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: white below
    save(image, tmp_path / "0.jpg", quality=95, exif=exif)
    turned = load_dataset(tmp_path).images
    assert turned.shape == (1, 32, 16, 3)
    assert turned[0, :14].max() < 30 and turned[0, 18:].min() > 225


def test_mixed_and_large_images_are_decoded_on_access(tmp_path):
    small, wide, large = pixels(1)[0], pixels(1, 16, 32)[0], pixels(1, 65, 65, 1)[0]
    save(small, tmp_path / "a" / "0.png")
    save(wide, tmp_path / "b" / "1.png")
    save(large, tmp_path / "b" / "2.png")
    dataset = load_dataset(tmp_path)
    assert isinstance(dataset.images, ImageFiles) and len(dataset) == 3
    assert np.array_equal(dataset.images[0], small) and np.array_equal(dataset.images[1], wide)
    assert dataset.images[-1].shape == (65, 65, 3) and (dataset.images[-1] == large).all()
    assert isinstance(dataset.images[1:], ImageFiles) and len(list(dataset.images[1:])) == 2
    part = dataset.subset([2, 0])
    assert part.paths == ("b/2.png", "a/0.png") and np.array_equal(part.images[1], small)
    before = dataset.fingerprint
    save(wide + 1, tmp_path / "b" / "1.png")
    assert load_dataset(tmp_path).fingerprint != before


def test_images_of_64_px_are_one_array(tmp_path):
    save(pixels(1, 64, 64)[0], tmp_path / "0.png")
    assert load_dataset(tmp_path).images.shape == (1, 64, 64, 3)


# ---- fingerprint and subset ----------------------------------------------------------------


def test_fingerprint_follows_pixels_and_order_but_not_labels():
    images = pixels(1200)
    first = ImageDataset("a", "test", images, np.zeros(1200, dtype=np.int64))
    assert ImageDataset("b", None, images.copy()).fingerprint == first.fingerprint
    changed = images.copy()
    changed[1100, 3, 4, 1] ^= 1
    assert ImageDataset("a", "test", changed).fingerprint != first.fingerprint
    assert ImageDataset("a", "test", images[::-1]).fingerprint != first.fingerprint
    reshaped = images.reshape(1200, 16, 64, 3)
    assert ImageDataset("a", "test", reshaped).fingerprint != first.fingerprint


def test_subset_takes_indices_masks_and_slices():
    dataset = ImageDataset(
        "a", "test", pixels(4), np.arange(4), ("w", "x", "y", "z"), tuple("0123")
    )
    assert dataset.subset([3, 1]).labels.tolist() == [3, 1]
    assert dataset.subset(np.arange(4) > 1).paths == ("2", "3")
    assert dataset.subset(slice(2)).labels.tolist() == [0, 1]
    assert len(dataset.subset([])) == 0
    assert dataset.subset([3]).classes == dataset.classes
    assert np.array_equal(dataset.subset([3]).images, dataset.images[3:])


# ---- bad input -----------------------------------------------------------------------------


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'cifar10'") as error:
        load_dataset("CIFAR-10")
    assert all(name in one_sentence(error) for name in DATASETS)


def test_unknown_split_lists_the_splits(tmp_path):
    with pytest.raises(ValueError, match="train, test, unlabeled") as error:
        load_dataset("stl10", "val")
    one_sentence(error)
    with pytest.raises(ValueError, match="no split 'train'"):
        load_dataset(tmp_path, "train")


def test_a_path_that_is_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load_dataset(str(tmp_path / "file.png"))


def test_an_empty_folder_names_the_extensions(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no images") as error:
        load_dataset(tmp_path)
    assert all(suffix in one_sentence(error) for suffix in IMAGE_SUFFIXES)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path):
    save(pixels(1)[0], tmp_path / "a" / "0.png")
    (tmp_path / "closed").mkdir(mode=0o000)
    if os.access(tmp_path / "closed", os.R_OK):
        pytest.skip("this user may list any folder")
    with pytest.raises(OSError, match="closed"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("size", [32, 96])
def test_truncated_and_false_images_are_named(tmp_path, size):
    for i in range(3):
        save(pixels(1, size, size, seed=i)[0], tmp_path / f"{i}.jpg")
    whole = (tmp_path / "1.jpg").read_bytes()
    for content in (whole[: len(whole) // 2], b"this is no JPEG", b""):
        (tmp_path / "1.jpg").write_bytes(content)
        with pytest.raises(OSError, match=r"1\.jpg") as error:
            dataset = load_dataset(tmp_path)
            dataset.images[1]  # larger ones are decoded here
        assert "BytesIO" not in one_sentence(error)


def test_tinyimagenet_says_what_to_lay_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="tinyimagenet32/val/<class>") as error:
        load_dataset("tinyimagenet32", "val", tmp_path)
    one_sentence(error)


def test_a_corrupt_pickle_is_named_and_kept(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    bad = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    bad.write_bytes(bad.read_bytes()[:-1] + b"x")
    with pytest.raises(OSError, match=r"data_batch_2 in .* is corrupt") as error:
        load_dataset("cifar10", "test", tmp_path)
    assert "data_batch_1" not in one_sentence(error) and bad.exists()


# ---- downloads -----------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize(
    "name, file",
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100-20", "cifar-100-python.tar.gz"),
        ("stl10", "stl10_binary.tar.gz"),
        ("fashion-mnist", "FashionMNIST/raw/train-images-idx3-ubyte.gz"),
    ],
)
def test_without_network_one_sentence_and_nothing_left(tmp_path, no_network, name, file):
    for root in (tmp_path, tmp_path / "new" / "data"):
        with pytest.raises(ConnectionError, match="no network") as error:
            load_dataset(name, "train", root)
        assert file in one_sentence(error) and str(root) in str(error.value)
    assert everything_under(tmp_path) == set()
    with pytest.raises(FileNotFoundError, match="download=True") as error:
        load_dataset(name, "train", tmp_path / "new", download=False)
    assert file in one_sentence(error)
    assert everything_under(tmp_path) == set()


class Response(io.BytesIO):
    """What urlopen returns, cut off after `length` bytes where `breaks`."""

    def __init__(self, content, url, breaks=False):
        super().__init__(content)
        self.url, self.length, self.breaks = url, len(content), breaks

    def read(self, size=-1):
        if self.breaks and self.tell() > 0:
            raise ConnectionResetError("the connection was cut")
        return super().read(min(size, 100) if self.breaks else size)


def test_download_arrives_whole(tmp_path, monkeypatch):
    images, _ = write_cifar(tmp_path, monkeypatch, "CIFAR10")
    packed = pack_cifar(tmp_path, monkeypatch)
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda request: Response(packed, request.full_url)
    )
    dataset = load_dataset("cifar10", "test", tmp_path / "new")
    assert np.array_equal(dataset.images, images[15:])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"cifar-10-batches-py"}


def test_a_broken_download_leaves_what_was_there(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    packed = pack_cifar(tmp_path, monkeypatch)
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda request: Response(packed, request.full_url, breaks=True)
    )
    mine = tmp_path / "cifar-10-batches-py" / "test_batch"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    before = everything_under(tmp_path)
    with pytest.raises(ConnectionError, match="cut") as error:
        load_dataset("cifar10", "test", tmp_path)
    one_sentence(error)
    assert everything_under(tmp_path) == before and mine.read_bytes() == b"mine"


def test_an_archive_put_there_by_hand_is_unpacked(tmp_path, monkeypatch, no_network):
    images, _ = write_cifar(tmp_path, monkeypatch, "CIFAR10")
    packed = pack_cifar(tmp_path, monkeypatch)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(packed[:-10])
    with pytest.raises(OSError, match=r"cifar-10-python\.tar\.gz is corrupt") as error:
        load_dataset("cifar10", "test", tmp_path)
    one_sentence(error)
    assert everything_under(tmp_path) == {archive.name}
    archive.write_bytes(packed)
    assert np.array_equal(load_dataset("cifar10", "train", tmp_path).images, images[:15])
    assert archive.exists()


def test_a_root_that_cannot_be_written(tmp_path, no_network):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="Cannot write cifar10") as error:
        load_dataset("cifar10", "test", tmp_path / "file" / "data")
    assert "TSP_DATA" in one_sentence(error)


def test_importing_the_module_loads_no_torch():
    code = "import sys, tsp_utils.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# ---- the real sets, where they are ---------------------------------------------------------


def need(name: str, split: str):
    if not (data_dir() / name / split).is_dir():
        pytest.skip(f"no {name}/{split} image folder in TSP_DATA (default data/)")


def test_real_cifar10():
    need("cifar10", "test")
    dataset = load_dataset("cifar10", "test", download=False)
    assert dataset.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(dataset.labels).tolist() == [1000] * 10
    assert dataset.classes == DATASETS["cifar10"].classes
    first = dataset.classes[dataset.labels[0]], dataset.classes[dataset.labels[-1]]
    assert first == ("airplane", "truck") and dataset.paths[-1].startswith("truck/")


def test_real_tinyimagenet32():
    need("tinyimagenet32", "val")
    dataset = load_dataset("tinyimagenet32", "val")
    assert dataset.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(dataset.labels).tolist() == [50] * 200
    assert dataset.classes == tuple(sorted(dataset.classes)) and len(dataset.classes) == 200
