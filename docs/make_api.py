"""docs/api.md, from the docstrings of the public names: python docs/make_api.py."""

import inspect
import re
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("api.md")
sys.path.insert(0, str(PAGE.parent.parent))

import tsp_utils  # noqa: E402


def entry(name: str, thing) -> str:
    """A name with its signature and its docstring; of a class, its public methods, too."""
    if not callable(thing):
        kind = type(thing).__name__
        held = f": {', '.join(map(str, thing))}" if isinstance(thing, dict) else ""
        return f"### `{name}`\n\n{kind} of {len(thing)}{held}.\n"
    parts = [f"### `{name}{signature(thing)}`", prose(thing)]
    if inspect.isclass(thing):
        parts += [f"**`.{method}{signature(member)}`** " + prose(member)
                  for method, member in vars(thing).items()
                  if inspect.isfunction(member) and method[0] != "_"]
    return "\n\n".join(parts) + "\n"


def prose(thing) -> str:
    """A docstring as Markdown: a product keeps its star, and errors begin a paragraph."""
    text = re.sub(r"(?<=[.:)])\s+(?=Raises\b)", "\n\n", inspect.getdoc(thing) or "")
    return re.sub(r"(?<=\w)\*(?=\w)", r"\\*", text)


class Long:
    """A default that is too long to be read in a signature."""

    def __repr__(self) -> str:
        return "..."


def signature(thing) -> str:
    """Parameters and their defaults; hints are left out, since shapes stand in the docstring."""
    empty, found = inspect.Parameter.empty, inspect.signature(thing)
    bare = [parameter.replace(annotation=empty, default=Long() if len(repr(
                parameter.default)) > 40 and parameter.default is not empty else parameter.default)
            for parameter in found.parameters.values() if parameter.name != "self"]
    return str(found.replace(parameters=bare, return_annotation=empty))


def page() -> str:
    """The whole page, module by module as data flows."""
    parts = ["# The public names\n\nEach is importable from `tsp_utils`. Made from the docstrings "
             "by `make api`; a test compares.\n"]
    for module, names in tsp_utils._HOME.items():
        parts.append(f"## {module}\n")
        parts += [entry(name, getattr(tsp_utils, name)) for name in names]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
