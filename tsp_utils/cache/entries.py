"""Entries of the cache: arrays, records and what functions returned, each a file under its key.

A file is named by its key (`keys`): content of the inputs, settings, code that is called. Versions
of libraries stand in it and are not in its key. It is written whole or not at all, by one process
at a time; one that does not match its description is named and made again.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import platform
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from tsp_utils.cache.keys import code_of, data_of, hash_of, plain
from tsp_utils.devices import find_device
from tsp_utils.files.paths import cache_dir, write_whole

logger = logging.getLogger(__name__)


def seeds(folder: str, label: str, inputs, functions, wanted, make: Callable) -> tuple[dict, int]:
    """Arrays [S, ...] by name of the wanted seeds, and how many of these were read.

    A seed gives the same run alone or among others, so a file grows: `make(seeds)` is called for
    those that it lacks, and more seeds cost no more than the difference. One process at a time.
    """
    entry = _Entry(folder, label, inputs, functions)
    with locked(entry.path):
        arrays = entry.read() or {}
        there = {int(seed): row for row, seed in enumerate(arrays.pop("seeds", ()))}
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
    entry = _Entry(folder, label, inputs, functions)
    with locked(entry.path):
        found = entry.read()
        if found is None:
            found = {name: np.asarray(value) for name, value in make().items()}
            entry.write(found | {"made_with": np.array(made_with())})
        found.pop("made_with", None)
        return found


def record(folder: str, label: str, inputs, functions, make: Callable) -> dict:
    """What `make()` returned, JSON values by name, now or the last time: for runs of minutes."""
    found = arrays(folder, label, inputs, functions, lambda: {"record": json.dumps(make())})
    return json.loads(str(found["record"]))


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
        return {f"{name}/{part}": item for name, value in vars(estimator.fit(X)).items()
                if name.endswith("_") for part, item in (
                    value.items() if isinstance(value, dict) else [("", value)])}

    name = type(estimator).__name__
    for place, value in arrays("fits", name, [name, estimator.get_params(), np.asarray(X)],
                               [type(estimator).fit], make).items():
        whole, _, part = place.partition("/")
        value = value if value.ndim else value.item()
        vars(estimator)[whole] = vars(estimator).get(whole, {}) | {part: value} if part else value
    return estimator


class _Entry:
    """One .npz of the cache."""

    def __init__(self, folder: str, label: str, inputs, functions):
        description = {"inputs": plain(inputs), "code": code_of(*functions)}
        self.description = json.dumps(description, sort_keys=True)
        name = f"{file_name(label)}_{hash_of(description)}.npz"
        self.path = cache_dir() / folder / name

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


@contextlib.contextmanager
def locked(path: Path):
    """One process at a time for a file of the cache; the system frees the lock of a killed one.

    Where a folder cannot be written there is nothing to lock: what it holds is read.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.warning("Another process makes %s; waiting for it.", path.name)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def prune(most: float) -> tuple[int, int]:
    """Remove what was not used for longest until `most` bytes are left; bytes removed and left.

    Used is what was read, where the file system notes it (often once a day), or written. What a
    process makes just now stays; a file's parts (vectors, sums, description) go together.
    """
    entries: dict[Path, list[Path]] = {}
    for path in cache_dir().glob("*/*"):
        if path.is_file() and path.suffix in (".npz", ".f32", ".sums", ".json"):
            entries.setdefault(path.with_suffix(""), []).append(path)
    sizes = {name: sum(path.stat().st_size for path in parts) for name, parts in entries.items()}
    used = {name: max(max(path.stat().st_mtime, path.stat().st_atime) for path in parts)
            for name, parts in entries.items()}
    left = before = sum(sizes.values())
    for name in sorted(entries, key=lambda name: used[name]):
        if left <= most:
            break
        suffix = ".f32" if len(entries[name]) > 1 else entries[name][0].suffix
        with contextlib.suppress(OSError, Timeout), FileLock(f"{name}{suffix}.lock", timeout=0):
            for path in sorted(entries[name], reverse=True):  # the sums first: no row without them
                path.unlink()
            left -= sizes[name]
    return before - left, left


def made_with() -> str:
    """JSON of what a result was made with, beside it: versions, machine, device."""
    return json.dumps(versions() | {"machine": platform.machine(), "device": find_device()})


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    from importlib.metadata import version
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "timm", "faiss-cpu", "scikit-learn", "numpy")}


def hardware(device: str) -> str:
    """The device in words, for records."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores ({platform.machine()})"
