"""The ledger: every verdict can change with the evidence, and mixed evidence is refused."""

from dataclasses import replace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tsp_utils.study import staleness
from tsp_utils.study.claims import CLAIMS, ICBPL_CLAIMS, claim_of
from tsp_utils.study.figures import plot_ledger
from tsp_utils.study.ledger import Evidence, ledger, read_evidence, save_evidence, to_markdown
from tsp_utils.study.profile import load_study
from tsp_utils.study.verdicts import COMPARED_K, holm

NOISE = np.array([-1.0, -0.5, 0.0, 0.5, 1.0] * 2)


def cell(claim: str, wanted: str = "holds", name: str = "", **changes) -> Evidence:
    """Evidence of a claim that has to lead to the verdict wanted."""
    m = claim_of(claim).margin
    d, of_k = {"holds": (m + 2 + NOISE, 0.0), "does not hold": (m - 3 + NOISE, 4.0), "inconclusive":
               (m + (3 * m + 5) * NOISE, 1.9), "not tested": (NOISE, 0.0)}[wanted]
    found = dict.fromkeys(("acc", "nmi", "ari"), tuple(d))
    if wanted == "not tested":
        found = dict(unmet="no such network")
    elif claim == "C9":
        found = dict(by_k={k: tuple(of_k + NOISE) for k in COMPARED_K})
    elif claim == "C7":
        found["falls"] = tuple(5 + NOISE)
    return Evidence(**dict(claim=claim, cell=name, backbone="vit", target="cifar10", n_pretrain=1,
                           protocol="split", n_head=10) | found | changes)


@pytest.mark.parametrize("verdict", ["holds", "does not hold", "inconclusive", "not tested"])
@pytest.mark.parametrize("claim", [claim.id for claim in (*CLAIMS, *ICBPL_CLAIMS)])
def test_every_claim_can_reach_every_verdict(claim, verdict):
    claims = CLAIMS if claim.startswith("C") else ICBPL_CLAIMS
    cells = [cell(claim, verdict)] * (2 if claim in ("C0", "C1") else 1)  # those want two
    table = ledger(cells, claims)
    aside = [cell(claim, other, decides=False) for other in ("holds", "does not hold")]
    pd.testing.assert_frame_equal(ledger([*aside, *cells], claims), table)  # they decide nothing
    assert list(table["id"]) == [c.id for c in claims]
    assert list(table.loc[table["id"] == claim, "verdict"]) == [verdict]
    others = table[table["id"] != claim]
    assert (others["verdict"] == "not tested").all() and (others["qualifier"] != "").all()


def combined(claim: str, *cells: Evidence):
    return claim_of(claim).combine(cells)


@pytest.mark.parametrize(("inner", "cosine", "expected"), [
    ("holds", "holds", "holds"), ("holds", "inconclusive", "inconclusive"),
    ("holds", "does not hold", "does not hold"), ("not tested", "not tested", "not tested"),
    ("holds", "not tested", "not tested"), ("not tested", "holds", "not tested"),
    ("not tested", "does not hold", "does not hold"), ("holds", None, "not tested")])
def test_c1_wants_both_metrics(inner, cosine, expected):
    cells = [cell("C1", verdict) for verdict in (inner, cosine) if verdict]
    assert combined("C1", *cells).verdict == expected


@pytest.mark.parametrize(("verdicts", "expected"), [
    (["holds", "holds", "inconclusive"], "holds"),
    (["holds", "inconclusive", "inconclusive"], "inconclusive"),
    (["holds", "small gain", "small gain"], "does not hold"),
    (["holds", "holds", "does not hold"], "does not hold")])  # reversed in one
def test_c3_wants_a_majority_and_no_reversal(verdicts, expected):
    small = tuple(0.5 + 0.1 * NOISE)  # above 0 and below the margin: lost, and not reversed
    found = combined("C3", *(cell("C3", acc=small, nmi=small, ari=small) if v == "small gain"
                             else cell("C3", v) for v in verdicts))
    assert found.verdict == expected and "of 3 cells" in found.qualifier


def test_c6_is_decided_at_equal_images_and_says_when_the_budget_turns_it():
    epochs = cell("C6", name="epochs")
    found = combined("C6", cell("C6", "does not hold", "images"), epochs)
    assert found.verdict == "does not hold"
    assert "depends on budget" in found.qualifier and "pair of networks" in found.qualifier
    same = combined("C6", cell("C6", name="images"), epochs)
    assert same.verdict == "holds" and "depends on budget" not in same.qualifier


def test_c7_wants_both_rates_or_says_which_and_consistency_has_to_fall():
    first = cell("C7", name="1e-4")
    both = combined("C7", first, cell("C7", name="1e-5"))
    assert both.verdict == "holds" and "only" not in both.qualifier
    one = combined("C7", first, cell("C7", "inconclusive", "1e-5"))
    assert one.verdict == "holds" and "at 1e-4 only" in one.qualifier
    rises = cell("C7", falls=tuple(-5 + NOISE))
    assert rises.verdict.verdict == "does not hold" and "does not" in rises.verdict.qualifier
    assert cell("C7", falls=tuple(5 * NOISE)).verdict.verdict == "inconclusive"
    assert combined("C7", rises, rises).verdict == "does not hold"
    lent = combined("D1", cell("D1", "does not hold", "1e-4"), cell("D1", name="1e-5"))
    assert (lent.qualifier, lent.mean) == ("at 1e-5 only", cell("D1").verdict.mean)


@pytest.fixture
def study(own_folders, tmp_path, monkeypatch):
    """A study with notebooks 04, 05 and 10."""
    monkeypatch.setattr(staleness, "NOTEBOOKS", tmp_path)
    for number in ("04", "05", "10"):
        nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), tmp_path / f"{number}_x.ipynb")
    return load_study("tiny")


def test_evidence_comes_back_as_it_was_left_with_holm_over_its_cells(study):
    cells = [cell("C9"), cell("C7", name="1e-4"), cell("C2", interval=(3.0, 4.0))]
    table = save_evidence(study, "04", cells)
    found = read_evidence(study)
    assert [c.claim for c in found] == ["C2", "C7", "C9"]
    assert {c.claim: c.verdict for c in found} == {c.claim: c.verdict for c in cells}
    assert list(table["id"]) == ["C9", "C7", "C2"] and (table["p_holm"] > table["p"]).any()
    np.testing.assert_array_equal(table["p_holm"], holm(table["p"]))
    pd.testing.assert_frame_equal(ledger(found), ledger(cells))
    save_evidence(study, "10", [cell("D2")])  # a later notebook's: read apart
    assert [c.claim for c in read_evidence(study)] == ["C2", "C7", "C9"]
    assert [c.claim for c in read_evidence(study, ICBPL_CLAIMS)] == ["D2"]


def test_a_notebooks_calls_add_up_and_a_cell_run_again_changes_nothing(study):
    """A notebook's first call for a claim has its first cell, whichever of them runs again."""
    for _ in range(2):
        save_evidence(study, "04", [cell("C6", name="images"), cell("C6", name="epochs")])
        save_evidence(study, "04", [cell("C6", name="dictionaries"), cell("C12")])
    save_evidence(study, "04", [cell("C6", "does not hold", name="images")])
    found = read_evidence(study)
    assert [c.cell for c in found] == ["images", "epochs", "dictionaries", ""]
    assert ledger(found).set_index("id").loc["C6", "verdict"] == "does not hold"
    save_evidence(study, "05", [cell("C6", name="another notebook's")])
    assert [c.cell for c in read_evidence(study)][-2:] == ["another notebook's", ""]
    # C3's cells are the networks and targets, and the strongest K-means may be the same one.
    save_evidence(study, "04", [cell("C3", name="head - K-means", backbone=b, target=t)
                                for b in ("vit", "resnet") for t in ("cifar10", "stl10")])
    assert len([c for c in read_evidence(study) if c.claim == "C3"]) == 4
    with pytest.raises(ValueError, match=r"same name \(04_C6_at-1_vit_cifar10, .*\); name each by"):
        save_evidence(study, "04", [cell("C6", name="at 1"), cell("C6", name="at, 1")])


def refused(study, *files):
    """`read_evidence` names these files, and what makes them anew."""
    with pytest.raises(ValueError, match=rf"in tiny: {', '.join(files)}; run make reproduce "
                                         r"PROFILE=tiny again\.$"):
        read_evidence(study)


def test_evidence_of_other_settings_or_of_no_notebook_is_named_and_refused(study, monkeypatch):
    with pytest.raises(FileNotFoundError, match="run make reproduce PROFILE=tiny first"):
        read_evidence(study)
    with pytest.raises(ValueError, match=r"There is no notebook 07 in .*; pass the number"):
        save_evidence(study, "07", [cell("C4")])
    with pytest.raises(ValueError, match="'C99' is not known; the nearest one is 'C9'"):
        claim_of("C99")
    for is_clone in (True, False):  # in Colab, say, no hash of a notebook tells
        monkeypatch.setattr("tsp_utils.study.ledger.IS_CLONE", is_clone)
        save_evidence(study, "04", [cell("C9")])
        save_evidence(replace(study, n_seeds=3), "05", [cell("C8")])
        refused(study, r"05_C8_vit_cifar10\.json")


def test_evidence_of_a_notebook_that_changed_is_refused_until_it_leaves_it_anew(study, monkeypatch):
    save_evidence(study, "04", [cell("C9"), cell("C12", name="dropped later")])
    save_evidence(study, "05", [cell("C8")])
    path = staleness.NOTEBOOKS / "04_x.ipynb"
    path.write_text(path.read_text().replace("1 + 1", "1 + 2"))
    refused(study, r"04_C12_dropped-later_vit_cifar10\.json", r"04_C9_vit_cifar10\.json")
    save_evidence(study, "04", [cell("C9")])
    assert [c.claim for c in read_evidence(study)] == ["C8", "C9"]
    monkeypatch.setattr(staleness, "code_called_by", lambda source: "another loss")
    refused(study, r"04_C9_.*\.json", r"05_C8_.*\.json")


def test_markdown_and_figure_show_every_claim_its_scope_and_a_cap_by_another_metric():
    table = ledger([cell("C8"), cell("C10", "inconclusive"), cell("C12", "does not hold"),
                    cell("C3", backbone="dino_vits16", ari=tuple(-0.1 + 0.1 * NOISE))])
    text, row = to_markdown(table), table.set_index("id").loc["C3"]
    assert text.count("\n") == len(CLAIMS) + 2
    assert "| 1 x 10 | +4.00 [+3.47, +4.53] |" in text and "**not tested**" in text
    assert row["verdict"] == "inconclusive" and "ARI pointing the other way" in row["qualifier"]
    # The paper's own networks are the same claim.
    assert (row["scope"], table.set_index("id").loc["C12", "scope"]) == (
        "same claim", "analogue at 32 px")
    plot_ledger(table, ax := plt.figure().gca(), {"C3": 99.0, "C8": -99.0})
    plt.close("all")
    assert [label.get_text().split()[-1] for label in ax.get_yticklabels()] == [
        c.id for c in CLAIMS]
    assert ("inconclusive; ViT-S/16, CIFAR-10; ARI pointing the other way"
            in [t.get_text() for t in ax.texts])
    assert {"paper 99 \u2192", "paper -99 \u2190"} <= {t.get_text() for t in ax.texts}
