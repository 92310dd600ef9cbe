"""How many clusters: each criterion by hand or by brute force, the command, and the page."""

import re
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from toys import CLOTHES

import tsp_utils.__main__ as command
from experiments import how_many as experiment
from tsp_utils import cache, load_study, nearest_neighbors, neighbor_weights, scale_features
from tsp_utils.files.paths import REPOSITORY, shipped_records
from tsp_utils.folder import how_many
from tsp_utils.folder.how_many import candidates_between, suggest_n_clusters


def blobs(n_blobs: int = 4, n: int = 160, noise: float = 1.0, distance: float = 12.0):
    x = noise * np.random.default_rng(0).standard_normal((n, 64))
    return (x + distance * np.eye(n_blobs, 64)[np.arange(n) % n_blobs]).astype(np.float32)


@pytest.fixture(autouse=True)
def here(own_folders, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_every_criterion_finds_four_blobs_and_a_seed_gives_them_again():
    found, again = (suggest_n_clusters(blobs(), range(2, 9), random_state=0) for _ in range(2))
    assert set(found.picks.values()) == {4} and list(found.table.index) == list(range(2, 9))
    assert found.table.loc[4, "stability"] == 1 and found.table["excess_loss"].idxmin() == 4
    pd.testing.assert_frame_equal(found.table, again.table)
    rivals = experiment.rivals(found, experiment.finch(found.features), 0)
    assert {name for name, k in rivals.items() if k != 4} <= {"ward_cut"}  # UMAP pairs blobs


def test_noise_has_no_strong_clusters():
    found = suggest_n_clusters(blobs(n=120, distance=0.0), range(2, 5), random_state=0)
    assert found.picks["prediction_strength"] == 1 and found.table["stability"].max() < 0.5


def test_a_head_among_padded_ones_is_the_head_alone():
    x, rows = blobs(noise=3.0), np.arange(0, 160, 2)
    among = how_many._fit(x, rows, [4, 5, 6, 7], 0)[0]
    assert {k: p.shape for k, p in among.items()} == {k: (160, k) for k in (4, 5, 6, 7)}
    for k, probs in among.items():
        np.testing.assert_allclose(probs, how_many._fit(x, rows, [k], 0)[0][k], atol=1e-4)


def test_prediction_strength_by_hand():
    own, told = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 0])
    assert how_many.prediction_strength(own, told) == pytest.approx(1 / 3)  # 1 pair of 3, 3 of 6
    assert how_many.prediction_strength(own, 1 - own) == 1


def test_excess_loss_is_eq_5_above_its_least_value_over_that_of_chance():
    x = blobs(2, 40)
    neighbors = nearest_neighbors(x, 5)
    sure, chance = np.eye(2)[np.arange(40) % 2], np.full((40, 2), 0.5)
    assert how_many.excess_loss(sure, neighbors) == pytest.approx(0)
    assert how_many.excess_loss(chance, neighbors) == pytest.approx(1)
    p = np.random.default_rng(0).dirichlet(np.ones(3), 40)
    weights, mean = neighbor_weights(neighbors), p.mean(0)
    agree = np.take_along_axis(np.log(p @ p.T), neighbors.indices, axis=1)
    loss = 3 * (mean * np.log(mean)).sum() - (weights * agree).sum(1).mean()
    assert how_many.excess_loss(p, neighbors) == pytest.approx(
        (loss + 3 * np.log(3)) / np.log(3), rel=1e-6)


def test_eigengaps_are_those_of_the_whole_laplacian_also_where_the_graph_falls_apart():
    x = blobs(3, 120)
    neighbors = nearest_neighbors(x, 6)
    links = np.zeros((120, 120))
    np.put_along_axis(links, neighbors.indices, 1, axis=1)
    links = (links + links.T) / 2
    scale = 1 / np.sqrt(links.sum(1))
    values = np.linalg.eigvalsh(np.eye(120) - scale[:, None] * links * scale)
    gaps = how_many.eigengaps(neighbors, [2, 3, 4, 10])
    np.testing.assert_allclose(gaps, values[[2, 3, 4, 10]] - values[[1, 2, 3, 9]], atol=1e-8)
    assert gaps.argmax() == 1 and abs(values[2]) < 1e-8  # three parts


def test_finch_by_hand():
    """Angles: first neighbours make four pairs, whose means make two, which are the end."""
    angles = np.radians([0, 150, 5, 20, 155, 26, 180, 187])
    levels = experiment.finch(np.stack([np.cos(angles), np.sin(angles)], 1))
    assert [level.tolist() for level in levels] == [[0, 1, 0, 2, 1, 2, 3, 3],
                                                    [0, 1, 0, 0, 1, 0, 1, 1]]
    assert experiment.finch(np.stack([np.cos(angles[[0, 2, 3]]), np.sin(angles[[0, 2, 3]])],
                                     1)) == []  # a chain: one cluster at once


def test_ward_is_cut_where_two_merges_lie_farthest_apart():
    points = np.array([0, 1, 10, 11, 40, 41, 50, 52.0])[:, None]  # two pairs of pairs
    found = how_many.HowMany(pd.DataFrame(index=[2, 3]), {}, blobs(2, 8), points)
    assert experiment.rivals(found, [], 0)["ward_cut"] == 2


@pytest.mark.parametrize("low, high, ks", [
    (2, 30, [*range(2, 13), 14, 16, 18, 21, 24, 28, 30]), (5, 4, []), (13, 14, [13, 14]),
    (1, 2, [1, 2]), (100, 130, [100, 112, 129, 130])])
def test_few_candidates_are_all_tried_and_of_many_some_in_even_ratios(low, high, ks):
    assert candidates_between(low, high) == ks


X = blobs(n=60)


@pytest.mark.parametrize("x, options, sentence", [
    (X[:20], {}, "How many clusters 20 samples make is not told; pass 30 or more."),
    (X, {"candidates": [1, 2]}, "to try are 1 to 2, and halves of 60 samples can make 2 to 29"),
    (X, {"candidates": [5, 30]}, "to try are 5 to 30, and halves of 60 samples can make 2 to 29"),
    (X, {"candidates": []}, "to try are none"),
    (X, {"max_samples": 40, "candidates": [20]}, "halves of 40 samples can make 2 to 19"),
    (np.repeat(X[:5], 12, 0), {}, "hold 5 distinct feature vectors, too few for 29 clusters"),
    (np.where(np.arange(60)[:, None] == 7, np.nan, X), {}, "the first in row 7"),
])
def test_bad_input_is_one_sentence(x, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as told:
        suggest_n_clusters(x, **options)
    assert "\n" not in str(told.value)


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(CLOTHES.images[:40]):
        Image.fromarray(image[..., 0]).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def run(*arguments) -> int:
    return command.main(["suggest", "photos", *arguments])


def test_the_command_writes_a_table_and_a_picture_and_prints(photos, capsys, tmp_path):
    before = {path: path.read_bytes() for path in photos.iterdir()}
    assert run("--max-clusters", "4", "--backbone", "pixels") == 0
    said = capsys.readouterr().out.splitlines()
    out = tmp_path / "clusters" / "photos"
    assert sorted(path.name for path in out.iterdir()) == ["how_many.csv", "how_many.png"]
    assert Image.open(out / "how_many.png").size[0] > 900
    table = pd.read_csv(out / "how_many.csv", index_col="n_clusters")
    assert list(table.index) == [2, 3, 4] and set(how_many.WORTH) < set(table)
    assert len(said) == len(how_many.WORTH) + 3 and all(
        line.startswith(words) for line, words in zip(said, how_many.WORTH.values(), strict=False))
    assert {path: path.read_bytes() for path in photos.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"how_many\.csv is there already: pass --force"):
        run("--max-clusters", "4", "--backbone", "pixels")
    assert run("--max-clusters", "3", "--backbone", "pixels", "--force") == 0
    assert len(pd.read_csv(out / "how_many.csv")) == 2


@pytest.mark.parametrize("arguments, sentence", [
    (["--min-clusters", "1"], "to try are 1 to 19, and halves of 40 samples"),
    (["--max-clusters", "200"], "to try are 2 to 200, and halves of 40 samples"),
    (["--out", "photos/in"], "lies in the folder of the images"),
    (["--backbone", "pixel"], "the nearest one is 'pixels'")])
def test_what_cannot_be_done_leaves_nothing(photos, tmp_path, arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as told:
        run(*arguments)
    assert "\n" not in str(told.value) and not (tmp_path / "clusters").exists()
    assert len(list(photos.iterdir())) == 40


def test_without_matplotlib_nothing_is_begun(photos, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "tsp_utils.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setattr(how_many, "list_images", lambda folder: pytest.fail("work was begun"))
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        run()


def test_the_records_are_of_the_code_that_is_here_on_eight_cells_and_more():
    records = shipped_records("how_many")
    assert {record["code"] for record in records} == {cache.code_of(experiment.picks)}
    cells = {(record["dataset"], record["backbone"], record["n_classes"]) for record in records}
    assert len(cells) == 15 and {n for *_, n in cells} == {3, 5, 10, 20, 100}
    assert {record["seed"] for record in records} == {0, 1, 2}
    assert all(set(record["picks"]) | {"always 10"} == set(experiment.NAMES) for record in records)


def test_the_page_has_the_tables_of_the_records():
    page = (REPOSITORY / "docs" / "how_many_clusters.md").read_text("utf-8")
    assert all(table in page for table in experiment.tables())
    drawn = pd.read_csv(REPOSITORY / "docs" / "how_many.csv", index_col="n_clusters")
    assert (drawn["silhouette_umap"].idxmax(), drawn["excess_loss"].idxmin(),
            drawn["stability"].idxmax()) == (12, 12, 16) and "say 12;" in page
    x = scale_features(load_study("offline").features("digits", "pixels").features[:500])
    assert drawn["eigengap"].to_numpy() == pytest.approx(  # the one that needs no training
        how_many.eigengaps(nearest_neighbors(x, 20), list(drawn.index)), abs=1e-3)
    assert drawn.loc[10:, "stability"].min() > 0.85 * drawn["stability"].max()  # flat from ten on
    minutes = sum(record["seconds"] for record in shipped_records("how_many")) / 60
    assert f"({minutes:.0f} minutes of one core" in page


def test_errors_are_those_of_the_picks():
    rows = experiment.errors()
    for record in shipped_records("how_many")[:3]:
        where = rows.query("data == @record['dataset'] and backbone == @record['backbone'] "
                           "and seed == @record['seed'] and `up to` == @record['between'][1]")
        for name, k in record["picks"].items():
            error = where[where["criterion"] == name]["error"].item()
            assert error == abs(k - 10) / 10


def test_no_criterion_earns_n_clusters_auto():
    """None comes within 0.2 of K in half of the cells, as the page says; and what it says to do."""
    usual = experiment.errors().query("`up to` == 30")
    rows = usual.query("criterion != 'always 10'")
    cells = rows.groupby(["criterion", "data", "backbone", "K"])["error"].mean().round(6) <= 0.2
    assert cells.groupby("criterion").mean().max() < 1 / 2
    told = experiment.together(usual).set_index("the three")
    assert float(told.loc["agree on more than 2", "mean error of their median"]) < 0.2
    assert told.loc["agree on 2", "within 0.2"] == "0"


def test_what_the_three_say_together_by_hand():
    said = dict(zip(how_many.WORTH, [(8, 2, 3, 10), (8, 2, 3, 2), (10, 2, 4, 5)], strict=True))
    rows = pd.DataFrame([
        {"data": "a", "backbone": "b", "K": 10, "seed": seed, "criterion": name, "picked": k}
        for name, picked in said.items() for seed, k in enumerate(picked)])
    told = experiment.together(rows).set_index("the three")
    assert told["runs"].to_dict() == {"agree on more than 2": "1", "agree on 2": "1",
                                      "do not agree": "2"}  # 3, 3, 4: a third apart
    assert told.loc["agree on more than 2"].tolist()[1:] == ["0.20", "0.20", "1"]
    assert told.loc["do not agree"].tolist()[1:] == ["0.60", "0.70", "0"]
