"""The numbers in the notebooks' prose: found as typed, looked up where they stand, retyped.

A Markdown cell that reads a figure says in its metadata which CSV it reads and what each number of
its text is, one entry a number, in the order of the text:

    "reading": "03_table1",
    "numbers": ["30.6 = acc_mean [backbone=patch_kmeans, method=k-means]",
                "13.9 = 100 x 03_curves: largest_share [epoch=1]",
                "13 = ari [weight=1.5] - ari [weight=3]",
                "95: of the interval"]

`TYPED = COLUMN [ROW]` is a measurement. The row is named by its values (`a|b` for either), and
exactly one row must have them; `[]` is the only row of a table, `max COLUMN [...]` and `min` take
the largest and the smallest of several, the column `all of the row` is the row's sum. `STEM:`
before the column is another CSV of figures/offline (`small/claims:` one of another profile), and
`100 x` a factor. `TYPED: REASON` is no measurement: a setting, a published number.

Not looked at: code, formulas, links, numbers of exercises, sections, figures, tables, equations and
notebooks, `K = 20`, `log 10`, `32-px`, 1e-4, and what is joined to a letter before it: CIFAR-10,
C9. Numbers as words (half, ten) are the author's to keep.

    python tests/readings.py            # say what does not agree
    python tests/readings.py --retype   # write the figures' numbers into the prose and the entries
"""

import contextlib
import csv
import json
import re
import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = ROOT / "figures"
SKIPPED = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)"  # code, formulas, links
    r"|^[ \t]*\d+\.(?= )"  # an exercise
    r"|\b(?:Sec\.|Sections?|Fig\.|Eq\.|Table|[Nn]otebook) \d+(?:\.\d+)?"
    r"|\b(?:Secs|Figs|Eqs|Tables|[Nn]otebooks) \d+(?:\.\d+)?(?:(?:, | and | to )\d+(?:\.\d+)?)*"
    r"|\bK = \d+|\blog \d+|\b\d+-px\b|\b\d+(?:\.\d+)?e[-+]?\d+\b|\b\d+/(?=[A-Za-z])"
    r"|[A-Za-z_][\w@/-]*", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
ENTRY = re.compile(r"(?P<typed>[^\s:]+)(?: = (?P<what>.+)|: (?P<why>\S.*))")
TERM = re.compile(r"(?:(?P<factor>-?\d+(?:\.\d+)?) x )?(?:(?P<stem>[\w/]+): )?"
                  r"(?:(?P<pick>max|min) )?(?P<column>[^][]+) \[(?P<where>[^][]*)\]")


def sentences_of(page: str) -> list[str]:
    """Sentences of a page's prose: no code, tables, badges or headings; a link counts its text."""
    text = re.sub(r"```.*?```|<!--.*?-->|\$\$.*?\$\$", "", page, flags=re.S)
    text = re.sub(r"\n\n(?: {4,}[^-\s].*\n)+", "\n\n", text)
    lines = [line for line in text.splitlines() if not re.match(r"#|\||\[?!\[", line)]
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    text = re.sub(r"`[^`]*`", "code", text)
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|(?<=[.!?·])\*{0,2}\s", text)
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def too_long(sentence: str) -> bool:
    """More than 30 words, or more than three numbers."""
    numbers = re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?", sentence)
    return len(sentence.split()) > 30 or len(numbers) > 3


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def cells_of(path: Path, kind: str | None = None) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if kind in (None, cell["cell_type"])]


def code_of(path: Path) -> str:
    return "\n".join(source_of(cell) for cell in cells_of(path, "code"))


def numbers_of(text: str) -> list[re.Match]:
    """The numbers of a text that need an entry, with their places."""
    return list(NUMBER.finditer(SKIPPED.sub(lambda found: " " * len(found[0]), text)))


def table_of(stem: str) -> list[dict[str, str]]:
    """The rows of a figure's CSV."""
    path = FIGURES / f"{stem if '/' in stem else 'offline/' + stem}.csv"
    if not path.exists():
        raise ValueError(f"{path.relative_to(ROOT)} is missing; run make figures")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def value_of(what: str, stem: str | None, tables=table_of) -> tuple[float, float]:
    """(value, its uncertainty: six digits are kept) of `COLUMN [ROW] - COLUMN [ROW]`."""
    total = slack = 0.0
    place, sign = 0, 1
    while True:
        term = TERM.match(what, place)
        if not term or not (term["stem"] or stem):
            raise ValueError("not of the form COLUMN [ROW]")
        value = sign * float(term["factor"] or 1) * _look_up(term, tables(term["stem"] or stem))
        total, slack, place = total + value, slack + 5e-6 * abs(value), term.end()
        if place == len(what):
            return total, slack
        if what[place:place + 3] not in (" - ", " + "):
            raise ValueError(f"{what[place:].strip()!r} was not expected")
        place, sign = place + 3, 1 if what[place + 1] == "+" else -1


def _look_up(term: re.Match, rows: list[dict[str, str]]) -> float:
    if not rows:
        raise ValueError("the table is empty")
    names = "|".join(map(re.escape, rows[0]))
    conditions = dict(part.partition("=")[::2]
                      for part in re.split(rf", (?=(?:{names})=)", term["where"]) if part)
    for column in {*conditions, term["column"]} - {*rows[0], "all of the row"}:
        raise ValueError(f"no column {column!r}")
    rows = [row for row in rows if all(any(_same(row[column], one) for one in wanted.split("|"))
                                       for column, wanted in conditions.items())]
    if not rows or (len(rows) > 1 and not term["pick"]):
        raise ValueError(f"{len(rows)} rows have {term['where']!r}")
    if term["column"] == "all of the row":
        return sum(float(value) for column, value in rows[0].items() if column not in conditions)
    values = [float(row[term["column"]]) for row in rows if row[term["column"]]]
    if not values:
        raise ValueError("the place is empty")
    return min(values) if term["pick"] == "min" else max(values)


def _same(stands: str, wanted: str) -> bool:
    try:
        return float(stands) == float(wanted)
    except ValueError:
        return stands == wanted


def agrees(typed: str, value: float, slack: float = 0.0) -> bool:
    """Whether the typed number is the value rounded to as many decimals, either way at half."""
    number = typed.replace(",", "").replace("−", "-")
    half = 0.5 * 10.0 ** -len(number.partition(".")[2])
    return abs(value - float(number)) <= half + slack + 1e-12


def typed_like(old: str, value: float) -> str:
    """The value with the decimals, the sign and the commas of a typed number."""
    plus, comma = "+" * (old[0] == "+"), "," * ("," in old)
    form = f"z{comma}.{len(old.partition('.')[2])}f"  # z: no -0.0
    return f"{value:{plus}{form}}".replace("-", "−" if "−" in old else "-")


def _wrong(cell: dict, tables):
    """(i, number, entry, its value or what is wrong with it) where these do not agree.

    Raises ValueError where text and entries do not line up.
    """
    pairs, entries = [], cell["metadata"].get("numbers", [])
    for number, entry in zip_longest(numbers_of(source_of(cell)), entries):
        parts = ENTRY.fullmatch(entry or "")
        if entry and not parts:
            raise ValueError(f"the entry {entry!r} is neither TYPED = COLUMN [ROW] nor TYPED: "
                             f"REASON")
        if not (number and entry) or number[0] != parts["typed"]:
            raise ValueError(f"the text has {number[0] if number else 'no more numbers'} where "
                             f"the entries have {entry or 'no more'}")
        pairs.append((number, parts))
    for i, (number, entry) in enumerate(pairs):
        if entry["what"]:
            try:
                found, slack = value_of(entry["what"], cell["metadata"].get("reading"), tables)
            except ValueError as error:
                found = error
            if isinstance(found, ValueError) or not agrees(number[0], found, slack):
                yield i, number, entry, found


def problems_of(cell: dict, tables=table_of) -> list[str]:
    """What does not agree between a cell's text, its entries and the CSVs; empty when all does."""
    try:
        return [f"{entry[0]}: {found if isinstance(found, ValueError) else f'it is {found:.6g}'}"
                for _, _, entry, found in _wrong(cell, tables)]
    except ValueError as error:
        return [str(error)]


def retype(cell: dict, tables=table_of) -> list[tuple[str, str]]:
    """Write the CSVs' numbers into a cell's text and entries; returns (old number, new entry).

    A number whose place is not there stays. Raises ValueError, the cell left as it is, where text
    and entries do not line up.
    """
    text, changed = source_of(cell), []
    for i, number, entry, value in reversed(list(_wrong(cell, tables))):
        if not isinstance(value, ValueError):
            new = typed_like(number[0], value)
            text = text[:number.start()] + new + text[number.end():]
            cell["metadata"]["numbers"][i] = f"{new} = {entry['what']}"
            changed.insert(0, (number[0], cell["metadata"]["numbers"][i]))
    cell["source"] = text.splitlines(keepends=True)
    return changed


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--retype"]):
        print(__doc__)
        return 2
    failed = False
    for path in PATHS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        before = json.dumps(notebook)
        for i, cell in enumerate(notebook["cells"]):
            if {"reading", "numbers"} & set(cell["metadata"]):
                where = f"{path.stem}, cell {i} ({cell.get('id', 'no id')})"
                if arguments:
                    with contextlib.suppress(ValueError):  # for problems_of to say
                        for old, new in retype(cell):
                            print(f"{where}: {old} -> {new}")
                for problem in problems_of(cell):
                    print(f"{where}: {problem}")
                    failed = True
        if json.dumps(notebook) != before:
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
