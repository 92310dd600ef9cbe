"""Ours against the paper's: Welch as scipy has it, records chosen and refused, exit status 3."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import tsp_utils.__main__ as command
from tsp_utils.paths import write_json
from tsp_utils.study.against_paper import compare, table_1, welch_interval
from tsp_utils.study.profile import load_study
from tsp_utils.study.published import TABLE_1
from tsp_utils.study.training import code_of_heads

PAPER = {(row.method, row.dataset): row for row in TABLE_1}


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_welch_is_scipys(level):
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, 10), rng.normal(0, 5, 7)
    found = welch_interval(a.mean(), a.std(ddof=1), 10, b.mean(), b.std(ddof=1), 7, level)
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    np.testing.assert_allclose(found, (a.mean() - b.mean(), *theirs))


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr("tsp_utils.study.profile.runs_dir", lambda: tmp_path)
    return replace(load_study("paper"), datasets=("cifar10",), backbones=("dino_vits16",))


def leave_record(study, shift=0.0, n=50_000, name="a", code=None, **changes):
    """A record as `run_heads` leaves it, its ACCs those of the paper plus a shift."""
    rows = []
    for method, row in (("k-means", PAPER["TSP K-means", "cifar10"]),
                        ("head", PAPER["TSP-ViT1", "cifar10"])):
        noise = np.linspace(-1, 1, 10) / np.linspace(-1, 1, 10).std(ddof=1) * row.acc_std
        rows += [dict(dataset="cifar10", backbone="dino_vits16", protocol="split", scored=scored,
                      method=method, seed=seed, nmi=50.0, ari=50.0,
                      acc=row.acc + shift * (method == "head") + noise[seed])
                 for scored in ("test", "train") for seed in range(10)]
    settings = dict(n_seeds=10, n_neighbors=20, metric="cosine", dataset="cifar10",
                    backbone="dino_vits16", n=n, protocol="split") | changes
    write_json(study.run_dir / "records" / f"{name}.json", {
        "settings": settings, "code": code or code_of_heads(study), "metrics": rows})


def test_equal_to_the_paper_is_inside_and_five_points_are_not(study, monkeypatch, capsys):
    leave_record(study)
    table = compare(study).set_index("stage")
    np.testing.assert_allclose(table["difference"], 0, atol=1e-9)
    assert not table["outside"].any() and list(table.index) == ["K-means", "head"]
    row = PAPER["TSP-ViT1", "cifar10"]
    half = stats.t.ppf(0.975, 18) * row.acc_std * np.sqrt(2 / 10)  # equal deviations and n
    np.testing.assert_allclose(table.loc["head", ["low", "high"]].astype(float), [-half, half])
    monkeypatch.setattr("tsp_utils.study.profile.load_study", lambda name: study)
    assert command.report_against_paper("paper") == 0
    leave_record(study, shift=-5)
    assert list(compare(study)["outside"]) == [False, True]
    assert command.report_against_paper("paper") == 3
    assert "1 of 1 heads lie beyond one point" in capsys.readouterr().out


def test_the_record_of_all_images_and_of_this_studys_settings_is_taken(study):
    leave_record(study, shift=-9, n=10_000, name="drawn")
    leave_record(study, shift=-9, name="other", n_neighbors=5)
    leave_record(study)
    assert len(table_1(study)) == 4
    assert compare(study)["difference"].abs().max() < 1e-9


def test_missing_and_stale_records_are_named(study):
    with pytest.raises(FileNotFoundError, match="no record of dino_vits16 on cifar10"):
        table_1(study)
    leave_record(study, code="older")
    with pytest.raises(ValueError, match="dino_vits16 on cifar10 are of other library sources"):
        table_1(study)
