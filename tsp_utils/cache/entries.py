"""Entries of the cache: arrays, records and what functions returned, each a file under its key.

A file is named by its key (`keys`): content of the inputs, settings, code that is called. Versions
of libraries stand in it and are not in its key. It is written whole or not at all, by one process
at a time; one that does not match its description is named and made again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import platform
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from tsp_utils.cache.keys import code_of, data_of, plain
from tsp_utils.devices import find_device
from tsp_utils.paths import cache_dir, write_whole

logger = logging.getLogger(__name__)


def seeds(folder: str, label: str, inputs, functions, wanted, make: Callable) -> tuple[dict, int]:
    """Arrays [S, ...] by name of the wanted seeds, and how many of these were read.

    A seed gives the same run alone or among others, so a file grows: `make(seeds)` is called for
    those that it lacks, and more seeds cost no more than the difference. One process at a time.
    """
    with _entry(folder, label, inputs, functions) as entry:
        arrays = entry.read()
        there = {int(seed): row for row, seed in enumerate(arrays.pop("seeds"))} if arrays else {}
        lacking = [seed for seed in wanted if seed not in there]
        if lacking:
            made = make(lacking) | {"made_with": np.full(len(lacking), made_with())}
            arrays = {name: np.concatenate([arrays[name], made[name]]) for name in made} \
                if there else made
            there |= {seed: len(there) + row for row, seed in enumerate(lacking)}
            entry.write(arrays | {"seeds": np.array(list(there))})
        rows = [there[seed] for seed in wanted]
        return {name: array[rows] for name, array in arrays.items()}, len(wanted) - len(lacking)


def arrays(folder: str, label: str, inputs, functions, make: Callable) -> dict:
    """Arrays by name that `make()` returned, now or the last time. One process at a time."""
    with _entry(folder, label, inputs, functions) as entry:
        found = entry.read()
        if found is None:
            found = {name: np.asarray(value) for name, value in make().items()}
            entry.write(found | {"made_with": np.array(made_with())})
        found.pop("made_with", None)
        return found


def record(folder: str, label: str, inputs, functions, make: Callable) -> dict:
    """What `make()` returned, JSON values by name, now or the last time: for runs of minutes."""
    def as_text() -> dict:
        return {"record": json.dumps(make())}

    return json.loads(str(arrays(folder, label, inputs, functions, as_text)["record"]))


def call(function: Callable, *arguments, **named):
    """function(*arguments, **named), or what it returned the last time, if nothing has changed.

    Keyed by the code that is called and by content: of the arguments, and of the variables that the
    function takes from around it. It returns a data frame, arrays by name, a dataclass of arrays or
    one value. Raises TypeError where an input has no content to go by.
    """
    import pandas as pd

    def make() -> dict:
        found = function(*arguments, **named)
        if isinstance(found, pd.DataFrame):
            return {"kind": "table"} | {f" {name}": found[name].tolist() for name in found}
        if dataclasses.is_dataclass(found):
            return {"kind": f"{type(found).__module__} {type(found).__qualname__}"} | {
                f" {name}": value for name, value in vars(found).items()}
        found = found if isinstance(found, dict) else {"": found}
        return {"kind": "arrays"} | {f" {name}": value for name, value in found.items()}

    found = arrays("calls", function.__qualname__, [list(arguments), named, data_of(function)],
                   [function], make)
    kind = found.pop("kind").item()
    found = {name[1:]: value if value.ndim else value.item() for name, value in found.items()}
    if kind == "table":
        return pd.DataFrame(found)
    if kind == "arrays":
        return found[""] if list(found) == [""] else found
    module, name = kind.split(" ")
    return getattr(importlib.import_module(module), name)(**found)


def fitted(estimator, X):
    """A scikit-learn estimator, fitted on X [N, D] now or the last time it was: what it learned.

    Keyed by its parameters, X and the code of its `fit`. Without a random_state it is fitted anew.
    """
    if estimator.get_params().get("random_state", 0) is None:
        return estimator.fit(X)

    def make() -> dict:
        learned = vars(estimator.fit(X))
        flat = {name: value for name, value in learned.items() if name.endswith("_")}
        for name, value in list(flat.items()):
            if isinstance(value, dict):
                flat |= {f"{name}/{part}": item for part, item in flat.pop(name).items()}
        return flat

    inputs = [type(estimator).__name__, estimator.get_params(), np.asarray(X)]
    for name, value in arrays("fits", type(estimator).__name__, inputs,
                              [type(estimator).fit], make).items():
        whole, _, part = name.partition("/")
        value = value if value.ndim else value.item()
        if part:
            vars(estimator).setdefault(whole, {})[part] = value
        else:
            setattr(estimator, whole, value)
    return estimator


class _entry(contextlib.AbstractContextManager):
    """One .npz of the cache, locked while it is looked at, made or grown."""

    def __init__(self, folder: str, label: str, inputs, functions):
        description = {"inputs": plain(inputs), "code": code_of(*functions)}
        self.description = json.dumps(description, sort_keys=True)
        name = f"{file_name(label)}_{key_of_description(description)}.npz"
        self.path = cache_dir() / folder / name

    def __enter__(self):
        _name_old_files(cache_dir())
        self.lock = locked(self.path)
        self.lock.__enter__()
        return self

    def __exit__(self, *error):
        return self.lock.__exit__(*error)

    def read(self) -> dict | None:
        """The arrays of the file; None where there is none, or one that is not what it says."""
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                found = {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s) and is made again.", self.path.name, error)
            return None
        if str(found.pop("description", "")) != self.description:
            logger.warning("%s does not match its description and is made again.", self.path.name)
            return None
        return found

    def write(self, arrays: dict) -> None:
        write_whole(self.path, lambda file: np.savez(
            file, description=np.array(self.description), **arrays))


def file_name(label: str) -> str:
    """A label without what a file system may refuse, at most 80 characters of its end."""
    return re.sub(r"[^\w.-]+", "-", label)[-80:].strip("-.")


def key_of_description(description: dict) -> str:
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)  # once a folder
def _name_old_files(folder: Path) -> None:
    old = [*folder.glob("features/*.npy"), *folder.glob("heads/*_heads.npz"),
           *folder.glob("heads/*_kmeans.npz"), *folder.glob("heads/*_clusters.npz")]
    if old:
        logger.warning("%s holds %d files of an earlier version, which are not used any more; "
                       "make clean removes them.", folder, len(old))


@contextlib.contextmanager
def locked(path: Path):
    """One process at a time for a file of the cache; the system frees the lock of a killed one.

    Where a folder cannot be written there is nothing to lock: what it holds is read.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.warning("Another process makes %s; waiting for it.", path.name)
            lock.acquire()
    except OSError:
        pass
    try:
        yield
    finally:
        lock.release()


def made_with() -> str:
    """JSON of what a result was made with, beside it: versions, machine, device."""
    return json.dumps(versions() | {"machine": platform.machine(), "device": find_device()})


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    from importlib.metadata import version
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "timm", "faiss-cpu", "scikit-learn", "numpy")}
