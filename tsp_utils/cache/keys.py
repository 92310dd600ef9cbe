"""Keys: what a result depends on, as 16 hex digits. Inputs by content, settings, the code called.

Code counts as its syntax, so that a comment, a docstring or a type hint makes nothing old.
"""

import ast
import contextlib
import dataclasses
import dis
import functools
import hashlib
import json
import linecache
import sys
import sysconfig
import types
from collections.abc import Iterable

import numpy as np

PACKAGE = __package__.partition(".")[0]
# What keeps, draws, reports or finds its place shapes no result.
SHAPES_NOTHING = {f"{PACKAGE}.{name}" for name in (
    "cache", "cache.keys", "cache.entries", "cache.vectors", "devices", "files.paths", "plots",
    "files.unknown_names", "networks.words", "study.figures", "folder.page", "__main__")}


def key_of(inputs, *functions) -> str:
    """16 hex digits of inputs (`plain` values) and of the code that the functions call."""
    return hash_of([plain(inputs), code_of(*functions)])


def hash_of(value) -> str:
    """16 hex digits of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def plain(value):
    """A value as JSON, by content: arrays and data sets as a hash, dataclasses as their fields.

    Raises TypeError for what has no content to go by, naming its type.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, slice):
        return ["slice", value.start, value.stop, value.step]
    if hasattr(value, "fingerprint"):  # images or features, with their labels
        return [value.fingerprint, plain(value.labels)]
    if hasattr(value, "describe"):  # a backbone
        return plain(value.describe())
    if hasattr(value, "state_dict"):  # a network
        return plain(value.state_dict())
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return value.tolist()
        content = hashlib.sha256(np.ascontiguousarray(value)).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name))
                for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if _is_own(_root(type(value))) and getattr(value, "__dict__", None):
        return {type(value).__name__: plain(vars(value))}
    raise TypeError(f"An input of type {type(value).__name__} has no content that a key could be "
                    f"made of; pass numbers, text, arrays, data sets or dataclasses of these.")


def code_of(*functions, given=()) -> str:
    """16 hex digits of the code of functions, classes or objects, and of all that they call.

    Followed are names of this package and of the user's own modules, as they are bound now: whoever
    replaces a function is seen. Of a class, the methods count whose names are called anywhere. Not
    followed are a registry (a dict or list of functions; give the entry that is used) and functions
    of `given`, whose results are inputs by content.
    """
    return _digest(_reached(functions, set(), given=given))


def data_of(function) -> dict:
    """What a function of the user's takes from its notebook or module beside its arguments.

    name -> value of the variables that it, and the functions beside it that it calls, mention.
    """
    data = {}
    _reached([function], set(), data)
    return data


def code_called_by(source: str) -> str:
    """16 hex digits of the code of this package that a notebook's source calls, registries too."""
    tree = ast.parse(source)
    imported = _imported(tree)

    def value_of(node):  # tsp.tsp_loss, plots.plot_map
        if isinstance(node, ast.Attribute):
            base = value_of(node.value)
            return getattr(base, node.attr, None) if isinstance(base, types.ModuleType) else None
        return imported.get(getattr(node, "id", None))

    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    found = [value for value in (*imported.values(), *map(value_of, attributes))
             if not isinstance(value, types.ModuleType | None)]
    return _digest(_reached(found, {node.attr for node in attributes}, registries=True))


def _imported(tree) -> dict:
    """name -> value of what a syntax tree imports from this package."""
    found: dict = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or item.name for item in node.names]
            if PACKAGE in (name.partition(".")[0] for name in modules):
                with contextlib.suppress(ImportError):  # for whoever runs it to see
                    exec(compile(ast.Module([node], []), "<imports>", "exec"), {}, found)
    return found


def _digest(reached: dict) -> str:
    return hash_of(sorted(reached.values()))


def _reached(functions, names: set, data: dict | None = None, registries=False, given=()) -> dict:
    """id -> text of every function and constant that can be reached; `names` are called already.

    data takes the variables that functions outside this package mention. registries: follow them.
    """
    texts, kept, visited, classes, waiting = {}, [], {}, [], list(functions)

    def follow(value):
        if isinstance(value, type):
            inside = [base for base in value.__mro__ if _is_own(_root(base))]
            classes.extend(base for base in inside if base not in classes)
            for base in inside:
                for name, member in vars(base).items():
                    generated = name == "__init__" and dataclasses.is_dataclass(base)
                    if name in names and _is_plain(member):
                        texts[base, name] = f"{base.__qualname__}.{name} = {_text_of(member)}"
                    elif name in names | CALLED_UNNAMED and not generated:
                        waiting.append(member)
        elif isinstance(value, types.ModuleType):
            if _is_own(_root(value)) and value.__name__ not in SHAPES_NOTHING:
                there = vars(value).keys() | set(getattr(value, "__all__", ()))  # or loaded lazily
                members = (getattr(value, name) for name in names & there)
                waiting.extend(filter(_may_be_own, members))
        elif (function := _function(value)) is not None:
            if function.__module__ in SHAPES_NOTHING or function in given or id(function) in texts:
                return
            trees, text = _syntax(function)
            texts[id(function)] = f"{function.__qualname__}: {text}"
            called, used = _uses(function, trees)
            if called - names:  # classes that were met before may have methods of these names
                names.update(called)
                waiting.extend(classes)
            for name, item in used.items():
                if _is_plain(item):
                    texts[name, repr(item)] = f"{name} = {_text_of(item)}"
                    continue
                if _may_be_own(item):
                    waiting.append(item)
                is_code = isinstance(item, types.ModuleType | type) or _function(item) is not None
                if data is not None and not is_code and _root(function) != PACKAGE and (
                        name in _variables(function.__code__)):
                    data[name] = item
        elif isinstance(value, dict | list | tuple):
            if registries:
                waiting.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, functools.partial):
            waiting.extend([value.func, *value.args, *value.keywords.values()])
        elif _is_own(_root(type(value))):  # an object: its class, and what was put on it by hand
            waiting.append(type(value))
            waiting.extend(item for item in getattr(value, "__dict__", {}).values()
                           if isinstance(item, types.FunctionType | types.MethodType))

    while waiting:
        value = waiting.pop()
        if visited.get(id(value)) != len(names):  # again where more names are called by now
            visited[id(value)] = len(names)
            kept.append(value)  # an id is a value's for as long as it lives
            follow(value)
    return texts


CALLED_UNNAMED = {"__init__", "__post_init__", "__call__", "__getitem__", "__len__", "__iter__",
                  "forward"}


def _root(value) -> str:
    """Top-level package of what defines a value; "" where nobody says."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(
        _function(value) or value, "__module__", None) or getattr(type(value), "__module__", "")
    return (name or "").partition(".")[0]


def _may_be_own(value) -> bool:
    return isinstance(value, dict | list | tuple | functools.partial) or _is_own(_root(value))


@functools.lru_cache
def _is_own(root: str) -> bool:
    """Whether a top-level package is this one or the user's: versions of libraries are no keys."""
    place = getattr(sys.modules.get(root), "__file__", None)
    return root in (PACKAGE, "__main__") or (place is not None and not any(
        place.startswith(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))


def _function(value):
    """The plain function inside a method, property, wrapper or cache; None for anything else."""
    for _ in range(20):  # an object may answer to every name, without end
        if isinstance(value, types.ModuleType | type):
            return None
        inner = (value.fget if isinstance(value, property) else
                 value.func if isinstance(value, functools.cached_property) else
                 getattr(value, "__func__", None) or getattr(value, "__wrapped__", None))
        if isinstance(value, types.FunctionType) and not isinstance(inner, types.FunctionType):
            return value
        value = inner
    return None


def _uses(function, trees) -> tuple[set, dict]:
    """Names that a function mentions or calls as attributes, and its globals among them."""
    code = function.__code__
    names = {name for part in _parts(code) for name in part.co_names}
    used = {name: function.__globals__[name] for name in names & function.__globals__.keys()}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not bound yet
            used[name] = cell.cell_contents
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    used |= {f"default {i}": item for i, item in enumerate(defaults) if not _is_plain(item)}
    for tree in trees:  # imported where it is used
        used |= _imported(tree)
    return names, used


@functools.lru_cache(maxsize=256)
def _variables(code) -> set:
    """Names that code loads as variables of its module or closure, not as attributes."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLOSURE")
    return {name for part in _parts(code) for name in (*part.co_freevars, *(
        step.argval for step in dis.get_instructions(part) if step.opname in loads))}


def _parts(code):
    """A code object, and those of the functions inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _parts(const)


def _syntax(function) -> tuple[tuple, str]:
    """A function's syntax trees and their text, or none and the text of its code object.

    The tree is used where it is the code that runs: not where there is no source, and not where a
    file was edited after it was imported.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename))
    running, trees = _trees_of(source, code.co_filename).get(
        (code.co_name, code.co_firstlineno), (None, ()))
    return (trees, _text_of_trees(trees)) if running == code else ((), _text_of_code(code))


@functools.lru_cache(maxsize=4096)
def _text_of_trees(trees: tuple) -> str:
    return _text_of_tree([*trees])


@functools.lru_cache(maxsize=256)
def _trees_of(source: str, filename: str) -> dict:
    """(name, first line) -> code object, syntax trees (of a line several lambdas) in a file."""
    try:
        module = ast.parse(source)
        code = compile(source, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    codes = {(part.co_name, part.co_firstlineno): part for part in _parts(code)}
    found = {}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            place = getattr(node, "name", "<lambda>"), first
            if place in codes:
                _, others = found.get(place, (None, ()))
                found[place] = codes[place], (*others, node)
    return found


HAVE_NO_EFFECT = {"annotation", "returns", "type_comment", "kind", "type_params"}


def _text_of_tree(node) -> str:
    """A syntax tree as text, the same under all Pythons: no places, docstrings and type hints."""
    if isinstance(node, list):
        return f"[{', '.join(map(_text_of_tree, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    documented = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    inside = [f"{name}={_text_of_tree(value)}" for name, value in fields.items()
              if value not in (None, []) and name not in HAVE_NO_EFFECT]
    return f"{type(node).__name__}({', '.join(inside)})"


def _text_of_code(code) -> str:
    consts = [_text_of_code(const) if isinstance(const, types.CodeType) else repr(const)
              for const in code.co_consts]
    return f"{code.co_code.hex()} {consts} {code.co_names} {code.co_varnames}"


def _is_plain(value) -> bool:
    """Numbers, text and containers of these: constants that a result depends on."""
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, tuple | list | set | frozenset | range):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bytes | bool | int | float | complex)


def _text_of(value) -> str:
    return repr(sorted(value, key=repr) if isinstance(value, set | frozenset) else value)
