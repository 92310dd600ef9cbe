"""The site: every page in its table of contents, the glossary, and, where Sphinx is, the pages."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import yaml
from readings import ROOT

TOC = yaml.safe_load((ROOT / "docs" / "_toc.yml").read_text(encoding="utf-8"))
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
MAKERS = {"sphinx", "myst_nb", "furo", "sphinx_external_toc", "latex2mathml"}
missing = sorted(name for name in MAKERS if importlib.util.find_spec(name) is None)


def files_of(entries: list) -> list[str]:
    return [name for entry in entries
            for name in (entry["file"], *files_of(entry.get("entries", [])))]


IN_TOC = [TOC["root"], *(name for part in TOC["subtrees"] for name in files_of(part["entries"]))]


def test_every_page_and_notebook_is_in_the_table_of_contents_once():
    wanted = [path for pattern in ("*.md", "docs/*.md", "notebooks/*.ipynb")
              for path in ROOT.glob(pattern)]
    names = {path.relative_to(ROOT).with_suffix("").as_posix() for path in wanted}
    tables = {name for name in IN_TOC if name.startswith("figures/")}
    assert len(names) > 30 and set(IN_TOC) - tables == names and len(IN_TOC) == len(set(IN_TOC))
    linked = {name for path in wanted
              for name in re.findall(r"\]\(\.\./(figures/[^)]*)\.md\)", path.read_text("utf-8"))}
    assert tables == linked and all((ROOT / f"{name}.md").exists() for name in tables)
    assert [part["caption"] for part in TOC["subtrees"]] == [
        "Read", "Rerun", "Teach", "Your own images", "Reference"]


def test_the_extra_is_what_the_site_is_made_by_and_no_other_environment_has_it():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in extras["site"]}
    assert {name.replace("-", "_") for name in names} == MAKERS
    for name in ("requirements.lock", "environment.yml", "environment-cpu.yml"):
        text = (ROOT / name).read_text("utf-8").lower()
        assert not [package for package in names if re.search(rf"^[- ]*{package}\b", text, re.M)]
    target = re.search(r"^site: .*\n(\t.*\n)+", (ROOT / "Makefile").read_text("utf-8"), re.M)[0]
    assert "pip install -e .[site]" in target.split("\n")[0] and MAKERS - {"sphinx"} == set(
        re.search(r"import ([\w, ]+)'", target)[1].split(", "))
    assert "/site/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


def test_the_glossary_has_the_words_that_a_reader_meets_and_says_where():
    """That the sections exist is tests/test_readme.py's, as for every link of a page."""
    entries = dict(re.findall(r"^### (.+)\n\n((?:.|\n)*?)(?=\n##|\Z)", GLOSSARY, re.M))
    pictured = ["head", "start", "draw", "perplexity", "consistency", "cap", "protocol"]
    words = [*pictured, "backbone", "neighbour weight", "lambda", "collapse", "acc", "nmi", "ari",
             "seed", "source", "target", "white", "black sheep", "rung", "power", "hub"]
    assert not [word for word in words if word not in " ".join(entries).lower()]
    for title, text in entries.items():
        said, met = re.sub(r"!\[.*", "", text).split("Met in ")
        assert 2 <= len(re.findall(r"[.?](?:\s|$)", said)) <= 4, title
        link = re.match(r"\[(\d\d)\]\(\.\./notebooks/(\d\d)_\w+\.ipynb#.+?\), \*", met)
        assert link[1] == link[2], title
    for word in pictured:
        assert f"](glossary/{word}.svg)" in entries[word.title()]
    for page in ("README.md", "docs/README.md", "docs/teaching.md"):
        assert "glossary.md)" in (ROOT / page).read_text("utf-8"), page


def test_the_glossary_s_pictures_are_small_and_fetch_nothing():
    pictures = sorted((ROOT / "docs" / "glossary").iterdir())
    assert sorted(re.findall(r"\]\(glossary/(.+?)\)", GLOSSARY)) == [p.name for p in pictures]
    for path in pictures:
        svg = path.read_text("utf-8")
        width = float(ElementTree.fromstring(svg).get("width"))
        assert len(svg) < 60_000 and width <= 420 and "prefers-color-scheme: dark" in svg
        assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


class Page(HTMLParser):
    """What a page loads, links to and can be linked at; the text of its cells that are folded."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.ids, self.folded = [], [], set(), 0
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.folded += tag == "details" and "open" not in attrs
        if tag == "a":
            self.links.append(attrs.get("href") or "")
        elif tag == "link" and attrs["rel"] not in ("index", "search", "next", "prev"):
            self.loads.append(attrs["href"])
        self.loads += [attrs[key] for key in ("src", "srcset", "data", "poster") if attrs.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    if missing:
        pytest.skip(f"needs pip install -e .[site]: {', '.join(missing)} not here")
    place = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-c", "docs", "-d",
                           place / "trees", ".", place / "site"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return {path: Page(path) for path in sorted((place / "site").rglob("*.html"))}


def test_a_page_loads_nothing_from_the_net_and_what_it_loads_and_links_to_is_there(site):
    assert len(site) >= len(IN_TOC)
    followed = 0
    for path, page in site.items():
        outside = [load for load in page.loads if re.match(r"(\w+:)?//", load)]
        assert not outside, (path.name, outside)
        for link in page.loads + page.links:
            url = urlsplit(link)
            if url.scheme or not link:
                continue
            to = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert to.exists(), (path.name, link)
            if url.fragment and to in site:
                assert unquote(url.fragment) in site[to].ids, (path.name, link)
            followed += 1
    assert followed > 1000
    style = "".join(path.read_text("utf-8") for path in next(iter(site)).parent.rglob("*.css"))
    assert not re.findall(r"@import|url\(\s*['\"]?(?:https?:)?//", style)


def test_notebooks_are_shown_with_outputs_formulas_and_folded_solutions(site):
    pages = {path.stem: page for path, page in site.items()}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells, page = json.loads(path.read_text("utf-8"))["cells"], pages[path.stem]
        folded = sum(bool(cell["metadata"].get("jupyter", {}).get("source_hidden"))
                     for cell in cells)
        figures = sum("image/png" in output.get("data", {})
                      for cell in cells for output in cell.get("outputs", []))
        shown = sum("_images/" in load for load in page.loads)
        assert page.folded == folded > 0 and shown == figures, path.name
        display = sum("".join(cell["source"]).count("$$") // 2 for cell in cells
                      if cell["cell_type"] == "markdown")
        assert page.text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"'
                               ) == display, path.name
        assert "$$" not in page.text and "google.colab" not in page.text
    assert pages["08_figures_and_tables"].text.count("<table") > 4  # Markdown's among them
