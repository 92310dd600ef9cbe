"""The README and the guide say what the figures say, and name commands that exist."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "your_own_images.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("profile", ["offline", "small"])
def test_results_are_those_of_the_committed_tables(profile):
    table = pd.read_csv(ROOT / "figures" / profile / "03_table1.csv").query("scored == 'test'")
    for (dataset, backbone), rows in table.groupby(["dataset", "backbone"], sort=False):
        by_method = rows.set_index("method")
        cells = [f"{r.acc_mean:.1f} ± {r.acc_std:.1f} | {r.nmi_mean:.1f} | {r.ari_mean:.1f}"
                 for r in (by_method.loc["k-means"], by_method.loc["head"])]
        line = f"| `{profile}` | {dataset} | `{backbone}` | {' | '.join(cells)} |"
        assert line in README, f"the README lacks: {line}"
    assert (table["n"] == 10).all()


def test_the_paper_s_first_row_beside_k_means_on_pixels():
    table = pd.read_csv(ROOT / "figures" / "small" / "03_kmeans_pixels.csv")
    for r in table.query("scored == 'train'").itertuples():
        figures = f"{r.acc_mean:.1f} ± {r.acc_std:.1f} / {r.nmi_mean:.1f} / {r.ari_mean:.1f}"
        assert figures in README, f"the README lacks {figures} ({r.pixels} pixels)"
        assert abs(r.acc_mean - 22.9) < 2.5 and abs(r.nmi_mean - 8.7) < 2.5


def test_the_ledger_is_the_committed_one_and_decides_seven_claims():
    text = README.split("<!-- ledger -->")[1].split("<!-- /ledger -->")[0].strip()
    assert text == (ROOT / "figures" / "small" / "claims.md").read_text(encoding="utf-8").strip()
    claims = pd.read_csv(ROOT / "figures" / "small" / "claims.csv")
    assert list(claims["id"]) == [f"C{i}" for i in range(13)]
    assert claims["verdict"].isin(["holds", "does not hold"]).sum() >= 7
    for row in claims.itertuples():  # the page says what the table says
        assert f"| {row.id}. " in text and f"**{row.verdict}**" in text.split(f"| {row.id}. ")[1]


def test_the_tables_of_the_heads_and_of_icbpl_are_the_committed_ones():
    for mark, name in (("heads", "offline/heads"), ("icbpl", "small/claims_icbpl")):
        text = README.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()
        assert text == (ROOT / "figures" / f"{name}.md").read_text("utf-8").strip()
    table = pd.read_csv(ROOT / "figures" / "offline" / "heads.csv")
    assert table["method"].nunique() >= 14
    assert len(table.groupby(["dataset", "backbone"])) == 4
    small = pd.read_csv(ROOT / "figures" / "small" / "heads.csv").set_index("backbone")
    six = small.loc["patch_kmeans"].query("method in ['pica', 'nnm', 'cc', 'tsp', 'scan', 'iic']")
    assert f"between {six['acc_mean'].min():.1f} and {six['acc_mean'].max():.1f}" in README


def test_the_guide_s_figures_are_notebook_09_s():
    numbers, uneven, few = (pd.read_csv(ROOT / "figures" / "offline" / f"09_{name}.csv")
                            for name in ("numbers", "uneven", "few"))
    for r in numbers.to_dict("records"):
        assert re.search(rf"^\| {r['clusters']}\b.*\| {r['largest']}, {r['smallest']} \| "
                         rf"{r['mean probability']:.0f} % \| {r['nmi']:.1f} \| {r['ari']:.1f} \|$",
                         GUIDE, re.M), r
    for r in uneven.dropna().to_dict("records"):  # the last row is the classes themselves
        assert re.search(rf"^\| {r['entropy_weight']:g}\b.*\| {r['largest']}, {r['smallest']} \| "
                         rf"{r['nmi']:.1f} \| {r['ari']:.1f} \|$", GUIDE, re.M), r
    for r in few.to_dict("records"):
        figures = f"{r['acc']:.1f} to {r['k-means acc mean']:.1f}"
        assert re.search(rf"{figures}\s+with\s+{r['images']:,g}\b", GUIDE), r


def test_every_target_and_file_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)\b", README)) - {"sure"}
    assert {"reproduce", "test", "help", "bench", "notebooks"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target} is no target"
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), f"{path} is linked and not there"


def test_times_of_notebooks_are_those_of_their_metadata():
    """One place says how long a notebook takes; its head and this table repeat it."""
    def said(seconds):
        return f"{seconds} s" if seconds <= 200 else f"{round(seconds / 60)} min"

    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        seconds = notebook["metadata"]["tsp"]["seconds"]
        row = re.search(rf"^\| \[{path.stem}\].*$", README, re.M)[0]
        assert row.endswith(f"| {seconds['offline']} s | {said(seconds['small'])} |"), row
        head = "".join(notebook["cells"][0]["source"])
        assert f"{seconds['offline']} s in `offline` and {said(seconds['small'])} in" in head
