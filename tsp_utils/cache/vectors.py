"""Features as the cache keeps them: float32 vectors by the content of their image, in any set."""

import contextlib
import json
import logging
import tempfile
import zlib
from pathlib import Path

import numpy as np

from tsp_utils.cache.entries import file_name, locked, made_with
from tsp_utils.cache.keys import code_of, hash_of, plain
from tsp_utils.files.paths import write_json

logger = logging.getLogger(__name__)


def rows(folder: Path, label: str, inputs, functions, digests: list[bytes], make,
         maker: str = "") -> np.ndarray:
    """A vector for each 16-byte digest of what it was made from: a read-only map float32 [N, D].

    `make(positions)` yields blocks (positions, float32 [B, D]) for what is not kept yet, in that
    order; each block is kept at once, so that what was made is not made again after a kill or an
    error. It is kept under its digests as they are then: `make` may correct those of what changed
    meanwhile. One process at a time makes vectors, or one of each `maker`. Raises OSError for a
    folder that cannot be written, ValueError for vectors of another width.
    """
    store = _Rows(folder, label, inputs, functions)
    for _ in range(3):
        lacking = _first_positions(digests, store.index())
        if lacking:
            with locked(store.data.with_suffix(f".{maker}") if maker else store.data):
                lacking = _first_positions(digests, store.index())  # another process may have come
                for positions, block in make(lacking) if lacking else ():
                    with locked(store.data) if maker else contextlib.nullcontext():
                        store.append([digests[i] for i in positions], block)
        index = store.index()
        if _first_positions(digests, index):  # of two alike one changed before it was read
            continue
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
    last_to_first = reversed([*enumerate(digests)])
    return sorted({digest: i for i, digest in last_to_first if digest not in index}.values())


class _Rows:
    """Vectors in `data` (float32, one after the other), their digests and sums in `sums`.

    Rows are appended, the vectors before their sums: what a kill tears has no sum and is cut off.
    """

    RECORD = 20  # bytes: a digest of 16 and the CRC-32 of the vector

    def __init__(self, folder: Path, label: str, inputs, functions):
        self.description = {"inputs": plain(inputs), "code": code_of(*functions)}
        name = f"{file_name(label)}_{hash_of(self.description)}"
        self.data, self.sums, self.about = (
            folder / f"{name}.{kind}" for kind in ("f32", "sums", "json"))
        self.dim = self._known_dim()
        if not self.dim and self.sums.exists():
            logger.warning("%s does not match its description and is made again.", self.data)
            for path in (self.sums, self.data):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _known_dim(self) -> int:
        """D as the description says; 0 where there is none, or one of something else."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(self.about.read_text())
            return known["dim"] if known["description"] == self.description else 0
        return 0

    def index(self) -> dict[bytes, tuple[int, int]]:
        """digest -> (row, sum) of every whole row."""
        self.dim = self.dim or self._known_dim()  # another process may have begun meanwhile
        try:
            records = self.sums.read_bytes()
            n = min(len(records) // self.RECORD, self.data.stat().st_size // (4 * self.dim))
        except (OSError, ZeroDivisionError):  # no file, or no width known yet
            return {}
        cut = [records[i : i + self.RECORD] for i in range(0, n * self.RECORD, self.RECORD)]
        return {record[:16]: (row, int.from_bytes(record[16:], "little"))
                for row, record in enumerate(cut)}

    def append(self, digests: list[bytes], block: np.ndarray) -> None:
        if self.dim not in (0, block.shape[1]):
            raise ValueError(f"{self.data.stem} holds vectors of {self.dim} numbers and these have "
                             f"{block.shape[1]}: pass images of one size")
        block = np.ascontiguousarray(block, np.float32)
        with writable(self.data.parent):
            if not self.dim:
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
