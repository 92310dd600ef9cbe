"""A run on a folder among others: files that change, any names, other runs, what is kept."""

import html
import os
import re
import subprocess
import sys
import warnings
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from toys import CLOTHES, QUICK, fill

import tsp_utils.__main__ as command
from tsp_utils import cache, load_backbone, load_dataset
from tsp_utils.files import image_folders
from tsp_utils.files.image_folders import find_images
from tsp_utils.files.paths import REPOSITORY, write_together
from tsp_utils.folder import cluster_folder as module
from tsp_utils.folder.cluster_folder import cluster_folder, cluster_images, path_of
from tsp_utils.folder.page import after_the_fact

pytestmark = [pytest.mark.filterwarnings("ignore:Collapse"), pytest.mark.usefixtures("quick")]
BOTH = ["clusters.csv", "report.html"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("side, when", [  # decoded at once, while the network computes
    (28, "list_images"), (28, "read_images"), (28, "cached_features"), (28, "find_neighbors"),
    (90, "list_images"), (90, "cached_features"), (90, "find_neighbors")])
def test_files_that_go_or_change_are_left_out_or_named(tmp_path, monkeypatch, caplog, side, when):
    photos, step = fill(tmp_path / "photos", side), getattr(module, when)

    def then(*args, **kwargs):
        found = step(*args, **kwargs) if when == "list_images" else None
        (photos / "003.png").unlink(missing_ok=True)
        (photos / "005.png").write_text("changed")
        return found or step(*args, **kwargs)

    monkeypatch.setattr(module, when, then)
    out = cluster_folder(photos, 3, backbone="patch_kmeans")
    assert names(tmp_path / "clusters") == BOTH
    page, read = (out / "report.html").read_text(), pd.read_csv(out / "clusters.csv")["path"]
    if {"003.png", "005.png"} <= set(read):  # too late to be left out
        said = "2 of 24 files changed or went away during the run (003.png, 005.png)"
        assert said in page and said in caplog.text and 'src="data:image/svg+xml' in page
    else:
        assert len(read) == 22 and "003.png cannot be read (No such file" in page
        assert "005.png is not an image that can be read" in page


def test_a_file_that_changes_gives_no_vector_to_what_it_held(tmp_path, monkeypatch):
    photos = fill(tmp_path / "photos", 90)
    (photos / "twin.png").write_bytes((photos / "007.png").read_bytes())
    before, extract = (photos / "007.png").read_bytes(), module.cached_features

    def clustered():
        return cluster_images(photos, find_images(photos), 3, "patch_kmeans", 0)

    wanted = clustered()
    assert wanted.neighbors.indices.shape == (25, 20)
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "another"))

    def meanwhile(network, dataset):
        assert len(dataset.images.digests) == 25  # looked at once
        (photos / "007.png").write_bytes((photos / "000.png").read_bytes())
        return extract(network, dataset)

    monkeypatch.setattr(module, "cached_features", meanwhile)
    expected = wanted.features[[0, *range(1, 7), 0, *range(8, 25)]]
    np.testing.assert_allclose(clustered().features, expected, atol=1e-4)  # other batches
    (photos / "007.png").write_bytes(before)
    monkeypatch.setattr(module, "cached_features", extract)
    np.testing.assert_allclose(clustered().features, wanted.features, atol=1e-4)


def test_results_are_written_together_or_not_at_all(photos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        write_together({tmp_path / "new" / "a": b"1", tmp_path / "file" / "b": b"2"})
    assert names(tmp_path / "new") == []
    write_together({tmp_path / "new" / "a": b"1", tmp_path / "new" / "b": b"2"})
    assert names(tmp_path / "new") == ["a", "b"] and (tmp_path / "new/b").read_bytes() == b"2"
    with monkeypatch.context() as patch, pytest.raises(TypeError, match="not callable"):
        patch.setattr("tsp_utils.folder.page.folder_page", "no page")
        cluster_folder(photos, 3)
    assert not (tmp_path / "clusters").exists()
    cluster_folder(photos, 3)  # nothing blocks the next run


ODD = ["a\nb.png", "c\rd.png", "e\r\nf.png", '"q".png', "=1+1.png", "+2.png", "-3.png", "@x.png",
       "😀.png", "comma, semi;.png", " lead.png", "tab\t.png", "back\\slash.png", "NA", "007",
       "1e5", "True", "P.HEIC", "file:x.png", "caf%E9.png", os.fsdecode(b"caf\xe9.png"),
       os.fsdecode(b"\xff\n\xfe")]


@on_linux
@pytest.mark.parametrize("odd", [ODD, [name for name in ODD if "\r" not in name]])
def test_a_table_of_any_names_is_utf_8_reads_back_and_has_no_formula(photos, odd):
    for path, name in zip(sorted(photos.iterdir()), odd, strict=False):
        path.rename(photos / name)
    out = cluster_folder(photos, 3)
    text = (out / "clusters.csv").read_bytes().decode("utf-8")
    assert not re.search(r'(^|\n|,)"?[=+@\t\r-]', text) 
    assert re.search('file:caf%E9.png"?,', text)
    assert r"caf\udce9.png" in (out / "report.html").read_text("utf-8")
    read = pd.read_csv(out / "clusters.csv")["path"]
    assert sorted(map(path_of, read)) == sorted(os.listdir(photos))
    assert {"P.HEIC", "./007"} < set(read)
    with_bytes = read.str.startswith("file:")
    assert all((photos / path).exists() for path in read[~with_bytes]) and with_bytes.sum() == 3


SHORTLY = f"""
from functools import partial
import tsp_utils.__main__, tsp_utils.folder.cluster_folder as module
module.TSPClustering = partial(module.TSPClustering, **{QUICK})
tsp_utils.__main__.console()
"""


@on_linux
def test_relative_names_are_the_callers_and_a_terminal_of_ascii_gets_ascii(photos, tmp_path):
    photos.rename(tmp_path / "figures")  # the repository has figures of its own
    done = subprocess.run(
        [sys.executable, "-c", SHORTLY, "cluster", "figures", "--n-clusters", "3", "--out", "é😀"],
        capture_output=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == rb"\xe9\U0001f600/clusters.csv"
    assert len(pd.read_csv(tmp_path / "é😀" / "clusters.csv")) == 24
    assert b"Traceback" not in done.stderr and not re.search(rb"(?i)[a-z]warning", done.stderr)


@pytest.mark.parametrize("folder", [".", "..", "../../photos"])
def test_from_inside_the_folder_the_results_lie_beside_it(photos, tmp_path, monkeypatch, folder):
    (photos / "deep").mkdir()
    monkeypatch.chdir(photos if folder == "." else photos / "deep")
    out = cluster_folder(folder, 3)
    assert out == tmp_path / "clusters" / "photos" and names(out) == BOTH
    assert len(names(photos)) == 24


@pytest.mark.parametrize("arguments, sentence", [
    ("--entropy-weight inf", "--entropy-weight is inf; pass 0 or more"),
    ("--entropy-weight 1e300", r"--entropy-weight is 1e\+300; pass 0 or more"),
    ("--n-neighbors 0", "--n-neighbors is 0; pass a whole number of at least 1"),
    ("--seed -1", "--seed is -1: pass a whole number from 0 to 4,294,967,295"),
    (f"--seed {2**32}", "--seed is 4294967296: pass")])
def test_errors_name_the_options_that_were_typed(photos, tmp_path, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        command.main(["cluster", "photos", "--n-clusters", "3", *arguments.split()])
    assert not (tmp_path / "clusters").exists()


def meanwhile(monkeypatch, do):
    """`do` is called while a run clusters."""
    step = module.cluster_images
    monkeypatch.setattr(module, "cluster_images", lambda *given, **settings: (
        do() or step(*given, **settings)))


@pytest.mark.parametrize("force", [False, True])
def test_of_two_runs_into_one_folder_the_second_is_refused(photos, tmp_path, monkeypatch, force):
    (tmp_path / "link").symlink_to(tmp_path)
    refused = []

    def second():
        with pytest.raises(FileExistsError, match=r"Another run writes into .*: wait for it, or"):
            cluster_folder(photos, 4, out=tmp_path / "link" / "clusters" / "photos", force=force)
        refused.append(True)

    meanwhile(monkeypatch, second)
    cluster_folder(photos, 3, force=force)
    assert refused == [True] and names(tmp_path / "clusters") == BOTH


def test_results_that_another_machine_wrote_meanwhile_are_kept(photos, tmp_path, monkeypatch):
    theirs = tmp_path / "clusters" / "photos" / "clusters.csv"
    meanwhile(monkeypatch, lambda: theirs.write_text("theirs") and None)
    with pytest.raises(FileExistsError, match="pass --force to replace it"):
        cluster_folder(photos, 3)
    assert theirs.read_text() == "theirs" and names(tmp_path / "clusters") == ["clusters.csv"]


@pytest.mark.parametrize("labels, clusters", [
    ([0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]), ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 3])])
def test_the_ceiling_of_acc_is_what_the_best_of_all_clusterings_of_these_sizes_reaches(
        labels, clusters):
    found = SimpleNamespace(labels=np.array(labels), classes=tuple("abc"[:labels[-1] + 1]))
    said = []
    for found.clusters in map(np.array, set(permutations(clusters))):
        said.append(after_the_fact(found))
    assert said[0]["ceiling"] == pytest.approx(max(told["metrics"]["acc"] for told in said))


@pytest.mark.parametrize("side", [28, 90])
def test_what_was_seen_once_is_not_seen_again(tmp_path, monkeypatch, side):
    network, encoded, decoded = load_backbone("patch_kmeans"), [], []
    encode, decode = network.encode, image_folders._decode
    monkeypatch.setattr(network, "encode", lambda x: encoded.append(len(x)) or encode(x))
    monkeypatch.setattr("tsp_utils.folder.choice.load_backbone", lambda name: network)
    monkeypatch.setattr("tsp_utils.files.image_folders._decode",
                        lambda *args: decoded.append(args) or decode(*args))

    def seen(folder: Path) -> tuple[int, int]:
        encoded.clear(), decoded.clear()
        cluster_images(folder, find_images(folder), 3, "patch_kmeans", 0)
        return sum(encoded), len(decoded) if side == 90 else 0

    photos, one = fill(tmp_path / "photos", side), side == 90  # the first is decoded for its size
    assert seen(photos)[0] == 24
    assert seen(photos) == (0, one)
    photos = photos.rename(tmp_path / "moved")
    assert seen(photos) == (0, one)
    (photos / "000.png").rename(photos / "zzz.png")
    assert seen(photos) == (0, one)
    Image.fromarray(255 - CLOTHES.images[5, ..., 0]).resize((side, side)).save(photos / "more.png")
    assert seen(photos) == (1, 2 * one)


def test_a_cache_is_pruned_from_what_was_not_used_for_longest(tmp_path, capsys):
    folder = tmp_path / "cache" / "features"
    for age in range(4):
        cache.rows(folder, f"v{age}", {}, [seen_in_a_test], [bytes(16)],
                   lambda rows: [(rows, np.full((1, 1000), 7, np.float32))])
        for path in folder.glob(f"v{age}_*"):
            os.utime(path, (1e9 - age, 1e9 - age))
    cache.arrays("records", "new", {}, [seen_in_a_test], lambda: {"x": np.ones(3)})
    whole = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*"))
    assert command.main(["cache"]) == 0 and "0.0 MB removed" in capsys.readouterr().out
    assert command.main(["cache", "--prune", "11K"]) == 0
    assert {path.name[:2] for path in folder.glob("*.*") if path.suffix != ".lock"} == {"v0", "v1"}
    removed, left = cache.prune(11_000)
    assert removed == 0 and left < 11_000 < whole
    with cache.entries.locked(next(folder.glob("v1*.f32"))):  # another process makes it just now
        cache.prune(0)
        assert {path.name[:2] for path in folder.glob("*.f32")} == {"v1"}
    cache.prune(0)
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").rglob("*.*"))
    with pytest.raises(SystemExit):
        command.main(["cache", "--prune", "much"])


def seen_in_a_test():
    pass


LARGE = """
import re, sys, warnings
warnings.filterwarnings("ignore", module="PIL")
from pathlib import Path
from tsp_utils.files.image_folders import ImageFiles
for image in ImageFiles(Path("large"), sys.argv[1:]):
    most = re.search("VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]  # kB
    print(*image.shape, int(most) / 1e6)
"""


@on_linux
def test_large_images_are_read_in_11_bytes_a_pixel_and_look_the_same(tmp_path):
    """As 144 megapixels in 1.5 GB, and the like."""
    step = np.add.outer(np.arange(6) * 20, np.arange(6) * 20).astype(np.uint8)
    plain = {"a.jpg": Image.fromarray(step).convert("RGB"), "b.tif": Image.fromarray(
        step * np.uint16(256)), "c.png": Image.fromarray(step).convert("RGBA")}
    for folder, side in (("large", 6_000), ("small", 1_500)):
        (tmp_path / folder).mkdir()
        for name, image in plain.items():
            image.resize((side, side), 0).save(tmp_path / folder / name, compress_level=1)
    done = subprocess.run([sys.executable, "-c", LARGE, *plain], cwd=tmp_path, text=True,
                          check=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    for line in done.stdout.splitlines():
        height, width, channels, used = map(float, line.split())
        assert 1024 <= height == width <= 2048 and channels == 3 and used < 0.4
    assert done.stdout.count("\n") == 3 and not done.stderr
    network = load_backbone("patch_kmeans")
    large, small = (load_dataset(tmp_path / folder).images for folder in ("large", "small"))
    for i, name in enumerate(plain):
        difference = network.prepare([large[i]]) - network.prepare([small[i]])
        assert difference.abs().max() < 0.05, name


def test_no_raw_warning_of_a_library_reaches_the_user(photos, capfd, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 28 * 28)
    Image.new("1", (36, 36)).save(photos / "large.png")  # Pillow warns of a bomb
    tags = Image.Exif()
    tags[0x010F] = "x"
    Image.fromarray(CLOTHES.images[0, ..., 0]).save(photos / "cut.jpg", exif=tags.tobytes()[:-3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command.main(["cluster", "photos", "--n-clusters", "3"])
    assert not any("PIL" in warning.filename for warning in caught)
    assert "DecompressionBomb" not in capfd.readouterr().err
    page = html.unescape((Path("clusters") / "photos" / "report.html").read_text())
    assert "1 of 26 images are of one colour throughout (large.png)" in page
