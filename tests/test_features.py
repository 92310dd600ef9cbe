"""Extraction and its cache: rows by content, keys, kills, errors, damage, read-only folders."""

import json
import logging
import os  # noqa: F401 (the processes that `run` starts know this module's names)
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tsp_utils.features import cached_features, extract_features

HERE = Path(__file__).resolve().parent


class Plain:
    """A backbone without torch: a fixed linear map, which counts its rows and can stop midway."""

    name = "plain"

    def __init__(self, dim=5, version=1, stop_after=None, stop=None):
        self.dim, self.version, self.rows = dim, version, 0
        self.stop_after, self.stop = stop_after, stop

    def describe(self):
        return {"backbone": self.name, "version": self.version, "shape": (self.dim,)}

    def prepare(self, images):
        images = np.stack(list(images)).astype(np.float32)
        return images.reshape(len(images), -1)

    def encode(self, x):
        if self.stop_after is not None and self.rows >= self.stop_after:
            self.stop()
        self.rows += len(x)
        weights = np.sin(np.arange(x.shape[1] * self.dim, dtype=np.float32))
        return x @ weights.reshape(-1, self.dim)


class Drawn:
    """A sequence of images that are made on access, so that they take no memory."""

    def __init__(self, n, side=8):
        self.n, self.side = n, side

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        return np.full((self.side, self.side, 3), i % 251, np.uint8)


def make_dataset(n=100, seed=0, name="toy", split="test"):
    images = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return SimpleNamespace(name=name, split=split, images=images)


def raise_(error):
    raise error


def files(folder):
    return sorted(p.name for p in Path(folder).iterdir() if p.suffix != ".lock")


def run(code, *arguments, **options):
    """Run code in a Python of its own in which this module's names are known."""
    code = (f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
            f"from test_features import *\n{code}")
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run([*options.pop("before", []), *command], capture_output=True, text=True,
                          timeout=120, **options)


def test_extraction_is_the_backbone_on_every_batch():
    images = make_dataset(103).images
    got = extract_features(Plain(), images, batch_size=10, progress=False)
    assert got.shape == (103, 5) and got.dtype == np.float32
    np.testing.assert_allclose(got, Plain().encode(Plain().prepare(images)), rtol=1e-4, atol=1e-2)
    out = np.empty((103, 5), np.float32)
    assert extract_features(Plain(), list(images), 7, progress=False, out=out) is out
    np.testing.assert_allclose(out, got, rtol=1e-4, atol=1e-2)


def test_extraction_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="0 images"):
        extract_features(Plain(), np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"pass one of \[100, 5\]"):
        extract_features(Plain(), make_dataset().images, out=np.empty((100, 4), np.float32))
    mixed = [*np.zeros((4, 8, 8, 3), np.uint8), *np.zeros((4, 9, 9, 3), np.uint8)]
    same = Plain()
    same.encode = lambda x: x
    with pytest.raises(ValueError, match="243 features in row 4 and 192 before"):
        extract_features(same, mixed, batch_size=4, progress=False)


def test_non_finite_features_name_backbone_and_first_row(tmp_path):
    backbone = Plain()
    encode = backbone.encode

    def broken(x):
        features = encode(x)
        if backbone.rows > 40:
            features[3, 2] = np.nan
        return features

    backbone.encode = broken
    dataset = make_dataset()
    with pytest.raises(ValueError, match="plain gave NaN or infinite features, first in row 43"):
        cached_features(backbone, dataset, tmp_path, batch_size=20, progress=False)
    backbone.encode, backbone.rows = encode, 0  # mended: the forty good rows are kept
    again = cached_features(backbone, dataset, tmp_path, batch_size=20, progress=False)
    np.testing.assert_array_equal(again, extract_features(Plain(), dataset.images, 20, False))


def test_a_hit_does_not_call_the_model_and_is_read_only(tmp_path):
    dataset, first, second = make_dataset(), Plain(), Plain()
    made = cached_features(first, dataset, tmp_path, progress=False)
    np.testing.assert_array_equal(made, extract_features(Plain(), dataset.images, progress=False))
    found = cached_features(second, dataset, tmp_path, progress=False)
    assert (first.rows, second.rows) == (100, 0)
    np.testing.assert_array_equal(made, found)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert [Path(name).suffix for name in files(tmp_path)] == [".f32", ".json", ".sums"]
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["dim"] == 5 and "torch" in record["made_with"]
    assert record["description"]["inputs"]["backbone"]["backbone"] == "plain"


def test_a_path_or_an_array_in_place_of_a_data_set_is_refused(tmp_path):
    for given, kind in (("photos", "str"), (make_dataset().images, "ndarray")):
        with pytest.raises(TypeError, match=f"takes a data set, and this is of type {kind}: pass "
                                            f"load_dataset"):
            cached_features(Plain(), given, tmp_path)
    assert files(tmp_path) == []


def test_the_default_folder_is_in_tsp_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TSP_CACHE", str(tmp_path))
    cached_features(Plain(), make_dataset(), progress=False)
    assert len(files(tmp_path / "features")) == 3


def test_a_vector_depends_on_its_image_and_on_nothing_of_the_set(tmp_path):
    dataset = make_dataset()
    cached_features(Plain(), dataset, tmp_path, progress=False)
    for name, split in (("other", "test"), ("toy", "train")):
        backbone = Plain()
        renamed = SimpleNamespace(name=name, split=split, images=dataset.images)
        cached_features(backbone, renamed, tmp_path, progress=False)
        assert backbone.rows == 0
    backbone = Plain(version=2)
    cached_features(backbone, dataset, tmp_path, progress=False)
    assert backbone.rows == 100 and len(files(tmp_path)) == 6


@pytest.mark.parametrize("place", [0, 50, 100])
def test_one_image_more_costs_one(tmp_path, place):
    dataset, added = make_dataset(), make_dataset(n=1, seed=7).images
    cached_features(Plain(), dataset, tmp_path, progress=False)
    grown = SimpleNamespace(name="toy", split="test",
                            images=np.insert(dataset.images, place, added[0], axis=0))
    backbone = Plain()
    got = cached_features(backbone, grown, tmp_path, batch_size=20, progress=False)
    assert backbone.rows == 1 and isinstance(got, np.memmap) and not got.flags.writeable
    np.testing.assert_allclose(got, extract_features(Plain(), grown.images, progress=False),
                               rtol=1e-5, atol=1e-2)
    backbone = Plain()
    fewer = SimpleNamespace(name="toy", split="test", images=grown.images[::-3])
    np.testing.assert_array_equal(cached_features(backbone, fewer, tmp_path), got[::-3])
    assert backbone.rows == 0


def test_duplicates_cost_one_and_come_back_in_their_places(tmp_path):
    images = make_dataset(n=10).images[[0, 3, 3, 0, 9, 3]]
    backbone = Plain()
    got = cached_features(backbone, SimpleNamespace(images=images), tmp_path, progress=False)
    assert backbone.rows == 3
    np.testing.assert_array_equal(got, extract_features(Plain(), images, progress=False))


def test_files_count_by_their_content_whatever_their_names(tmp_path):
    from PIL import Image

    from tsp_utils.image_folders import ImageFiles

    for i, image in enumerate(make_dataset(n=6).images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    names = [f"{i}.png" for i in range(6)]

    def extracted(names):
        backbone = Plain()
        images = SimpleNamespace(images=ImageFiles(tmp_path, names))
        return cached_features(backbone, images, tmp_path / "cache", progress=False), backbone.rows

    first, n = extracted(names)
    assert n == 6
    (tmp_path / "2.png").rename(tmp_path / "a new name.png")
    again, n = extracted([*names[:2], *names[3:], "a new name.png"])
    assert n == 0
    np.testing.assert_array_equal(again, first[[0, 1, 3, 4, 5, 2]])


def test_edited_code_is_run_and_not_read_back(tmp_path, monkeypatch):
    """What a reader does: change `prepare`, or the network, and look."""
    from tsp_utils.backbones import Backbone, load_backbone
    from tsp_utils.patch_kmeans import PatchKMeans

    dataset = SimpleNamespace(images=make_dataset(n=4).images)
    network = load_backbone("patch_kmeans", device="cpu")
    before = np.array(cached_features(network, dataset, tmp_path, progress=False))
    prepare, forward = Backbone.prepare, PatchKMeans.forward
    for owner, name, replacement in (
            (Backbone, "prepare", lambda self, images: prepare(self, images).flip(2)),
            (PatchKMeans, "forward", lambda self, x: 2 * forward(self, x))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            changed = cached_features(network, dataset, tmp_path, progress=False)
            assert np.abs(changed - before).max() > 0.01, name
    np.testing.assert_array_equal(cached_features(network, dataset, tmp_path), before)


def test_the_key_changes_with_weights_transform_pixels_and_dtype(tmp_path):
    torch = pytest.importorskip("torch")
    from tsp_utils.backbones import Backbone, BackboneSpec

    def build(scale=1.0, dtype=torch.float32, **options):
        spec = BackboneSpec("tiny", "tiny", **{"input_size": 8, "dim": 4, **options})
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
        with torch.no_grad():
            for weights in model.parameters():
                weights.fill_(scale)
        return Backbone(spec, model, torch.device("cpu"), dtype)

    dataset = make_dataset(n=8)
    variants = [(build(), dataset), (build(2.0), dataset), (build(mean=(0.5,) * 3), dataset),
                (build(interpolation="bilinear"), dataset), (build(std=(0.5,) * 3), dataset),
                (build(dtype=torch.bfloat16), dataset)]
    for backbone, data in variants:
        cached_features(backbone, data, tmp_path, progress=False)
    assert len(files(tmp_path)) == 3 * len(variants)
    cached_features(build(), dataset, tmp_path, progress=False)
    assert len(files(tmp_path)) == 3 * len(variants)


def test_interrupted_extraction_does_only_the_remaining_rows(tmp_path):
    dataset = make_dataset(105)
    stopped = Plain(stop_after=60, stop=partial(raise_, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        cached_features(stopped, dataset, tmp_path, batch_size=20, progress=False)
    resumed = Plain()
    got = cached_features(resumed, dataset, tmp_path, batch_size=20, progress=False)
    assert resumed.rows == 45
    whole = extract_features(Plain(), dataset.images, batch_size=20, progress=False)
    np.testing.assert_array_equal(got, whole)
    assert len(files(tmp_path)) == 3


def test_a_killed_process_leaves_rows_that_the_next_goes_on_from(tmp_path):
    done = run("cached_features(Plain(stop_after=60, stop=partial(os._exit, 9)), make_dataset(105),"
               "sys.argv[1], batch_size=20, progress=False)", tmp_path)
    assert done.returncode == 9, done.stderr
    for kind in ("f32", "sums"):  # what the kill tore
        with open(next(tmp_path.glob(f"*.{kind}")), "ab") as file:
            file.write(b"torn")
    resumed, dataset = Plain(), make_dataset(105)
    got = cached_features(resumed, dataset, tmp_path, batch_size=20, progress=False)
    assert resumed.rows == 45
    whole = extract_features(Plain(), dataset.images, batch_size=20, progress=False)
    np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError("a torn JPEG")])
def test_what_was_made_stays_after_an_error_and_the_error_is_its_own(tmp_path, error):
    failing, resumed = Plain(stop_after=40, stop=partial(raise_, error)), Plain()
    with pytest.raises(type(error), match=str(error)):
        cached_features(failing, make_dataset(), tmp_path, batch_size=20, progress=False)
    cached_features(resumed, make_dataset(), tmp_path, batch_size=20, progress=False)
    assert resumed.rows == 60


@pytest.mark.parametrize("damage, rows", [
    ("truncated", 5), ("one byte", 1), ("no json", 100), ("json torn", 100), ("no sums", 100),
    ("other description", 100)])
def test_rows_that_do_not_match_are_named_and_made_again(tmp_path, caplog, damage, rows):
    dataset = make_dataset()
    good = np.array(cached_features(Plain(), dataset, tmp_path, progress=False))
    data, about, sums = (next(tmp_path.glob(f"*.{kind}")) for kind in ("f32", "json", "sums"))
    content = bytearray(data.read_bytes())
    if damage == "truncated":
        data.write_bytes(content[:-90])
    elif damage == "one byte":
        content[-7] ^= 1
        data.write_bytes(content)
    elif damage == "no json":
        about.unlink()
    elif damage == "json torn":
        about.write_text(about.read_text()[:30])
    elif damage == "no sums":
        sums.unlink()
    else:
        about.write_text(about.read_text().replace('"plain"', '"other"'))
    backbone = Plain()
    with caplog.at_level(logging.WARNING):
        got = cached_features(backbone, dataset, tmp_path, progress=False)
    np.testing.assert_allclose(got, good, rtol=1e-6, atol=1e-3)
    assert backbone.rows == rows
    assert str(data) in caplog.text or damage in ("truncated", "no sums")  # as after a kill


READ_ONLY = """
folder, expected = sys.argv[1:]
backbone = Plain()
try:
    cached_features(backbone, make_dataset(n=int(expected)), folder, progress=False)
    print("used", backbone.rows)
except OSError as error:
    print("refused", error)
"""


def test_a_read_only_folder_is_read_but_not_written(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(
            ["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting a folder read-only is not permitted here")
    cached_features(Plain(), make_dataset(n=100), tmp_path, progress=False)
    before = ["unshare", "-m", "sh", "-c", f'mount --bind "{tmp_path}" "{tmp_path}" && '
              f'mount -o remount,bind,ro "{tmp_path}" && exec "$@"', "sh"]
    done = run(READ_ONLY, tmp_path, 100, before=before)
    if "mount" in done.stderr:
        pytest.skip("mounting a folder read-only is not permitted here")
    assert done.stdout.strip() == "used 0", done.stderr
    done = run(READ_ONLY, tmp_path, 101, before=before)
    assert done.stdout.startswith(f"refused the cache folder {tmp_path}"), done.stderr
    assert "TSP_CACHE" in done.stdout and len(done.stdout.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache folder .*file.inside cannot be written.*TSP_CACHE"):
        cached_features(Plain(), make_dataset(), tmp_path / "file" / "inside", progress=False)


@pytest.mark.parametrize("full_at", [1, 3])
def test_a_disk_that_fills_up_is_one_sentence_and_spoils_nothing(tmp_path, monkeypatch, full_at):
    from tsp_utils.cache import _Rows

    append, writes = _Rows.append, []

    def full(store, digests, block):
        writes.append(len(block))
        if len(writes) == full_at:
            with open(store.data, "ab") as file:
                file.write(b"torn")
            raise OSError(28, "No space left on device")
        append(store, digests, block)

    monkeypatch.setattr(_Rows, "append", full)
    with pytest.raises(OSError, match=r"No space left on device"):
        cached_features(Plain(), make_dataset(), tmp_path, batch_size=20, progress=False)
    backbone = Plain()
    got = cached_features(backbone, make_dataset(), tmp_path, batch_size=20, progress=False)
    assert backbone.rows == 100 - 20 * (full_at - 1)
    np.testing.assert_array_equal(got, extract_features(Plain(), make_dataset().images, 20, False))


def test_two_processes_at_once_extract_once(tmp_path):
    code = (f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
            "from test_features import *\nimport time\nbackbone = Plain()\n"
            "encode = backbone.encode\n"
            "backbone.encode = lambda x: (time.sleep(0.05), encode(x))[1]\n"
            "cached_features(backbone, make_dataset(400), sys.argv[1], 20, progress=False)\n"
            "print(backbone.rows)")
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert sorted(out.strip() for out, _ in ends) == ["0", "400"], ends
    dataset = make_dataset(400)
    np.testing.assert_array_equal(
        cached_features(Plain(), dataset, tmp_path, 20, progress=False),
        extract_features(Plain(), dataset.images, 20, progress=False))


MEMORY = """
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

for n in (2_000, 20_000):
    dataset = SimpleNamespace(name="drawn", split="test", images=Drawn(n))
    features = cached_features(Plain(dim=2048), dataset, sys.argv[1], progress=False)
    assert features.shape == (n, 2048)
    print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory")
def test_peak_memory_does_not_grow_with_the_number_of_images(tmp_path):
    done = run(MEMORY, tmp_path)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())  # MB
    assert large - small < 20  # the features of 20,000 images are 156 MB, of 2,000 16 MB
