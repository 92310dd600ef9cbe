"""The runner: order, parameters, skipping, resuming, failing, refreshing, publishing."""

import json
import os
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tsp_utils import run
from tsp_utils.run import notebook_hash, notebook_paths, publish_figures, refresh, reproduce
from tsp_utils.study import load_study


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty notebook folder, with a run folder of its own."""
    monkeypatch.setattr("tsp_utils.study.runs_dir", lambda: tmp_path / "runs")
    for name in ("PYTHONPATH", "TSP_DATA", "TSP_CACHE"):  # the runner sets them for its kernels
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


@pytest.fixture
def executed(monkeypatch) -> list:
    """Stands for papermill: copies the notebook and keeps (name, parameters)."""
    calls = []

    def execute(path, out, parameters, **_):
        calls.append((Path(path).stem, parameters))
        shutil.copy(path, out)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return calls


def write_notebook(folder: Path, name: str, *sources: str) -> Path:
    """Title, parameters cell, then one code cell a source."""
    parameters = new_code_cell('profile = "offline"', metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), parameters,
                                   *map(new_code_cell, sources)])
    notebook.metadata["kernelspec"] = dict(name="python3", display_name="Python 3",
                                           language="python")
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def what_happened(profile="tiny", folder=None, **options) -> list[tuple[str, str]]:
    return [(name, what) for name, what, _ in reproduce(profile, folder=folder, **options)]


def run_dir(folder: Path, profile="tiny") -> Path:
    return folder.parent / "runs" / profile


def source_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


RAN, SKIPPED = "ran", "unchanged, skipped"


def test_notebooks_run_in_order_fail_by_name_and_resume(folder):
    """The real thing, with kernels."""
    log = folder.parent / "log.txt"
    note = f"open({str(log)!r}, 'a').write(%r + profile + ' ')"
    write_notebook(folder, "01_second", note % "second:",
                   "if profile == 'tiny':\n    raise ValueError('too few\\nimages')")
    write_notebook(folder, "00_first", note % "first:")
    write_notebook(folder, "02_third", note % "third:")
    write_notebook(folder, "draft", note % "draft:")  # no number, no part of the study

    steps = reproduce("tiny", folder=folder)
    assert next(steps)[:2] == ("00_first", RAN)
    # Papermill's injected cell is not the reader's: the failing one is the third of the source.
    with pytest.raises(RuntimeError, match=r"^01_second\.ipynb failed in code cell 3: ValueError: "
                                           r"too few \(all of it: .*01_second\.failed") as failed:
        next(steps)
    assert "\n" not in str(failed.value)
    assert log.read_text() == "first:tiny second:tiny "
    here = {path.name for path in run_dir(folder).iterdir()}
    assert here == {"00_first.ipynb", "01_second.failed.ipynb"}

    write_notebook(folder, "01_second", note % "mended:")
    assert what_happened(folder=folder) == [("00_first", SKIPPED), ("01_second", RAN),
                                            ("02_third", RAN)]
    assert log.read_text() == "first:tiny second:tiny mended:tiny third:tiny "
    assert {path.name for path in run_dir(folder).iterdir()} == {
        "00_first.ipynb", "01_second.ipynb", "02_third.ipynb"}


def test_second_time_skips_and_force_runs_again(folder, executed):
    for name in ("00_a", "01_b"):
        write_notebook(folder, name, "1 + 1")
    assert what_happened(folder=folder) == [("00_a", RAN), ("01_b", RAN)]
    assert executed == [("00_a", {"profile": "tiny"}), ("01_b", {"profile": "tiny"})]
    assert what_happened(folder=folder) == [("00_a", SKIPPED), ("01_b", SKIPPED)]
    assert what_happened(folder=folder, force=True) == [("00_a", RAN), ("01_b", RAN)]
    assert len(executed) == 4


def test_figures_that_a_notebook_no_longer_draws_are_removed(folder, executed):
    figures = run_dir(folder) / "figures"
    figures.mkdir(parents=True)
    for name in ("00_a_old.png", "01_b_old.png"):
        (figures / name).touch()
        os.utime(figures / name, (0, 0))
    (figures / "00_a_new.png").touch()
    write_notebook(folder, "00_a", "1 + 1")
    what_happened(folder=folder)
    assert {path.name for path in figures.iterdir()} == {"00_a_new.png", "01_b_old.png"}


def test_a_changed_notebook_alone_runs_again(folder, executed):
    for name in ("00_a", "01_b", "02_c"):
        write_notebook(folder, name, "1 + 1")
    what_happened(folder=folder)
    write_notebook(folder, "01_b", "1 + 2")
    assert what_happened(folder=folder) == [("00_a", SKIPPED), ("01_b", RAN), ("02_c", SKIPPED)]
    (run_dir(folder) / "02_c.ipynb").write_text("{ torn")
    assert what_happened(folder=folder) == [("00_a", SKIPPED), ("01_b", SKIPPED), ("02_c", RAN)]


def test_outputs_and_execution_counts_do_not_shape_a_notebook(folder):
    path, study = write_notebook(folder, "00_a", "1 + 1"), load_study("tiny")
    before = notebook_hash(path, study)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].execution_count = 7
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(notebook, path)
    assert notebook_hash(path, study) == before


def test_a_changed_profile_library_or_bundled_file_runs_again(folder, executed, tmp_path,
                                                             monkeypatch):
    write_notebook(folder, "00_a", "1 + 1")
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    (bundled / "weights").write_bytes(b"old")
    monkeypatch.setattr(run, "bundled_dir", lambda: bundled)
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert what_happened("tiny n_neighbors=5", folder=folder) == [("00_a", RAN)]
    assert executed[-1] == ("00_a", {"profile": "tiny n_neighbors=5"})
    assert run_dir(folder, "tiny+n_neighbors=5").is_dir()
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]

    (bundled / "weights").write_bytes(b"new")  # learned again: of the same size
    assert what_happened(folder=folder) == [("00_a", RAN)]
    monkeypatch.setattr(run, "source_hash", lambda: "another library")
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]


def test_images_that_moved_to_another_class_folder_run_again(folder, executed):
    write_notebook(folder, "00_a", "1 + 1")
    images = Path(os.environ["TSP_DATA"]) / "fashion-mnist" / "test"
    for name in ("cat", "dog"):
        (images / name).mkdir(parents=True)
    (images / "cat" / "1.png").write_bytes(b"image")
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]
    (images / "cat" / "1.png").rename(images / "dog" / "1.png")
    assert what_happened(folder=folder) == [("00_a", RAN)]


def test_an_interruption_leaves_no_partial(folder, monkeypatch):
    write_notebook(folder, "00_a", "1 + 1")

    def interrupted(path, out, parameters, **_):
        shutil.copy(path, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        what_happened(folder=folder)
    assert not list(run_dir(folder).iterdir())


def test_a_kernel_that_dies_is_named(folder, monkeypatch):
    from nbclient.exceptions import DeadKernelError
    write_notebook(folder, "00_a", "1 + 1")

    def dies(*_, **__):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(papermill, "execute_notebook", dies)
    with pytest.raises(RuntimeError, match=r"^00_a\.ipynb stopped because its kernel died.*memory"):
        what_happened(folder=folder)


def test_kernels_find_package_and_folders_from_where_they_work(folder, executed, monkeypatch):
    """Kernels start in the notebooks' folder, so that a relative TSP_CACHE would be another."""
    write_notebook(folder, "00_a", "1 + 1")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("TSP_CACHE", "my_cache")
    for _ in range(2):
        what_happened(folder=folder)
    assert os.environ["TSP_CACHE"] == str(folder.parent / "my_cache")
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(run.REPOSITORY) and len(paths) == len(set(paths)) == 2


# Outputs back into the notebooks.


def test_refresh_writes_outputs_without_traces_of_the_run(folder):
    path = write_notebook(folder, "00_a", "print(profile, 6 * 7)", "import sys, warnings\n"
                          "from tqdm import tqdm\n"
                          "for _ in tqdm(range(3), unit='image'):\n    pass\n"
                          "print('mind this', file=sys.stderr)")
    failing = write_notebook(folder, "01_b", "print('never written')", "1 / 0")
    before = failing.read_bytes()
    steps = refresh(folder)
    assert next(steps)[:2] == ("00_a", "refreshed")
    with pytest.raises(RuntimeError, match=r"^01_b\.ipynb failed in code cell 3: ZeroDivision"):
        next(steps)
    assert failing.read_bytes() == before
    assert {p.name for p in folder.iterdir()} == {"00_a.ipynb", "01_b.ipynb"}

    notebook = source_of(path)
    assert notebook["cells"][2]["outputs"][0]["text"] == ["offline 42\n"]
    (warned,) = notebook["cells"][3]["outputs"]
    assert "".join(warned["text"]) == "mind this\n"  # the bar is gone, the message stays
    assert all("execution" not in cell["metadata"] for cell in notebook["cells"])
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert not [c for c in notebook["cells"] if "injected-parameters" in c["metadata"].get("tags",
                                                                                            [])]


# Figures.


def test_publishing_copies_a_finished_run_and_says_what_is_missing(folder, executed, tmp_path,
                                                                   monkeypatch):
    monkeypatch.setattr(run, "REPOSITORY", tmp_path)
    monkeypatch.setattr(run, "notebook_paths", lambda _=None: notebook_paths(folder))
    for name in ("00_a", "01_b"):
        write_notebook(folder, name, "1 + 1")
    with pytest.raises(FileNotFoundError, match=r"missing: 00_a, 01_b\); run make reproduce "
                                                r"PROFILE=tiny first"):
        publish_figures("tiny")
    assert not (tmp_path / "figures").exists()

    list(reproduce("tiny", folder=folder))
    figures = run_dir(folder) / "figures"
    figures.mkdir()
    for name in ("00_a_curve.png", "00_a_curve.csv", "01_b_sheet_local.png"):
        (figures / name).write_text(name)
    target = tmp_path / "figures" / "tiny"
    target.mkdir(parents=True)
    (target / "00_a_of_an_earlier_run.png").touch()
    (target / "notes.md").touch()
    copied = publish_figures("tiny")
    assert {path.name for path in target.iterdir()} == {
        "00_a_curve.png", "00_a_curve.csv", "notes.md"}
    assert [path.name for path in copied] == ["00_a_curve.csv", "00_a_curve.png"]
    assert (tmp_path / "figures" / "tiny" / "00_a_curve.csv").read_text() == "00_a_curve.csv"
    assert not (tmp_path / "figures" / "tiny" / "01_b_sheet_local.png").exists()
