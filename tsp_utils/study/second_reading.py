"""A second reading of the evidence, by interval and power, beside the verdicts; docs/rules.md.

Power comes from simulated rungs (`rungs`), whose records ship: from which quality of features on a
claim about the head would be seen to hold.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from tsp_utils.files.paths import shipped_records
from tsp_utils.study.claims import claim_of
from tsp_utils.study.verdicts import t_interval

# The setting of the head that a claim compares with the study's; None: with its own start.
COMPARED = {"C3": None, "C8": "random start", "C10": "one hidden layer", "C12": "uniform weights"}
DRAWS, OFTEN = 1000, 0.8  # draws of ten pairs; the share of them in which a claim has to hold


def power_curves() -> pd.DataFrame:
    """How often each claim of COMPARED holds on each simulated rung of CIFAR-10's `patch_kmeans`.

    Columns claim, law, consistency (@20, percent) and share: of DRAWS draws of ten pairs, with
    replacement, from the rung's ten seeds. By ACC alone: the records have no NMI and no ARI.
    """
    records = pd.DataFrame(shipped_records("quality"))
    records["law"] = records["backbone"].str.extract(r"^simulated_([a-z]+)_.*_patch_kmeans$")
    simulated = records[(records["dataset"] == "cifar10") & records["law"].notna()]
    rungs = {setting: rows.set_index("backbone") for setting, rows in simulated.groupby("setting")}
    drawn = np.random.default_rng(0).integers(10, size=(DRAWS, 10))
    found = []
    for claim, setting in COMPARED.items():
        for name, rung in rungs["the study's"].iterrows():
            other = rung["k-means"] if setting is None else rungs[setting].loc[name, "head"]
            pairs = (np.array(rung["head"]["acc"]) - other["acc"])[drawn]  # [DRAWS, 10]
            low = stats.ttest_1samp(pairs, 0, axis=1).confidence_interval().low  # as `t_interval`
            holds = (low > 0) & (pairs.mean(1) >= claim_of(claim).margin)
            found.append((claim, rung["law"], rung["consistency"], holds.mean()))
    return pd.DataFrame(found, columns=["claim", "law", "consistency", "share"])


def power_of(curves: pd.DataFrame) -> dict[str, float]:
    """claim -> the consistency from which on it holds OFTEN under both laws; NaN for none.

    Where it holds on every rung, that of the poorer end of the ladder: its power lies below.
    """
    found = {}
    for claim, rows in curves.groupby("claim", sort=False):
        starts = []
        for _, law in rows.groupby("law"):
            law = law.sort_values("consistency", ascending=False)
            kept = law["consistency"][(law["share"] >= OFTEN).cummin()]
            starts.append(kept.min())  # NaN where not even the best rung shows it
        found[claim] = float(np.max(starts))
    return found


def reading(cell) -> str:
    """What an `Evidence` says by its interval, in the words of the table in docs/rules.md.

    C9, which claims equivalence, keeps its verdict; C7 holds only if label consistency falls, too.
    """
    if cell.by_k is not None or cell.verdict.verdict == "not tested":
        return cell.verdict.verdict
    margin = claim_of(cell.claim).margin
    mean, low, high = cell.verdict.mean, cell.verdict.low, cell.verdict.high
    if low > 0 and mean >= margin:
        also = cell.falls is None or t_interval(cell.falls)[1] > 0
        found = "holds" if also else "undecided"
    elif low > 0 and high < margin:
        found = "right direction, below the margin"
    elif high < 0:
        found = "reversed"
    else:
        return "no effect" if -margin < low and high < margin else "undecided"
    sign = -1 if high < 0 else 1
    ends = [t_interval(sign * np.array(d))[2] for d in (cell.nmi, cell.ari) if d is not None]
    return "undecided" if min(ends, default=0) < 0 else found


def second_reading(cells: Sequence) -> pd.DataFrame:
    """One row a cell of `Evidence`: verdict, reading, its features' label consistency, its power.

    note: "below its power", or "holds on no rung" where a claim has none; "" where neither counts,
    where the features are not on the ladder, and where every rung shows the claim.
    """
    records = pd.DataFrame(shipped_records("quality"))
    real = records[records["setting"] == "the study's"].set_index(["dataset", "backbone"])
    curves = power_curves()
    power, feet = power_of(curves), curves.groupby(["claim", "law"])["consistency"].min()
    rows = []
    for cell in cells:
        found, needed = reading(cell), power.get(cell.claim, np.nan)
        quality = float(real["consistency"].get((cell.target, cell.backbone), np.nan))
        note = ""
        if cell.claim in power and found not in ("holds", "reversed", "not tested"):
            note = ("holds on no rung" if np.isnan(needed) else
                    "below its power" if quality < needed > feet[cell.claim].max() else "")
        rows.append({
            "id": cell.claim, "cell": cell.cell, "backbone": cell.backbone, "target": cell.target,
            "mean": cell.verdict.mean, "low": cell.verdict.low, "high": cell.verdict.high,
            "margin": claim_of(cell.claim).margin, "verdict": cell.verdict.verdict,
            "reading": found, "consistency": quality, "power": needed, "note": note})
    return pd.DataFrame(rows)
