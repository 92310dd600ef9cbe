"""Every head on the same features: tuning without labels, the table, what could not run."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.heads import code_of_the_comparison
from tsp_utils import load_study
from tsp_utils.files.paths import shipped_records
from tsp_utils.scaling import scale_features
from tsp_utils.study import head_comparison as comparison
from tsp_utils.study.head_comparison import ABLATIONS, METHODS, FeaturesToCluster, run_head
from tsp_utils.study.head_tables import heads_markdown, heads_table
from tsp_utils.systems.rivals import RIVALS


@pytest.fixture
def study(own_folders):
    return load_study("offline n_images=500 n_seeds=3 min_steps=20 batch_size=64")


@pytest.fixture
def sets(study):
    return study.fit_and_score("cifar10", "vit_nano_cpu")


@pytest.fixture
def trainings(monkeypatch) -> list:
    """Grows by one with every training."""
    trainings, train = [], FeaturesToCluster.train
    monkeypatch.setattr(FeaturesToCluster, "train",
                        lambda *args, **settings: trainings.append(1) or train(*args, **settings))
    return trainings


def compared(study, *methods):
    rows, trials = comparison.compare_heads(study, "cifar10", "vit_nano_cpu", methods)
    return rows.set_index("method"), trials


def shuffled(found):
    return replace(found, labels=np.random.default_rng(0).permutation(found.labels))


def test_consensus_is_the_majority_after_matching():
    truth, renamed = np.array([[0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1]])
    elsewhere = np.array([1, 1, 2, 0, 0, 0])  # renamed, and one image in another cluster
    odd = np.array([0, 0, 1, 1, 2, 1])  # the reference, and one against two
    for clusters, expected in (((truth, renamed, elsewhere), truth),
                               ((renamed, truth, elsewhere), renamed),
                               ((odd, truth, renamed), truth)):
        np.testing.assert_array_equal(comparison.consensus(np.stack(clusters), 0), expected)


def test_all_methods_run_and_a_seed_is_a_row(study):
    rows, trials = compared(study, *METHODS, *ABLATIONS)
    assert list(rows.index[rows["acc"].isna()]) == ["gmm"]
    assert "need at least 1290 samples, and there are 500" in rows.loc["gmm", "not_run"]
    counts = rows["acc"].groupby("method").count().drop("gmm")
    assert (counts.drop("tsp consensus") == 3).all() and counts["tsp consensus"] == 1
    assert set(trials["method"]) == set(RIVALS)
    for method, own in trials.groupby("method"):
        assert len(own) == len(comparison.TRIALS) and own["chosen"].sum() == 1
        full = own[own["least_used"] == 10]
        best = (full if len(full) else own).sort_values("loss").iloc[0]
        used = ["learning_rate", "sharpness"]
        assert rows.loc[method, used].iloc[0].tolist() == best[used].tolist()


def test_training_depends_on_the_loss_not_on_labels_nor_on_what_is_scored(
        study, sets, trainings, tmp_path, monkeypatch):
    fit, score = sets
    found = run_head(FeaturesToCluster(study, fit, score), "pica")["clusters"]
    run_head(FeaturesToCluster(study, fit, replace(score, features=score.features[:50])), "pica")
    # Four trials; the seeds that the best one trained are heads already.
    assert len(trainings) == 4
    with monkeypatch.context() as patched:
        patched.setitem(RIVALS, "pica", replace(RIVALS["pica"], loss=RIVALS["iic"].loss))
        run_head(FeaturesToCluster(study, fit, score), "pica")
    assert len(trainings) == 8
    monkeypatch.setenv("TSP_CACHE", str(tmp_path / "shuffled"))  # else it would be read back
    again = run_head(FeaturesToCluster(study, *map(shuffled, sets)), "pica")["clusters"]
    np.testing.assert_array_equal(again, found)
    assert len(trainings) == 12


@pytest.mark.parametrize("scaling", ["l2", "mean-norm", "raw"])
def test_every_scaling_reaches_the_heads(study, scaling):
    sets = study.fit_and_score("cifar10", "patch_kmeans")
    data = FeaturesToCluster(replace(study, scaling=scaling), *sets)
    for found, given in zip((data.fitted, data.scored), sets, strict=True):
        np.testing.assert_allclose(found, scale_features(given.features, scaling), rtol=1e-5)


def test_a_method_that_cannot_run_stops_no_other_and_a_fault_is_not_hidden(study, monkeypatch):
    """A batch below C is a reason, told before any trial; an error of shapes is none."""
    rows, trials = compared(replace(study, batch_size=5), "kmeans", "scan", "tsp consensus",
                            "k-means")
    assert "the nearest one is 'k-means'" in rows.loc["kmeans", "not_run"]
    assert "batches of 5 are smaller than the 10 clusters" in rows.loc["scan", "not_run"]
    assert "batches of 5" in rows.loc["tsp consensus", "not_run"] and trials.empty
    assert rows.loc["k-means", "acc"].notna().all()

    def broken(a, b, step):
        raise ValueError("shapes (3,) and (4,) do not match")

    monkeypatch.setitem(RIVALS, "scan", replace(RIVALS["scan"], loss=broken))
    with pytest.raises(ValueError, match="shapes"):
        compared(study, "scan", "k-means")


def test_the_table_pairs_by_seed():
    shared = dict(dataset="d", backbone="b", protocol="all")
    acc = dict(zip(("tsp", "scan"), np.random.default_rng(0).normal(30, 1, (2, 10)), strict=True))
    rows = pd.DataFrame([dict(shared, method="gmm", not_run="too few")] + [
        dict(shared, method=method, seed=seed, acc=value, nmi=1.0, ari=1.0, n_used=10,
             learning_rate=1e-3, sharpness=1.0)
        for method, values in acc.items() for seed, value in enumerate(values)])
    table = heads_table(rows).set_index("method")
    interval = stats.ttest_rel(acc["scan"], acc["tsp"]).confidence_interval()
    assert table.loc["scan", ["low", "high"]].tolist() == pytest.approx(list(interval))
    assert np.isnan(table.loc["tsp", "minus_tsp"]) and table.loc["gmm", "not_run"] == "too few"
    assert table.loc["scan", "acc_std"] == pytest.approx(acc["scan"].std(ddof=1))
    lines = heads_markdown(heads_table(rows), pd.DataFrame([dict(dataset="d", backbone="b",
                                                                 acc=50.0)]))
    tsp, scan = (f"{acc[m].mean():.1f} ± {acc[m].std(ddof=1):.1f}" for m in ("tsp", "scan"))
    for line in (f"| tsp | {tsp} |", f"| scan | {scan} (=) |", "| gmm | not run |",
                 "probe, with labels* | 50.00 |"):
        assert line in lines


def test_tuning_sets_emptied_clusters_aside(study, sets, monkeypatch):
    ended = {(1e-4, 1.0): (-9.0, 7), (1e-4, 10.0): (-1.0, 10), (1e-3, 1.0): (-2.0, 10),
             (1e-3, 10.0): (-8.0, 9)}  # loss and clusters in use

    def train(method, seeds, learning_rate, sharpness):
        loss, used = ended[learning_rate, sharpness]
        heads = SimpleNamespace(named_parameters=list, predict=lambda features: np.tile(
            np.arange(len(features)) % used, (3, 1)))
        return heads, np.full(len(seeds), loss)

    data = FeaturesToCluster(study, *sets)
    monkeypatch.setattr(data, "train", train)
    chosen = comparison.tune(data, "iic").query("chosen").iloc[0]
    assert (chosen["learning_rate"], chosen["sharpness"]) == (1e-3, 1.0)


def test_the_probe_keeps_train_and_test_apart_and_spectral_clustering_has_no_test(study):
    fit = study.features("cifar10", "vit_nano_cpu")
    even, odd = (replace(fit, features=fit.features[i::2], labels=fit.labels[i::2])
                 for i in (0, 1))
    with pytest.raises(comparison.NotRun, match="only clusters the images that it is fitted on"):
        comparison.scores_of(FeaturesToCluster(study, even, fit), "spectral")
    for pair in ((even, odd), (fit, fit)):  # fitted and scored on the same it is near 100
        assert 20 < comparison.linear_probe(*pair) < 80
    assert comparison.linear_probe(shuffled(fit), shuffled(fit)) < 20


def test_the_records_that_ship_are_of_these_sources_and_complete():
    records = shipped_records("heads")
    assert records["code"] == code_of_the_comparison()
    rows = pd.DataFrame(records["rows"])
    assert set(rows["method"]) == {*METHODS, *ABLATIONS}
    counts = rows.groupby(["dataset", "backbone", "method"])["acc"].count()
    assert len(counts.groupby(level=[0, 1])) == 4
    assert (counts.drop("tsp consensus", level="method") == 10).all()  # every method ran
    probes = pd.DataFrame(records["probes"]).set_index(["dataset", "backbone"])["acc"]
    best = rows.groupby(["dataset", "backbone"])["acc"].max()
    assert (probes > best).all()  # labels are worth something on every feature set
