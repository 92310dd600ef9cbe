"""The notebooks of a profile: side by side, resumed, skipped where nothing has changed.

A notebook's own metadata says what the runner has to know of it:

    "tsp": {"data": ["study", "fashion-mnist"],  the images it loads: the study's, or a set's test
            "reads": ["03", "04"],               the notebooks whose evidence and tables it reads
            "seconds": {"offline": 40, "small": 70}}                 how long it takes, at first

Its executed copy adds the hash that it was run for and the files that it left, with their hashes.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import joblib
from filelock import FileLock, Timeout

from tsp_utils.cache import code_called_by, find_device
from tsp_utils.datasets import dataset_files
from tsp_utils.paths import REPOSITORY, bundled_dir, cache_dir, data_dir, write_whole
from tsp_utils.study.profile import Study, load_study

NOTEBOOKS = REPOSITORY / "notebooks"
QUIET = ["--IPKernelApp.log_level=CRITICAL"]  # else each kernel warns of TCP, and of its own end
# Papermill, which ends with its kernel when the runner is gone: even kill -9 closes the pipe.
PAPERMILL = """
import os, signal, sys, threading, time
sys.modules["rfc3987_syntax"] = None  # jsonschema would build a grammar of URIs for a second
def end_with_the_runner():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)
threading.Thread(target=end_with_the_runner, daemon=True).start()
from papermill.__main__ import papermill
papermill()
"""


class Step(NamedTuple):
    """What is said of a notebook: that it starts, how far it is, or (`ended`) what became of it."""

    name: str
    what: str
    seconds: float = 0.0
    ended: bool = True


def notebook_paths(folder: Path = NOTEBOOKS) -> list[Path]:
    """The study's notebooks in their order."""
    return sorted(path for path in folder.glob("[0-9][0-9]_*.ipynb"))


def reproduce(profile: str, force: bool = False, folder: Path = NOTEBOOKS,
              jobs: int | None = None):
    """Run every notebook of a profile into its run folder; yields `Step`s.

    `jobs` notebooks run side by side, each on its share of the cores: two, or one where they would
    share a GPU or a single core. One at a time they run in their order; side by side the longest
    begin, and one that reads what others leave waits for these.
    A notebook is skipped when its executed copy carries the same hash (`notebook_hash`) and what it
    left is still there. Raises RuntimeError naming the first cell that fails: what is still running
    then is stopped, the executed copies that are finished stay; and where another run of the
    profile is under way.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"{jobs} notebooks side by side cannot run; pass at least 1.")
    study = load_study(profile)
    _prepare_kernels()
    n_cores = joblib.cpu_count()
    jobs = jobs or (1 if n_cores == 1 or find_device() != "cpu" else 2)
    about = {path: _about(path) for path in notebook_paths(folder)}
    waiting, running = list(about), {}
    if jobs > 1:  # so that no long one is left to the end, with nothing beside it
        waiting.sort(key=lambda path: _seconds_said(about[path], study), reverse=True)
    with _alone(study):
        try:
            while waiting or running:
                path = _next_to_start(waiting, running, about)
                ended = next((path for path in running
                              if running[path].process.poll() is not None), None)
                if ended is not None:
                    yield Step(ended.stem, "ran", running.pop(ended).finish())
                elif path is not None and len(running) < jobs:
                    waiting.remove(path)
                    parts = _parts(path, study)
                    if not force and _is_done(path, study, _hash(parts)):
                        yield Step(path.stem, "unchanged, skipped")
                    else:
                        alone = not running and not waiting
                        n_threads = n_cores if alone else max(1, n_cores // jobs)
                        running[path] = _Execution(path, study, profile, parts, n_threads)
                        yield Step(path.stem, "starts", ended=False)
                else:
                    for execution in running.values():
                        if (step := execution.news()) is not None:
                            yield step
                    time.sleep(0.1)
        finally:
            for execution in running.values():
                execution.stop()


@contextlib.contextmanager
def _alone(study: Study):
    """The run folder, to this process alone; raises RuntimeError where another one has it.

    The system frees the lock of a process that is killed; what that one had under way is removed.
    """
    study.run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(study.run_dir.with_name(f".{study.profile}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"Another run of {study.profile} is under way in "
                           f"{_relative(study.run_dir)}; wait until it ends, or stop it, then give "
                           f"the same command again.") from None
    try:
        for left_over in study.run_dir.glob(".running-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield
    finally:
        lock.release()


def _next_to_start(waiting: list[Path], running, about: dict[Path, dict]) -> Path | None:
    """The first that waits for nothing: a reader waits for those before it that it reads."""
    return next((path for path in waiting if not any(
        other.name[:2] in about[path].get("reads", ()) and other.name < path.name
        for other in [*waiting, *running])), None)


def _seconds_said(about: dict, study: Study) -> float:
    """The seconds that a notebook takes in a profile, or at most where that one is not said."""
    said = about.get("seconds", {})
    return said.get(study.profile.partition("+")[0], max(said.values(), default=0))


class _Execution:
    """A notebook that papermill runs in a process of its own, until it is finished or stopped."""

    def __init__(self, path: Path, study: Study, profile: str, parts: dict, n_threads: int):
        self.path, self.study, self.parts = path, study, parts
        self.executed, self.noted = study.run_dir / path.name, _noted_by(path, study)
        self.n_noted = len(_lines(self.noted))  # by executions that did not end well
        self.folder = Path(tempfile.mkdtemp(prefix=".running-", dir=study.run_dir))
        self.partial, self.log = self.folder / path.name, self.folder / "log.txt"
        self.code_cells = _numbered_code_cells(path)
        self.read, self.cell, self.said = 0, 0, 0.0
        self.start = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = _papermill(path, self.partial, profile, n_threads, log, self.noted)

    def news(self) -> Step | None:
        """Which code cell runs, when it is another one or a second later; None between."""
        with self.log.open("rb") as log:
            log.seek(self.read)
            lines = log.read().rpartition(b"\n")[0]
        self.read += len(lines)
        cell = self.cell
        for number in re.findall(rb"Executing Cell (\d+)-", lines):
            cell = self.code_cells[int(number) - 1] if int(number) <= len(self.code_cells) else cell
        seconds = time.perf_counter() - self.start
        if cell == 0 or (cell == self.cell and seconds < self.said + 1):
            return None
        self.cell, self.said = cell, seconds
        return Step(self.path.stem, f"code cell {cell} of {self.code_cells[-1]}", seconds, False)

    def finish(self) -> float:
        """Put the executed copy in its place; returns the seconds, raises RuntimeError."""
        seconds = time.perf_counter() - self.start
        failed, name = self.executed.with_suffix(".failed.ipynb"), self.path.name
        try:
            if self.process.returncode == 0:
                self._keep()
                failed.unlink(missing_ok=True)
                return seconds
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]
            if "DeadKernelError" in last or self.process.returncode < 0:
                raise RuntimeError(f"{name} stopped because its process died, most often for want "
                                   f"of memory; the same command resumes here.")
            if (cell := _failed_cell(self.partial)) is None:
                raise RuntimeError(f"{name} could not be run: {last}")
            self.partial.replace(failed)
            raise RuntimeError(f"{name} failed in code cell {cell} (all of it: "
                               f"{_relative(failed)}); finished notebooks were kept, the same "
                               f"command resumes here.")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self) -> None:
        """The executed copy with its hash and what it left; what earlier ones left goes."""
        about = _about(self.partial)
        now = _data_stamps(about, self.study)  # with what was downloaded meanwhile
        data = {name: now[name] if stamp[0] == 0 else stamp
                for name, stamp in self.parts["data"].items()}
        noted = _lines(self.noted)
        left = {name: _sha256(self.study.run_dir / name)
                for name in dict.fromkeys(noted[self.n_noted:])}
        notebook = json.loads(self.partial.read_text(encoding="utf-8"))
        notebook["metadata"]["tsp"] = about | {"left": left,
                                               "hash": _hash(self.parts | {"data": data})}
        self.partial.write_text(json.dumps(notebook, indent=1), encoding="utf-8")
        others = {name for path in self.study.run_dir.glob("*.ipynb") if path != self.executed
                  for name in _about(path).get("left", ())}
        for old in {*noted, *_about(self.executed).get("left", ())} - left.keys() - others:
            (self.study.run_dir / old).unlink(missing_ok=True)
        self.partial.replace(self.executed)
        self.noted.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the process and its kernel, leaving nothing half-written."""
        # A command that a script starts in the background ignores SIGINT, and so would its child.
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _papermill(path: Path, out: Path, profile: str, n_threads: int, log,
               noted: Path) -> subprocess.Popen:
    """Start papermill on a notebook, with so many threads; it says in `log` which cell runs.

    The files that the notebook leaves are noted in `noted`, by `Study.leave`.
    """
    # Threads beyond the cores wait for each other by spinning: ten times slower, measured.
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "LOKY_MAX_CPU_COUNT"
    wanted = {name: os.environ.get(name, "") for name in names}  # fewer, where the user says so
    threads = {name: str(min(n_threads, int(n)) if n.isdigit() and int(n) else n_threads)
               for name, n in wanted.items()}
    return subprocess.Popen(
        [sys.executable, "-c", PAPERMILL, str(path), str(out), "-r", "profile", profile,
         "--kernel", "python3", "--cwd", str(path.parent), "--no-progress-bar", "--log-output",
         "--no-request-save-on-cell-execute"],
        env=os.environ | threads | {"TSP_LEFT": str(noted)}, stdin=subprocess.PIPE, stdout=log,
        stderr=log)


def _numbered_code_cells(path: Path) -> list[int]:
    """Code cells of the source up to each cell of papermill's copy, which has one cell more."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    numbers, n = [], 0
    for cell in cells:
        n += cell["cell_type"] == "code"
        numbers.append(n)
        if "parameters" in cell["metadata"].get("tags", []):
            numbers.append(n)
    return numbers


def stop_when_terminated() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: what it started is stopped, too."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _prepare_kernels() -> None:
    """What kernels need from here: the package when it is not installed, folders that stay put."""
    paths = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    # Kernels work in the notebooks' folder, where a relative path would mean another place.
    os.environ["TSP_DATA"] = os.path.abspath(data_dir())
    os.environ["TSP_CACHE"] = os.path.abspath(cache_dir())


def _failed_cell(executed: Path) -> str | None:
    """The failed code cell's number in the source, which lacks papermill's own, and its error."""
    try:
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return None
    number = 0
    for cell in cells:
        if cell["cell_type"] == "code":
            number += "injected-parameters" not in cell["metadata"].get("tags", [])
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    return f"{number}: {_first_line(output['ename'], output['evalue'])}"
    return None


def _first_line(name: str, message: str) -> str:
    return f"{name}: {message}".strip().split("\n")[0]


def _relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def notebook_hash(path: Path, study: Study) -> str:
    """Hash of all that an executed notebook depends on.

    Its text and code, the study's settings, the code of the package that it calls, what ships, the
    images that it loads, and what the notebooks that it reads have left.
    """
    return _hash(_parts(path, study))


def _hash(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _parts(path: Path, study: Study) -> dict:
    """What `notebook_hash` is made of, by name."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    about = notebook["metadata"].get("tsp", {})
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    reads = [other for other in notebook_paths(path.parent)
             if other.name[:2] in about.get("reads", ())]
    return {"cells": cells, "study": repr(study),
            "code": _code_called("\n".join(text for kind, text in cells if kind == "code")),
            "bundled": sorted((file.relative_to(bundled_dir()).as_posix(), _sha256(file))
                              for file in bundled_dir().rglob("*") if file.is_file()),
            "data": _data_stamps(about, study),
            "reads": {other.stem: _about(study.run_dir / other.name).get("left")
                      for other in reads}}


def _code_called(source: str) -> str:
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return code_called_by(TransformerManager().transform_cell(source))  # %magic and !shell
    except SyntaxError:
        return ""  # it will fail, and is not skipped


def _data_stamps(about: dict, study: Study) -> dict:
    """Number of files, and a hash of their names and sizes, of each split that a notebook loads.

    Blind to times, in which clones differ.
    """
    splits = {"all": ("test",), "split": ("test", "train")}[study.protocol]
    wanted = {}
    for name in about.get("data", ["study"]):
        wanted |= {(name, "test"): None} if name != "study" else {
            (target, split): None for target in study.datasets if not study.uses_vectors(target)
            for split in splits}
    stamps = {}
    for name, split in wanted:
        files = dataset_files(name, split)
        sizes = sorted([file.parent.name, file.name, file.stat().st_size] for file in files)
        stamps[f"{name}/{split}"] = [len(files), _hash(sizes)]
    return stamps


def _is_done(path: Path, study: Study, wanted: str) -> bool:
    """Whether the executed copy is what a run would give, and what it left is still as it was."""
    about = _about(study.run_dir / path.name)
    return about.get("hash") == wanted and not _noted_by(path, study).exists() and all(
        _sha256(study.run_dir / name) == left for name, left in about["left"].items())


def _noted_by(path: Path, study: Study) -> Path:
    """Where a notebook's files are noted, from its start until it is finished and no longer."""
    return study.run_dir / f".{path.stem}.left"


def _about(path: Path) -> dict:
    """What a notebook's metadata say to the runner; nothing where there is none to be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("tsp", {})
    except (OSError, ValueError, KeyError):
        return {}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def refresh(folder: Path = NOTEBOOKS):
    """Run the notebooks with their default parameters and write the outputs back; yields `Step`s.

    Nothing is written for a notebook that fails (RuntimeError names it and the cell).
    """
    _prepare_kernels()
    with _alone(load_study()):
        for path in notebook_paths(folder):
            start = time.perf_counter()
            yield Step(path.stem, "starts", ended=False)
            _refresh(path)
            yield Step(path.stem, "refreshed", time.perf_counter() - start)


def _refresh(path: Path) -> None:
    """Timing metadata and execution ids are left out, so that a diff shows what changed."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(path.parent)}},
                            extra_arguments=QUIET)
    try:
        client.execute()
    except CellExecutionError as error:
        what = _first_line(error.ename, error.evalue)
        raise RuntimeError(f"{path.name} failed in code cell {client.code_cells_executed}: "
                           f"{what}; it was left as it is.") from None
    except DeadKernelError:
        raise RuntimeError(f"{path.name} stopped because its kernel died, most often for want "
                           f"of memory; it was left as it is.") from None
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _without_progress(cell.outputs)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python",
                                        "name": "python3"},
                         "language_info": {"name": "python"},
                         "tsp": notebook.metadata.get("tsp", {})}
    write_whole(path, lambda file: file.write((nbformat.writes(notebook) + "\n").encode()))


def _without_progress(outputs: list) -> list:
    """Outputs less tqdm's bars, which say something only while they run; warnings beside stay."""
    kept = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if output.get("name") == "stderr":
            pieces = [piece for piece in re.split(r"[\r\n]+|\x1b\[A", output.text)
                      if piece.strip() and not re.search(r"\[[\d:]+[<,].*/\w+[],]", piece)]
            if not pieces:
                continue
            output.text = "\n".join(pieces) + "\n"
        kept.append(output)
    return kept


def publish_figures(profile: str) -> list[Path]:
    """Copy a finished run's figures, CSVs and tables into figures/PROFILE; returns what was copied.

    Raises FileNotFoundError where there is no finished run to copy from.
    """
    study = load_study(profile)
    source = study.run_dir / "figures"
    missing = [path.stem for path in notebook_paths() if not (study.run_dir / path.name).exists()]
    if missing or not source.exists():
        raise FileNotFoundError(f"There is no finished run of {profile} to take figures from "
                                f"(missing: {', '.join(missing) or 'figures'}); run make reproduce "
                                f"PROFILE={profile} first.")
    target = REPOSITORY / "figures" / study.profile
    target.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "csv"):
        for old in target.glob(f"*.{kind}"):  # what an earlier run drew
            old.unlink()
    # Sheets of images that are not ours to republish stay in runs/.
    chosen = [path for path in sorted(source.iterdir())
              if not path.stem.endswith("_local")]
    return [Path(shutil.copy2(path, target / path.name)) for path in chosen]
