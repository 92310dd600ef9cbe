"""The notebooks in order: run for a profile, resumed, skipped where nothing has changed."""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from tsp_utils.head_runs import source_hash
from tsp_utils.paths import REPOSITORY, bundled_dir, cache_dir, data_dir
from tsp_utils.study import Study, load_study

NOTEBOOKS = REPOSITORY / "notebooks"
QUIET = ["--IPKernelApp.log_level=CRITICAL"]  # else each kernel warns of TCP, and of its own end


def notebook_paths(folder: Path = NOTEBOOKS) -> list[Path]:
    """The study's notebooks in their order."""
    return sorted(path for path in folder.glob("[0-9][0-9]_*.ipynb"))


def reproduce(profile: str, force: bool = False, folder: Path = NOTEBOOKS):
    """Run every notebook of a profile into its run folder; yields (name, what happened, seconds).

    A notebook is skipped when its executed copy carries the same hash (its source, the profile, the
    library's sources, the data at hand). Raises RuntimeError naming the first cell that fails;
    the executed copies that are finished stay.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    study = load_study(profile)
    study.run_dir.mkdir(parents=True, exist_ok=True)
    _prepare_kernels()
    for path in notebook_paths(folder):
        wanted = notebook_hash(path, study)
        executed = study.run_dir / path.name
        if not force and _hash_of(executed) == wanted:
            yield path.stem, "unchanged, skipped", 0.0
            continue
        start, began = time.perf_counter(), time.time()
        partial = study.run_dir / f".{path.stem}.partial.ipynb"
        try:
            papermill.execute_notebook(
                path, partial, {"profile": profile}, cwd=str(folder), kernel_name="python3",
                progress_bar=False, request_save_on_cell_execute=False, extra_arguments=QUIET)
            _mark(partial, wanted)
            partial.replace(executed)
        except PapermillExecutionError as error:
            failed = executed.with_suffix(".failed.ipynb")
            partial.replace(failed)
            raise RuntimeError(
                f"{path.name} failed in code cell {_cell_number(failed, error.exec_count)}: "
                f"{_first_line(error)} (all of it: {_relative(failed)}); finished notebooks were "
                f"kept, the same command resumes here.") from None
        except DeadKernelError:
            raise RuntimeError(f"{path.name} stopped because its kernel died, most often for want "
                               f"of memory; the same command resumes here.") from None
        finally:
            partial.unlink(missing_ok=True)
        executed.with_suffix(".failed.ipynb").unlink(missing_ok=True)
        for kind in ("figures", "claims"):
            for old in (study.run_dir / kind).glob(f"{path.stem[:2]}_*"):
                if old.stat().st_mtime < began - 2:  # of an earlier run that drew something else
                    old.unlink()
        yield path.stem, "ran", time.perf_counter() - start


def _prepare_kernels() -> None:
    """What kernels need from here: the package when it is not installed, folders that stay put."""
    paths = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    # Kernels work in the notebooks' folder, where a relative path would mean another place.
    os.environ["TSP_DATA"] = os.path.abspath(data_dir())
    os.environ["TSP_CACHE"] = os.path.abspath(cache_dir())


def _cell_number(executed: Path, exec_count: int | None) -> int | str:
    """The failed code cell's number in the source, which lacks the parameters papermill injects."""
    cells = [cell for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"]
             if cell["cell_type"] == "code"
             and "injected-parameters" not in cell["metadata"].get("tags", [])]
    return next((number for number, cell in enumerate(cells, 1)
                 if exec_count is not None and cell["execution_count"] == exec_count), "?")


def _first_line(error) -> str:
    return f"{error.ename}: {error.evalue}".strip().split("\n")[0]


def _relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def notebook_hash(path: Path, study: Study) -> str:
    """Hash of everything that shapes an executed notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    source = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    parts = [source, repr(study), source_hash(), _stamp_of(bundled_dir(), content=True)]
    parts += [_stamp_of(data_dir() / name) for name in study.datasets
              if not study.uses_vectors(name)]
    if "read_evidence" in str(source):  # it reads what the notebooks before it left
        parts += [hashlib.sha256(left.read_bytes()).hexdigest()
                  for folder in ("claims", "figures")
                  for left in sorted((study.run_dir / folder).glob("[0-9][0-9]_*.[cj]s*"))
                  if left.name[:2] < path.name[:2]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
            number = client.code_cells_executed
            raise RuntimeError(f"{path.name} failed in code cell {number}: {_first_line(error)}; "
                               f"it was left as it is.") from None
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
