"""The published rows: spot values, and what the paper says about them itself."""

import pytest

from tsp_utils.study.published import DATASETS, EXTERNAL, TABLE_1, TABLE_2

EARLIER = ("K-means", "DEC", "DAC", "DCCM", "IIC", "PICA", "SCAN", "NNM")
TSP = ("TSP-ResNet", "TSP-ViT1", "TSP-ViT2", "TSP K-means")


def row(method, dataset, table=TABLE_1):
    (found,) = [r for r in table if (r.method, r.dataset) == (method, dataset)]
    return found


def accs(methods, table=TABLE_1):
    """The best ACC of these methods on each set."""
    return [max(row(method, dataset, table).acc for method in methods) for dataset in DATASETS]


def test_table_1_is_complete_and_every_cell_is_a_percentage():
    assert {(r.method, r.dataset) for r in TABLE_1} == {
        (m, d) for m in (*EARLIER, *TSP, "supervised") for d in DATASETS}
    assert len(TABLE_1) == 13 * 3
    for r in (*TABLE_1, *TABLE_2, *EXTERNAL):
        assert all(v is None or 0 < v < 100 for v in (r.nmi, r.acc, r.ari))


@pytest.mark.parametrize(("method", "dataset", "values"), [
    ("TSP-ViT1", "cifar100-20", (58.2, 54.9, 40.8, 1.4, 2.5, 2.1)),
    ("TSP K-means", "stl10", (89.2, 81.7, 80.2, 3.0, 9.2, 8.1)),
    ("K-means", "cifar10", (8.7, 22.9, 4.9, None, None, None)),
    ("supervised", "stl10", (97.0, 98.9, 97.6, None, None, None))])
def test_spot_values_of_table_1(method, dataset, values):
    r = row(method, dataset)
    assert (r.nmi, r.acc, r.ari, r.nmi_std, r.acc_std, r.ari_std) == values


def test_deviations_and_runs_belong_to_the_tsp_rows_alone_and_iic_has_accuracy_only():
    for r in TABLE_1:
        deviations = (r.nmi_std, r.acc_std, r.ari_std, r.n)
        assert (None in deviations) is (r.method not in TSP)
        assert deviations == (None,) * 4 or r.n == 10
        if r.method == "IIC":
            assert r.nmi is None and r.ari is None and r.acc is not None


def test_the_abstract_names_the_best_and_the_best_before():
    assert accs(["TSP-ViT1", "TSP-ViT2"]) == [94.0, 55.6, 97.9]
    assert accs(EARLIER) == [84.3, 47.7, 80.8]


def test_both_vits_pass_scan_and_nnm_on_every_metric_as_sec_4_2_says():
    for dataset in DATASETS:
        for vit in ("TSP-ViT1", "TSP-ViT2"):
            for earlier in ("SCAN", "NNM"):
                ours, theirs = row(vit, dataset), row(earlier, dataset)
                assert ours.acc > theirs.acc and ours.nmi > theirs.nmi and ours.ari > theirs.ari


def test_tsp_resnet_on_stl10_is_below_scan_in_accuracy_whatever_the_text_says():
    assert row("TSP-ResNet", "stl10").acc < row("SCAN", "stl10").acc < row("NNM", "stl10").acc


def test_table_2_peaks_at_10_and_is_not_quite_table_1_at_20():
    by_k = {r.n_neighbors: r for r in TABLE_2}
    assert list(by_k) == [5, 10, 15, 20, 25, 30]
    assert max(by_k, key=lambda k: by_k[k].acc) == 10
    r = by_k[30]
    assert (r.acc, r.acc_std, r.nmi, r.nmi_std) == (91.88, 0.90, 84.23, 1.12)
    assert (r.ari, r.ari_std, r.n) == (83.27, 1.59, 10)
    in_table_1 = row("TSP-ViT1", "cifar10")
    assert abs(by_k[20].acc - in_table_1.acc) < 0.05 < abs(by_k[20].nmi - in_table_1.nmi)


def test_external_rows_raise_the_bar_of_c0():
    assert accs(["SCAN + self-labelling"], EXTERNAL) == [88.3, 50.7, 80.9]
    assert accs(["SPICE"], EXTERNAL) == [91.7, 58.4, 92.9]
    assert accs(["SPICE"], EXTERNAL)[1] > accs(TSP)[1]
