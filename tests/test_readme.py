"""The README and the pages it leads to say what the figures say, and name what exists."""

import functools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from readings import sentences_of, too_long
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score
from toys import fill

import tsp_utils as tsp
from experiments.photos import code_of_a_kind
from experiments.stability import code_of_a_cell
from tsp_utils.estimator import rate_for
from tsp_utils.files.paths import shipped_records

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])}
README, RESULTS, GUIDE, MEASURED = (PAGES[name] for name in (
    "README.md", "docs/results.md", "docs/your_own_images.md", "docs/your_own_images_measured.md"))
PROSE = (  # held to short sentences
    "README.md", "docs/glossary.md", "docs/teaching.md", "docs/slides.md", "docs/where_tsp_sits.md",
    "docs/results.md", "docs/profiles.md", "docs/how_many_clusters.md", "docs/your_own_images.md",
    "docs/your_own_images_measured.md", "docs/budget.md")


def figure(name: str) -> pd.DataFrame:
    return pd.read_csv(FIGURES / f"{name}.csv")


@pytest.mark.parametrize("profile", ["offline", "small"])
def test_results_are_those_of_the_committed_tables(profile):
    table = figure(f"{profile}/03_table1").query("scored == 'test'")
    for (dataset, backbone), rows in table.groupby(["dataset", "backbone"], sort=False):
        by_method = rows.set_index("method")
        cells = [f"{r.acc_mean:.1f} ± {r.acc_std:.1f} | {r.nmi_mean:.1f} | {r.ari_mean:.1f}"
                 for r in (by_method.loc["k-means"], by_method.loc["head"])]
        assert f"| `{profile}` | {dataset} | `{backbone}` | {' | '.join(cells)} |" in RESULTS
    assert (table["n"] == 10).all()


@pytest.mark.parametrize("profile", ["offline", "small"])
def test_table_1_is_asked_whether_its_losses_rest(profile):
    page, asked = PAGES["docs/budget.md"], figure(f"{profile}/03_rate")
    for r in asked.to_dict("records"):
        assert r["rate"] == rate_for(r["late"] / 100)
        acc = [f"{r[f'{at}acc_mean']:.1f} ± {r[f'{at}acc_std']:.1f}" for at in (
            "k-means_", "head_", "")]
        acc[2] = "the same" if r["rate"] == 1e-4 else acc[2]
        taken = f"{r['late']:.1f} | {r['rate']:.0e}".replace("e-0", "e-")
        assert (f"| `{profile}` | {r['dataset']} | `{r['backbone']}` | {taken} | "
                f"{' | '.join(acc)} |") in page
    rests = (asked["rate"] == 1e-4).groupby(asked["dataset"]).agg(["sum", "size"]).T.to_dict("list")
    assert rests == {"offline": {"cifar10": [0, 3], "fashion-mnist": [2, 4]},
                     "small": {"cifar10": [2, 3]}}[profile]  # as the next sentence has it
    assert ("On CIFAR-10 two of three losses rest with 19,500 steps, and none with 3,900. On "
            "Fashion-MNIST two of four rest with 3,900.") in page
    change = asked["acc_mean"] - asked["head_acc_mean"]
    moved = asked[change.abs() > 1]
    if profile == "small":
        assert moved.empty
    else:
        assert moved[["dataset", "backbone"]].values.tolist() == [["fashion-mnist", "vit_nano_cpu"]]
        assert f"above K-means, at {moved['acc_mean'].item():.1f}." in " ".join(RESULTS.split())
        assert f"on CIFAR-10 loses {-change.min():.1f} points in `offline`" in page


def test_the_paper_s_first_row_beside_k_means_on_pixels():
    for r in figure("small/03_kmeans_pixels").query("scored == 'train'").itertuples():
        assert (f"{r.acc_mean:.1f} ± {r.acc_std:.1f} / {r.nmi_mean:.1f} / {r.ari_mean:.1f}"
                in RESULTS)
        assert abs(r.acc_mean - 22.9) < 2.5 and abs(r.nmi_mean - 8.7) < 2.5


def test_tables_are_the_committed_ones_and_the_ledger_decides_all_claims_but_one():
    for mark, name in (("heads", "offline/heads"), ("icbpl", "small/claims_icbpl"),
                       ("ledger", "small/claims")):
        text = RESULTS.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()
        assert text == (FIGURES / f"{name}.md").read_text("utf-8").strip()
    claims = figure("small/claims")
    assert list(claims["id"]) == [f"C{i}" for i in range(13)]
    for row in claims.itertuples():
        assert f"**{row.verdict}**" in re.search(rf"^\| {row.id}\. .*$", text, re.M)[0]
    same, mixture = figure("small/03_c3_same"), figure("small/03_c11").set_index("cell")
    said = [f"{row.mean:+.1f}" for row in same.itertuples()]
    said.append(f"{figure('small/03_c3_rate')['mean'].item():+.1f}")
    said.append(f"{mixture.loc['32 principal axes', 'mean']:+.1f}")
    page = " ".join(RESULTS.split())
    told = page[page.index("In `small`, on all of CIFAR-10"):].split("A claim's power")[0]
    assert re.findall(r"[+-]\d\.\d", told) == said
    assert [b in told for b in same["backbone"]] == [True] * 3
    counts = claims["verdict"].value_counts()
    assert f"{counts['holds']} hold here and {counts['does not hold']} do not." in README
    assert counts["not tested"] == 1 and "inconclusive" not in counts


def test_the_comparison_of_heads_is_as_wide_as_the_pages_say():
    table = figure("offline/heads")
    assert table["method"].nunique() >= 14 and len(table.groupby(["dataset", "backbone"])) == 4
    acc = figure("small/heads").query("backbone == 'patch_kmeans' and method in "
                                      "['pica', 'nnm', 'cc', 'tsp', 'scan', 'iic']")["acc_mean"]
    assert f"between {acc.min():.1f} and {acc.max():.1f}" in RESULTS
    assert f"within {acc.max() - acc.min():.1f} points" in README
    head = figure("offline/11_gain").query("kind == 'real' and dataset == 'cifar10'").set_index(
        "backbone")["head_mean"]
    assert (f"from {head['patch_kmeans']:.0f} to {head['resnet_contrast_cifar10']:.0f} % accuracy"
            in README)


@pytest.mark.parametrize("name, line", [
    ("09_numbers", r"{clusters}\b.*\| {largest}, {smallest} \| {mean probability:.0f} % \| "
                   r"{nmi:.1f} \| {ari:.1f}"),
    ("09_uneven", r"{entropy_weight:g}\b.*\| {largest:g}, {smallest:g} \| {nmi:.1f} \| {ari:.1f}"),
    ("09_few", r"{images:,g} \| {acc:.1f} \| {k-means acc mean:.1f}")])
def test_the_figures_beside_the_guide_are_notebook_09_s(name, line):
    rows = figure(f"offline/{name}")
    for r in (rows.dropna() if name == "09_uneven" else rows).to_dict("records"):
        assert re.search(rf"^\| {line.format(**r)} \|$", MEASURED, re.M), r


def test_the_python_of_the_guide_runs(own_folders, tmp_path, monkeypatch, capsys):
    """Each block as it stands, after those above it: on a folder of pictures and on blobs."""
    x, kinds = make_blobs(240, 16, centers=10, cluster_std=0.5, random_state=0)
    (tmp_path / "path" / "to").mkdir(parents=True)
    fill(tmp_path / "path" / "to" / "photos", side=32)
    np.save(tmp_path / "features.npy", x)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tsp, "TSPClustering", functools.partial(
        tsp.TSPClustering, n_init=2, max_epochs=5, min_steps=100))
    names, printed = {}, []
    for block in re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S):
        exec(block, names)
        printed.append(capsys.readouterr().out)
        if "clusters" in names:  # those of the blobs
            assert adjusted_rand_score(kinds, names.pop("clusters")) > 0.9
    assert [len(text.splitlines()) for text in printed] == [24, 0, 1]
    assert len(names["stability"]) == 240 and names["stability"].mean() > 0.9
    tried = pd.DataFrame(names["search"].cv_results_)
    assert len(tried) == 8 and tried["mean_test_score"].between(0, 1).all()
    assert names["search"].best_params_.keys() == {"tspclustering__entropy_weight",
                                                   "tspclustering__n_neighbors"}


def test_every_target_that_a_page_names_exists():
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"reproduce", "test", "help", "bench", "notebooks"} <= set(commands_of(README))
    for name, text in PAGES.items():
        assert set(commands_of(text)) <= made, name


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_somewhere(name):
    """Files exist, sections are headed so, addresses elsewhere are whole."""
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[^\s)]*)?", link), link
            continue
        path, _, section = link.partition("#")
        to = (ROOT / name).parent / path if path else ROOT / name
        assert to.exists(), f"{link} is linked and not there"
        if section:
            text = to.read_text("utf-8")
            if to.suffix == ".ipynb":
                text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]
                                 if cell["cell_type"] == "markdown")
            titles = re.findall(r"^#+ (.+)$", text, re.M)
            assert section in map(anchor, titles), f"{link}: no such section"


def commands_of(text: str) -> list[str]:
    """The targets that a text tells one to make: in code, or first on an indented line."""
    return re.findall(r"(?:`|^    )make ([a-z-]+)\b", text, re.M)


def anchor(title: str) -> str:
    """How GitHub names a section: lower case, no punctuation, dashes for blanks."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_times_of_notebooks_are_those_of_their_metadata():
    """One place says how long a notebook takes; its head and this table repeat it."""
    def said(seconds):
        return f"{seconds} s" if seconds <= 200 else f"{round(seconds / 60)} min"

    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        seconds = notebook["metadata"]["tsp"]["seconds"]
        row = re.search(rf"^\| \[{path.stem}\].*$", PAGES["docs/profiles.md"], re.M)[0]
        assert row.endswith(f"| {seconds['offline']} s | {said(seconds['small'])} |"), row
        head = "".join(notebook["cells"][0]["source"])
        assert f"{seconds['offline']} s in `offline` and {said(seconds['small'])} in" in head


@pytest.mark.parametrize("name, most", [("README.md", 700), ("docs/your_own_images.md", 900)])
def test_pages_that_are_read_first_are_short(name, most):
    assert len(PAGES[name].split()) <= most  # as wc -w counts, tables included


def test_the_readme_s_table_is_of_the_committed_ones_and_of_the_paper():
    def ours(name, **where):
        table = figure(name)
        (row,) = table[(table[list(where)] == pd.Series(where)).all(axis=1)].to_dict("records")
        return row

    def cell(mean, std=None):
        return f"{mean:.1f}" + ("" if std is None or pd.isna(std) else f" ± {std:.1f}")

    def of(row, *names):
        assert row.get("n_seeds", row.get("n")) == 10
        return cell(*(row[name] for name in names or ("acc_mean", "acc_std")))

    published = pd.read_csv(ROOT / "tsp_utils" / "study" / "published.csv")
    published = published.query("table == 'Table 1' and dataset == 'cifar10'").set_index("method")
    paper = {name: cell(row.acc, row.acc_std) for name, row in published.iterrows()}
    tested = {"backbone": "patch_kmeans", "scored": "test"}
    heads = {"backbone": "patch_kmeans", "dataset": "cifar10"}
    best = ours("offline/11_gain", kind="real", dataset="cifar10",
                backbone="resnet_contrast_cifar10")
    wanted = [
        ("K-means on pixels", of(ours("small/03_kmeans_pixels", scored="test",
                                      pixels="mean-norm")), paper["K-means"]),
        ("K-means on features", of(ours("small/table1", method="k-means", **tested)),
         paper["TSP K-means"]),
        ("TSP head on them", of(ours("small/table1", method="head", **tested)), paper["TSP-ViT1"]),
        ("SCAN's loss on them", of(ours("small/heads", method="scan", **heads)), paper["SCAN"]),
        ("NNM's loss on them", of(ours("small/heads", method="nnm", **heads)), paper["NNM"]),
        ("linear layer, with labels", cell(ours("small/10_probes", **heads)["acc"]),
         paper["supervised"]),
        ("our best bundled features, K-means", of(best, "k-means_mean", "k-means_std"), "none"),
        ("our best bundled features, TSP head", of(best, "head_mean", "head_std"), "none"),
    ]
    table = re.search(r"^\| CIFAR-10.*?\n\n", README, re.M | re.S)[0].splitlines()
    assert table[2:-1] == [f"| {' | '.join(row)} |" for row in wanted]
    assert f"(TSP's then: {ours('small/heads', method='tsp', **heads)['acc_mean']:.1f})" in README


@pytest.mark.parametrize("name", PROSE)
def test_sentences_are_short_and_carry_three_numbers_at_most(name):
    sentences = sentences_of(PAGES[name])
    assert len(sentences) > 20 and not [s for s in sentences if too_long(s)]


def test_the_index_lists_every_page():
    linked = set(re.findall(r"\]\((\w+\.md)\)", PAGES["docs/README.md"]))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_picture_and_the_film_are_of_one_run_and_small():
    curve = pd.read_csv(ROOT / "docs" / "hero.csv")
    svg = (ROOT / "docs" / "hero.svg").read_text(encoding="utf-8")
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    said = " ".join(text.text for text in texts)
    assert f"{curve['acc'].iloc[-1]:.0f} % of 2,000 Fashion-MNIST images" in said
    assert "prefers-color-scheme: dark" in svg and len(svg) < 200_000
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    assert min(map(int, re.findall(r"font(?:-size)?: (\d+)px", svg))) >= 11
    with Image.open(ROOT / "docs" / "hero.gif") as film:
        assert film.n_frames >= 30 and film.size == (700, 380)
    assert (ROOT / "docs" / "hero.gif").stat().st_size < 3e6
    falls = curve["loss"].iloc[0] > curve["loss"].iloc[-1]  # as the README says of the film
    assert falls and curve["acc"][:20].min() < curve["acc"][0] < curve["acc"].iloc[-1]


def test_the_tables_of_stability_and_of_backbones_are_the_records():
    """And what it says of them: votes agree more often but once, stable images are put alike."""
    rows, good, split, gained = shipped_records("stability"), [], [], []
    assert [row["kind"] for row in rows] == ["tuned"] * 5 + ["fresh"] * 4
    assert {row["code"] for row in rows} == {code_of_a_cell()}
    for r in rows:
        best, votes = (np.mean(r[name]["four_fifths"]) for name in ("best", "all"))
        stable, others = (np.sum(r["kept"][name], 0) for name in ("stable", "others"))
        shares = f"{100 * stable[0] / stable[1]:.1f} | {100 * others[0] / others[1]:.1f} |"
        name = f"{r['dataset']}, `{r['backbone']}`{', *fresh*' * (r['kind'] == 'fresh')}"
        row = f"| {name} | {r['consistency']:.1f} | {best:.1f} | {votes:.1f} | {shares}"
        assert row in MEASURED
        split.append([100 * stable[0] / stable[1], 100 * others[0] / others[1]])
        assert stable[0] / stable[1] > max(0.9, others[0] / others[1])
        gained.append(votes - best)
        assert abs(np.mean(r["all"]["acc"]) - np.mean(r["best"]["acc"])) < 2
        good += [votes] if r["consistency"] >= 60 else []
    assert len(good) == 6 and min(good) >= 90 and "All six of these sets reach it." in MEASURED
    assert min(gained[:-1]) > 0 and f"{-gained[-1]:.1f} points less often on the last" in MEASURED
    (least, lower), (most, upper) = np.min(split, 0), np.max(split, 0)
    assert f"put {least:.1f} to {most:.1f} % of the stable images alike" in GUIDE
    assert f"Of the others it was {lower:.1f} to {upper:.1f} %" in GUIDE
    kinds: dict = {}
    for r in shipped_records("kinds_of_images"):
        kinds.setdefault((r["kind"], r["n"], r["n_clusters"]), []).append(
            f"{np.mean(r['head']['acc']):.1f} ± {np.std(r['head']['acc'], ddof=1):.1f}")
        assert r["code"] == code_of_a_kind()
    for (kind, n, n_clusters), cells in kinds.items():
        assert f"| {kind} | {n:,}, {n_clusters} | {' | '.join(cells)} |" in MEASURED
