"""The paper's rows; ours against them: Welch as scipy has it, records chosen, exit status 3."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy import stats

import tsp_utils.__main__ as command
from tsp_utils.files.paths import write_json
from tsp_utils.study.against_paper import compare, table_1, welch_interval
from tsp_utils.study.profile import load_study
from tsp_utils.study.published import DATASETS, EXTERNAL, TABLE_1, TABLE_2
from tsp_utils.study.training import code_of_heads

EARLIER = ("K-means", "DEC", "DAC", "DCCM", "IIC", "PICA", "SCAN", "NNM")
TSP = ("TSP-ResNet", "TSP-ViT1", "TSP-ViT2", "TSP K-means")
PAPER = {(row.method, row.dataset): row for row in TABLE_1}


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_welch_is_scipys(level):
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, 10), rng.normal(0, 5, 7)
    found = welch_interval(a.mean(), a.std(ddof=1), 10, b.mean(), b.std(ddof=1), 7, level)
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    np.testing.assert_allclose(found, (a.mean() - b.mean(), *theirs))


@pytest.fixture
def study(own_folders):
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


def test_what_equals_the_paper_is_inside_and_five_points_off_is_not(study, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="no record of dino_vits16 on cifar10"):
        table_1(study)
    leave_record(study, code="older")
    with pytest.raises(ValueError, match="dino_vits16 on cifar10 are of other library sources"):
        table_1(study)
    leave_record(study, shift=-9, n=10_000, name="drawn")  # not of all images
    leave_record(study, shift=-9, name="other", n_neighbors=5)  # not of this study's settings
    leave_record(study)
    assert len(table_1(study)) == 4
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


def accs(methods, table=TABLE_1):
    """The best ACC of these methods on each set."""
    return [max(r.acc for r in table if r.method in methods and r.dataset == dataset)
            for dataset in DATASETS]


def test_table_1_is_complete_and_every_cell_is_a_percentage_of_which_iic_has_accuracy_only():
    assert set(PAPER) == {(m, d) for m in (*EARLIER, *TSP, "supervised") for d in DATASETS}
    assert len(TABLE_1) == len(PAPER)
    for r in (*TABLE_1, *TABLE_2, *EXTERNAL):
        assert all(v is None or 0 < v < 100 for v in (r.nmi, r.acc, r.ari))
        assert r.acc is not None and (r.nmi is None) == (r.ari is None) == (r.method == "IIC")
    for r in TABLE_1:  # deviations and runs belong to its own rows alone
        found = (r.nmi_std, r.acc_std, r.ari_std, r.n)
        assert None not in found and r.n == 10 if r.method in TSP else found == (None,) * 4


@pytest.mark.parametrize(("method", "dataset", "values"), [
    ("TSP-ViT1", "cifar100-20", (58.2, 54.9, 40.8, 1.4, 2.5, 2.1)),
    ("TSP K-means", "stl10", (89.2, 81.7, 80.2, 3.0, 9.2, 8.1)),
    ("K-means", "cifar10", (8.7, 22.9, 4.9, None, None, None)),
    ("supervised", "stl10", (97.0, 98.9, 97.6, None, None, None))])
def test_spot_values_of_table_1(method, dataset, values):
    r = PAPER[method, dataset]
    assert (r.nmi, r.acc, r.ari, r.nmi_std, r.acc_std, r.ari_std) == values


def test_the_best_of_the_abstract_of_sec_4_2_and_of_others_later():
    assert accs(["TSP-ViT1", "TSP-ViT2"]) == [94.0, 55.6, 97.9]
    assert accs(EARLIER) == [84.3, 47.7, 80.8]
    for dataset, vit, earlier in product(DATASETS, ("TSP-ViT1", "TSP-ViT2"), ("SCAN", "NNM")):
        ours, theirs = PAPER[vit, dataset], PAPER[earlier, dataset]
        assert ours.acc > theirs.acc and ours.nmi > theirs.nmi and ours.ari > theirs.ari
    # whatever the text says:
    assert PAPER["TSP-ResNet", "stl10"].acc < accs(["SCAN"])[2] < accs(["NNM"])[2]
    assert accs(["SCAN + self-labelling"], EXTERNAL) == [88.3, 50.7, 80.9]
    assert accs(["SPICE"], EXTERNAL) == [91.7, 58.4, 92.9]


def test_table_2_peaks_at_10_and_is_not_quite_table_1_at_20():
    by_k = {r.n_neighbors: r for r in TABLE_2}
    assert list(by_k) == [5, 10, 15, 20, 25, 30]
    assert max(by_k, key=lambda k: by_k[k].acc) == 10
    r = by_k[30]
    assert (r.acc, r.acc_std, r.nmi, r.nmi_std) == (91.88, 0.90, 84.23, 1.12)
    assert (r.ari, r.ari_std, r.n) == (83.27, 1.59, 10)
    in_table_1 = PAPER["TSP-ViT1", "cifar10"]
    assert abs(by_k[20].acc - in_table_1.acc) < 0.05 < abs(by_k[20].nmi - in_table_1.nmi)
