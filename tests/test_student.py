"""The exercises and the students' copies: solutions pass, stubs fail, each in one sentence."""

import json
import re
from functools import cache
from pathlib import Path

import checks
import make_student
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from readings import PATHS, ROOT, cells_of, source_of

QUESTION = re.compile(r"### Exercise (\d) \((warm-up|code|break it on purpose|open)\)\n\n")


def tags_of(cell) -> list[str]:
    return cell["metadata"].get("tags", [])


@cache
def exercises() -> dict[str, dict[str, str]]:
    """"03.2" -> its kind, and the text of its solution and check."""
    found, number = {}, None
    for path in PATHS:
        for cell in cells_of(path):
            if asked := QUESTION.match(source_of(cell)):
                number = f"{path.stem[:2]}.{asked[1]}"
                found[number] = {"kind": asked[2]}
            elif "solution" in tags_of(cell):
                found[number]["solution"] = source_of(cell)
            elif "check" in tags_of(cell):
                found[number]["check"] = source_of(cell)
    return found


CHECKED = [number for number, parts in exercises().items() if parts["kind"] != "open"]
each = pytest.mark.parametrize("number", CHECKED)


@cache
def set_up(notebook: str) -> dict:
    """The names after the cell that begins a notebook's exercises."""
    (source,) = [source_of(cell) for path in PATHS if path.stem[:2] == notebook
                 for cell in cells_of(path, "code")
                 if source_of(cell).startswith("# For the exercises")]
    names = {}
    exec(source, names)
    return names


def answer_of(number: str) -> str:
    """The name that an exercise asks for."""
    check = exercises()[number]["check"]
    return re.search(rf'with check\("{re.escape(number)}", "(\w+)"\):', check)[1]


def told(number: str, code: str = "", **names) -> str:
    """What the check says after this code in the place of the solution; "" where it passes."""
    names = set_up(number[:2]) | names
    exec(code, names)
    try:
        exec(exercises()[number]["check"], names)
    except checks.NotYet as error:
        return str(error)
    return ""


def is_one_sentence(text: str, number: str) -> bool:
    return bool(re.fullmatch(rf"Exercise {re.escape(number)}: [^\n]{{20,300}}[^.]\.", text)
                and not re.search(r"[.?!] [A-Z]", text[len("Exercise 03.2: "):]))


def test_there_are_thirty_of_four_kinds_of_which_three_are_discussed_and_each_names_a_mistake():
    kinds = [parts["kind"] for parts in exercises().values()]
    assert len(kinds) == 30 and len(CHECKED) == 27 and kinds.count("open") == 3
    assert set(kinds) == {"warm-up", "code", "break it on purpose", "open"}
    for path in PATHS:
        assert sum(number[:2] == path.stem[:2] for number in exercises()) >= 2, path.stem
    pages = (ROOT / "docs" / "rubrics.md").read_text(encoding="utf-8")
    for number, parts in exercises().items():
        has_rubric = f"## {number} " in pages
        assert has_rubric == (parts["kind"] == "open") == ("check" not in parts), number
    assert len(set(map(answer_of, CHECKED))) == 27
    assert {number for number, *_ in MISTAKES} == set(CHECKED)


@each
def test_its_solution_passes_and_its_stub_does_not(number, capsys):
    """By `make student`, and as nbgrader writes it."""
    solution = exercises()[number]["solution"]
    assert told(number, solution) == ""
    assert capsys.readouterr().out == f"Exercise {number}: right.\n"
    stub = make_student.REGION.sub(make_student.stub, solution)
    assert ("raise NotImplementedError(" in stub) != bool(re.search(r"^\w+ = \.\.\.$", stub, re.M))
    said = told(number, stub)
    assert is_one_sentence(said, number) and "is not written yet" in said
    if "def " in solution:
        said = told(number, make_student.REGION.sub(r"\1raise NotImplementedError()\n", solution))
        assert "is not written yet" in said


@each
def test_an_answer_of_a_wrong_shape_or_kind_gets_a_sentence(number):
    name, is_function = answer_of(number), "def " in exercises()[number]["solution"]
    for wrong in (np.zeros((1, 2, 3)), "some text", None, {}, np.nan):
        given = (lambda *_, wrong=wrong, **__: wrong) if is_function else wrong
        said = told(number, **{name: given})
        assert is_one_sentence(said, number), said


@each
def test_out_of_order_it_says_which_cell_to_run(number):
    check, solution = exercises()[number]["check"], exercises()[number]["solution"]
    above = f"`{answer_of(number)}` is not there; run the cell above this one first"
    cases = [({}, "is not there; run the cell"), (set_up(number[:2]), above)]
    if "def " in solution:  # the cells of the exercise, and not the one that sets up
        cases.append(({}, 'begins with "For the exercises"'))
        exec(solution, cases[-1][0])
    for names, said in cases:
        with pytest.raises(checks.NotYet, match=said) as stopped:
            exec(check, dict(names))
        assert is_one_sentence(str(stopped.value), number)


MISTAKES = [  # exercise, what a student may write, what the check says
    ("00.1", "of_networks = [c.id for c in tsp.CLAIMS if c.unit == 'head']", "decided by heads"),
    ("00.2", "def lead(a, b): return [r.acc for r in tsp.TABLE_1 if r.method == a]",
     "take its rival's"),
    ("01.1", "def my_scale(x): return x / np.linalg.norm(x, axis=1).mean()", "mean length is 1"),
    ("01.1", "def my_scale(x): return tsp.scale_features(x, 'l2')", "a scalar of its own"),
    ("01.2", "def stretch(x): return 2 * x", "lengths differ more"),
    ("01.2", "def stretch(x): return x + 5 * np.random.default_rng(0).normal(size=x.shape)",
     "moved"),
    ("02.1", "share = tsp.label_consistency(tsp.nearest_neighbors(vectors, 50), labels)\n"
             "curve = share[[4, 19, 49]]", "these are fractions"),
    ("02.1", "share = tsp.label_consistency(tsp.nearest_neighbors(vectors, 51), labels)\n"
             "curve = 100 * share[[5, 20, 50]]", "one too far"),
    ("02.2", "def my_perplexity(w): return -(w * np.log(w)).sum(1)", "this is the entropy"),
    ("02.2", "def my_perplexity(w): return np.exp(-(w * np.log(w)).sum(1))", "weight of 0"),
    ("02.3", "def make_hub(x):\n    x[0] = x.mean(0)\n    return x", "by the inner product"),
    ("03.1", "def at_start(c, weight): return np.log(c)", "entropy term is missing"),
    ("03.2", "def my_safe_loss(a, b, weight=3.0): return tsp.tsp_loss(a, b, 0.0)[0]",
     "your loss is missing the entropy term"),
    ("03.2", "def my_safe_loss(a, b, weight=3.0):\n    p, q = a.softmax(1), b.softmax(1)\n"
             "    m = p.mean(0)\n"
             "    return weight * (m * m.log()).sum() - (p * q).sum(1).log().mean()",
     "still meet log\\(0\\)"),
    ("03.3", "def renumber(first, proba): return proba", "as they came"),
    ("03.3", "def renumber(first, proba):\n"
             "    return proba[:, tsp.match_clusters(first, proba.argmax(1))]", "turned round"),
    ("03.4", "def collapse(n, c): return np.zeros((n, c))", "be surer"),
    ("04.1", "def sharper(d, share): return tsp.neighbor_perplexity(tsp.neighbor_weights("
             "tsp.nearest_neighbors(vectors, 20))).mean()", "does `share` reach sigma"),
    ("04.2", "def equivalent(d, m):\n    _, low, high = tsp.t_interval(d)\n"
             "    return low < 0 < high", "not significant is not equivalent"),
    ("04.2", "def equivalent(d, m):\n    _, low, high = tsp.t_interval(d)\n"
             "    return -m < low and high < m", "the rule takes 90 %"),
    ("05.1", "def certainty(row_norm): return 10.0", "all probabilities average"),
    ("05.2", "def random_rows(c, d, seed):\n    r = np.random.default_rng(seed).random((c, d))\n"
             "    return r / np.linalg.norm(r, axis=1, keepdims=True) / np.sqrt(d)", "one corner"),
    ("06.1", "def train_last_only(network): network.requires_grad_(False)", "nothing learns"),
    ("06.2", "def cheat(n, c): return np.tile(50 * np.eye(c)[0], (n, 1))", "not equally used"),
    ("07.1", "def follow(t, s, m): return m * s + (1 - m) * t", "follows too fast"),
    ("07.1", "def follow(t, s, m): return t.weight", "`follow` stopped with AttributeError: 'numpy."
     "ndarray' object has no attribute 'weight'"),
    ("07.2", "def two_collapses(n, o): return np.zeros((2, n, o))", "more than one output"),
    ("08.1", "def verdict_of(mean, low, high, m): return 'holds' if low > 0 else 'inconclusive'",
     "ends below the margin"),
    ("08.2", "def significant_but_small(): return [5.0, 5.1] * 5", "keep the interval below two"),
    ("09.1", "def overstated(acc): return acc.max() - acc.mean()", "best head of all colleagues"),
    ("09.2", "def sureness(k): return 1 / k", "average to 1 / k"),
    ("10.1", "def my_cc(p, q):\n    h = lambda m: (m.mean(0) * m.mean(0).log()).sum()\n"
             "    loss = tsp.RIVALS['cc'].loss(p.log().T[None], q.log().T[None], None)[0]\n"
             "    return loss - h(p) - h(q)", "missing the entropy term"),
    ("10.2", "def fools_dac(n, c): return np.eye(c)[np.arange(n) % c]", "give each the same"),
    ("11.1", "def kmeans_acc(s): return 100 * (tsp.kmeans(tsp.scale_features(vectors, s), 10, [0])"
             ".clusters[0] == labels).mean()", "were not matched"),
    ("11.2", "def blur(x, s, rng): return x + s * x.std(0) * rng.normal(size=x.shape[1])",
     "the same noise"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the mistakes
@pytest.mark.parametrize("number, code, said", MISTAKES)
def test_a_known_mistake_is_named(number, code, said):
    text = told(number, code)
    assert is_one_sentence(text, number) and re.search(said, text), text


def test_jupyter_shows_the_sentence_alone():
    """In a kernel: no traceback, and the cells after it do not run."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = new_notebook(cells=[new_code_cell(exercises()["03.4"]["check"]), new_code_cell("1")])
    client = NotebookClient(notebook, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    with pytest.raises(CellExecutionError):
        client.execute()
    (output,) = notebook.cells[0].outputs
    (line,) = output.traceback
    assert line.startswith("Exercise 03.4: `") and notebook.cells[1].execution_count is None


# The copies.


def test_the_copies_are_fresh():
    """A changed notebook wants `make student`."""
    made = make_student.copies()
    there = {path.name for path in make_student.STUDENT.iterdir()} - {"__pycache__",
                                                                      ".ipynb_checkpoints"}
    assert there == set(made) == {path.name for path in PATHS} | {"checks.py"}
    parsed = {".ipynb": json.loads, ".py": str}  # how JSON is laid out is nbformat's
    old = [name for name, text in made.items() for read in [parsed[Path(name).suffix]]
           if read((make_student.STUDENT / name).read_text(encoding="utf-8")) != read(text)]
    assert old == [], f"run make student: {old}"


@pytest.fixture(scope="module")
def copies() -> dict:
    return {name: nbformat.reads(text, 4) for name, text in make_student.copies().items()
            if name.endswith(".ipynb")}


def test_a_copy_has_no_outputs_no_solutions_its_stubs_and_folds_what_is_read_later(copies):
    stubs = 0
    for path in PATHS:
        notebook = copies[path.name]
        nbformat.validate(notebook)
        for cell in notebook.cells:
            assert "solution" not in tags_of(cell) and "jupyter" not in cell.metadata
            assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        shown = {cell.id: cell.source for cell in notebook.cells}
        text = "\n".join(shown.values())
        assert "SOLUTION" not in text and "OWNER" not in text  # an address would make it stale
        stubs += len(re.findall(r"^ +raise NotImplementedError\(|^\w+ = \.\.\.$", text, re.M))
        for cell in cells_of(path):
            source = source_of(cell)
            if "solution" in tags_of(cell):
                (inside,) = make_student.REGION.findall(source)
                assert inside[1] not in text
            elif "reading" in cell["metadata"] and not source.startswith("#"):
                assert shown[cell["id"]].startswith("<details>") and source in shown[cell["id"]]
    assert stubs == 27


def test_every_prediction_has_a_box_and_the_next_cell_waits(copies):
    n_boxes = 0
    for path in PATHS:
        asked = [cell["id"] for cell in cells_of(path, "markdown")
                 if "**Make a prediction" in source_of(cell)]
        assert asked == [cell["id"] for cell in cells_of(path) if "prediction" in tags_of(cell)]
        code = [cell for cell in copies[path.name].cells if cell.cell_type == "code"]
        boxes = [i for i, cell in enumerate(code) if cell.id.endswith("-box")]
        assert [code[i].id for i in boxes] == [f"{name}-box" for name in asked]
        for i in boxes:
            n_boxes += 1
            guard = "\n".join(code[i + 1].source.split("\n\n")[:2])
            box = re.search(r"^(prediction_\d) = \"\"$", code[i].source, re.M)[1]
            for before, said in ((code[i].source, "is empty; write your prediction"),
                                 (f"{box} = '  '", "is empty"), ("", "is not there; run the box")):
                with pytest.raises(checks.NotYet, match=f"^`{box}` {said}[^.]*.$"):
                    exec(f"{before}\n{guard}", {})
            exec(f"{box} = 'falls'\n{guard}", {})
    assert n_boxes == 19


def test_answers_are_not_overwritten(tmp_path):
    folder = tmp_path / "student"
    make_student.write(folder)
    make_student.write(folder)  # nobody worked there
    path = folder / PATHS[3].name
    path.write_bytes(path.read_bytes().replace(b'prediction_1 = \\"\\"',
                                               b'prediction_1 = \\"falls\\"'))
    (folder / "mine.ipynb").write_text(nbformat.writes(new_notebook()), encoding="utf-8")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(SystemExit, match=rf"^error: {path.name}, mine.ipynb in student/ holds "
                                         r"somebody's answers; move it elsewhere"):
        make_student.write(folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("source, tags", [("x = 1", ["solution"]), (
    "### BEGIN SOLUTION\nx = 1\n### END SOLUTION", [])])
def test_a_cell_that_is_half_a_solution_is_named(source, tags):
    cell = new_code_cell(source, id="half", metadata={"tags": tags})
    with pytest.raises(SystemExit, match=r"^error: 03\.ipynb, cell half: a cell has the tag"):
        list(make_student.student_cells(new_notebook(cells=[cell]), "03.ipynb"))


def test_the_cells_carry_what_nbgrader_wants():
    """Its schema 3: solutions are written by students, checks are locked and worth a point."""
    seen = set()
    for cell in (cell for path in PATHS for cell in cells_of(path, "code")):
        found = {"solution", "check"} & set(tags_of(cell))
        grader = cell["metadata"].get("nbgrader", {})
        assert bool(found) == bool(grader)
        if found:
            grades = found == {"check"}
            printed = "".join("".join(output["text"]) for output in cell["outputs"])
            assert bool(re.fullmatch(r"Exercise \d\d\.\d: right\.\n", printed)) == grades
            assert grader["grade"] == grader["locked"] == grades == (not grader["solution"])
            assert grader["schema_version"] == 3
            assert grader.get("points") == (1 if grades else None)
            seen.add(grader["grade_id"])
            assert grades or cell["metadata"]["jupyter"] == {"source_hidden": True}
    assert len(seen) == 54
