"""The committed notebooks: their shape, their outputs, and the numbers that their prose states."""

import copy
import json
import re
import statistics
from pathlib import Path

import pytest
from readings import (
    PATHS,
    agrees,
    main,
    numbers_of,
    problems_of,
    retype,
    source_of,
    table_of,
    typed_like,
    value_of,
)

MACHINE_PATH = re.compile(r"/(?:home|root|Users|tmp|work|mnt|opt|usr|private|var)/[\w.-]+"
                          r"|\b[A-Z]:\\+\w+|site-packages")

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str | None = None) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if kind in (None, cell["cell_type"])]


def tags_of(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def stated(text: str) -> list[str]:
    return [found[0] for found in numbers_of(text)]


def test_the_notebooks_are_there():
    if not PATHS:
        pytest.skip("notebooks/ holds no notebook yet")
    assert PATHS[0].stem == "00_overview"
    numbers = [int(path.stem[:2]) for path in PATHS]
    assert numbers == sorted(set(numbers)) and set(range(9)) <= set(numbers)


@each
def test_one_cell_holds_the_parameters(path):
    tagged = [cell for cell in cells_of(path, "code") if "parameters" in tags_of(cell)]
    assert len(tagged) == 1 and source_of(tagged[0]).startswith('profile = "offline"')
    assert not [cell for cell in cells_of(path) if "injected-parameters" in tags_of(cell)]


@each
def test_first_cell_says_what_it_is_and_what_it_takes(path):
    first = cells_of(path)[0]
    assert first["cell_type"] == "markdown" and source_of(first).startswith("# ")
    for word in ("Question", "Afterwards", "Needs", "Takes"):
        assert word in source_of(first), f"the first cell does not say {word}"


@each
def test_code_cells_are_short(path):
    """3 to 8 lines, 20 at most: one question, one cell."""
    cells = [source_of(cell).strip().splitlines() for cell in cells_of(path, "code")]
    lengths = [len(lines) for lines in cells]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 20
    assert [line for lines in cells for line in lines if len(line) > 100] == []


@each
def test_no_path_of_a_machine(path):
    text = "\n".join(json.dumps(cell, ensure_ascii=False) for cell in cells_of(path))
    text = re.sub(r'"image/png": "[^"]*"', "", text)  # base64 holds any letters
    assert MACHINE_PATH.findall(text) == []


@each
def test_outputs_are_there_and_are_no_errors(path):
    cells = [cell for cell in cells_of(path, "code") if source_of(cell).strip()]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs, "committed without outputs; run make refresh"
    assert all(cell["execution_count"] is not None for cell in cells), "run make refresh"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [cell for cell in cells if "execution" in cell["metadata"]]  # timings


@each
def test_size_is_under_one_megabyte(path):
    assert path.stat().st_size < 1_000_000


@each
def test_numbers_of_the_prose_stand_where_their_entries_say(path):
    assert [f"{cell['id']}: {problem}" for cell in cells_of(path, "markdown")
            if {"reading", "numbers"} & set(cell["metadata"])
            for problem in problems_of(cell)] == []


@each
def test_no_decimal_is_without_an_entry(path):
    """But for the first cell's, which says how long the notebook takes."""
    assert [(cell["id"], number) for cell in cells_of(path, "markdown")[1:]
            if "numbers" not in cell["metadata"]
            for number in stated(source_of(cell)) if "." in number] == []


def test_few_decimals_are_called_no_measurement():
    if not PATHS:
        pytest.skip("notebooks/ holds no notebook yet")
    entries = [entry for path in PATHS for cell in cells_of(path, "markdown")
               for entry in cell["metadata"].get("numbers", [])
               if "." in re.split("[ :]", entry)[0]]
    measured = [entry for entry in entries if " = " in entry]
    assert len(entries) > 300 and len(measured) > 0.95 * len(entries)


@pytest.mark.parametrize("number", [f"{i:02d}" for i in range(1, 11)])
def test_exercises_and_their_solutions_at_the_end(number):
    paths = [path for path in PATHS if path.stem.startswith(number)]
    if not paths:
        pytest.skip(f"notebooks/ holds no notebook {number} yet")
    cells = cells_of(paths[0])
    exercises = [i for i, cell in enumerate(cells) if cell["cell_type"] == "markdown"
                 and re.search(r"^#+ Exercises", source_of(cell), re.M)]
    solutions = [i for i, cell in enumerate(cells) if "solution" in tags_of(cell)]
    assert len(exercises) == 1 and solutions and solutions[0] > exercises[0]
    assert solutions[-1] == len(cells) - 1, "the last cell is a solution"


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


def tables(stem):
    return {"table": TABLE, "other": OTHER}[stem]


def cell_of(text=TEXT, entries=ENTRIES):
    return {"source": text.splitlines(keepends=True),
            "metadata": {"reading": "table", "numbers": list(entries)}}


def without(i, *instead):
    return [*ENTRIES[:i], *instead, *ENTRIES[i + 1:]]


def test_a_cell_that_agrees_has_no_problem():
    assert problems_of(cell_of(), tables) == []


@pytest.mark.parametrize(("text", "entries", "said"), [
    (TEXT.replace("34.1", "34.2"), ENTRIES, "34.2 where the entries have 34.1"),
    (TEXT.replace("34.1", "34.2"), without(0, ENTRIES[0].replace("34.1", "34.2")), "it is 34.073"),
    (TEXT.replace("6,517", "6,518"), without(4, ENTRIES[4].replace("6,517", "6,518")), "is 6517"),
    (TEXT, without(0, ENTRIES[0].replace("head, K=20", "1e-4, last")), "it is 30.65"),
    (TEXT, without(0, ENTRIES[0].replace("K=20", "K=15")), "0 rows have"),
    (TEXT, without(0, ENTRIES[0].replace("method=head, K=20", "")), "2 rows have"),
    (TEXT, without(0, ENTRIES[0].replace("acc, mean", "top hub")), "it is 6517"),
    (TEXT, without(0, ENTRIES[0].replace("acc, mean", "acc")), "no column 'acc'"),
    (TEXT, without(0, ENTRIES[0].replace("method=", "methods=")), "no column 'methods'"),
    (TEXT, without(1, ENTRIES[1].replace("100 x ", "")), "it is 0.138672"),
    (TEXT, without(2, ENTRIES[2].replace("mean", "low")), "the place is empty"),
    (TEXT, without(3, ENTRIES[3].replace(" - ", " + ")), "it is 64.723"),
    (TEXT, without(3, ENTRIES[3].replace(" - ", " / ")), "was not expected"),
    (TEXT, without(4, ENTRIES[4].replace("max", "min")), "it is 72"),
    (TEXT, without(5), "10,000 where the entries have 30.6"),
    (TEXT, ENTRIES[:-1], "30.6 where the entries have no more"),
    (TEXT, [*ENTRIES, "5 = K [K=5]"], "no more numbers where the entries have 5 = K"),
    (TEXT, without(5, "10,000"), "neither"),
    (TEXT + " And 7 more.", ENTRIES, "7 where the entries have no more"),
    (TEXT.replace("34.1 and", "34.1, 12 and"), ENTRIES, "12 where the entries have 13.9"),
])
def test_what_does_not_agree_is_said(text, entries, said):
    problems = problems_of(cell_of(text, entries), tables)
    assert len(problems) == 1 and said in problems[0]


def test_numbers_are_found_as_typed():
    text = ("1. From 33.4 (±1.6) to $x = 0.5$ 2.25 %, −1.50; Sec. 4.2, Secs 3.2 and 4.5, Figs 1, "
            "2, Eqs 1 to 3, notebook 02, K = 20, log 10, 1e-4, 32-px, 1/sqrt(D), C9, CIFAR-10, "
            "ViT-S/16, consistency@5, [it](a/3.md), 0.654. Twice 5x, +2.7, 256 x 3,072; n=10, "
            "4-fold, 2-point.")
    assert stated(text) == ["33.4", "1.6", "2.25", "−1.50", "0.654", "5", "+2.7", "256", "3,072",
                            "10", "4", "2"]


def test_values_are_compared_as_typed():
    assert agrees("33.4", 33.3512) and agrees("33.4", 33.449)
    assert not agrees("33.4", 33.46) and not agrees("33.40", 33.3512)
    assert agrees("-0.56", -0.565) and agrees("-0.57", -0.565)  # exactly half
    assert not agrees("-0.57", -0.5649) and agrees("-0.57", -0.5649, slack=1e-4)
    assert agrees("−1.50", -1.4999) and not agrees("1.5", -1.5)
    assert agrees("6,517", 6517) and not agrees("6,517", 6518)
    for what, value in (("acc, mean [K=20] + -2 x other: mean []", 35.203),
                        ("all of the row [target=cifar10, method=head]", 6571.211672)):
        assert value_of(what, "table", tables)[0] == pytest.approx(value)
    with pytest.raises(ValueError, match="missing; run make figures"):
        table_of("no_such_figure")


def test_new_figures_are_typed_into_text_and_entries():
    cell, new = cell_of(), copy.deepcopy(TABLE)
    new[0] |= {"acc, mean": "33.96", "top hub": "12345"}
    by_stem = {"table": new, "other": [{"mean": "0.0004", "low": ""}]}.get
    assert retype(cell, by_stem) == [
        ("34.1", ENTRIES[0].replace("34.1", "34.0")),
        ("-0.57", ENTRIES[2].replace("-0.57", "0.00")),
        ("3.4", ENTRIES[3].replace("3.4", "3.3")),
        ("6,517", ENTRIES[4].replace("6,517", "12,345"))]
    assert problems_of(cell, by_stem) == [] and retype(cell, by_stem) == []
    assert source_of(cell) == (TEXT.replace("34.1", "34.0").replace("-0.57", "0.00")
                               .replace("3.4 more", "3.3 more").replace("6,517", "12,345"))
    assert cell["source"][0] == "# Sec. 4.2\n"
    broken = cell_of(entries=ENTRIES[:-1])
    with pytest.raises(ValueError, match="line up"):
        retype(broken, tables)
    assert broken == cell_of(entries=ENTRIES[:-1])
    assert typed_like("+2.7", 0.04) == "+0.0" and typed_like("+2.7", -1) == "-1.0"
    assert typed_like("−1.50", -2) == "−2.00" and typed_like("5", 4.6) == "5"


def test_the_tool_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "gain.csv").write_text("mean,n\n3.473,10\n", encoding="utf-8")
    right = {"cells": [
        {"cell_type": "markdown", "id": "a", "source": ["Not a reading, 10.\n"], "metadata": {}},
        {"cell_type": "markdown", "id": "b", "source": ["## β\n", "By 3.5, n = 10."],
         "metadata": {"numbers": ["3.5 = mean []", "10 = n []"], "reading": "gain"}},
        {"cell_type": "code", "id": "c", "source": ["1 + 1"], "metadata": {}}]}
    text = json.dumps(right, indent=1, ensure_ascii=False) + "\n"
    path = tmp_path / "03.ipynb"
    path.write_text(text.replace("3.5", "2.5"), encoding="utf-8")
    monkeypatch.setattr("readings.PATHS", [path])
    monkeypatch.setattr("readings.FIGURES", tmp_path)
    assert main([]) == 1 and path.read_text(encoding="utf-8") == text.replace("3.5", "2.5")
    assert capsys.readouterr().out == "03, cell 1 (b): 2.5 = mean []: it is 3.473\n"
    assert main(["--retype"]) == 0 and path.read_text(encoding="utf-8") == text
    assert capsys.readouterr().out == "03, cell 1 (b): 2.5 -> 3.5 = mean []\n"
    assert main([]) == 0 and main(["--help"]) == 2


@each
def test_the_tool_would_change_nothing_else(path):
    text = path.read_text(encoding="utf-8")
    assert json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n" == text


def test_paths_of_a_machine_are_seen():
    assert MACHINE_PATH.search("/".join(["", "home", "someone", "x"]))
    assert not MACHINE_PATH.search("runs/offline/x")
