"""The README and the guide say what the figures say, and name commands that exist."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "your_own_images.md").read_text(encoding="utf-8")


def figure(name: str) -> pd.DataFrame:
    return pd.read_csv(FIGURES / f"{name}.csv")


@pytest.mark.parametrize("profile", ["offline", "small"])
def test_results_are_those_of_the_committed_tables(profile):
    table = figure(f"{profile}/03_table1").query("scored == 'test'")
    for (dataset, backbone), rows in table.groupby(["dataset", "backbone"], sort=False):
        by_method = rows.set_index("method")
        cells = [f"{r.acc_mean:.1f} ± {r.acc_std:.1f} | {r.nmi_mean:.1f} | {r.ari_mean:.1f}"
                 for r in (by_method.loc["k-means"], by_method.loc["head"])]
        assert f"| `{profile}` | {dataset} | `{backbone}` | {' | '.join(cells)} |" in README
    assert (table["n"] == 10).all()


def test_the_paper_s_first_row_beside_k_means_on_pixels():
    for r in figure("small/03_kmeans_pixels").query("scored == 'train'").itertuples():
        assert f"{r.acc_mean:.1f} ± {r.acc_std:.1f} / {r.nmi_mean:.1f} / {r.ari_mean:.1f}" in README
        assert abs(r.acc_mean - 22.9) < 2.5 and abs(r.nmi_mean - 8.7) < 2.5


def test_tables_are_the_committed_ones_and_the_ledger_decides_seven_claims():
    for mark, name in (("heads", "offline/heads"), ("icbpl", "small/claims_icbpl"),
                       ("ledger", "small/claims")):
        text = README.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()
        assert text == (FIGURES / f"{name}.md").read_text("utf-8").strip()
    claims = figure("small/claims")
    assert list(claims["id"]) == [f"C{i}" for i in range(13)]
    assert claims["verdict"].isin(["holds", "does not hold"]).sum() >= 7
    for row in claims.itertuples():
        assert f"**{row.verdict}**" in re.search(rf"^\| {row.id}\. .*$", text, re.M)[0]


def test_the_comparison_of_heads_is_as_wide_as_the_readme_says():
    table = figure("offline/heads")
    assert table["method"].nunique() >= 14 and len(table.groupby(["dataset", "backbone"])) == 4
    acc = figure("small/heads").query("backbone == 'patch_kmeans' and method in "
                                      "['pica', 'nnm', 'cc', 'tsp', 'scan', 'iic']")["acc_mean"]
    assert f"between {acc.min():.1f} and {acc.max():.1f}" in README


def test_the_guide_s_figures_are_notebook_09_s():
    def stands(line: str) -> bool:
        return re.search(line, GUIDE, re.M) is not None

    for r in figure("offline/09_numbers").to_dict("records"):
        assert stands(rf"^\| {r['clusters']}\b.*\| {r['largest']}, {r['smallest']} \| "
                      rf"{r['mean probability']:.0f} % \| {r['nmi']:.1f} \| {r['ari']:.1f} \|$"), r
    uneven = figure("offline/09_uneven").dropna()  # the last row is the classes themselves
    for r in uneven.to_dict("records"):
        assert stands(rf"^\| {r['entropy_weight']:g}\b.*\| {r['largest']}, {r['smallest']} \| "
                      rf"{r['nmi']:.1f} \| {r['ari']:.1f} \|$"), r
    for r in figure("offline/09_few").to_dict("records"):
        assert stands(rf"{r['acc']:.1f} to {r['k-means acc mean']:.1f}\s+with\s+"
                      rf"{r['images']:,g}\b"), r


def test_every_target_and_file_it_names_exists():
    targets = set(re.findall(r"make ([a-z-]+)\b", README)) - {"sure"}
    assert {"reproduce", "test", "help", "bench", "notebooks"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
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
