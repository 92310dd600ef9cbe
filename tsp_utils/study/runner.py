"""The notebooks of a profile: side by side, resumed, skipped where nothing has changed."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import joblib
from filelock import FileLock, Timeout

from tsp_utils.cache import hash_of
from tsp_utils.devices import find_device
from tsp_utils.files.paths import REPOSITORY, cache_dir, data_dir
from tsp_utils.study import staleness
from tsp_utils.study.profile import Study, load_study

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
for last in (False, False, True):
    try:
        papermill()  # ends this process
    except RuntimeError as error:  # two kernels that start at one moment may be given one port
        if last or "Kernel died before replying" not in str(error):
            raise
"""


class Step(NamedTuple):
    """What is said of a notebook: that it starts, how far it is, or (`ended`) what became of it."""

    name: str
    what: str
    seconds: float = 0.0
    ended: bool = True


def reproduce(profile: str, force: bool = False, folder: Path = staleness.NOTEBOOKS,
              jobs: int | None = None):
    """Run every notebook of a profile into its run folder; yields `Step`s.

    `jobs` notebooks run side by side, each on its share of the cores: two, or one where they would
    share a GPU or a single core. One at a time they run in their order; side by side the longest
    begin, and one that reads what others leave waits for these.
    A notebook is skipped when its executed copy carries the hash of its `parts_of` and what it left
    is still there. Raises RuntimeError naming the first cell that fails: what is still running
    then is stopped, the executed copies that are finished stay; and where another run of the
    profile is under way.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"{jobs} notebooks side by side cannot run; pass at least 1.")
    study, n_cores = load_study(profile), joblib.cpu_count()
    jobs = jobs or (1 if n_cores == 1 or find_device() != "cpu" else 2)
    about = {path: staleness.about_of(path) for path in staleness.notebook_paths(folder)}
    waiting, running = list(about), {}
    if jobs > 1:  # so that no long one is left to the end, with nothing beside it
        said = {path: about[path].get("seconds", {}) for path in waiting}
        waiting.sort(reverse=True, key=lambda path: said[path].get(
            study.profile.partition("+")[0], max(said[path].values(), default=0)))
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
                    parts = staleness.parts_of(path, study)
                    if not force and staleness.is_done(path, study, hash_of(parts)):
                        yield Step(path.stem, "unchanged, skipped")
                    else:
                        alone = not running and not waiting
                        n_threads = n_cores if alone else max(1, n_cores // jobs)
                        running[path] = _Execution(path, study, profile, parts, n_threads)
                        yield Step(path.stem, "starts", ended=False)
                else:
                    yield from filter(None, [run.news() for run in running.values()])
                    time.sleep(0.1)
        finally:
            for execution in running.values():
                execution.stop()


@contextlib.contextmanager
def _alone(study: Study):
    """The run folder, to this process alone; what a killed one had under way is removed."""
    study.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(study.run_dir.with_name(f".{study.profile}.lock"), timeout=0):
            for left_over in study.run_dir.glob(".running-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            yield
    except Timeout:
        raise RuntimeError(f"Another run of {study.profile} is under way in {study.run_dir}; wait "
                           f"until it ends, or stop it, then give the command again.") from None


def _next_to_start(waiting: list[Path], running, about: dict[Path, dict]) -> Path | None:
    """The first that waits for nothing: a reader waits for those before it that it reads."""
    return next((path for path in waiting if not any(
        other.name[:2] in about[path].get("reads", ()) and other.name < path.name
        for other in [*waiting, *running])), None)


class _Execution:
    """A notebook that papermill runs in a process of its own, until it is finished or stopped."""

    def __init__(self, path: Path, study: Study, profile: str, parts: dict, n_threads: int):
        self.path, self.study, self.parts = path, study, parts
        self.executed, self.noted = study.run_dir / path.name, staleness.noted_by(path, study)
        self.n_noted = len(_lines(self.noted))  # by executions that did not end well
        self.folder = Path(tempfile.mkdtemp(prefix=".running-", dir=study.run_dir))
        self.partial, self.log = self.folder / path.name, self.folder / "log.txt"
        self.code_cells = _numbered_code_cells(path)
        self.cell, self.said = 0, 0.0
        self.start = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = _papermill(path, self.partial, profile, n_threads, log, self.noted)

    def news(self) -> Step | None:
        """Which code cell runs, when it is another one or a second later; None between."""
        numbers = re.findall(rb"Executing Cell (\d+)-", self.log.read_bytes())
        seconds = time.perf_counter() - self.start
        cell = self.code_cells[min(int(numbers[-1]), len(self.code_cells)) - 1] if numbers else 0
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
            if "DeadKernelError" in last or not 0 < self.process.returncode < 256:  # Windows: above
                raise RuntimeError(f"{name} stopped because its process died, most often for want "
                                   f"of memory; the same command resumes here.")
            if (cell := _failed_cell(self.partial)) is None:
                raise RuntimeError(f"{name} could not be run: {last}")
            self.partial.replace(failed)
            raise RuntimeError(f"{name} failed in code cell {cell} (all of it: {failed}); finished "
                               f"notebooks were kept, the same command resumes here.")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self) -> None:
        """The executed copy with its hash and what it left; what earlier ones left goes."""
        notebook = json.loads(self.partial.read_text(encoding="utf-8"))
        about = notebook["metadata"].get("tsp", {})
        now = staleness.data_stamps(about, self.study)  # with what was downloaded meanwhile
        data = {name: now[name] if stamp[0] == 0 else stamp
                for name, stamp in self.parts["data"].items()}
        noted = _lines(self.noted)
        left = {name: staleness.sha256_of(self.study.run_dir / name)
                for name in dict.fromkeys(noted[self.n_noted:])}
        notebook["metadata"]["tsp"] = about | {"left": left,
                                               "hash": hash_of(self.parts | {"data": data})}
        self.partial.write_text(json.dumps(notebook, indent=1), encoding="utf-8")
        others = {name for path in self.study.run_dir.glob("*.ipynb") if path != self.executed
                  for name in staleness.about_of(path).get("left", ())}
        before = staleness.about_of(self.executed).get("left", ())
        for old in {*noted, *before} - left.keys() - others:
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
    """Start papermill; `log` says which cell runs, `noted` what `Study.leave` wrote."""
    # Threads beyond the cores wait for each other by spinning: ten times slower, measured.
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "LOKY_MAX_CPU_COUNT"
    wanted = {name: os.environ.get(name, "") for name in names}  # fewer, where the user says so
    threads = {name: str(min(n_threads, int(n)) if n.isdigit() and int(n) else n_threads)
               for name, n in wanted.items()}
    # Kernels work in the notebooks' folder: there the package may be found by its place alone, and
    # a relative path would mean another place.
    paths = filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))
    places = {"TSP_LEFT": str(noted), "PYTHONPATH": os.pathsep.join(paths),
              "TSP_DATA": os.path.abspath(data_dir()), "TSP_CACHE": os.path.abspath(cache_dir())}
    return subprocess.Popen(
        [sys.executable, "-c", PAPERMILL, str(path), str(out), "-r", "profile", profile,
         "--kernel", "python3", "--cwd", str(path.parent), "--no-progress-bar", "--log-output",
         "--no-request-save-on-cell-execute"],
        env=os.environ | threads | places, stdin=subprocess.PIPE, stdout=log, stderr=log)


def _numbered_code_cells(path: Path) -> list[int]:
    """Code cells of the source up to each cell of papermill's copy, which has one cell more."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    counts = accumulate(cell["cell_type"] == "code" for cell in cells)
    return [n for cell, n in zip(cells, counts, strict=True)
            for _ in range(1 + ("parameters" in cell["metadata"].get("tags", [])))]


def stop_when_terminated() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: what it started is stopped, too."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _failed_cell(executed: Path) -> str | None:
    """The failed code cell's number in the source, which lacks papermill's own, and its error."""
    own = (cell for cell in staleness.own_cells(executed) if cell["cell_type"] == "code")
    return next((f"{number}: {output['ename']}: {output['evalue']}".strip().split("\n")[0]
                 for number, cell in enumerate(own, 1) for output in cell["outputs"]
                 if output["output_type"] == "error"), None)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
