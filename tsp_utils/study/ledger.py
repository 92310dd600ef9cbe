"""The ledger: what the notebooks measured for each claim, and the verdicts that follow.

A notebook leaves `Evidence` (paired differences, no verdict) in runs/<profile>/claims/; `ledger`
reads that alone and applies the claims' own rules.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from tsp_utils.cache import hash_of
from tsp_utils.files.paths import IS_CLONE
from tsp_utils.study import staleness
from tsp_utils.study.claims import CLAIMS, Claim, claim_of
from tsp_utils.study.verdicts import Verdict, decide, decide_equivalence, holm, t_interval

COLUMNS = ("id", "scope", "quantity", "backbone", "target", "protocol", "n_pretrain", "n_head",
           "mean", "low", "high", "p", "rule", "verdict", "qualifier")


@dataclass(frozen=True)
class Evidence:
    """Measured for one cell of one claim: paired differences in points, as `decide` takes them."""

    claim: str  # its id
    cell: str  # what was compared, in words; the claim's first cell is its primary one
    backbone: str
    target: str
    protocol: str
    n_pretrain: int  # networks an arm
    n_head: int  # heads a network; 0 where no head is involved
    acc: tuple = ()  # [n]; C1, C2 and C5: of label consistency
    nmi: tuple | None = None
    ari: tuple | None = None
    by_k: dict | None = None  # C9: {K: [n]}
    falls: tuple | None = None  # C7: consistency before - after, which must be above 0 as well
    interval: tuple | None = None  # in place of t's
    unmet: str = ""  # a precondition that failed, named
    note: str = ""  # for the reader, behind the verdict
    decides: bool = True  # False: for the second reading alone
    order: int = 0  # of the cells of a claim

    @cached_property
    def verdict(self) -> Verdict:
        """By `docs/rules.md`, of this cell alone."""
        claim = claim_of(self.claim)
        if self.by_k is not None:
            return decide_equivalence({int(k): d for k, d in self.by_k.items()}, claim.margin)
        found = decide(self.acc, claim.margin, nmi=self.nmi, ari=self.ari, unit=claim.unit,
                       n_pretrain=self.n_pretrain, interval=self.interval, unmet=self.unmet)
        if self.falls is None or found.verdict != "holds":
            return found
        _, low, high = t_interval(self.falls)
        if low > 0:
            return found
        return replace(found, verdict="does not hold" if high < 0 else "inconclusive",
                       qualifier="ACC falls, and label consistency does not")


def save_evidence(study, notebook: str, cells: Sequence[Evidence]) -> pd.DataFrame:
    """Leave a notebook's evidence for the ledger; returns the cells with their verdicts.

    A notebook may call it several times, and a cell may be run again: each cell of a claim has one
    file, and keeps its place. Raises ValueError for two cells of one name.
    """
    stamp = _stamp(study, notebook)
    folder = study.run_dir / "claims"
    kept = {}
    for path in folder.glob(f"{notebook}_*.json"):
        record = json.loads(path.read_text())
        if record["stamp"] == stamp:
            kept[path.stem] = record["order"]
        else:
            path.unlink()  # of an earlier version, which no ledger would take
    parts = [(notebook, cell.claim, cell.cell, cell.backbone, cell.target) for cell in cells]
    names = [re.sub(r"[^\w]+", "-", "_".join(filter(None, part))).strip("-_") for part in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"Two cells of one claim have the same name ({', '.join(sorted(names))}); "
                         f"name each by what it compares.")
    for name, cell in zip(names, cells, strict=True):
        order = kept.setdefault(name, 1 + max(kept.values(), default=-1))
        record = {"stamp": stamp, **asdict(replace(cell, order=order))}
        study.leave(f"claims/{name}.json", lambda file, record=record: file.write(
            json.dumps(record).encode()))
    return table_of(cells)


def read_evidence(study, claims: Sequence[Claim] = CLAIMS) -> list[Evidence]:
    """All evidence for these claims in a profile's run, in the claims' order.

    Raises FileNotFoundError where there is none, ValueError naming evidence of other settings than
    this study's, or of a notebook that has changed since (it, or what it calls and reads).
    """
    ids = [claim.id for claim in claims]
    records = {path: record for path in sorted((study.run_dir / "claims").glob("*.json"))
               if (record := json.loads(path.read_text()))["claim"] in ids}
    again = f"run make reproduce PROFILE={study.profile.partition('+')[0]}"
    if not records:
        raise FileNotFoundError(f"There is no evidence of {study.profile} yet; {again} first.")
    stamps = {notebook: _stamp(study, notebook) for notebook in {path.name[:2] for path in records}}
    mixed = [path.name for path, record in records.items()
             if record["stamp"] != stamps[path.name[:2]]]
    if mixed:
        more = f" and {len(mixed) - 3} more" if len(mixed) > 3 else ""
        raise ValueError(f"Evidence of other settings, or of notebooks that have changed since, "
                         f"lies in {study.profile}: {', '.join(mixed[:3])}{more}; {again} again.")
    cells = [(path.name[:2], Evidence(**{key: record[key] for key in record if key != "stamp"}))
             for path, record in records.items()]
    return [cell for _, cell in sorted(cells, key=lambda found: (
        ids.index(found[1].claim), found[0], found[1].order))]


def _stamp(study, notebook: str) -> dict:
    """What evidence depends on: the settings, and the hash by which the notebook is run again."""
    if not IS_CLONE:  # a notebook in Colab, say, that nobody runs again by its hash
        return {"study": repr(study), "notebook": None}
    path = next(iter(staleness.NOTEBOOKS.glob(f"{notebook}_*.ipynb")), None)
    if path is None:
        raise ValueError(f"There is no notebook {notebook} in {staleness.NOTEBOOKS}; pass the "
                         f"number that its file begins with.")
    return {"study": repr(study), "notebook": hash_of(staleness.parts_of(path, study))}


def table_of(cells: Sequence[Evidence]) -> pd.DataFrame:
    """One row a cell, with its verdict and Holm's p over the cells."""
    rows = [_row(cell, cell.verdict) | {"cell": cell.cell} for cell in cells]
    table = pd.DataFrame(rows, columns=["id", "cell", *COLUMNS[1:-3], "n", *COLUMNS[-3:]])
    table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"]))
    return table


def ledger(cells: Sequence[Evidence], claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """C0 to C12 (or these claims), one row each, from one profile's evidence; columns COLUMNS."""
    rows = []
    for claim in claims:
        own = [cell for cell in cells if cell.claim == claim.id and cell.decides]
        first = own[0] if own else Evidence(
            claim.id, "", "", "", "", 0, 0, unmet=claim.unmeasured)
        rows.append(_row(first, claim.combine(own) if own else first.verdict))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(cell: Evidence, verdict: Verdict) -> dict:
    claim, same = claim_of(cell.claim), cell.backbone.startswith("dino_")  # the paper's networks
    return asdict(verdict) | {
        "id": claim.id, "scope": "same claim" if same else claim.scope, "quantity": claim.quantity,
        "backbone": cell.backbone, "target": cell.target, "protocol": cell.protocol,
        "n_pretrain": cell.n_pretrain, "n_head": cell.n_head,
        "rule": f"m = {claim.margin:g}; {claim.decides}"}


def to_markdown(table: pd.DataFrame) -> str:
    """The ledger as a Markdown table for reading: claim, quantity, what was measured, verdict."""
    lines = ["| claim | d, in points | backbone, target, protocol | n | mean [95 %] | p (Holm) | "
             "verdict |", "|---|---|---|---|---|---|---|"]
    for (_, row), adjusted in zip(table.iterrows(), holm(table["p"]), strict=True):
        claim, tested = claim_of(row["id"]), np.isfinite(row["mean"])
        numbers = f"{row['mean']:+.2f}"
        numbers += f" [{row['low']:+.2f}, {row['high']:+.2f}]" if np.isfinite(row["low"]) else ""
        p = f"{_p(row['p'])} ({_p(adjusted)})" if np.isfinite(row["p"]) else ""
        where = ", ".join(filter(None, (f"`{row['backbone']}`" if row["backbone"] else "",
                                        row["target"], row["protocol"])))
        n = f"{row['n_pretrain']} x {row['n_head']}" if row["n_pretrain"] else ""
        verdict = f"**{row['verdict']}**" + (f": {row['qualifier']}" if row["qualifier"] else "")
        lines.append(f"| {row['id']}. {claim.claim} | {row['quantity']}; m = {claim.margin:g} | "
                     f"{where} | {n} | {numbers if tested else ''} | {p} | {verdict} |")
    return "\n".join(lines) + "\n"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
