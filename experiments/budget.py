"""One budget of training: on which rungs of notebook 11 the loss rests, at which rate, and its ACC.

No label decides: the rule reads the first head's loss alone, as `TSPClustering` does. ACC of ten
seeds at the paper's rate and at the highest is that of notebook 11's records where they have it.
"""

import logging
from dataclasses import replace
from pathlib import Path

from experiments.quality import code_of_a_rung, rungs
from tsp_utils.cache import hardware, versions
from tsp_utils.estimator import RATES, last_fall, rate_for
from tsp_utils.files.paths import bundled_dir, shipped_records, write_lines
from tsp_utils.study.profile import load_study
from tsp_utils.study.training import run_heads

logger = logging.getLogger(__name__)
KNOWN = {"the study's": RATES[0], "rate 1e-3": RATES[-1]}  # settings of notebook 11's records


def late_falls(study, found) -> dict[str, float]:
    """By rate, the share of the first head's fall that comes late; at 3e-4 as evidence alone."""
    return {f"{rate:g}": round(last_fall(run_heads(
        replace(study, learning_rate=rate, n_seeds=1), found, found).curves["loss"]), 4)
        for rate in RATES[:-1]}


def acc_of_heads(study, found, rate: float) -> list[float]:
    """ACC of every seed at a rate, percent: of notebook 11's record, or trained."""
    for record in shipped_records("quality"):
        if KNOWN.get(record["setting"]) == rate and record["n_seeds"] == study.n_seeds and (
                record["fit"], record["code"]) == (found.fingerprint, code_of_a_rung(study)):
            return record["head"]["acc"]
    table = run_heads(replace(study, learning_rate=rate), found, found).table
    return table["acc"][table["method"] == "head"].round(3).tolist()


def read_budget(n_seeds: int = 10) -> Path:
    """Every rung but the labelled ones; returns the path of the records."""
    study = replace(load_study("offline"), profile="budget", n_seeds=n_seeds)
    made: list[dict] = []
    for kind, found in rungs(with_labels=False):
        late = late_falls(study, found)
        made.append({
            "kind": kind, "dataset": found.dataset, "backbone": found.backbone,
            "n": len(found.labels), "n_clusters": found.n_clusters, "protocol": "all",
            "fit": found.fingerprint, "code": code_of_a_rung(study), "late": late,
            "acc": {f"{rate:g}": acc_of_heads(study, found, rate)
                    for rate in sorted({RATES[0], rate_for(late["0.0001"])})},
            "hardware": hardware("cpu"), "versions": versions()})
        logger.info("%s under %s: %s", found.dataset, found.backbone, late)
    return write_lines(bundled_dir() / "readouts" / "budget.json", made)
