"""The second reading: words by hand, power against `decide` itself, and what is below it."""

import numpy as np
import pandas as pd
import pytest

from tsp_utils import decide
from tsp_utils.files.paths import shipped_records
from tsp_utils.study.ledger import Evidence
from tsp_utils.study.second_reading import (
    COMPARED,
    power_curves,
    power_of,
    reading,
    second_reading,
)


def cell(*acc, claim="C3", target="cifar10", **more) -> Evidence:
    return Evidence(claim, "by hand", "patch_kmeans", target, "all", 1, len(acc), acc=acc, **more)


# Ten pairs, nine times a and once b: the mean is a + (b - a) / 10, the half-interval 2.262 |b - a|
# / 10. C3's margin is 2.
@pytest.mark.parametrize("a, b, said", [
    (3.0, 3.5, "holds"), (1.0, 1.2, "right direction, below the margin"), (-1.0, -1.2, "reversed"),
    (0.0, 0.5, "no effect"), (0.0, 20.0, "undecided"), (1.9, 2.2, "right direction, below the "
                                                                  "margin"),
    (1.7, 3.5, "undecided"), (-1.0, -9.0, "undecided")])
def test_an_interval_and_a_margin_in_words(a, b, said):
    assert reading(cell(*[a] * 9, b)) == said


def test_only_an_interval_on_the_other_side_caps():
    up = [3.0] * 9 + [3.5]
    down, unsure = [-1.0] * 9 + [-1.2], [-1.0] * 9 + [8.0]
    assert reading(cell(*up, nmi=tuple(unsure), ari=tuple(unsure))) == "holds"
    assert reading(cell(*up, nmi=tuple(unsure), ari=tuple(down))) == "undecided"
    assert reading(cell(*down, nmi=tuple(up))) == "undecided"
    assert reading(cell(*[0.0] * 9, 0.5, nmi=tuple(down))) == "no effect"


def test_what_was_not_tested_stays_so_and_c7_asks_for_consistency_too():
    assert reading(cell(3.0, 3.1, unmet="no network")) == reading(cell(3.0)) == "not tested"
    falls = [9.0] * 4 + [9.5]
    assert reading(cell(*falls, claim="C7", falls=(5.0, 5.0, 5.1))) == "holds"
    assert reading(cell(*falls, claim="C7", falls=(0.0, 5.0, -5.0))) == "undecided"


def test_power_is_where_a_claim_holds_from_there_on_under_both_laws():
    curves = pd.DataFrame([("C3", law, x, share) for law, shares in {
        "shift": (0.9, 0.1, 0.8, 1.0), "moved": (0.0, 0.0, 0.9, 0.95)}.items()
        for x, share in zip((40, 50, 60, 70), shares, strict=True)],
        columns=["claim", "law", "consistency", "share"])
    assert power_of(curves) == {"C3": 60}
    curves.loc[(curves["law"] == "shift") & (curves["consistency"] == 60), "share"] = 0.79
    assert power_of(curves) == {"C3": 70}
    curves.loc[(curves["law"] == "moved") & (curves["consistency"] == 70), "share"] = 0.79
    assert np.isnan(power_of(curves)["C3"])


def test_the_curves_are_what_decide_says_of_the_same_draws(monkeypatch):
    monkeypatch.setattr("tsp_utils.study.second_reading.DRAWS", 100)
    records = {(r["setting"], r["backbone"]): r for r in shipped_records("quality")
               if r["dataset"] == "cifar10"}
    name = "simulated_shift_1.5_patch_kmeans"
    draws = np.random.default_rng(0).integers(10, size=(100, 10))
    head = np.array(records["the study's", name]["head"]["acc"])
    pairs = {"C3": head - records["the study's", name]["k-means"]["acc"],
             "C8": head - records["random start", name]["head"]["acc"]}
    curves = power_curves().set_index(["claim", "consistency"])["share"]
    for claim, d in pairs.items():
        by_rule = np.mean([decide(d[rows], 2).verdict == "holds" for rows in draws])
        assert curves[claim, records["the study's", name]["consistency"]] == by_rule


def test_what_features_are_too_poor_for_is_said_and_a_reversal_is_not_excused(monkeypatch):
    curves = power_curves()
    poor = curves["consistency"].lt(60) & curves["claim"].eq("C3")
    monkeypatch.setattr("tsp_utils.study.second_reading.power_curves",
                        lambda: curves.assign(share=curves["share"].where(~poor, 0.5)))
    found = second_reading([
        cell(*[0.0] * 9, 0.5), cell(*[-1.0] * 9, -1.2), cell(*[0.0] * 9, 0.5, claim="C11"),
        cell(*[0.0] * 9, 0.5, target="nowhere"), cell(*[0.0] * 9, 0.5, target="fashion-mnist"),
        cell(*[0.0] * 9, 0.5, claim="C12"), cell(*[3.0] * 9, 3.5)])
    assert set(COMPARED) == {"C3", "C8", "C10", "C12"}
    assert found["note"].tolist() == [
        "below its power", "", "", "", "", "holds on no rung", ""]
    assert found["consistency"][0] == pytest.approx(38.45) and np.isnan(found["consistency"][3])
    assert found["consistency"][0] < found["power"][0] < found["consistency"][4]
    assert found["power"].isna().tolist() == [False, False, True, False, False, True, False]
    monkeypatch.setattr("tsp_utils.study.second_reading.power_curves", lambda: curves)
    assert second_reading([cell(*[0.0] * 9, 0.5)])["note"].item() == ""  # every rung shows C3
