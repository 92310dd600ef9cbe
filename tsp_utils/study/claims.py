"""The claims (C0 to C12 of TSP, D1 to D3 of ICBPL): margin, how measurements are combined, name.

`docs/rules.md` says them in full. Another claim is a row here, and a notebook that leaves evidence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tsp_utils.files.unknown_names import unknown
from tsp_utils.study.verdicts import Verdict

ANALOGUE, NOT_HERE = "analogue at 32 px", "not testable here"


def first_cell(cells, notes=()) -> Verdict:
    """The verdict of a claim's primary cell; `cells` are `Evidence`, in their order."""
    return _with(cells[0].verdict, None, (cells[0].verdict.qualifier, cells[0].note, *notes))


def first_cell_and_budget(cells) -> Verdict:
    """C6: the first cell decides; the others are said, and whether another budget turns it."""
    signs = {np.sign(cell.verdict.mean) for cell in cells
             if cell.backbone == cells[0].backbone and np.isfinite(cell.verdict.mean)}
    return first_cell(cells, ["depends on budget"] * (len(signs) > 1) + _each(cells[1:]))


def all_cells(cells) -> Verdict:
    """C0, C1: every cell must hold, and there must be two; the cell that decides lends numbers."""
    found = [cell.verdict.verdict for cell in cells]
    outcome = next((verdict for verdict in ("does not hold", "not tested", "inconclusive")
                    if verdict in found), "holds" if len(found) > 1 else "not tested")
    decides = cells[found.index(outcome) if outcome in found else 0]
    if outcome == "not tested":
        return _with(decides.verdict, outcome, (
            decides.verdict.qualifier if outcome in found else "one cell only", cells[0].note))
    networks = "for this pair of networks" * (
        claim_of(cells[0].claim).unit == "backbone" and cells[0].n_pretrain == 1)
    return _with(decides.verdict, outcome, [*_each(cells), networks])


def most_cells(cells) -> Verdict:
    """C3: more than half of the cells must hold, and none may be reversed."""
    tested = [cell.verdict for cell in cells if cell.verdict.verdict != "not tested"]
    if not tested:
        return first_cell(cells)
    won, undecided = (sum(verdict.verdict == wanted for verdict in tested)
                      for wanted in ("holds", "inconclusive"))
    lost = sum("reversed" in verdict.qualifier for verdict in tested)
    half, first = len(tested) / 2, cells[0].verdict
    outcome = ("holds" if won > half and not lost else
               "does not hold" if lost or won + undecided <= half else "inconclusive")
    return _with(first, outcome, (
        f"holds in {won} of {len(tested)} cells, reversed in {lost}",
        first.qualifier if "pointing" in first.qualifier else "", cells[0].note))


def either_rate(cells) -> Verdict:
    """C7, D1: at both learning rates, or "at ... only"."""
    holds = [cell for cell in cells if cell.verdict.verdict == "holds"]
    tested = {cell.verdict.verdict for cell in cells} - {"not tested"}
    if not tested:
        return first_cell(cells)
    if holds:  # numbers of a rate at which it does
        only = f"at {', '.join(cell.cell for cell in holds)} only" * (len(holds) < len(cells))
        return _with(holds[0].verdict, "holds", (only, cells[0].note))
    return _with(cells[0].verdict, "inconclusive" if len(tested) > 1 else tested.pop(),
                 [*_each(cells), cells[0].note])


def _each(cells) -> list[str]:
    return [f"{cell.cell}: {cell.verdict.verdict}" + (
            f", {cell.verdict.mean:+.1f}" if np.isfinite(cell.verdict.mean) else "")
            for cell in cells]


def _with(verdict: Verdict, outcome: str | None, notes) -> Verdict:
    return replace(verdict, verdict=outcome or verdict.verdict,
                   qualifier="; ".join(note for note in notes if note))


@dataclass(frozen=True)
class Claim:
    """One claim of a paper. `scope` is that of profile `small`; n_head 0: no head is involved."""

    id: str
    name: str  # in figures
    claim: str
    where: str  # in the paper
    quantity: str  # d, in percentage points
    margin: float  # m, in the same points
    unit: str  # what is replicated: "head", "backbone" (a pretrained network) or "image"
    scope: str
    n_head: int  # seeds wanted
    decides: str  # beyond the general rule
    combine: Callable = first_cell  # its cells -> one verdict
    unmeasured: str = "no notebook of this profile measured it"  # said where there is no cell


CLAIMS = tuple(Claim(*row) for row in (
    ("C0", "above earlier methods", "TSP with a ViT clusters better than every earlier method.",
     "Abstract, Table 1", "ACC, ours - best published", 0, "head", NOT_HERE, 10,
     "only in `paper`; against the paper's rows, and again with SCAN + self-labelling and SPICE",
     all_cells, "only in `paper`, with the official networks at 224 px"),
    ("C1", "ViT over ResNet, abroad",
     "A ViT's neighbours keep their labels better under shift than a ResNet's.", "Fig. 1",
     "consistency@20 on the shifted target, ViT - ResNet", 2, "backbone", ANALOGUE, 0,
     "under inner product AND cosine; kNN in domain within 3; three seeds an arm: every ViT above",
     all_cells),
    ("C2", "neighbours are alike", "Neighbours in the latent space are alike in meaning.",
     "Secs 1 and 4.3, Fig. 2", "consistency@5, backbone - pixels", 10, "image", ANALOGUE, 0,
     "interval by image bootstrap"),
    ("C3", "head over K-means", "The trained head beats K-means on the same features.",
     "Sec. 4.4, Table 1", "ACC, head - strongest K-means", 2, "head", ANALOGUE, 30,
     "overall: in more than half of the backbone x target cells, and reversed in none", most_cells),
    ("C4", "larger ViT over smaller", "The larger ViT clusters better.", "Sec. 4.2, Table 1",
     "ACC, larger - smaller ViT", 1, "backbone", ANALOGUE, 30,
     "same recipe, source and images seen"),
    ("C5", "ResNet loses more abroad", "A ResNet loses more than a ViT when the domain shifts.",
     "Sec. 4.3, Fig. 5", "consistency@20, (ViT - ResNet) shifted - (ViT - ResNet) in domain", 2,
     "backbone", ANALOGUE, 0, "kNN in domain within 3 points, else not tested"),
    ("C6", "source over target alone",
     "A large foreign source serves better than the target alone.", "Sec. 4.3, Figs 4, 7",
     "ACC, source - target-only", 3, "backbone", ANALOGUE, 30,
     "source 25 times the target, equal images, scored on images that neither arm trained on",
     first_cell_and_budget),
    ("C7", "frozen over fine-tuned", "Fine-tuning with the clustering loss destroys clusters.",
     "Sec. 4.4, Fig. 6", "ACC, frozen - fine-tuned at the last epoch", 5, "head", ANALOGUE, 5,
     "AND consistency@20 falls; at learning rates 1e-4 and 1e-5, or 'holds at ... only'",
     either_rate),
    ("C8", "K-means start", "A start from K-means beats a random one.", "Secs 3.2 and 4.5",
     "ACC, K-means - random direction at equal row norm", 2, "head", ANALOGUE, 100,
     "2 x 2 of direction and row norm"),
    ("C9", "K hardly matters", "Results hardly depend on K.", "Sec. 4.5, Table 2",
     "ACC, each other K - K = 20", 2, "head", ANALOGUE, 30,
     "equivalence over K = 5, 10, 15, 25, 30"),
    ("C10", "one layer over two", "One layer in the head beats several.",
     "Sec. 3.2 (evidence promised, never shown)", "ACC, linear - one hidden layer", 2, "head",
     ANALOGUE, 30, "three rates, best by loss"),
    ("C11", "GMM over K-means", "Clusters in the latent space are not globular.",
     "Sec. 4.4 (read off UMAP)", "ACC, full-covariance GMM - K-means", 2, "head", ANALOGUE, 30,
     "protocol `all`", first_cell,
     "only in `small`; notebook 10 reads other mixtures from its records"),
    ("C12", "weighted neighbours", "Weighting neighbours by distance helps.",
     "Sec. 3.2, Eq. 4 (never ablated)", "ACC, weighted - uniform neighbours", 1, "head", ANALOGUE,
     30, "perplexity of P beside it"),
))  # fmt: skip


# The findings of the second system, ICBPL (Zhu, Hu and Wang, 2024, abstract), by the same rules.
ICBPL_CLAIMS = tuple(Claim(*row) for row in (
    ("D1", "fine-tuning helps", "Fine-tuning improves the clusters.", "ICBPL, finding 1",
     "ACC, fine-tuned - frozen at the last epoch", 2, "head", ANALOGUE, 5,
     "last two blocks; at learning rates 1e-4 and 1e-5, or 'holds at ... only'", either_rate),
    ("D2", "neighbour pull helps", "Pulling neighbours together improves the clusters.",
     "ICBPL, finding 2", "ACC, with - without the neighbour pull", 1, "head", ANALOGUE, 10,
     "on frozen features"),
    ("D3", "nearest centre helps",
     "Pulling samples to the nearest fixed centre improves the clusters.", "ICBPL, finding 3",
     "ACC, with - without the nearest-centre term", 1, "head", ANALOGUE, 10, "on frozen features"),
))  # fmt: skip


def claim_of(claim_id: str) -> Claim:
    """The claim of that id, C0 to C12 or D1 to D3. Raises ValueError for another one."""
    claims = {claim.id: claim for claim in (*CLAIMS, *ICBPL_CLAIMS)}
    if claim_id not in claims:
        raise ValueError(unknown("claim", claim_id, claims))
    return claims[claim_id]
