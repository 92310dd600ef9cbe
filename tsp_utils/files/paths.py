"""Where data, caches and results live, and how a file is written whole or not at all.

The only module that reads TSP_DATA and TSP_CACHE.
"""

import contextlib
import json
import os
import queue
import secrets
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

PACKAGE = Path(__file__).resolve().parent.parent
REPOSITORY = PACKAGE.parent
IS_CLONE = (REPOSITORY / "requirements.lock").exists()  # else an installed package


def data_dir() -> Path:
    """Folder of images and downloaded weights: $TSP_DATA, else data/ in the clone.

    Of an installed package, here and below, the user's own folder for such files.
    """
    return Path(os.environ.get("TSP_DATA") or (
        REPOSITORY / "data" if IS_CLONE else user_data_path("tsp_utils", appauthor=False)))


def cache_dir() -> Path:
    """Folder of extracted features and trained heads: $TSP_CACHE, else cache/ in the clone."""
    return Path(os.environ.get("TSP_CACHE") or (
        REPOSITORY / "cache" if IS_CLONE else user_cache_path("tsp_utils", appauthor=False)))


def runs_dir() -> Path:
    """Folder of executed notebooks, figures and run records: runs/ in the clone, else here."""
    return (REPOSITORY if IS_CLONE else Path.cwd()) / "runs"


def bundled_dir() -> Path:
    """Folder of what ships with the package: weights, vectors, Fashion-MNIST's test split."""
    return PACKAGE / "bundled"


def shipped_records(name: str):
    """What a file of records holds that ships with the package: bundled/readouts/NAME.json."""
    return json.loads((bundled_dir() / "readouts" / f"{name}.json").read_text())


def check_reachable(*urls: str, seconds: float = 8) -> None:
    """Raise OSError within `seconds` where none of these hosts answers: who downloads may wait
    for minutes, and a name server for ever."""
    answers: queue.Queue = queue.Queue()

    def ask(url: str) -> None:
        try:
            call = urllib.request.Request(url, method="HEAD")
            with contextlib.suppress(urllib.error.HTTPError):  # an answer: the download says more
                urllib.request.urlopen(call, timeout=seconds).close()
            answers.put(None)
        except Exception as error:
            answers.put(error)

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    until, error = time.monotonic() + seconds, None
    for _ in urls:
        try:
            error = answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            error = TimeoutError(f"no answer within {seconds:.0f} s")
        if error is None:
            return
    raise OSError(str(error))


@contextlib.contextmanager
def without_empty(folder: Path):
    """Remove at the end what was made of a folder and of those it lies in, if it is still empty."""
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield
    finally:
        for path in new:  # the inner one first
            if os.path.isdir(path) and not any(path.iterdir()):
                path.rmdir()


def write_whole(path: Path, write) -> None:
    """Write a file by `write(binary file)` beside its place, and move it there when it is whole.

    Raises OSError naming the folder that cannot be written; what was there before stays.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    made = False  # a file that was there is not ours to remove
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            made = True
            write(file)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save's own has the system's behind it
        why = getattr(error.__context__ or error, "strerror", error)
        elsewhere = ", or point TSP_CACHE to another folder" if cache_dir() in path.parents else ""
        raise OSError(f"{path.parent} cannot be written ({why}); make it writable, with some space "
                      f"left{elsewhere}.") from error
    finally:
        if made:
            with contextlib.suppress(OSError):
                partial.unlink()


def write_together(contents: dict[Path, bytes]) -> None:
    """Write files by `write_whole`, each moved to its place only when the others are written."""
    (path, content), *others = contents.items()

    def write(file) -> None:
        file.write(content)
        file.flush()
        if others:
            write_together(dict(others))

    write_whole(path, write)


def write_json(path: Path, content, indent: int | None = None) -> None:
    """`content` as JSON, by `write_whole`."""
    write_whole(path, lambda file: file.write(json.dumps(content, indent=indent).encode()))


def write_lines(path: Path, records: list) -> Path:
    """Records as a JSON list, one a line, by `write_whole`; returns the path."""
    text = "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return path
