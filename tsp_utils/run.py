"""The notebooks in order: run for a profile, resumed, skipped where nothing has changed."""

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

import joblib

from tsp_utils.head_runs import find_device, source_hash
from tsp_utils.paths import REPOSITORY, bundled_dir, cache_dir, data_dir
from tsp_utils.study import Study, load_study

NOTEBOOKS = REPOSITORY / "notebooks"
QUIET = ["--IPKernelApp.log_level=CRITICAL"]  # else each kernel warns of TCP, and of its own end


def notebook_paths(folder: Path = NOTEBOOKS) -> list[Path]:
    """The study's notebooks in their order."""
    return sorted(path for path in folder.glob("[0-9][0-9]_*.ipynb"))


def reproduce(profile: str, force: bool = False, folder: Path = NOTEBOOKS,
              jobs: int | None = None):
    """Run every notebook of a profile into its run folder; yields (name, what happened, seconds).

    `jobs` notebooks run side by side, each on its share of the cores: two, or one where they would
    share a GPU or a single core. One at a time they run in their order; side by side those that say
    they take longest begin, and one that reads the others' evidence waits for all before it.
    A notebook is skipped when its executed copy carries the same hash (its source, the profile, the
    library's sources, the data at hand). Raises RuntimeError naming the first cell that fails: what
    is still running then is stopped, the executed copies that are finished stay.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"{jobs} notebooks side by side cannot run; pass at least 1.")
    study = load_study(profile)
    study.run_dir.mkdir(parents=True, exist_ok=True)
    _prepare_kernels()
    n_cores = joblib.cpu_count()
    jobs = jobs or (1 if n_cores == 1 or find_device() != "cpu" else 2)
    waiting, running = notebook_paths(folder), {}
    if jobs > 1:  # so that no long one is left to the end, with nothing beside it
        waiting.sort(key=_seconds_said, reverse=True)
    try:
        while waiting or running:
            path = _next_to_start(waiting, running)
            ended = next((path for path in running if running[path].process.poll() is not None),
                         None)
            if ended is not None:
                yield ended.stem, "ran", running.pop(ended).finish()
            elif path is not None and len(running) < jobs:
                waiting.remove(path)
                wanted = notebook_hash(path, study)
                if not force and _hash_of(study.run_dir / path.name) == wanted:
                    yield path.stem, "unchanged, skipped", 0.0
                else:
                    alone = not running and not waiting
                    n_threads = n_cores if alone else max(1, n_cores // jobs)
                    running[path] = _Execution(path, profile, study.run_dir, wanted, n_threads)
            else:
                time.sleep(0.1)
    finally:
        for execution in running.values():
            execution.stop()


def _next_to_start(waiting: list[Path], running) -> Path | None:
    """The first that waits for nothing: a reader of evidence waits for all notebooks before it."""
    return next((path for path in waiting if not _reads_evidence(path)
                 or all(path.name <= other.name for other in [*waiting, *running])), None)


def _seconds_said(path: Path) -> int:
    """The seconds that a notebook's head says it takes, at most; 0 where it says nothing."""
    said = re.search(r"\*\*Takes\*\*[^\n]*", path.read_text(encoding="utf-8"))
    return max(map(int, re.findall(r"(\d+) s\b", said[0])), default=0) if said else 0


class _Execution:
    """A notebook that papermill runs in a process of its own, until it is finished or stopped."""

    def __init__(self, path: Path, profile: str, run_dir: Path, wanted: str, n_threads: int):
        self.path, self.run_dir, self.wanted = path, run_dir, wanted
        self.executed = run_dir / path.name
        self.partial = run_dir / f".{path.stem}.partial.ipynb"
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self.start, self.began = time.perf_counter(), time.time()
        self.process = _papermill(path, self.partial, profile, n_threads, self.messages)

    def finish(self) -> float:
        """Put the executed copy in its place; returns the seconds, raises RuntimeError."""
        seconds = time.perf_counter() - self.start
        failed, name = self.executed.with_suffix(".failed.ipynb"), self.path.name
        try:
            if self.process.returncode == 0:
                _mark(self.partial, self.wanted)
                self.partial.replace(self.executed)
                failed.unlink(missing_ok=True)
                self._remove_old_figures()
                return seconds
            self.messages.seek(0)
            last = self.messages.read().decode(errors="replace").strip().split("\n")[-1]
            if "DeadKernelError" in last:
                raise RuntimeError(f"{name} stopped because its kernel died, most often for want "
                                   f"of memory; the same command resumes here.")
            if (cell := _failed_cell(self.partial)) is None:
                raise RuntimeError(f"{name} could not be run: {last}")
            self.partial.replace(failed)
            raise RuntimeError(f"{name} failed in code cell {cell} (all of it: "
                               f"{_relative(failed)}); finished notebooks were kept, the same "
                               f"command resumes here.")
        finally:
            self.partial.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the process and its kernel, leaving nothing half-written."""
        # A command that a script starts in the background ignores SIGINT, and so would its child.
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.partial.unlink(missing_ok=True)

    def _remove_old_figures(self) -> None:
        """Of an earlier run, which drew something else."""
        for kind in ("figures", "claims"):
            for old in (self.run_dir / kind).glob(f"{self.path.stem[:2]}_*"):
                if old.stat().st_mtime < self.began - 2:
                    old.unlink()


def _papermill(path: Path, out: Path, profile: str, n_threads: int, messages) -> subprocess.Popen:
    """Start papermill on a notebook, with so many threads; what it says goes to `messages`."""
    # Threads beyond the cores wait for each other by spinning: ten times slower, measured.
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "LOKY_MAX_CPU_COUNT"
    wanted = {name: os.environ.get(name, "") for name in names}  # fewer, where the user says so
    threads = {name: str(min(n_threads, int(n)) if n.isdigit() and int(n) else n_threads)
               for name, n in wanted.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "papermill", str(path), str(out), "-r", "profile", profile,
         "--kernel", "python3", "--cwd", str(path.parent), "--no-progress-bar",
         "--no-request-save-on-cell-execute"],
        env=os.environ | threads, stdout=messages, stderr=messages)


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
    """Hash of everything that shapes an executed notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    source = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    parts = [source, repr(study), source_hash(), _stamp_of(bundled_dir(), content=True)]
    parts += [_stamp_of(data_dir() / name) for name in study.datasets
              if not study.uses_vectors(name)]
    if _reads_evidence(path):
        parts += [hashlib.sha256(left.read_bytes()).hexdigest()
                  for folder in ("claims", "figures")
                  for left in sorted((study.run_dir / folder).glob("[0-9][0-9]_*.[cj]s*"))
                  if left.name[:2] < path.name[:2]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _reads_evidence(path: Path) -> bool:
    """Whether a notebook reads what those before it left: all claims, not some of its own."""
    return "read_evidence(study)" in path.read_text(encoding="utf-8")


def _stamp_of(folder: Path, content: bool = False) -> list:
    """Names and sizes of a folder's files, or their content: weights learned again keep their size.

    Blind to times, in which clones differ.
    """
    found = [(entry.relative_to(folder).as_posix(),
              hashlib.sha256(entry.read_bytes()).hexdigest() if content else entry.stat().st_size)
             for entry in folder.rglob("*") if entry.is_file()]
    return [len(found), hashlib.sha256(repr(sorted(found)).encode()).hexdigest()]


def _hash_of(executed: Path) -> str | None:
    try:
        return json.loads(executed.read_text(encoding="utf-8"))["metadata"]["tsp"]["hash"]
    except (OSError, ValueError, KeyError):
        return None


def _mark(path: Path, wanted: str) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["tsp"] = {"hash": wanted}
    path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


def refresh(folder: Path = NOTEBOOKS):
    """Run the notebooks with their default parameters and write the outputs back; yields names.

    Nothing is written for a notebook that fails (RuntimeError names it and the cell). Timing
    metadata and execution ids are left out, so that a diff shows what changed.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    _prepare_kernels()
    for path in notebook_paths(folder):
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=1200, kernel_name="python3", record_timing=False,
                                resources={"metadata": {"path": str(folder)}},
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
                             "language_info": {"name": "python"}}
        partial = path.with_name(f".{path.name}.partial")
        try:
            nbformat.write(notebook, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        yield path.stem, "refreshed", time.perf_counter() - start


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
