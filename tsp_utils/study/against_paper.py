"""Ours against the paper's numbers, stage by stage, as Welch intervals of the difference."""

import json
import math

import pandas as pd
from scipy import stats

from tsp_utils.study.published import TABLE_1
from tsp_utils.study.training import code_of_heads, summarise

ROWS = {
    "K-means": {"dino_vits16": "TSP K-means"},  # the paper does not say of which backbone it is
    "head": {"dino_resnet50": "TSP-ResNet", "dino_vits16": "TSP-ViT1", "dino_vitb16": "TSP-ViT2"},
}


def welch_interval(mean, std, n, other_mean, other_std, other_n, level=0.95):
    """Difference of two means and its Welch interval: (difference, low, high)."""
    a, b = std**2 / n, other_std**2 / other_n
    df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (other_n - 1)) if a + b else math.inf
    half = stats.t.ppf((1 + level) / 2, df) * math.sqrt(a + b)
    return mean - other_mean, mean - other_mean - half, mean - other_mean + half


def table_1(study) -> pd.DataFrame:
    """Mean and deviation of K-means and heads, every pair, from the run's records alone.

    Raises FileNotFoundError where a pair has no record of this study's settings, ValueError where
    it only has one of other library sources; both name the pairs.
    """
    newest, stale, code = {}, set(), code_of_heads(study)
    for path in sorted((study.run_dir / "records").glob("*.json")):
        record = json.loads(path.read_text())
        settings = record["settings"]
        if any(settings[key] != value for key, value in vars(study).items() if key in settings):
            continue
        pair = settings["dataset"], settings["backbone"]
        if record.get("code") != code:
            stale.add(pair)
        elif pair not in newest or settings["n"] > newest[pair]["settings"]["n"]:
            newest[pair] = record  # all images, not the ten thousand of the ablations
    missing = [pair for pair in study.head_cells() if pair not in newest]
    again = f"run make reproduce PROFILE={study.profile.partition('+')[0]}"
    if old := [" on ".join(pair[::-1]) for pair in missing if pair in stale]:
        raise ValueError(f"The records of {', '.join(old)} are of other library sources; {again} "
                         f"again.")
    if missing:
        raise FileNotFoundError(f"There is no record of {missing[0][1]} on {missing[0][0]} with "
                                f"the settings of {study.profile}; {again} first.")
    return summarise(pd.concat([pd.DataFrame(newest[pair]["metrics"])
                                for pair in study.head_cells()]))


def compare(study) -> pd.DataFrame:
    """Ours less the paper's ACC, in points: K-means, then heads, where the paper has a row.

    `outside` says that the 95 % interval lies wholly beyond one point. Where K-means agrees and
    the head does not, the departure is in the head; where K-means already departs, before it.
    """
    ours, rows = table_1(study).query("scored == 'test'"), []
    for stage, paper_names in ROWS.items():
        for row in ours[ours["method"] == stage.lower()].itertuples():
            name = paper_names.get(row.backbone), row.dataset
            for paper in (p for p in TABLE_1 if (p.method, p.dataset) == name):
                difference, low, high = welch_interval(
                    row.acc_mean, row.acc_std, row.n, paper.acc, paper.acc_std, paper.n)
                rows.append((stage, row.dataset, row.backbone, row.protocol, row.acc_mean,
                             row.acc_std, row.n, paper.acc, paper.acc_std, difference, low, high,
                             bool(low > 1 or high < -1)))
    return pd.DataFrame(rows, columns=["stage", "target", "backbone", "protocol", "ours",
                                       "ours_std", "n", "paper", "paper_std", "difference", "low",
                                       "high", "outside"])
