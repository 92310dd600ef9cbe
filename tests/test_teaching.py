"""The lesson, its pictures and rehearsal, and the command that scores a student's loss."""

import re
from pathlib import Path
from xml.etree import ElementTree

import hero
import make_slides
import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import rehearse
import score_loss
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from readings import ROOT, cells_of, problems_of, source_of
from toys import CLOTHES

import tsp_utils as tsp
from tsp_utils.study import head_comparison

matplotlib.use("Agg")
DOCS = ROOT / "docs"
LESSON_PAGE, MAP_PAGE = ((DOCS / name).read_text(encoding="utf-8")
                         for name in ("teaching.md", "where_tsp_sits.md"))


def figure(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "figures" / "offline" / f"{name}.csv")


def row_of(name: str, **where) -> dict:
    table = figure(name)
    (row,) = table[(table[list(where)] == pd.Series(where)).all(axis=1)].to_dict("records")
    return row


def test_the_picture_and_the_frames_are_drawn_from_what_a_head_predicts():
    rng = np.random.default_rng(0)
    points, p = rng.random((60, 2)), rng.dirichlet(np.ones(10), (3, 60))
    p[-1] = np.eye(10)[np.arange(60) % 10]  # every cluster has members in the end
    curve = pd.DataFrame({"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "acc": [10.0, 20.0, 71.0]})
    neighbors = tsp.nearest_neighbors(rng.random((60, 8), np.float32), 20)
    found = {"images": CLOTHES, "points": points, "probabilities": p, "curve": curve,
             "neighbors": neighbors, "weights": tsp.neighbor_weights(neighbors)}
    drawn = ElementTree.fromstring(hero.hero_svg(found))
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("71 % of 2,000") for text in texts)
    assert sum("%" in text for text in texts) == 1 + 7 + 10  # in all, neighbours, clusters
    frames = [np.asarray(frame) for frame in hero.animation(found)]
    assert [frame.shape for frame in frames] == [(380, 700, 3)] * 3
    assert (frames[0] != frames[-1]).any()
    kept = hero.apart(points, 60, 0.1, first=[5])
    gaps = np.abs(points[kept][:, None] - points[kept]).max(2) + np.eye(len(kept))
    assert kept[0] == 5 and gaps.min() > 0.1


def test_the_plan_is_the_page_s_and_its_cells_are_there():
    said = re.findall(r"^\| \[(.+?)\]\(#.+?\) \| (\d+) \| .+? \| (\d) \|$", LESSON_PAGE, re.M)
    plan = [(block.title, str(block.minutes), str(block.questions)) for block in rehearse.LESSON]
    assert said == plan and sum(block.minutes for block in rehearse.LESSON) == 120
    for block, cells in rehearse.cells_of_blocks(rehearse.LESSON, ROOT / "notebooks"):
        assert cells or not block.notebook
        title = block.title  # each says all five things
        text = re.split(rf"^### {title}$", LESSON_PAGE, flags=re.M | re.I)[1].split("\n##")[0]
        for part in ("Said", "Run", "Asked first", "Misconception", "They got it"):
            assert f"**{part}" in text or title == "wrap-up", (title, part)
        asked = re.search(r"\*\*Asked first\.\*\*(.*?)\n- ", text, re.S)
        assert not asked or asked[1].count("?") == block.questions, title
    shorter = LESSON_PAGE.split("## 50 minutes")[1].split("## ")[0]
    assert sum(map(int, re.findall(r"^\| (\d+) \|", shorter, re.M))) == 50


def test_the_rehearsal_that_was_measured_is_on_the_page_and_left_slack():
    table = pd.read_csv(DOCS / "rehearsal.csv", dtype=str)
    for line in table.itertuples(index=False):
        assert f"| {' | '.join(line)} % |" in LESSON_PAGE
    took = [rehearse.Took(block, float(seconds), int(words)) for block, seconds, words in
            zip(rehearse.LESSON, table["run_s"], table["words"], strict=False)]
    assert [f"{t.minutes:.1f}" for t in took] == list(table["minutes"])[:-1]
    assert min(t.slack for t in took) >= rehearse.SLACK


def test_twenty_slides_show_one_thing_each_and_their_numbers_are_those_of_the_figures():
    page = (DOCS / "slides.md").read_text(encoding="utf-8")
    slides = make_slides.slides_of(page)
    assert len(slides) == 20 and {slide.kind for slide in slides} == set(make_slides.SHOWN)
    said = {}
    for slide in slides:
        assert len(f"{slide.title} {slide.parts.get('asked', '')}".split()) <= 30, slide.title
        assert re.match(r"\*\*(Said|Asked)\.\*\* \w", slide.notes), slide.title
        said[slide.block.lower()] = said.get(slide.block.lower(), "") + slide.notes
    assert list(said) == [block.title.lower() for block in rehearse.LESSON]
    for block, notes in said.items():
        assert "**Asked.**" in notes, block
        assert "**Misconception" in notes or block == "wrap-up", block
    for part in re.split("^### ", page, flags=re.M)[1:]:
        cell = {"source": re.sub("<!--.*?-->", "", part),
                "metadata": {"numbers": re.findall("<!-- (.*?) -->", part)}}
        assert problems_of(cell) == [], part


def test_a_slide_that_shows_no_one_thing_is_named():
    with pytest.raises(ValueError, match="The slide 'b' shows 'some text'; give it one picture"):
        make_slides.slides_of("## a\n\n### b\n\nsome text\n\n> **Said.** it\n")


def test_the_slides_are_one_file_that_loads_nothing():
    pytest.importorskip("latex2mathml", reason="needs pip install -e .[site]")
    html = make_slides.deck()
    assert len(re.findall("<section", html)) == len(re.findall(r"<aside><p>", html)) == 20
    pictures = re.findall(r"<img [^>]*src=.(data:image/[a-z+]+;base64,)", html)
    assert len(pictures) == html.count("<img") > 8 and html.count("<math") == 2
    assert not re.findall(r"<link|<iframe|@import|url\(|src=.http|href=", html)


def notebook(folder: Path, *sources: str) -> Path:
    cells = [new_markdown_cell("one two three")]
    cells += [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
    nbformat.write(new_notebook(cells=cells), folder / "lesson.ipynb")
    return folder


def test_a_rehearsal_runs_block_by_block_in_one_kernel_and_leaves_runs_alone(tmp_path):
    folder = notebook(tmp_path, "import tsp_utils as tsp\nplace = tsp.load_study('tiny').run_dir",
                      f"assert not place.is_relative_to({str(ROOT)!r})")
    blocks = (rehearse.Block("a", 1, 0, "lesson", "c0"), rehearse.Block("b", 1, 0, "lesson", "c1"),
              rehearse.Block("c", 10, 2))
    first, second, third = rehearse.rehearse(blocks, folder)
    assert (first.words, second.words, third.words) == (3, 0, 0)
    assert first.seconds > 0 and third.minutes == 4 and third.slack == 0.6
    assert "too little" in rehearse.row(third._replace(seconds=240.0))


@pytest.mark.parametrize("last, source, said", [
    ("c0", "1 / 0", "The lesson stopped in lesson.ipynb, cell c0: ZeroDivisionError: division"),
    ("c9", "1", "ends with cell 'c9', which lesson.ipynb does not have after its cell 0")])
def test_a_rehearsal_that_cannot_go_on_says_where(last, source, said, tmp_path):
    block = rehearse.Block("a", 1, 0, "lesson", last)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(said)):
        list(rehearse.rehearse((block,), notebook(tmp_path, source)))


def test_numbers_of_the_lesson_are_those_of_the_figures():
    curve = pd.read_csv(DOCS / "hero.csv")["acc"]
    metrics = row_of("02_metrics", target="cifar10", backbone="patch_kmeans")
    hubs = row_of("02_metrics", target="fashion-mnist", backbone="patch_kmeans")
    live = figure("06_live").query("arm == 'backbone'").set_index("epoch")
    agree, consistent = live["agreement with the nearest"], live["consistency@20"]
    weights = row_of("02_perplexity", target="cifar10", backbone="patch_kmeans", k=20)
    collapse, (gain,) = figure("03_collapse"), figure("03_gain").to_dict("records")
    text = " ".join(LESSON_PAGE.split())
    for said in (
            f"from {curve.iloc[0]:.1f} to {curve.min():.1f} % before it rises to "
            f"{curve.iloc[-1]:.1f} %", f"On CIFAR-10 {metrics['cosine']:.1f} % of twenty",
            f"a neighbour of {hubs['inner, top hub']:,} of the 10,000",
            f"it is {weights['perplexity']:.1f} of 20",
            f"{gain['mean']:.1f} points, {gain['low']:.1f} to {gain['high']:.1f},",
            f"The loss goes to {collapse['loss'].min():.2f}, and ACC to about "
            f"{collapse['acc'].mean():.0f},",
            f"rises from {agree[0]:.1f} to {agree[2]:.1f} %",
            f"falls from {consistent[0]:.1f} to {consistent[2]:.1f} %"):
        assert said in text, said
    assert hubs["cosine"] > 2 * hubs["inner"]


def test_ten_questions_are_answered_each_from_a_section_that_is_there():
    text = " ".join(LESSON_PAGE.split("## Ten questions, and their answers")[1].split())
    asked = re.findall(r"(\d+)\. \*\*(.+?\?)\*\* \(\[\d\d\]\(\.\./(\S+?)\), \*(.+?)\*\) (\S.+?)"
                       r"(?= \d+\. \*\*|$)", text)
    assert [int(number) for number, *_ in asked] == list(range(1, 11))
    for _, question, path, section, answer in asked:
        sources = "\n".join(map(source_of, cells_of(ROOT / path)))
        assert f"## {section}" in sources.splitlines(), (question, section)
        assert 8 < len(answer.split()) < 60


def test_every_head_has_its_place_on_the_map_and_its_accuracy():
    table = figure("heads").query("dataset == 'cifar10' and backbone == 'patch_kmeans'")
    acc = table.set_index("method")["acc_mean"]
    said = dict(re.findall(r"^\| `(.+?)` \| .* \| ([\d.]+) \|$", MAP_PAGE, re.M))
    assert said == {method: f"{value:.1f}" for method, value in acc.items()}
    assert set(head_comparison.METHODS) == set(said)
    asking = [acc[m] for m in ("tsp", "scan", "nnm", "iic", "pica", "cc")]
    assert max(asking) - min(asking) < 1 and acc["k-means"] < acc["temi"] < min(asking)
    assert max(acc["dec"], acc["secu"]) < acc["k-means"]


def test_the_worked_example_is_the_file_that_was_scored():
    assert (DOCS / "example_loss.py").read_text(encoding="utf-8") in MAP_PAGE
    table = pd.read_csv(DOCS / "example_loss.csv")
    (own,) = table.to_dict("records")
    assert score_loss.sentence(table, "example_loss") in MAP_PAGE
    assert own["low"] > 0 and own["minus_tsp"] < min(1, own["acc_std"]) and own["n"] == 10
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert ".logsumexp(-2).exp().mean(-1)" in text  # the same change, inside the library


def test_a_loss_of_one_s_own_is_scored_beside_others():
    table, probe = score_loss.score(DOCS / "example_loss.py", "tiny n_seeds=2")
    assert list(table["method"]) == ["k-means", "tsp", "example_loss"]
    assert table["acc_mean"].notna().all() and len(probe) == 1
    assert "example_loss" not in tsp.RIVALS and "example_loss" not in head_comparison.METHODS


def test_a_loss_that_was_edited_is_trained_again(tmp_path):
    path, keys = tmp_path / "edited_loss.py", set()
    for weight in (1, 2):
        path.write_text(f"def loss(a, b, step):\n    return (a * b).mean((1, 2)) * {weight}\n")
        keys.add(tsp.cache.code_of(score_loss.read_loss(path).loss))
    assert len(keys) == 2


@pytest.mark.parametrize("name, text, said", [
    ("a_loss", "x = 1", "defines no function loss; write def loss(a, b, step)"),
    ("a_loss", "def loss(", "could not be read as Python: SyntaxError"),
    ("a_loss", "def loss(a, b, step): return a.mean()", r"returns () for two heads; return one"),
    ("a_loss", "def loss(a, b, step): return 1.0", r"returns float for two heads"),
    ("a_loss", "def loss(a, b, step): return a.detach().mean((1, 2))", "cannot be trained on"),
    ("a_loss", "def loss(a, b, step): return a.mean((1, 2)) * float('nan')", "cannot be trained"),
    ("a_loss", "def loss(a, b): return a", "fails on logits [S, C, B] = [2, 5, 32]: TypeError"),
    ("a_loss", "DRAW = 'nearest'\ndef loss(a, b, step): return a", "pass one of gaussian, unif"),
    ("scan", "def loss(a, b, step): return a", "scan is a head of notebook 10 already; rename"),
    ("missing", None, "pass the Python file of a loss")])
def test_a_loss_that_cannot_be_scored_is_told_in_one_sentence(name, text, said, tmp_path):
    path = tmp_path / f"{name}.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as told:
        score_loss.read_loss(path)
    assert "\n" not in str(told.value)
