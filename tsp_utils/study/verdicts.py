"""Verdicts on paired differences: intervals, tests, when a claim holds; `docs/rules.md`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from tsp_utils import cache

COMPARED_K = (5, 10, 15, 25, 30)  # C9, each against 20


@dataclass(frozen=True)
class Verdict:
    """A decision (holds, does not hold, inconclusive, not tested) and its numbers in points."""

    verdict: str
    qualifier: str
    mean: float
    low: float
    high: float
    p: float
    n: int
    n_needed: int | None = None  # the n that would decide, where more seeds would


def t_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, low, high: the two-sided t-interval of differences [n]; ends NaN if n < 2."""
    d = _checked(differences)
    if len(d) < 2:
        return (float(d[0]) if len(d) else np.nan), np.nan, np.nan
    with warnings.catch_warnings():  # equal differences: scipy doubts its t, the ends are right
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = stats.ttest_1samp(d, 0).confidence_interval(level)
    return float(d.mean()), float(low), float(high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided sign-flip p, differences [n]: exact to n = 20, then 100,000 seeded flips."""
    d, rng = _checked(differences), np.random.default_rng(0)
    if not len(d):
        return np.nan
    # No flip changes the total. Added, it makes scipy's tolerance for ties (1e-14, relative) one
    # for the rounding of the sum, which may itself be next to 0.
    total = np.abs(d).sum()
    if len(d) <= 20:
        # The first keeps its sign, by symmetry. scipy wants two more; a zero changes no sum.
        others = np.pad(d[1:], (0, max(3 - len(d), 0)))
        found = stats.permutation_test(
            (others,), lambda flipped, axis: np.abs(d[0] + flipped.sum(axis)) + total,
            permutation_type="samples", alternative="greater", vectorized=True,
            n_resamples=2**19, batch=1000)
    else:  # permutation_test would take minutes for 10,000 images, this takes a second
        found = stats.monte_carlo_test(
            1.0 * (d > 0), lambda size: rng.integers(2, size=size, dtype=bool),
            lambda positive, axis: np.abs(2 * (positive @ np.abs(d)) - total) + total,
            alternative="greater", vectorized=True, n_resamples=100_000, batch=100)
    return float(found.pvalue)


def _flipped(d: np.ndarray) -> float:
    """sign_flip_p(d): many flips take seconds, and a ledger asks for each several times."""
    return cache.call(sign_flip_p, d) if len(d) > 12 else sign_flip_p(d)


def bootstrap_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Low, high: percentile interval of the mean by 2,000 seeded resamples; differences [n > 1]."""
    low, high = stats.bootstrap(
        (_checked(differences),), np.mean, confidence_level=level, method="percentile",
        n_resamples=2000, batch=20, vectorized=True, rng=0).confidence_interval
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values [m], in the order given; NaN (not tested) stays, and counts not."""
    adjusted = np.array(p_values, dtype=float)
    tested = np.flatnonzero(~np.isnan(adjusted))
    order = tested[np.argsort(adjusted[tested])]
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def decide(differences: Sequence[float], margin: float, *, nmi: Sequence[float] | None = None,
           ari: Sequence[float] | None = None, unit: str = "head", n_pretrain: int = 1,
           interval: tuple[float, float] | None = None, unmet: str = "") -> Verdict:
    """The verdict on paired differences [n] in points, by `docs/rules.md`.

    nmi, ari: the same pairs' differences, which can cap the verdict. unit "backbone" with
    n_pretrain > 1: one difference a pair of networks, heads averaged first. interval: a 95 %
    interval in place of t's (C2's bootstrap). unmet: a precondition that failed, named.
    Raises ValueError for NaN, unequal lengths, or heads passed as networks.
    """
    d = _checked(differences)
    others = {k: _checked(v) for k, v in (("NMI", nmi), ("ARI", ari)) if v is not None}
    if any(len(other) != len(d) for other in others.values()):
        raise ValueError(f"Pass as many NMI and ARI differences as ACC differences ({len(d)}).")
    if unit == "backbone" and n_pretrain > 1 and len(d) != n_pretrain:
        raise ValueError(f"{len(d)} differences for {n_pretrain} pairs of networks: average the "
                         "heads and pass one difference a pair.")

    def holds(mean, low, high):
        return low > 0 and mean >= margin

    mean, low, high = t_interval(d)
    low, high = interval or (low, high)
    result = Verdict("not tested", unmet, mean, low, high, _flipped(d), len(d))
    if unmet or len(d) < 2:
        return replace(result, qualifier=unmet or "fewer than two paired differences")
    if holds(mean, low, high):
        verdict, against = "holds", [k for k, v in others.items() if v.mean() < 0]
    elif high < 0:
        verdict, against = "does not hold", [k for k, v in others.items() if v.mean() > 0]
    elif high < margin:  # says only "less than m": contradicted by a metric that itself holds
        verdict, against = "does not hold", [k for k, v in others.items() if holds(*t_interval(v))]
    else:
        return _undecided(result, _pairs_for(d, mean if mean >= margin else margin - mean))
    if against:
        note = f"{' and '.join(against)} pointing the other way"
        return replace(result, verdict="inconclusive", qualifier=note)
    notes = ["reversed"] if high < 0 else []
    notes += ["for this pair of networks"] if unit == "backbone" and n_pretrain == 1 else []
    return replace(result, verdict=verdict, qualifier="; ".join(notes))


def decide_equivalence(differences: Mapping[int, Sequence[float]], bound: float = 2) -> Verdict:
    """C9's verdict on paired ACC differences {K: [n]} against K = 20, in points.

    Its numbers are of one K: a 95 % interval outside the bound, else the farthest 90 % interval.
    """
    d = {k: _checked(differences.get(k, ())) for k in COMPARED_K}
    if missing := ", ".join(str(k) for k in COMPARED_K if len(d[k]) < 2):
        return Verdict("not tested", f"fewer than two pairs at K = {missing}", *[np.nan] * 4, 0)

    def result(verdict, k, level):
        return Verdict(verdict, f"K = {k}", *t_interval(d[k], level), _flipped(d[k]), len(d[k]))

    size = {k: abs(d[k].mean()) for k in COMPARED_K}
    wide = {k: t_interval(d[k], 0.95) for k in COMPARED_K}
    if outside := [k for k in COMPARED_K if wide[k][1] > bound or wide[k][2] < -bound]:
        return result("does not hold", max(outside, key=size.get), 0.95)
    reach = {k: float(np.abs(t_interval(d[k], 0.90)[1:]).max()) for k in COMPARED_K}
    worst = max(reach, key=reach.get)
    if reach[worst] <= bound:
        return result("holds", worst, 0.90)
    beyond = [_pairs_for(d[k], size[k] - bound) for k in COMPARED_K if size[k] > bound]
    within = [_pairs_for(d[k], bound - size[k], 0.90) for k in COMPARED_K if reach[k] > bound]
    # one K outside refutes, so the soonest counts; to hold, every K must come inside
    return _undecided(result("inconclusive", worst, 0.90), min(beyond) if beyond else max(within))


def _pairs_for(d: np.ndarray, gap: float, level: float = 0.95) -> float:
    """Smallest n whose half-interval, at this deviation, is below gap; inf above 100,000."""
    n = np.arange(len(d) + 1, 100_001)
    enough = stats.t.ppf((1 + level) / 2, n - 1) * d.std(ddof=1) / np.sqrt(n) < gap
    return int(n[np.argmax(enough)]) if enough.any() else np.inf


def _undecided(result: Verdict, n: float) -> Verdict:
    n_needed = int(n) if np.isfinite(n) else None
    note = f"n = {n_needed} would decide" if n_needed else "no n up to 100,000 would decide"
    return replace(result, verdict="inconclusive", n_needed=n_needed,
                   qualifier="; ".join(filter(None, (result.qualifier, note))))


def _checked(differences: Sequence[float]) -> np.ndarray:
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or not np.isfinite(d).all():
        raise ValueError("Differences must be a flat list of finite points: drop failed seeds.")
    return d
