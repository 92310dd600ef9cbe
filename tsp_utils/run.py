"""The notebooks in order: run for a profile, resumed, skipped when nothing that shapes them changed."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from tsp_utils.paths import REPOSITORY, bundled_dir, data_dir
from tsp_utils.study import Study, load_study, source_hash

NOTEBOOKS = REPOSITORY / "notebooks"


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
    from papermill.exceptions import PapermillExecutionError

    study = load_study(profile)
    study.run_dir.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(  # for the kernels, when nothing is installed
        [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    for path in notebook_paths(folder):
        wanted = notebook_hash(path, study)
        executed = study.run_dir / path.name
        if not force and _hash_of(executed) == wanted:
            yield path.stem, "unchanged, skipped", 0.0
            continue
        start = time.perf_counter()
        partial = study.run_dir / f".{path.name}.partial"
        try:
            papermill.execute_notebook(
                path, partial, {"profile": profile}, cwd=str(folder), kernel_name="python3",
                progress_bar=False, request_save_on_cell_execute=False)
            _mark(partial, wanted)
            partial.replace(executed)
        except PapermillExecutionError as error:
            failed = executed.with_suffix(".failed.ipynb")
            partial.replace(failed)
            raise RuntimeError(
                f"{path.name} failed in code cell {error.exec_count}: {error.ename}: "
                f"{error.evalue} (all of it: {_relative(failed)}); finished notebooks were kept, "
                f"the same command resumes here.") from None
        finally:
            partial.unlink(missing_ok=True)
        executed.with_suffix(".failed.ipynb").unlink(missing_ok=True)
        yield path.stem, "ran", time.perf_counter() - start


def _relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def notebook_hash(path: Path, study: Study) -> str:
    """Hash of everything that shapes an executed notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    source = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    parts = [source, repr(study), source_hash(), _stamp_of(bundled_dir())]
    parts += [_stamp_of(data_dir() / name) for name in study.datasets if not study.uses_vectors(name)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stamp_of(folder: Path) -> list:
    """Names and sizes of the files of a folder; quick, and blind to times (clones differ in them)."""
    found = [(entry.name, entry.stat().st_size) for entry in folder.rglob("*") if entry.is_file()]
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

    Nothing is written for a notebook that fails. Timing metadata and execution ids are left out, so
    that a diff shows what changed.
    """
    import nbformat
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = str(REPOSITORY)
    for path in notebook_paths(folder):
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=1200, kernel_name="python3", record_timing=False,
                       resources={"metadata": {"path": str(folder)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if not _is_progress(o)]
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python",
                                            "name": "python3"},
                             "language_info": {"name": "python"}}
        nbformat.write(notebook, path)
        yield path.stem, "refreshed", time.perf_counter() - start


def _is_progress(output) -> bool:
    """tqdm's bars, which say something only while they run."""
    return ("application/vnd.jupyter.widget-view+json" in output.get("data", {})
            or output.get("name") == "stderr" and ("it/s" in output.text or "s/it" in output.text))


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
    # Sheets of images that are not ours to republish stay in runs/.
    chosen = [path for path in sorted(source.iterdir())
              if not path.stem.endswith("_local")]
    return [Path(shutil.copy2(path, target / path.name)) for path in chosen]
