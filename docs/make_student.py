"""student/, from notebooks/: no outputs, no solutions, a box for each prediction: make student.

Tags say what a cell is: `prediction` (a box follows, and the next code cell waits for it),
`solution` (a stub takes the place of what stands between nbgrader's markers), `open` (a place for
the answer follows), `colab` (left out).
"""

import ast
import hashlib
import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
STUDENT = ROOT / "student"
REGION = re.compile(r"^( *)### BEGIN SOLUTION\n(.*?)^ *### END SOLUTION\n?", re.S | re.M)
NOTE = "\n\n*A student's copy: {boxes}write each exercise and run its check.*"
FILL = "fill each box before you run what follows, "
BOX = "# Your prediction, between the quotes; the next cell waits for it.\n{name} = \"\""
GUARD = "from checks import predicted\n\npredicted(\"{name}\", globals())  # of the box above\n\n"
FOLD = "<details>\n<summary>Our reading: open it after your own</summary>\n\n{}\n\n</details>"


def stub(region: re.Match) -> str:
    """What stands in the place of a solution: `NAME = ...` on top, in a function an exception."""
    if region[1]:
        return f"{region[1]}raise NotImplementedError(\"write this, then run the check below\")\n"
    answer = [node for node in ast.parse(region[2]).body if isinstance(node, ast.Assign)][-1]
    return f"{ast.unparse(answer.targets[0])} = ...\n"


def student_cells(notebook, name: str):
    """The cells of a student's copy, one by one."""
    n_boxes, waiting = 0, ""
    for cell in notebook.cells:
        tags, source = cell.metadata.get("tags", []), cell.source
        if "colab" in tags:
            continue
        if ("solution" in tags) != bool(REGION.search(source)):
            sys.exit(f"error: {name}, cell {cell.id}: a cell has the tag solution and nbgrader's "
                     f"markers, or neither; add what is missing.")
        if cell.cell_type == "markdown":
            folds = "reading" in cell.metadata and not source.startswith("#")
            yield new_markdown_cell(FOLD.format(source) if folds else source, id=cell.id,
                                    metadata={"tags": tags} if tags else {})
            if "prediction" in tags:
                n_boxes += 1
                waiting = f"prediction_{n_boxes}"
                yield new_code_cell(BOX.format(name=waiting), id=f"{cell.id}-box")
            if "open" in tags:
                yield new_markdown_cell("*Your answer:*", id=f"{cell.id}-answer")
            continue
        source = REGION.sub(stub, source).rstrip("\n")
        tags = [tag for tag in tags if tag not in ("solution", "nbval-check-output")]
        metadata = {key: value for key, value in cell.metadata.items() if key == "nbgrader"}
        yield new_code_cell(GUARD.format(name=waiting) + source if waiting else source, id=cell.id,
                            metadata=metadata | ({"tags": tags} if tags else {}))
        waiting = ""


def hash_of(cells) -> str:
    return hashlib.sha256("\0".join(cell.source for cell in cells).encode()).hexdigest()[:16]


def copies() -> dict[str, str]:
    """File name -> text of all that student/ holds."""
    made = {"checks.py": (ROOT / "notebooks" / "checks.py").read_text("utf-8")}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, 4)
        notebook.cells = list(student_cells(notebook, path.name))
        boxes = any(cell.id.endswith("-box") for cell in notebook.cells)
        notebook.cells[0].source += NOTE.format(boxes=FILL * boxes)
        notebook.metadata = {"kernelspec": notebook.metadata.kernelspec,
                             "student": {"made": hash_of(notebook.cells)}}
        made[path.name] = nbformat.writes(notebook).rstrip("\n") + "\n"
    return made


def worked_in(folder: Path) -> list[str]:
    """The copies whose text somebody has changed since they were made."""
    changed = []
    for path in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, 4)
        if notebook.metadata.get("student", {}).get("made") != hash_of(notebook.cells):
            changed.append(path.name)
    return changed


def write(folder: Path = STUDENT) -> None:
    made, changed = copies(), worked_in(folder)
    if changed:
        sys.exit(f"error: {', '.join(changed)} in {folder.name}/ holds somebody's answers; move it "
                 f"elsewhere, then run make student again.")
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.ipynb"):
        path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write()
