"""The claims, the page that states them, and verdicts worked out by hand."""

import math
import re
import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tsp_utils.study import verdicts
from tsp_utils.study.claims import CLAIMS, ICBPL_CLAIMS
from tsp_utils.study.verdicts import COMPARED_K, decide, decide_equivalence, holm

PAGE = (Path(__file__).parents[1] / "docs" / "rules.md").read_text(encoding="utf-8")

# Mean 0, standard deviation 1, n = 4: the 95 % interval is mean -+ 3.1824 / 2 = 1.5912.
NOISE = np.array([-1, -1, 1, 1]) * math.sqrt(3) / 2


def test_the_page_states_each_claim_and_lists_changes():
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in PAGE.splitlines() if line.startswith(("| C", "| D"))]
    for cells, c in zip(rows, (*CLAIMS, *ICBPL_CLAIMS), strict=True):
        assert len(cells) == 8 and cells[0] == c.id
        assert cells[1].lower() == c.claim.rstrip(".").lower()
        assert cells[4:] == [str(c.margin), c.unit, c.scope, str(c.n_head or "–")]
    assert PAGE.splitlines()[2].startswith("Written before any result") and "## Changes" in PAGE
    assert [c.id for c in CLAIMS] == [f"C{i}" for i in range(13)]
    assert {c.id for c in CLAIMS if c.unit == "backbone"} == {"C1", "C4", "C5", "C6"}
    assert {c.unit for c in CLAIMS} == {"head", "backbone", "image"}
    assert {c.scope for c in CLAIMS} <= {"same claim", "analogue at 32 px", "not testable here"}


@pytest.mark.parametrize(("differences", "margin", "verdict", "qualifier"), [
    (NOISE + 3, 2, "holds", ""),  # the lower end is above 0, the mean reaches the margin
    ([2.0, 2.0, 2.0], 2, "holds", ""),  # the margin itself is enough
    (NOISE + 0.3, 2, "does not hold", ""),  # the upper end, 1.89, is below the margin
    (NOISE / 10 + 1, 2, "does not hold", ""),  # a gain that is certain, but too small
    ([1.99, 1.99, 1.99], 2, "does not hold", ""),
    (NOISE - 3, 2, "does not hold", "reversed"),
    ([1.0, 2.9, 2.0], 2, "inconclusive", None),
    # 2.4469 / sqrt(7) = 0.925 < 1, and 2.5706 / sqrt(6) = 1.049 is not
    (NOISE + 1, 2, "inconclusive", "n = 7 would decide"),
    (NOISE + 1.2, 1, "inconclusive", "n = 6 would decide"),  # above it: the lower end has to pass 0
    (NOISE, 0, "inconclusive", "no n up to 100,000 would decide"),
    ([5.0], 2, "not tested", "fewer than two paired differences"),
])
def test_a_verdict_by_hand(differences, margin, verdict, qualifier):
    found = decide(differences, margin)
    assert found.verdict == verdict and qualifier in (None, found.qualifier)


def test_a_verdict_carries_its_numbers_even_where_it_is_not_tested():
    v = decide(NOISE + 3, 2, unmet="unequal in domain")
    assert (v.verdict, v.qualifier) == ("not tested", "unequal in domain")
    assert (v.n, v.n_needed) == (4, None)
    np.testing.assert_allclose([v.mean, v.low, v.high], [3, 3 - 1.5912, 3 + 1.5912], atol=1e-4)
    assert v.p == 2 / 16  # all four positive: only all-plus and all-minus are as extreme
    v = decide([], 2, unmet="no images of the target")
    assert (v.verdict, v.n) == ("not tested", 0) and math.isnan(v.mean) and math.isnan(v.p)
    v = decide(NOISE + 12, 10, unit="image", interval=(11.0, 13.0))  # a bootstrap's, say
    assert (v.verdict, v.low, v.high) == ("holds", 11.0, 13.0)
    assert decide(NOISE + 1, 2).n_needed == 7
    assert decide(NOISE + 12, 10, interval=(-1.0, 13.0)).verdict == "inconclusive"
    v = decide_equivalence({k: NOISE for k in COMPARED_K if k != 15})
    assert (v.verdict, v.n) == ("not tested", 0) and "K = 15" in v.qualifier


def test_nmi_or_ari_pointing_the_other_way_caps_a_verdict_and_one_pair_qualifies_it():
    up, down, small, pair = NOISE + 3, NOISE - 0.1, NOISE / 10 + 0.1, "for this pair of networks"
    for differences, more, expected in (
            (up, dict(nmi=up, ari=up), ("holds", "")),
            (up, dict(nmi=down, ari=up), ("inconclusive", "NMI pointing the other way")),
            (up, dict(nmi=down, ari=down), ("inconclusive", "NMI and ARI pointing the other way")),
            (-up, dict(nmi=-up, ari=-up), ("does not hold", "reversed")),
            (-up, dict(ari=up), ("inconclusive", "ARI pointing the other way")),
            # A gain below the margin is contradicted only by a metric that holds.
            (small, dict(nmi=-small, ari=small), ("does not hold", "")),
            (small, dict(nmi=up), ("inconclusive", "NMI pointing the other way")),
            (up, dict(unit="backbone"), ("holds", pair)),
            (-up, dict(unit="backbone"), ("does not hold", f"reversed; {pair}")),
            (up, dict(unit="backbone", n_pretrain=4), ("holds", "")),
            (up, dict(unit="head", n_pretrain=1), ("holds", ""))):
        found = decide(differences, 2, **more)
        assert (found.verdict, found.qualifier) == expected, more


@pytest.mark.parametrize(("differences", "more", "sentence"), [
    ([1.0, float("nan")], {}, "finite"), ([1.0, float("inf")], {}, "finite"),
    ([[1.0, 2.0]], {}, "finite"), (NOISE, dict(nmi=NOISE[:3]), r"as many .* \(4\)"),
    (np.tile(NOISE, 3), dict(unit="backbone", n_pretrain=3), "one difference a pair")])
def test_what_is_not_paired_or_counted_as_the_rules_say_is_refused(differences, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        decide(differences, 2, **more)


@pytest.mark.filterwarnings("error")
def test_t_interval_is_that_of_a_paired_t_test_and_of_equal_differences_has_no_width():
    a, b = np.random.default_rng(3).normal([[60], [58]], 2, (2, 10))
    for level in (0.90, 0.95):
        expected = stats.ttest_rel(a, b).confidence_interval(level)
        np.testing.assert_allclose(verdicts.t_interval(a - b, level), [(a - b).mean(), *expected])
    assert verdicts.t_interval([1.99, 1.99, 1.99]) == (1.99, 1.99, 1.99)
    assert verdicts.t_interval([0.0, 0.0]) == (0, 0, 0)


@pytest.mark.parametrize(("differences", "p"), [
    ([-1, 2, 3], 4 / 8),  # |sum| >= 4: 6 and 4, and their negatives
    ([0.0, 0.0], 1), (np.ones(20), 2 / 2**20), (np.ones(60), 1 / 100_001),
    # Sums of 0 up to rounding, which no flip falls below: ties.
    (0.1 * np.tile([1, 2, 3, -6], 3), 1), (0.1 * np.tile([1, 2, 3, -6], 50), 1)])
def test_sign_flip_p_by_hand(differences, p):
    assert verdicts.sign_flip_p(differences) == p


def test_sign_flip_p_is_that_of_brute_force_and_above_twenty_seeded_and_near_the_exact_one():
    for n in (1, 2, 5, 10):
        d = np.random.default_rng(n).normal(0.7, 1, n).round(1)  # rounded, so that ties occur
        sums = np.abs(np.array(list(product([-1, 1], repeat=n))) @ d)
        assert verdicts.sign_flip_p(d) == np.mean(sums >= abs(d.sum()) - 1e-9)
    d = np.concatenate([np.ones(15), -np.ones(6)])  # the number of pluses is binomial
    exact = stats.binomtest(15, 21, 0.5).pvalue
    p = verdicts.sign_flip_p(d)
    assert p == verdicts.sign_flip_p(d) and abs(p - exact) < 4 * math.sqrt(exact / 100_000)


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    d = np.random.default_rng(4).normal(2, 5, 2000)
    half = 1.96 * d.std() / math.sqrt(2000)
    found = verdicts.bootstrap_interval(d)
    assert found == verdicts.bootstrap_interval(d)
    np.testing.assert_allclose(found, [d.mean() - half, d.mean() + half], atol=0.1 * half)
    assert np.diff(verdicts.bootstrap_interval(d, 0.9)) < np.diff(found)


@pytest.mark.parametrize("function, n", [(verdicts.sign_flip_p, 2_000),
                                         (verdicts.bootstrap_interval, 10_000)])
def test_memory_is_bounded_where_all_differences_are_distinct(function, n):
    d = np.random.default_rng(5).normal(0, 1, n)
    tracemalloc.start()
    function(d)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize(("p", "adjusted"), [
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never falling
    ([0.04, 0.01, 0.03, 0.02], [0.06, 0.04, 0.06, 0.06]),
    ([0.5, np.nan, 0.04], [0.5, np.nan, 0.08]), ([0.6, 0.7], [1.0, 1.0]), ([], [])])
def test_holm_by_hand(p, adjusted):
    np.testing.assert_allclose(holm(p), adjusted, strict=True)


@pytest.mark.parametrize(("means", "verdict", "qualifier", "numbers"), [
    # To 1.977 at 90 %; the 95 % end, 2.39, would not do.
    ({5: 0.8}, "holds", "K = 5", (0.8, -0.3767, 1.9767)),
    ({30: -0.8}, "holds", "K = 30", (-0.8, -1.9767, 0.3767)),
    ({30: -3.6}, "does not hold", "K = 30", (-3.6, -5.1912, -2.0088)),
    # Only the 90 % interval lies outside: from 2.0233, at 95 % from 1.609.
    ({5: 3.2}, "inconclusive", None, (3.2, 2.0233, 4.3767)),
    # 2.0150 / sqrt(6) = 0.823 < 1, 2.1318 / sqrt(5) = 0.953 < 1
    ({5: 1.0}, "inconclusive", "K = 5; n = 5 would decide", (1.0, -0.1767, 2.1767)),
    # One K outside would refute: 7, as above.
    ({5: 1.0, 10: 3.0}, "inconclusive", "K = 10; n = 7 would decide", (3.0, 1.8233, 4.1767)),
])
def test_equivalence_by_hand(means, verdict, qualifier, numbers):
    """Deviation 1, n = 4: a 90 % half-width of 1.1767, a 95 % one of 1.5912; the bound is 2."""
    v = decide_equivalence({k: NOISE + means.get(k, 0.0) for k in COMPARED_K})
    assert v.verdict == verdict and qualifier in (None, v.qualifier)
    np.testing.assert_allclose([v.mean, v.low, v.high], numbers, atol=1e-4)


def test_the_flips_of_many_pairs_are_drawn_once(tmp_path, monkeypatch):
    """A ledger decides every cell several times, and 100,000 flips of 10,000 pairs take seconds."""
    monkeypatch.setenv("TSP_CACHE", str(tmp_path))
    d = np.random.default_rng(0).standard_normal(40) + 0.3
    first = decide(d, 1.0)
    assert first.p == verdicts.sign_flip_p(d) != decide(d + 0.1, 1.0).p
    monkeypatch.setattr(verdicts.stats, "monte_carlo_test", None)  # any draw would fail
    assert decide(d, 0.5).p == first.p
