"""The committed notebooks: their shape, their outputs, and the numbers that their prose states."""

import copy
import json
import re
import statistics

import pytest
import readings
from readings import FIGURES, PATHS, cells_of, problems_of, retype, source_of

MACHINE_PATH = re.compile(r"/(?:home|root|Users|tmp|work|mnt|opt|usr|private|var)/[\w.-]+"
                          r"|\b[A-Z]:\\+\w+|site-packages")

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def tagged(cells: list[dict], tag: str) -> list[dict]:
    return [cell for cell in cells if tag in cell["metadata"].get("tags", [])]


def stated(text: str) -> list[str]:
    return [found[0] for found in readings.numbers_of(text)]


def test_the_notebooks_are_numbered_from_the_overview_on():
    assert PATHS[0].stem == "00_overview"
    assert [int(path.stem[:2]) for path in PATHS] == list(range(len(PATHS))) and len(PATHS) >= 9


@each
def test_its_cells_are_those_of_a_lesson(path):
    cells, code = cells_of(path), cells_of(path, "code")
    (parameters,) = tagged(code, "parameters")
    assert source_of(parameters).startswith('profile = "offline"')
    assert not tagged(cells, "injected-parameters")
    first = source_of(cells[0])
    assert cells[0]["cell_type"] == "markdown" and first.startswith("# ")
    for word in ("Question", "Afterwards", "Needs", "Takes"):
        assert word in first, f"the first cell does not say {word}"
    lines = [source_of(cell).strip().splitlines() for cell in code]
    lengths = [len(lines_of_one) for lines_of_one in lines]  # one question, one cell
    assert statistics.median(lengths) <= 8 and max(lengths) <= 20
    assert [line for lines_of_one in lines for line in lines_of_one if len(line) > 100] == []
    (exercises,) = [cell for cell in cells if cell["cell_type"] == "markdown"
                    and re.search(r"^#+ Exercises", source_of(cell), re.M)]
    last = cells[cells.index(exercises) + 1:]  # questions, solutions and checks (test_student.py)
    assert last and tagged(last, "exercise") == last
    assert tagged(cells, "solution") == tagged(last, "solution") != []


def test_no_figure_is_over_200_kb():
    sizes = [path.stat().st_size for path in FIGURES.rglob("*.png")]
    assert len(sizes) > 60 and max(sizes) < 200_000


@each
def test_the_file_is_small_holds_no_path_of_a_machine_and_is_laid_out_as_the_tool_would(path):
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 1_000_000
    assert json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n" == text
    cells = json.dumps(cells_of(path), ensure_ascii=False)
    assert MACHINE_PATH.findall(re.sub(r'"image/png": "[^"]*"', "", cells)) == []  # base64
    assert MACHINE_PATH.findall("runs/offline/x, " + "/".join(["", "home", "me"])) == ["/home/me"]


@each
def test_outputs_are_there_are_no_errors_and_where_they_are_compared_have_no_bar(path):
    cells = [cell for cell in cells_of(path, "code") if source_of(cell).strip()]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs, "committed without outputs; run make refresh"
    assert all(cell["execution_count"] is not None for cell in cells), "run make refresh"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [cell for cell in cells if "execution" in cell["metadata"]]  # timings
    # With an empty cache a training's bar would be a part of its output.
    assert not [cell["id"] for cell in tagged(cells, "nbval-check-output")
                if re.search(r"^\S.*study\.train\(", source_of(cell), re.M)]


@each
def test_numbers_of_the_prose_stand_where_their_entries_say_and_each_decimal_has_one(path):
    cells = cells_of(path, "markdown")
    assert [f"{cell['id']}: {problem}" for cell in cells
            if {"reading", "numbers"} & set(cell["metadata"])
            for problem in problems_of(cell)] == []
    # But for those of the first cell, which says how long the notebook takes.
    assert [(cell["id"], number) for cell in cells[1:] if "numbers" not in cell["metadata"]
            for number in stated(source_of(cell)) if "." in number] == []


@each
def test_sentences_are_short_and_carry_three_numbers_at_most(path):
    """As those of the pages; exercises are left out, whose numbers are settings."""
    sentences = [sentence for cell in cells_of(path, "markdown") if "-ex" not in cell["id"]
                 for sentence in readings.sentences_of(source_of(cell))]
    assert len(sentences) > 20 and not [s for s in sentences if readings.too_long(s)]


def test_few_decimals_are_called_no_measurement():
    entries = [entry for path in PATHS for cell in cells_of(path, "markdown")
               for entry in cell["metadata"].get("numbers", [])
               if "." in re.split("[ :]", entry)[0]]
    measured = [entry for entry in entries if " = " in entry]
    assert len(entries) > 300 and len(measured) > 0.95 * len(entries)


# The check itself: it must be able to fail.

TABLE = [{"target": "cifar10", "method": "head", "K": "20", "acc, mean": "34.073",
          "share": "0.138672", "top hub": "6517"},
         {"target": "cifar10", "method": "1e-4, last", "K": "5", "acc, mean": "30.65",
          "share": "0.5", "top hub": "72"}]
OTHER = [{"mean": "-0.565", "low": ""}]
TEXT = ("# Sec. 4.2\n\nAt K = 20 on CIFAR-10 (C9, `x = 0.5`, $y = 0.5$) the head has 34.1 and "
        "13.9 %, against -0.57; 3.4 more, and 6,517 images of 10,000. From 30.6 on.")
ENTRIES = ["34.1 = acc, mean [method=head, K=20]", "13.9 = 100 x share [K=20]",
           "-0.57 = other: mean []",
           "3.4 = acc, mean [method=head] - acc, mean [method=1e-4, last, target=cifar10]",
           "6,517 = max top hub []", "10,000: images", "30.6 = acc, mean [method=1e-4, last]"]
tables = {"table": TABLE, "other": OTHER}.get


def cell_of(text=TEXT, entries=ENTRIES):
    return {"source": text.splitlines(keepends=True),
            "metadata": {"reading": "table", "numbers": list(entries)}}


@pytest.mark.parametrize(("i", "old", "new", "said"), [
    (0, "method=head, K=20", "method=1e-4, last", "it is 30.65"), (0, "K=20", "K=15", "0 rows"),
    (0, "method=head, K=20", "", "2 rows have"), (0, "acc, mean", "top hub", "it is 6517"),
    (0, "acc, mean", "acc", "no column 'acc'"), (0, "method=", "methods=", "no column 'methods'"),
    (1, "100 x ", "", "it is 0.138672"), (2, "mean", "low", "the place is empty"),
    (3, " - ", " + ", "it is 64.723"), (3, " - ", " / ", "was not expected"),
    (4, "max", "min", "it is 72"), (5, ": images", "", "neither"),
    (0, "34.1", "34.2", "it is 34.073"), (4, "6,517", "6,518", "it is 6517"),  # in the text, too
])
def test_an_entry_that_is_wrong_is_said(i, old, new, said):
    entries = [*ENTRIES[:i], ENTRIES[i].replace(old, new), *ENTRIES[i + 1:]]
    text = TEXT.replace(old, new) if old[0].isdigit() and old[-1] != " " else TEXT
    (problem,) = problems_of(cell_of(text, entries), tables)
    assert said in problem and problems_of(cell_of(), tables) == []


@pytest.mark.parametrize(("text", "entries", "said"), [
    (TEXT.replace("34.1", "34.2"), ENTRIES, "34.2 where the entries have 34.1"),
    (TEXT, [*ENTRIES[:5], ENTRIES[6]], "10,000 where the entries have 30.6"),
    (TEXT, ENTRIES[:-1], "30.6 where the entries have no more"),
    (TEXT, [*ENTRIES, "5 = K [K=5]"], "no more numbers where the entries have 5 = K"),
    (TEXT.replace("34.1 and", "34.1, 12 and"), ENTRIES, "12 where the entries have 13.9")])
def test_a_text_and_entries_that_do_not_line_up_are_said_and_not_retyped(text, entries, said):
    cell = cell_of(text, entries)
    (problem,) = problems_of(cell, tables)
    assert said in problem
    with pytest.raises(ValueError, match=re.escape(said)):
        retype(cell, tables)
    assert cell == cell_of(text, entries)


def test_numbers_are_found_as_typed():
    text = ("1. From 33.4 (±1.6) to $x = 0.5$ 2.25 %, −1.50; Sec. 4.2, Secs 3.2 and 4.5, Figs 1, "
            "2, Eqs 1 to 3, notebook 02, K = 20, log 10, 1e-4, 32-px, 1/sqrt(D), C9, CIFAR-10, "
            "ViT-S/16, consistency@5, [it](a/3.md), 0.654. Twice 5x, +2.7, 256 x 3,072; n=10, "
            "4-fold, 2-point.")
    assert stated(text) == ["33.4", "1.6", "2.25", "−1.50", "0.654", "5", "+2.7", "256", "3,072",
                            "10", "4", "2"]


@pytest.mark.parametrize(("typed", "value", "agreed"), [
    ("33.4", 33.3512, True), ("33.4", 33.449, True), ("33.4", 33.46, False),
    ("33.40", 33.3512, False), ("-0.56", -0.565, True), ("-0.57", -0.565, True),  # exactly half
    ("-0.57", -0.5649, False), ("−1.50", -1.4999, True), ("1.5", -1.5, False),
    ("6,517", 6517, True), ("6,517", 6518, False)])
def test_values_are_compared_as_typed(typed, value, agreed):
    assert readings.agrees(typed, value) is agreed


def test_values_are_computed_and_as_certain_as_six_digits():
    for what, value in (("acc, mean [K=20] + -2 x other: mean []", 35.203),
                        ("all of the row [target=cifar10, method=head]", 6571.211672)):
        assert readings.value_of(what, "table", tables)[0] == pytest.approx(value)
    assert readings.agrees("-0.57", -0.5649, slack=1e-4)
    with pytest.raises(ValueError, match="missing; run make figures"):
        readings.table_of("no_such_figure")


def test_new_figures_are_typed_into_text_and_entries():
    cell, new = cell_of(), copy.deepcopy(TABLE)
    new[0] |= {"acc, mean": "33.96", "top hub": "12345"}
    by_stem = {"table": new, "other": [{"mean": "0.0004", "low": ""}]}.get
    text, expected = TEXT, []
    for i, old, new in ((0, "34.1", "34.0"), (2, "-0.57", "0.00"), (3, "3.4", "3.3"),
                        (4, "6,517", "12,345")):
        text = text.replace(f" {old}", f" {new}")
        expected.append((old, ENTRIES[i].replace(old, new)))
    assert retype(cell, by_stem) == expected
    assert problems_of(cell, by_stem) == [] and source_of(cell) == text
    for old, value, like in (("+2.7", 0.04, "+0.0"), ("+2.7", -1, "-1.0"), ("−1.50", -2, "−2.00"),
                             ("5", 4.6, "5")):
        assert readings.typed_like(old, value) == like


def test_the_tool_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "gain.csv").write_text("mean,n\n3.473,10\n", encoding="utf-8")
    right = {"cells": [
        {"cell_type": "markdown", "id": "a", "source": ["Not a reading, 10.\n"], "metadata": {}},
        {"cell_type": "markdown", "id": "b", "source": ["## β\n", "By 3.5, n = 10."],
         "metadata": {"numbers": ["3.5 = mean []", "10 = n []"], "reading": "gain"}}]}
    text = json.dumps(right, indent=1, ensure_ascii=False) + "\n"
    path = tmp_path / "03.ipynb"
    path.write_text(text.replace("3.5", "2.5"), encoding="utf-8")
    monkeypatch.setattr("readings.PATHS", [path])
    monkeypatch.setattr("readings.FIGURES", tmp_path)
    for arguments, said, left in (([], "2.5 = mean []: it is 3.473\n", text.replace("3.5", "2.5")),
                                  (["--retype"], "2.5 -> 3.5 = mean []\n", text)):
        assert readings.main(arguments) == (arguments == [])
        assert path.read_text(encoding="utf-8") == left
        assert capsys.readouterr().out == f"03, cell 1 (b): {said}"
    assert readings.main([]) == 0 and readings.main(["--help"]) == 2
