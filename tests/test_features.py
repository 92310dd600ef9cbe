"""Extraction and its cache: rows by content, keys, kills, errors, damage, read-only folders."""

import ctypes
import json
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import two_processes

from tsp_utils.backbones import Backbone, load_backbone
from tsp_utils.cache.vectors import _Rows
from tsp_utils.datasets import ImageDataset
from tsp_utils.features import cached_features, extract_features

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mounts or /proc")


class Plain:
    """A backbone without torch: a fixed linear map, which counts its rows and can stop midway."""

    name = "plain"

    def __init__(self, dim=5, version=1, stop_after=None, stop=None):
        self.dim, self.version, self.rows = dim, version, 0
        self.stop_after = stop_after
        self.stop = stop and partial(stop)  # a function put on an object would count as its code

    def describe(self):
        return {"backbone": self.name, "version": self.version, "shape": (self.dim,)}

    def prepare(self, images):
        images = np.stack(list(images)).astype(np.float32)
        return images.reshape(len(images), -1)

    def encode(self, x):
        if self.stop_after is not None and self.rows >= self.stop_after:
            x = self.stop(x)
        self.rows += len(x)
        weights = np.sin(np.arange(x.shape[1] * self.dim, dtype=np.float32))
        return x @ weights.reshape(-1, self.dim)


def images_of(n=100, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def kept(folder, images, backbone=None):
    """Features by way of the cache, and how many of them the backbone had to make."""
    backbone = backbone or Plain()
    found = cached_features(backbone, SimpleNamespace(images=images), folder, 20, progress=False)
    return found, backbone.rows


def made_again(folder, images, n):
    """The cache makes n rows, and all that it gives are those of a plain extraction."""
    found, n_made = kept(folder, images)
    assert n_made == n
    np.testing.assert_allclose(found, plainly(images), rtol=1e-5, atol=1e-2)
    return found


def plainly(images):
    return extract_features(Plain(), images, 20, progress=False)


def interrupted(x):
    raise KeyboardInterrupt("now")


def end_the_process(x):
    os._exit(9)


def with_nan(x):
    x[3, 2] = np.nan
    return x


def files(folder):
    return sorted(p.name for p in Path(folder).iterdir() if p.suffix != ".lock")


def test_extraction_is_the_backbone_on_every_batch():
    images = images_of(103)
    got = extract_features(Plain(), images, batch_size=10, progress=False)
    assert got.shape == (103, 5) and got.dtype == np.float32
    np.testing.assert_allclose(got, Plain().encode(Plain().prepare(images)), rtol=1e-4, atol=1e-2)
    out = np.empty((103, 5), np.float32)
    assert extract_features(Plain(), list(images), 7, progress=False, out=out) is out
    np.testing.assert_allclose(out, got, rtol=1e-4, atol=1e-2)


def test_extraction_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="0 images"):
        extract_features(Plain(), images_of(0))
    with pytest.raises(ValueError, match=r"pass one of \[100, 5\]"):
        extract_features(Plain(), images_of(), out=np.empty((100, 4), np.float32))
    same = Plain()
    same.encode = lambda x: x
    with pytest.raises(ValueError, match="243 features in row 4 and 192 before"):
        extract_features(same, [*images_of(4), *np.zeros((4, 9, 9, 3), np.uint8)], 4, False)


def test_a_hit_in_tsp_cache_does_not_call_the_model_and_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TSP_CACHE", str(tmp_path))
    made_again(None, images_of(), 100)
    found = made_again(None, images_of(), 0)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    folder = tmp_path / "features"
    assert [Path(name).suffix for name in files(folder)] == [".f32", ".json", ".sums"]
    record = json.loads(next(folder.glob("*.json")).read_text())
    assert record["dim"] == 5 and "torch" in record["made_with"]
    assert record["description"]["inputs"]["backbone"]["backbone"] == "plain"


def test_what_is_no_data_set_and_a_folder_that_cannot_be_made_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"a data set, .* of type ndarray: pass load_dataset"):
        cached_features(Plain(), images_of(), tmp_path)
    assert files(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cache folder .*file.inside cannot be written.*TSP_CACHE"):
        kept(tmp_path / "file" / "inside", images_of())


def test_a_vector_depends_on_its_image_and_on_nothing_of_the_set(tmp_path):
    backbone = Plain()
    for name, split in (("toy", "test"), ("other", "test"), ("toy", "train")):
        cached_features(backbone, ImageDataset(name, split, images_of()), tmp_path, progress=False)
        assert backbone.rows == 100
    assert kept(tmp_path, images_of(), Plain(version=2))[1] == 100 and len(files(tmp_path)) == 6


@pytest.mark.parametrize("place", [0, 50, 100])
def test_one_image_more_costs_one(tmp_path, place):
    kept(tmp_path, images_of())
    grown = np.insert(images_of(), place, images_of(n=1, seed=7)[0], axis=0)
    found = made_again(tmp_path, grown, 1)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    np.testing.assert_array_equal(made_again(tmp_path, grown[::-3], 0), found[::-3])


def test_duplicates_count_once(tmp_path):
    made_again(tmp_path, images_of(10)[[0, 3, 3, 0, 9, 3]], 3)


def test_edited_code_is_run_and_not_read_back(tmp_path, monkeypatch):
    """What a reader does: change `prepare`, and look. The network's code: tests/test_edits.py."""
    dataset, network = SimpleNamespace(images=images_of(4)), load_backbone("patch_kmeans", "cpu")
    before = np.array(cached_features(network, dataset, tmp_path, progress=False))
    prepare = Backbone.prepare
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "prepare", lambda self, images: prepare(self, images).flip(2))
        changed = cached_features(network, dataset, tmp_path, progress=False)
        assert np.abs(changed - before).max() > 0.01
    np.testing.assert_array_equal(cached_features(network, dataset, tmp_path), before)


@pytest.mark.parametrize("stop, kind, said", [
    (interrupted, KeyboardInterrupt, "^now$"),
    (with_nan, ValueError, "plain gave NaN or infinite features, first in row 63")])
def test_after_an_error_only_the_remaining_rows_are_made(tmp_path, stop, kind, said):
    with pytest.raises(kind, match=said):
        kept(tmp_path, images_of(105), Plain(stop_after=60, stop=stop))
    made_again(tmp_path, images_of(105), 45)
    assert len(files(tmp_path)) == 3


def test_a_killed_process_leaves_rows_that_the_next_goes_on_from(tmp_path):
    with two_processes() as others, pytest.raises(BrokenProcessPool):
        others.submit(kept, tmp_path, images_of(105),
                      Plain(stop_after=60, stop=end_the_process)).result()
    for kind in ("f32", "sums"):  # what the kill tore
        with open(next(tmp_path.glob(f"*.{kind}")), "ab") as file:
            file.write(b"torn")
    made_again(tmp_path, images_of(105), 45)


@pytest.mark.parametrize("kind, damage, lost, named", [
    ("f32", lambda content: content[:-90], 5, False),  # as after a kill
    ("f32", lambda content: content[:-7] + bytes([content[-7] ^ 1]) + content[-6:], 1, True),
    ("json", None, 100, True),
    ("json", lambda content: content[:30], 100, True),
    ("json", lambda content: content.replace(b'"plain"', b'"other"'), 100, True),
    ("sums", None, 100, False),
])
def test_rows_that_do_not_match_are_made_again(tmp_path, caplog, kind, damage, lost, named):
    kept(tmp_path, images_of())
    (path,) = tmp_path.glob(f"*.{kind}")
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        made_again(tmp_path, images_of(), lost)
    assert str(path.with_suffix(".f32")) in caplog.text or not named


def read_only(folder):
    """The rows made of 100 images and the error with 101, in mounts of this process's own."""
    if ctypes.CDLL(None).unshare(0x20000):  # CLONE_NEWNS
        return None
    for mount in (["--make-rprivate", "/"], ["--bind", folder, folder],
                  ["-o", "remount,bind,ro", folder]):
        if subprocess.run(["mount", *mount], capture_output=True).returncode:
            return None
    n_made = kept(folder, images_of())[1]
    with pytest.raises(OSError) as refused:
        kept(folder, images_of(101))
    return n_made, str(refused.value)


@on_linux
def test_a_read_only_folder_is_read_but_not_written(tmp_path):
    kept(tmp_path, images_of())
    with two_processes() as others:
        found = others.submit(read_only, tmp_path).result()
    if found is None:
        pytest.skip("mounting a folder read-only is not permitted here")
    n_made, said = found
    assert n_made == 0 and said.startswith(f"the cache folder {tmp_path}")
    assert "TSP_CACHE" in said and "\n" not in said


@pytest.mark.parametrize("full_at", [1, 3])
def test_a_disk_that_fills_up_is_one_sentence_and_spoils_nothing(tmp_path, monkeypatch, full_at):
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
        kept(tmp_path, images_of())
    made_again(tmp_path, images_of(), 100 - 20 * (full_at - 1))


def pause(x):
    time.sleep(0.02)
    return x


def made_slowly(folder):
    return kept(folder, images_of(400), Plain(stop_after=0, stop=pause))[1]


def test_two_processes_at_once_extract_once(tmp_path):
    with two_processes() as both:
        assert sorted(both.map(made_slowly, [tmp_path] * 2)) == [0, 400]
    made_again(tmp_path, images_of(400), 0)


def peaks(folder):
    """The most memory that this process had, in MB, after few images and after many."""
    found = []
    for n in (2_000, 20_000):
        assert kept(folder, images_of(n), Plain(dim=2048))[0].shape == (n, 2048)
        status = Path("/proc/self/status").read_text()
        found.append(int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024)
    return found


@on_linux
def test_peak_memory_does_not_grow_with_the_number_of_images(tmp_path):
    with two_processes() as others:
        small, large = others.submit(peaks, tmp_path).result()
    assert large - small < 20  # the features of 20,000 images are 156 MB, of 2,000 16 MB
