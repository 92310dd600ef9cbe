"""The second reading: words by hand, power against `decide` itself, and what is below it."""

import numpy as np
import pandas as pd
import pytest

from tsp_utils import decide
from tsp_utils.files.paths import shipped_records
from tsp_utils.study.ledger import Evidence
from tsp_utils.study.second_reading import COMPARED, power_curves, power_of, reading, second_reading


def cell(*acc, claim="C3", target="cifar10", **more) -> Evidence:
    return Evidence(claim, "by hand", "patch_kmeans", target, "all", 1, len(acc), acc=acc, **more)


# Ten pairs, nine times a and once b: the mean is a + (b - a) / 10, the half-interval 2.262 |b - a|
# / 10. C3's margin is 2.
@pytest.mark.parametrize("a, b, said", [
    (3.0, 3.5, "holds"), (1.0, 1.2, "right direction, below the margin"), (-1.0, -1.2, "reversed"),
    (0.0, 0.5, "no effect"), (0.0, 20.0, "undecided"), (1.7, 3.5, "undecided"),
    (1.9, 2.2, "right direction, below the margin"), (-1.0, -9.0, "undecided")])
def test_an_interval_and_a_margin_in_words(a, b, said):
    assert reading(cell(*[a] * 9, b)) == said


UP, DOWN, UNSURE, NO_EFFECT = ((*[a] * 9, b) for a, b in (
    (3.0, 3.5), (-1.0, -1.2), (-1.0, 8.0), (0.0, 0.5)))
FALLS = (*[9.0] * 4, 9.5)


@pytest.mark.parametrize("acc, more, said", [
    (UP, dict(nmi=UNSURE, ari=UNSURE), "holds"), (UP, dict(nmi=UNSURE, ari=DOWN), "undecided"),
    (DOWN, dict(nmi=UP), "undecided"), (NO_EFFECT, dict(nmi=DOWN), "no effect"),
    ((3.0, 3.1), dict(unmet="no network"), "not tested"), ((3.0,), {}, "not tested"),
    (FALLS, dict(claim="C7", falls=(5.0, 5.0, 5.1)), "holds"),
    (FALLS, dict(claim="C7", falls=(0.0, 5.0, -5.0)), "undecided")])
def test_only_an_interval_on_the_other_side_caps_and_c7_asks_for_consistency_too(acc, more, said):
    assert reading(cell(*acc, **more)) == said


def test_power_is_where_a_claim_holds_from_there_on_under_both_laws():
    for shift, moved, power in (
            ((0.9, 0.1, 0.8, 1.0), (0.0, 0.0, 0.9, 0.95), 60),
            ((0.9, 0.1, 0.79, 1.0), (0.0, 0.0, 0.9, 0.95), 70),
            ((0.9, 0.1, 0.79, 1.0), (0.0, 0.0, 0.9, 0.79), np.nan)):
        curves = pd.DataFrame({"claim": "C3", "law": ["shift"] * 4 + ["moved"] * 4,
                               "consistency": [40, 50, 60, 70] * 2, "share": [*shift, *moved]})
        assert power_of(curves) == pytest.approx({"C3": power}, nan_ok=True)


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
        cell(*NO_EFFECT), cell(*DOWN), cell(*NO_EFFECT, claim="C11"),
        cell(*NO_EFFECT, target="nowhere"), cell(*NO_EFFECT, target="fashion-mnist"),
        cell(*NO_EFFECT, claim="C12"), cell(*UP)])
    assert set(COMPARED) == {"C3", "C8", "C10", "C12"}
    assert found["note"].tolist() == [
        "below its power", "", "", "", "", "holds on no rung", ""]
    assert found["consistency"][0] == pytest.approx(38.45) and np.isnan(found["consistency"][3])
    assert found["consistency"][0] < found["power"][0] < found["consistency"][4]
    assert found["power"].isna().tolist() == [False, False, True, False, False, True, False]
    monkeypatch.setattr("tsp_utils.study.second_reading.power_curves", lambda: curves)
    assert second_reading([cell(*NO_EFFECT)])["note"].item() == ""  # every rung shows C3
