"""One cache for all that is kept: features, K-means, heads, other clusterers, records of an hour.

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
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from tsp_utils.keys import (  # noqa: F401 (the runner asks here)
    code_called_by,
    code_of,
    data_of,
    key_of,
    plain,
)
from tsp_utils.paths import cache_dir, write_json, write_whole

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
        self.path = cache_dir() / folder / f"{file_name(label)}_{_key(description)}.npz"

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


def _key(description: dict) -> str:
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
        lock = contextlib.nullcontext()
    with lock:
        yield


def made_with() -> str:
    """JSON of what a result was made with, beside it: versions, machine, device."""
    return json.dumps(versions() | {"machine": platform.machine(), "device": find_device()})


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    from importlib.metadata import version
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "timm", "faiss-cpu", "scikit-learn", "numpy")}


def find_device() -> str:
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


# Rows by content: features.


def rows(folder: Path, label: str, inputs, functions, digests: list[bytes], make) -> np.ndarray:
    """A vector for each 16-byte digest of what it was made from: a read-only map float32 [N, D].

    `make(positions)` yields blocks (positions, float32 [B, D]) for what is not kept yet, in that
    order; each block is kept at once, so that what was made is not made again after a kill or an
    error. Raises OSError for a folder that cannot be written, ValueError for vectors of another
    width.
    """
    store = _Rows(folder, label, inputs, functions)
    for _ in range(2):
        lacking = _first_positions(digests, store.index())
        if lacking:
            with locked(store.data):
                lacking = _first_positions(digests, store.index())  # another process may have come
                for positions, block in make(lacking) if lacking else ():
                    store.append([digests[i] for i in positions], block)
        index = store.index()
        found, damaged = store.take([index[digest] for digest in digests])
        if not damaged:
            return found
        logger.warning("%d rows of %s do not match their sums and are made again.", len(damaged),
                       store.data)
        with locked(store.data):
            store.forget(damaged)
    raise OSError(f"{store.data} did not read back as it was written: check the disk, or set "
                  f"TSP_CACHE to another folder")


def _first_positions(digests, index) -> list[int]:
    """Where each digest that is not in the index comes first."""
    first = {}
    for i, digest in enumerate(digests):
        if digest not in index:
            first.setdefault(digest, i)
    return list(first.values())


class _Rows:
    """Vectors in `data` (float32, one after the other), their digests and sums in `sums`.

    Rows are appended, the vectors before their sums: what a kill tears has no sum and is cut off.
    """

    RECORD = 20  # bytes: a digest of 16 and the CRC-32 of the vector

    def __init__(self, folder: Path, label: str, inputs, functions):
        self.description = {"inputs": plain(inputs), "code": code_of(*functions)}
        name = f"{file_name(label)}_{_key(self.description)}"
        self.data, self.sums, self.about = (
            folder / f"{name}.{kind}" for kind in ("f32", "sums", "json"))
        self.dim = self._known_dim()
        if self.dim is None and self.sums.exists():
            logger.warning("%s does not match its description and is made again.", self.data)
            for path in (self.sums, self.data):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _known_dim(self) -> int | None:
        """D as the description says; None where there is none, or one of something else."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(self.about.read_text())
            return known["dim"] if known["description"] == self.description else None
        return None

    def index(self) -> dict[bytes, tuple[int, int]]:
        """digest -> (row, sum) of every whole row."""
        self.dim = self.dim or self._known_dim()  # another process may have begun meanwhile
        try:
            records = self.sums.read_bytes()
            n = min(len(records) // self.RECORD, self.data.stat().st_size // (4 * self.dim))
        except (OSError, TypeError):
            return {}
        cut = [records[i : i + self.RECORD] for i in range(0, n * self.RECORD, self.RECORD)]
        return {record[:16]: (row, int.from_bytes(record[16:], "little"))
                for row, record in enumerate(cut)}

    def append(self, digests: list[bytes], block: np.ndarray) -> None:
        if self.dim not in (None, block.shape[1]):
            raise ValueError(f"{self.data.stem} holds vectors of {self.dim} numbers and these have "
                             f"{block.shape[1]}: pass images of one size")
        block = np.ascontiguousarray(block, np.float32)
        with writable(self.data.parent):
            if self.dim is None:
                self.dim = block.shape[1]
                write_json(self.about, {"description": self.description, "dim": self.dim,
                                        "made_with": json.loads(made_with())}, indent=1)
            with open(self.sums, "ab") as sums, open(self.data, "ab") as data:
                n = min(sums.tell() // self.RECORD, data.tell() // (4 * self.dim))
                sums.truncate(n * self.RECORD)
                data.truncate(n * 4 * self.dim)
                data.write(block.tobytes())
                data.flush()
                sums.write(b"".join(digest + zlib.crc32(vector).to_bytes(4, "little")
                                    for digest, vector in zip(digests, block, strict=True)))

    def forget(self, damaged: list[int]) -> None:
        with writable(self.data.parent), open(self.sums, "r+b") as sums:
            for row in damaged:
                sums.seek(row * self.RECORD)
                sums.write(bytes(self.RECORD))

    def take(self, wanted: list[tuple[int, int]]) -> tuple[np.ndarray, list[int]]:
        """Vectors of (row, sum) as a map [N, D], and the rows that are not what was written.

        What lies together is mapped in place, else through a file that ends with the process: read
        in pieces, since mapped pages would count as memory.
        """
        numbers = np.array([row for row, _ in wanted])
        together = bool((np.diff(numbers) == 1).all())
        damaged, width = [], 4 * self.dim
        with open(self.data, "rb") as data, tempfile.TemporaryFile() as copy:
            for start in range(0, len(wanted), 1000):
                piece = wanted[start : start + 1000]
                breaks = np.flatnonzero(np.diff(numbers[start : start + 1000]) != 1) + 1
                for run in np.split(np.arange(len(piece)), breaks):
                    data.seek(piece[run[0]][0] * width)
                    block = data.read(len(run) * width)
                    damaged += [piece[i][0] for at, i in enumerate(run)
                                if zlib.crc32(block[at * width : (at + 1) * width]) != piece[i][1]]
                    if not together:
                        copy.write(block)
            copy.flush()
            offset = int(numbers[0]) * width if together else 0
            found = np.memmap(data if together else copy, np.float32, "r", offset,
                              (len(wanted), self.dim)) if not damaged else np.empty((0, 0))
        return found, sorted(set(damaged))


@contextlib.contextmanager
def writable(folder: Path):
    """OSError becomes one sentence that names the folder and TSP_CACHE."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(f"the cache folder {folder} cannot be written ({error.strerror or error}): "
                      "set TSP_CACHE to a folder that can") from error
