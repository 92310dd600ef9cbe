"""A folder of images to a table and a page: odd files, bad input, the page in a browser."""

import errno
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from toys import CLOTHES, QUICK, fill

import tsp_utils.__main__ as command
from tsp_utils import TSPClustering, cached_features, load_backbone, load_dataset
from tsp_utils.files.paths import REPOSITORY
from tsp_utils.folder.cluster_folder import cluster_folder
from tsp_utils.folder.page import MAP_IMAGES, _command, chosen_images, folder_page, neighbor_shares

pytestmark = [pytest.mark.filterwarnings("ignore:Collapse"), pytest.mark.usefixtures("quick")]


def write(path, made):
    """A text, an image, or a black square of that side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(made, str):
        path.write_text(made)
    else:
        image = Image.new("1", (made, made)) if isinstance(made, int) else Image.fromarray(made)
        image.save(path)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def test_table_and_page_are_those_of_three_lines_of_python(photos, caplog):
    (photos / "000.png").rename(photos / "naïve名 with spaces.png")
    before = content(photos)
    out = cluster_folder(photos, 4, backbone="patch_kmeans")
    assert out == Path("clusters/photos") and content(photos) == before
    assert not re.search("Passed over|one colour|pages|splits", caplog.text)
    table = pd.read_csv(out / "clusters.csv")
    assert list(table["path"]) == sorted(path.name for path in photos.iterdir())
    features = cached_features(load_backbone("patch_kmeans"), load_dataset(photos))
    model = TSPClustering(4, random_state=0, **QUICK).fit(features)
    assert table["cluster"].tolist() == model.labels_.tolist()
    sure = model.predict_proba(features).max(1)
    np.testing.assert_allclose(table["probability"], sure, atol=1e-3)
    np.testing.assert_allclose(table["stability"], model.stability_, atol=1e-3)

    page = (out / "report.html").read_text()
    assert f"at a learning rate of {model.learning_rate_};" in page
    assert f"image's cluster is {100 * sure.mean():.0f} %" in page
    said = re.findall(r"Cluster (\d): (\d+) images?, mean probability (\d+) %", page)
    for cluster, n, mean in ((int(number) for number in numbers) for numbers in said):
        assert n == (model.labels_ == cluster).sum()
        assert mean == pytest.approx(100 * sure[model.labels_ == cluster].mean(), abs=0.6)
    assert len(said) == page.count('<section class="cluster"') == table["cluster"].nunique()
    dots = re.findall(r"<title>(\d): (.*?)</title></circle>", page)
    assert sorted(dots) == sorted(zip(table["cluster"].astype(str), table["path"], strict=True))
    loaded_from_elsewhere = r"src=\"(?!data:)|<link|url\(|@import|https?://(?!www.w3.org/2000/svg)"
    assert not re.search(loaded_from_elsewhere, page)
    links = re.findall(r'<figure><a href="(.*?)"', page)
    assert len(links) == page.count("<figure>") and {
        (out / unquote(html.unescape(link))).resolve() for link in links
    } <= {path.resolve() for path in photos.iterdir()}


@pytest.mark.parametrize("side", [28, 84])  # small images are decoded at once, larger ones late
def test_what_was_skipped_passed_over_or_not_meant_is_said_in_every_run(tmp_path, side, caplog):
    photos = fill(tmp_path / "photos", side)
    (photos / "!broken.jpg").write_text("no image")  # the first of them
    (photos / "cut.png").write_bytes((photos / "000.png").read_bytes()[:200])
    (photos / "gone.png").symlink_to("nowhere.png")
    for i in range(4):
        Image.new("L", (side, side), 40 * i).save(photos / f"blank {i}.png")
    pages = [Image.open(photos / f"00{i}.png") for i in range(2)]
    Image.new("L", pages[0].size).save(photos / "scan.tif", save_all=True, append_images=pages)
    for name in ("@eaDir/0.png", "notes.txt", "more.txt", "IMG.HEIC", ".DS_Store"):
        write(photos / name, "no image")
    for attempt in range(3):  # from the second on, features come from the cache
        caplog.clear()
        out = cluster_folder(photos, 3, backbone="patch_kmeans", force=attempt > 0)
        assert len(pd.read_csv(out / "clusters.csv")) == 29
        page = html.unescape((out / "report.html").read_text())
        for said in ("Passed over, as junk or as what Pillow does not read: 2 .txt, 1 .heic, "
                     "1 hidden, 1 in @eaDir.",
                     "4 of 29 images are of one colour throughout (blank 0.png, blank 1.png, "
                     "blank 2.png and 1 more)",
                     "first that is not of one colour was taken: scan.tif (page 2)."):
            assert caplog.text.count(said) == 1 and page.count(said) == 1, said
        assert "!broken.jpg is not an image" in page and "cut.png cannot be read" in page
        assert "gone.png cannot be read" in page
        better = "--backbone auto looks for a network that sees more"
        assert caplog.text.count(better) == page.count(better) == (side > 64)
        (note,) = (tmp_path / "cache" / "files").glob("*.sums")
        if attempt == 1:  # the note beside the cache is lost: the files are looked at again
            note.unlink()


def test_class_folders_are_read_after_the_fact_alone_and_splits_not_at_all(tmp_path, caplog):
    """The same images in the same order, in class folders and in those of two splits."""
    kinds = {8: "bags", 0: "shirts & tops", 1: "trousers"}
    for i, (image, label) in enumerate(zip(CLOTHES.images, CLOTHES.labels, strict=True)):
        if label in kinds:
            write(tmp_path / "kinds" / kinds[label] / f"{i}.png", image[..., 0])
            split = "test" if label == 8 else "train"
            write(tmp_path / "splits" / split / f"{kinds[label]}{i}.png", image[..., 0])
    by_kind, by_split = (cluster_folder(tmp_path / name, 3) for name in ("kinds", "splits"))
    assert pd.read_csv(by_kind / "clusters.csv")["cluster"].equals(
        pd.read_csv(by_split / "clusters.csv")["cluster"])
    said = "splits of a data set (test, train) are not taken as classes: pass one of them"
    page = (by_split / "report.html").read_text()
    assert said in caplog.text and said in page and "after the fact" not in page
    page = (by_kind / "report.html").read_text()
    assert "after the fact" in page and "shirts &amp; tops" in page and "ACC " in page
    assert said not in page and "leave some unmatched" not in page
    page = (cluster_folder(tmp_path / "kinds", 4, force=True) / "report.html").read_text()
    assert "4 clusters for 3 classes leave some unmatched" in page


def as_bash_reads(line: str) -> list[str]:
    """What a line prints with a NUL behind each."""
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    return os.fsdecode(done.stdout).split("\0")[:-1]


def test_the_printed_python_makes_the_same_again(photos, tmp_path):
    """With settings that the command lacks."""
    photos.rename(tmp_path / "it's \\ \"off\"")
    out = cluster_folder("it's \\ \"off\"", 4, seed=2, n_neighbors=5, init="random",
                         learning_rate=np.float64(1e-3))
    made, page = content(out), (out / "report.html").read_text("utf-8")
    shutil.rmtree(out)
    line = html.unescape(re.search('<code class="command">(.*?)</code>', page, re.DOTALL)[1])
    kind, code = as_bash_reads(f"python() {{ printf '%s\\0' \"$@\"; }}; {line}")
    assert kind == "-c"
    exec(code, {})
    assert content(out) == made


@pytest.mark.parametrize("name", [
    "plain", "two  spaces", "it's", '"quoted"', "$HOME `id` $(id)", "-dash", "--out", "new\nline",
    "back\\slash", "naïve名", "a;b&c|d", "!bang*?[x]", "#hash", os.fsdecode(b"caf\xe9's")])
def test_the_printed_command_has_every_setting_whatever_the_names(name, tmp_path):
    model = TSPClustering(5, n_neighbors=9, entropy_weight=np.float32(0.1), **QUICK)
    found = SimpleNamespace(folder=name, probabilities=np.ones((9, 5)), made={
        "backbone": "timm:" + name, "seed": 12, "out": name, "settings": model.get_params()})
    printed = as_bash_reads(f"printf '%s\\0' {_command(found)}")
    asked = vars(command.parser().parse_args(printed[3:]))
    assert asked.pop("do") is command.cluster_images
    path = f"./{name}" if name[0] == "-" else name
    assert asked == {
        "command": "cluster", "folder": path, "n_clusters": 5, "backbone": "timm:" + name,
        "out": path, "n_neighbors": 9, "entropy_weight": pytest.approx(0.1), "seed": 12,
        "force": False}


def test_what_lies_in_the_output_folder_stays_as_it_is(photos, tmp_path):
    for name in (".writable", "clusters.csv.bak", "notes.txt"):
        write(tmp_path / "out" / name, "mine")
    mine = content(tmp_path / "out")
    for force in (False, True):
        now = content(cluster_folder(photos, 4, out=tmp_path / "out", force=force))
        assert mine.items() <= now.items() and len(now) == len(mine) + 2


def test_an_out_where_nothing_may_or_can_be_written_is_refused(photos, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "clusters.csv").symlink_to("not there yet.csv")
    with pytest.raises(FileExistsError, match=r"clusters\.csv is there already: pass --force"):
        cluster_folder(photos, 4, out=other)
    (other / "report.html").mkdir()
    with pytest.raises(FileExistsError, match=r"report\.html is a folder.*pass another folder"):
        cluster_folder(photos, 4, out=other, force=True)

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("long" * 99, "short"):
        with pytest.raises(OSError, match=r"cannot be written .*: pass another folder as --out\.$"):
            cluster_folder(photos, 4, out=tmp_path / "new" / name)
        assert not (tmp_path / "new").exists()
        monkeypatch.setattr("tempfile.TemporaryFile", read_only)


def test_shares_of_neighbours_and_chosen_images_by_hand():
    clusters = np.array([0, 0, 0, 1, 1])
    indices = np.array([[1, 2], [0, 2], [0, 3], [4, 2], [3, 0]])
    shares = neighbor_shares(clusters, indices, 3)
    np.testing.assert_allclose(shares, [[5 / 6, 1 / 6, 0], [1 / 2, 1 / 2, 0], [0, 0, 0]])
    found = SimpleNamespace(clusters=clusters, probabilities=np.array(
        [[0.5, 0.3], [0.9, 0.1], [0.7, 0.2], [0.4, 0.6], [0.2, 0.8]]))
    assert chosen_images(found, 0, 2) == ([1], [2], [0])
    assert chosen_images(found, 1, 8) == ([4], [], [3])

    sure = np.linspace(1, 0.5, 200)  # in the order of the images
    found = SimpleNamespace(clusters=np.zeros(200, int),
                            probabilities=np.stack([sure, 1 - sure], 1))
    most, drawn, least = chosen_images(found, 0, 8)
    assert most == list(range(8)) and least == list(range(199, 191, -1))
    assert len(drawn) == 8 and not {*drawn} & {*most, *least} and drawn == sorted(drawn)
    assert 60 < np.mean(drawn) < 140 and chosen_images(found, 0, 8)[1] == drawn  # by seed


def good(n: int) -> dict:
    return {f"photos/{i:03d}.png": CLOTHES.images[i, ..., 0] for i in range(n)}


CASES = {  # what goes wrong -> the command's arguments, and files by name as `write` makes them
    "no such folder": (["elsewhere"], {}),
    "an empty folder": (["photos"], {}),
    "no images among other files": (["photos"], {"photos/a.txt": "a", "photos/b.heic": "b"}),
    "no readable image": (["photos"], {f"photos/{i}.jpg": "no image" for i in range(9)}),
    "one image": (["photos"], good(1)),
    "10 clusters for 8 images": (["photos", "--n-clusters", "10"], good(8)),
    "one cluster": (["photos", "--n-clusters", "1"], good(20)),
    "pictures of one colour only": (["photos"], {f"photos/{i}.png": 28 for i in range(20)}),
    "duplicates only": (["photos"], dict.fromkeys(good(20), CLOTHES.images[0, ..., 0])),
    "a backbone that is not known": (["photos", "--backbone", "dino_vits"], good(20)),
    "results that are there": (["photos", "--out", "results"],
                               good(20) | {"results/clusters.csv": "mine"}),
    "an --out in the images' folder": (["photos", "--out", "photos/results"], good(20)),
    "an --out that is a file": (["photos", "--out", "taken"], good(20) | {"taken": "mine"}),
    "a text file named .jpg": (["photos"], good(20) | {"photos/letter.jpg": "dear reader"}),
    "a PNG of 20,000 x 20,000": (["photos"], good(20) | {"photos/huge.png": 20_000}),
}


def test_each_bad_input_gets_the_sentence_of_the_page_which_says_what_to_pass(
        tmp_path, monkeypatch):
    table = []
    for what, (arguments, files) in CASES.items():
        root = tmp_path / what
        (root / "photos").mkdir(parents=True)
        monkeypatch.chdir(root)
        for name, made in files.items():
            write(root / name, made)
        mine = content(root)
        try:  # the last number given counts
            command.main(["cluster", "--n-clusters", "3", *arguments])
            page = (root / "clusters" / "photos" / "report.html").read_text()
            sentence = "skipped: " + re.search("<li>(.*?)</li>", page)[1]
        except (ValueError, OSError) as error:
            sentence = str(error)
            assert not (root / "clusters").exists()
        assert mine.items() <= content(root).items()  # nothing of the user's is changed
        sentence = sentence.replace(f"{root}/", "").replace("|", "/")
        assert "\n" not in sentence and 20 < len(sentence) < 330, what
        assert re.search("pass |replace or delete|all are|looked for", sentence), sentence
        table.append(f"| {what} | {sentence} |")
    table = "\n".join(table)
    page = (REPOSITORY / "docs" / "odd_inputs.md").read_text()
    assert table in page, f"the page lacks:\n{table}"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page in")
def test_the_page_in_a_browser(tmp_path):
    """In a wide frame and a narrow one: nothing sticks out, pictures load, pointing shows one."""
    for i, label in enumerate(CLOTHES.labels[:29]):  # so few need no UMAP
        write(tmp_path / "kinds" / f"a rather long name of a class, number {label}" / f"{i}.png",
              CLOTHES.images[i, ..., 0])
    page = (cluster_folder(tmp_path / "kinds", 7) / "report.html").read_text()
    probe = """
    const look = width => new Promise(done => {
      const frame = document.createElement("iframe");
      frame.style = `border: 0; width: ${width}px; height: 900px`;
      frame.onload = () => {
        const page = frame.contentDocument, root = page.documentElement, {
          MouseEvent, KeyboardEvent} = frame.contentWindow;
        const tip = page.getElementById("tip"), images = [...page.images], visited = new Set();
        const point = new MouseEvent("mouseover", {bubbles: true});
        page.querySelector("circle[data-image]").dispatchEvent(point);
        page.querySelector('circle[tabindex="0"]').focus();
        for (const key of ["Right", "Left", "Down", "Up", ...Array(99).fill("Right")]) {
          const press = new KeyboardEvent("keydown", {key: `Arrow${key}`, bubbles: true});
          page.activeElement.dispatchEvent(press);
          visited.add(page.activeElement.textContent);
        }
        const follows = tip.textContent === page.activeElement.textContent;
        setTimeout(() => {
          const box = tip.getBoundingClientRect();
          done({
            inner: root.clientWidth, scroll: root.scrollWidth, images: images.length,
            blank: images.filter(image => image.naturalWidth === 0).length,
            shown: tip.style.display, left: box.left, right: box.right, text: tip.textContent,
            picture: tip.querySelector("img").naturalWidth, visited: visited.size, follows,
            in_tab_order: page.querySelectorAll('[tabindex="0"]').length});
          frame.remove();
        }, 500);
      };
      frame.srcdoc = SOURCE;
      document.body.append(frame);
    });
    look(1280).then(wide => look(400).then(narrow => {
      document.title = JSON.stringify([wide, narrow]);
    }));
    """.replace("SOURCE", json.dumps(page).replace("</", "<\\/"))
    test = tmp_path / "test.html"
    test.write_text(f"<!DOCTYPE html><title>not run</title><body><script>{probe}</script>")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/c",
         "--virtual-time-budget=20000", "--window-size=1400,1000", "--dump-dom", test.as_uri()],
        capture_output=True, text=True, timeout=120, check=False)
    frames = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    for seen, width in zip(frames, (1280, 400), strict=True):
        assert seen["inner"] in (width, width - 15)  # less a scroll bar
        assert seen["scroll"] <= seen["inner"]
        assert seen["images"] > 20 and seen["blank"] == 0 and seen["picture"] == 28
        assert seen["visited"] > 5 and seen["in_tab_order"] == 1 and seen["follows"]  # by keyboard
        assert seen["shown"] == "block" and ".png" in seen["text"]
        assert seen["left"] >= 0 and seen["right"] <= seen["inner"]


def test_a_large_folder_keeps_the_page_small(monkeypatch):
    """Ten thousand photos in a hundred clusters: the page stays below ten megabytes."""
    rng = np.random.default_rng(0)
    n, n_clusters = 10_000, 100
    probabilities = rng.dirichlet(np.ones(n_clusters), n)
    found = SimpleNamespace(
        folder=REPOSITORY, paths=tuple(f"{i}.jpg" for i in range(n)), labels=None, classes=(),
        clusters=probabilities.argmax(1), probabilities=probabilities, stability=np.ones(n),
        features=rng.normal(size=(n, 4)), history={"loss": np.linspace(1, 0, 100)},
        neighbors=SimpleNamespace(indices=rng.integers(0, n, (n, 20))), unreadable={}, notes=[],
        made={"backbone": "made up", "weights": "", "seed": 0, "out": "clusters/a",
              "rate": 1e-4, "settings": TSPClustering().get_params(), "versions": {}},
        changed=set(), told=list)
    photo = rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)  # noise is what packs worst
    monkeypatch.setattr("tsp_utils.files.image_folders._decode", lambda path, content: (photo, 0))
    monkeypatch.setattr("tsp_utils.folder.page.map_points", lambda features: (
        np.arange(2000), rng.normal(size=(2000, 2))))
    page = folder_page(found)
    assert len(page.encode()) < 10e6 and page.count("data-image=") == MAP_IMAGES
