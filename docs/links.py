"""The repository's address, from pyproject.toml, into every place that names it: make links.

What stands there now is CITATION.cff's `repository-code`, whose slug, OWNER/NAME, is replaced.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "/".join(("OWNER", "REPOSITORY"))  # not yet an address: badges would be broken
HOST = "https://github.com/"
COLAB = "https://colab.research.google.com/"


def slug_of(address: str) -> str:
    found = re.fullmatch(rf"{HOST}([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if found is None:
        sys.exit(f"error: Repository in pyproject.toml is {address!r}; write {HOST}OWNER/NAME.")
    return found[1]


def badges(slug: str) -> str:
    """CI's badge, and Colab's of each notebook that can install the package there."""
    if slug == PLACEHOLDER:
        return ""
    ci = f"{HOST}{slug}/actions/workflows/ci.yml"
    notebooks = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
                 if f"git+{HOST}" in path.read_text("utf-8")]
    return "\n".join([f"[![ci]({ci}/badge.svg)]({ci})", *(
        f"[![{name[:2]} in Colab]({COLAB}assets/colab-badge.svg)]"
        f"({COLAB}github/{slug}/blob/main/notebooks/{name})" for name in notebooks)])


def fill() -> list[Path]:
    """Write the address everywhere; returns the files that changed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    slug, citation = slug_of(project["urls"]["Repository"]), ROOT / "CITATION.cff"
    before = slug_of(re.search("^repository-code: (.+)$", citation.read_text("utf-8"), re.M)[1])
    places = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb"),
              citation]  # the last: a run that is cut off can be repeated
    changed = []
    for path in places:
        old = path.read_text("utf-8")
        new = re.sub(rf"(?<![\w.-]){re.escape(before)}(?![\w-])", slug, old)
        if path.name == "README.md":
            block = f"<!-- badges -->\n{badges(slug)}\n<!-- /badges -->".replace("\n\n", "\n")
            new = re.sub("<!-- badges -->.*?<!-- /badges -->", block, new, flags=re.S)
        if new != old:
            path.write_text(new, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in fill():
        print(path.relative_to(ROOT))
