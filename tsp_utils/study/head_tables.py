"""The comparison of heads as tables: means, deviations, differences to TSP."""

import pandas as pd

from tsp_utils.study.head_comparison import CONSENSUS
from tsp_utils.study.verdicts import t_interval


def heads_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a feature set and method: mean and standard deviation (n - 1) over the seeds, and the
    difference to TSP with its 95 % interval.

    minus_tsp is paired by seed; the consensus is one clustering, so it is set against the head of
    lowest loss, the interval by a bootstrap over images (`paired_by` says which).
    """
    table = []
    for (dataset, backbone, protocol), cell in rows.groupby(["dataset", "backbone", "protocol"],
                                                           sort=False):
        tsp = cell[cell["method"] == "tsp"].set_index("seed")
        for method, found in cell.groupby("method", sort=False):
            row = dict(dataset=dataset, backbone=backbone, protocol=protocol, method=method)
            first = found.iloc[0]
            if found["acc"].isna().any():
                table.append(row | dict(n=0, not_run=first["not_run"]))
                continue
            row |= {f"{m}_{of}": found[m].agg(of) for m in ("acc", "nmi", "ari")
                    for of in ("mean", "std")}
            row |= dict(n=len(found), n_used=found["n_used"].mean(),
                        learning_rate=first["learning_rate"], sharpness=first["sharpness"])
            if method == CONSENSUS:
                row |= dict(minus_tsp=first["acc"] - first["against"], low=first["against_low"],
                            high=first["against_high"], paired_by="image")
            elif method != "tsp" and len(tsp):
                paired = found.set_index("seed")["acc"] - tsp["acc"]
                row |= dict(zip(("minus_tsp", "low", "high"), t_interval(paired.dropna()),
                                strict=True), paired_by="seed")
            table.append(row)
    return pd.DataFrame(table).reindex(columns=[
        "dataset", "backbone", "protocol", "method", "acc_mean", "acc_std", "nmi_mean", "nmi_std",
        "ari_mean", "ari_std", "n", "minus_tsp", "low", "high", "paired_by", "n_used",
        "learning_rate", "sharpness", "not_run"])


def heads_markdown(table: pd.DataFrame, probes: pd.DataFrame) -> str:
    """`heads_table` as a Markdown table: ACC, a row a method (best mean on top), a column a feature
    set; (=) where the interval of the difference to TSP contains 0; the linear probe's row below.
    """
    cells = list(dict.fromkeys(zip(table["dataset"], table["backbone"], strict=True)))
    found = {(r.dataset, r.backbone, r.method): r for r in table.itertuples()}
    order = table.groupby("method")["acc_mean"].mean().sort_values(ascending=False).index
    lines = ["| head | " + " | ".join(f"{d}, `{b}`" for d, b in cells) + " |",
             "|---" * (len(cells) + 1) + "|"]
    for method in order:
        row = []
        for cell in cells:
            r = found[*cell, method]
            spread = f" ± {r.acc_std:.1f}" if r.acc_std == r.acc_std else ""
            level = " (=)" if method != "tsp" and r.low <= 0 <= r.high else ""
            row.append(f"{r.acc_mean:.1f}{spread}{level}" if r.n else "not run")
        lines.append(f"| {method} | {' | '.join(row)} |")
    bound = probes.set_index(["dataset", "backbone"])["acc"]
    lines.append("| *linear probe, with labels* | " + " | ".join(
        f"{bound[cell]:.2f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"
