"""The committed notebooks: their shape, their outputs, and the numbers that their prose states."""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = ROOT / "figures" / "offline"
MACHINE_PATH = re.compile(r"/(?:home|root|Users|tmp|work|mnt|opt|usr|private|var)/[\w.-]+"
                          r"|\b[A-Z]:\\+\w+|site-packages")
DECIMAL = re.compile(r"(?<![\w.])[-−]?\d+\.\d+(?![\d.]*\.\d)")

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str | None = None) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if kind in (None, cell["cell_type"])]


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def tags_of(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def readings_of(path: Path) -> list[tuple[str, str]]:
    """(stem of the figure's CSV, text) of the markdown cells that read a figure."""
    return [(cell["metadata"]["reading"], source_of(cell)) for cell in cells_of(path, "markdown")
            if "reading" in cell["metadata"]]


def stated_numbers(text: str) -> list[str]:
    """Numbers with a decimal point, as they are typed; formulas and section numbers left out."""
    text = re.sub(r"\$[^$]*\$|\bSecs?\.\s*[\d.]+", "", text)
    return [number.replace("−", "-") for number in DECIMAL.findall(text)]


def is_among(number: str, values: list[float]) -> bool:
    """Whether a typed number is one of the values, or 100 times it, rounded to as many decimals."""
    half = 0.5 * 10.0 ** -len(number.partition(".")[2])
    # A value just at half may be rounded either way, and the CSV keeps six digits.
    return any(abs(scale * value - float(number)) <= half * (1 + 1e-6) + 1e-5 * abs(float(number))
               for value in values for scale in (1, 100))


def values_of(stem: str) -> list[float]:
    """Every number in a figure's CSV."""
    values = []
    with (FIGURES / f"{stem}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            for entry in row:
                try:
                    values.append(float(entry))
                except ValueError:
                    continue
    return values


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
    long = [source_of(cell) for cell in cells_of(path, "code")
            if len(source_of(cell).strip().splitlines()) > 25]
    assert long == []


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
def test_numbers_of_a_reading_are_in_the_figures_csv(path):
    readings = readings_of(path)
    if not readings:
        pytest.skip("no cell reads a figure here")
    for stem, text in readings:
        assert (FIGURES / f"{stem}.csv").exists(), f"{stem}.csv is missing; run make figures"
        values = values_of(stem)
        absent = [number for number in stated_numbers(text) if not is_among(number, values)]
        assert absent == [], f"not in {stem}.csv"


def test_readings_state_numbers():
    if not PATHS:
        pytest.skip("notebooks/ holds no notebook yet")
    stating = [stem for path in PATHS for stem, text in readings_of(path) if stated_numbers(text)]
    assert len(stating) >= 3


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


def test_numbers_are_found_and_compared_as_typed():
    text = "From 33.4 (±1.6) to $x = 0.5$ 2.25 %, −1.50; Sec. 4.2, K = 20, torch 2.1.0, 0.654."
    assert stated_numbers(text) == ["33.4", "1.6", "2.25", "-1.50", "0.654"]
    assert is_among("33.4", [33.3512]) and is_among("33.4", [0.33449])
    assert not is_among("33.4", [33.46]) and not is_among("33.40", [33.3512])
    assert is_among("-1.50", [-1.4999]) and not is_among("1.5", [-1.5])
    assert not is_among("0.65", [])
    assert MACHINE_PATH.search("/".join(["", "home", "someone", "x"]))
    assert not MACHINE_PATH.search("runs/offline/x")
