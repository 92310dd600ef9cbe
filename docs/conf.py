"""The site, by Sphinx: make site. Notebooks are shown with the outputs that they have, never run.

Its sources are the pages where they lie, so a link that works in the repository works in the site.
Nothing is fetched when a page is read: formulas are MathML, which browsers draw themselves.
"""

import json
import re

from docutils import nodes
from latex2mathml.converter import convert

project = "TSP"
html_title = "TSP: deep clustering on frozen features"
extensions = ["myst_nb", "sphinx_external_toc"]
external_toc_path = "docs/_toc.yml"
external_toc_exclude_missing = True
exclude_patterns = [".*", "build", "site", "data", "cache", "runs", "clusters", "dist", "student"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # the default loads a script from the net
nb_render_markdown_format = "myst"  # of outputs, with tables
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub names sections
html_math_renderer = "mathml"

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_show_copyright = False  # README says whose text it is
html_show_search_summary = False  # excerpts would be fetched, which a browser refuses in a folder


def shown(app, docname: str, source: list[str]) -> None:
    """A page as the site shows it, before it is read.

    Of notebooks, what Jupyter folds is folded and what is for Colab alone is left out. Badges are
    left out, being of the net. A table of figures/ gets its name as a title.
    """
    if docname.startswith("notebooks/"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            tags = cell["metadata"].setdefault("tags", [])
            folded = cell["metadata"].get("jupyter", {})
            wanted = {"remove-cell": "colab" in tags, "hide-input": folded.get("source_hidden"),
                      "hide-output": folded.get("outputs_hidden")}
            tags += [tag for tag in wanted if wanted[tag]]
            if "solution" in tags:
                cell["metadata"]["mystnb"] = {"code_prompt_show": "Show a solution"}
        source[0] = json.dumps(notebook)
    elif docname.startswith("figures/"):
        source[0] = f"# The table {docname}\n\n{source[0]}"
    else:
        source[0] = re.sub(r"^\[!\[.*\n", "", source[0], flags=re.M)


def formula(translator, node) -> None:
    """A formula, in the line or in a block of its own."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    made = convert(node.astext(), display=display)
    translator.body.append(f'<div class="formula">{made}</div>' if display == "block" else made)
    raise nodes.SkipNode


def opened(app, name: str, template: str, context: dict, tree) -> None:
    """A link to a film, a picture or a table opens it and does not save it."""
    context["body"] = context.get("body", "").replace(' download=""', "")


def setup(app) -> None:
    app.connect("source-read", shown)
    app.connect("html-page-context", opened)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
