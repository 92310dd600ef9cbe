"""The slides of the lesson as one file that needs no network: make slides.

docs/slides.md is the source. A heading of the second level is a block of the lesson, one of the
third a slide, which shows a picture, a formula or a question; a quotation is its speaker's notes.
Pictures go into the file, formulas become MathML, which browsers draw themselves.
"""

import base64
import html
import re
from pathlib import Path
from typing import NamedTuple

import jinja2
import mistune

DOCS = Path(__file__).resolve().parent
TYPES = {".png": "image/png", ".gif": "image/gif", ".svg": "image/svg+xml"}
SHOWN = {"picture": r"!\[(?P<alt>.+)\]\((?P<path>.+)\)", "formula": r"\$\$(?P<tex>.+)\$\$",
         "question": r"\*\*(?P<asked>.+\?)\*\*"}


class Slide(NamedTuple):
    """A slide's block and title, what it shows (a key of SHOWN, its parts), and its notes."""

    block: str
    title: str
    kind: str
    parts: dict[str, str]
    notes: str


def slides_of(page: str) -> list[Slide]:
    """The slides of a page; raises ValueError for one that does not show exactly one thing."""
    found = []
    page = re.sub(r"<!--.*?-->\n", "", page)  # which say where a number comes from
    for block in re.split(r"^## ", page, flags=re.M)[1:]:
        name, *slides = re.split(r"^### ", block, flags=re.M)
        for slide in slides:
            title, text = slide.split("\n", 1)
            notes = "\n".join(line[2:] for line in re.findall(r"^>.*", text, re.M))
            text = re.sub(r"^>.*", "", text, flags=re.M).strip()
            shown = [(kind, match.groupdict()) for kind, pattern in SHOWN.items()
                     if (match := re.fullmatch(pattern, text))]
            if len(shown) != 1:
                raise ValueError(f"The slide {title!r} shows {text!r}; give it one picture, one "
                                 f"formula or one question, and its notes as a quotation.")
            found.append(Slide(name.strip(), title, *shown[0], notes))
    return found


def html_of(slide: Slide) -> str:
    """What a slide shows."""
    if slide.kind == "formula":
        from latex2mathml.converter import convert  # of the extra `site`

        return convert(slide.parts["tex"], display="block")
    if slide.kind == "question":
        return f"<p>{html.escape(slide.parts['asked'])}</p>"
    path = DOCS / slide.parts["path"]
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<img alt="{html.escape(slide.parts["alt"])}" '
            f'src="data:{TYPES[path.suffix]};base64,{data}">')


def deck() -> str:
    """All slides, as a page of HTML."""
    template = jinja2.Template((DOCS / "slides.html.jinja").read_text("utf-8"))
    slides = slides_of((DOCS / "slides.md").read_text("utf-8"))
    return template.render(slides=[
        {"block": slide.block, "title": slide.title, "shown": html_of(slide),
         "notes": mistune.html(slide.notes)} for slide in slides])


if __name__ == "__main__":
    path = DOCS.parent / "site" / "slides.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(deck(), encoding="utf-8")
    print("Open site/slides.html")
