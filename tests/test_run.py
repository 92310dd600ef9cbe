"""The runner: order, parameters, skipping, resuming, failing, refreshing, publishing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
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
    """Stands for papermill: copies the notebook and keeps (name, profile)."""
    calls = []

    def execute(path, out, profile, n_threads, messages):
        calls.append((path.stem, profile))
        return subprocess.Popen(["cp", str(path), str(out)])

    monkeypatch.setattr(run, "_papermill", execute)
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


def what_happened(profile="tiny", folder=None, jobs=1, **options) -> list[tuple[str, str]]:
    steps = reproduce(profile, folder=folder, jobs=jobs, **options)
    return [(name, what) for name, what, _ in steps]


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

    steps = reproduce("tiny", folder=folder, jobs=1)
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
    assert executed == [("00_a", "tiny"), ("01_b", "tiny")]
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
    assert executed[-1] == ("00_a", "tiny n_neighbors=5")
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


def test_two_run_side_by_side_and_a_reader_of_evidence_waits(folder):
    """With kernels: each of the first two goes on only when it has seen the other begin."""
    here = folder.parent
    meet = ("import pathlib, time\n"
            "here = pathlib.Path({here!r})\n"
            "(here / '{mine}').touch()\n"
            "while not (here / '{other}').exists():\n    time.sleep(0.1)\n"
            "time.sleep({pause})\n"
            "(here / '{mine}.ended').touch()")
    write_notebook(folder, "00_a", meet.format(here=str(here), mine="a", other="b", pause=2))
    write_notebook(folder, "01_b", meet.format(here=str(here), mine="b", other="a", pause=0))
    write_notebook(folder, "02_c", "# read_evidence(study)\n"
                   f"import pathlib\nhere = pathlib.Path({str(here)!r})\n"
                   "assert all((here / f'{name}.ended').exists() for name in 'ab')")
    write_notebook(folder, "03_d", "1 + 1")
    happened = what_happened(folder=folder, jobs=2)
    assert sorted(happened) == [(name, RAN) for name in ("00_a", "01_b", "02_c", "03_d")]
    assert [name for name, _ in happened].index("02_c") >= 2


def test_side_by_side_the_longest_begins_and_one_at_a_time_the_first(folder, executed):
    for name, said in (("00_a", "nothing"), ("01_b", "**Takes** about 20 s (`offline`)."),
                       ("02_c", "**Takes** 155 s the first time, 28 s from the cache."),
                       ("03_d", "**Takes** 10 s.\n\nFig. 5 took 900 s."), ("04_e", "")):
        write_notebook(folder, name, "1 + 1" if name != "03_d" else "# read_evidence(study)")
        notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        notebook.cells[0].source += f"\n\n{said}"
        nbformat.write(notebook, folder / f"{name}.ipynb")
    what_happened(folder=folder, jobs=1)
    assert [name for name, _ in executed] == ["00_a", "01_b", "02_c", "03_d", "04_e"]
    executed.clear()
    what_happened(folder=folder, jobs=2, force=True)
    assert [name for name, _ in executed[:2]] == ["02_c", "01_b"]
    assert {name for name, _ in executed[2:]} == {"00_a", "03_d", "04_e"}


def test_a_reader_of_evidence_waits_for_those_before_it_alone(folder):
    a, b, c = (folder / f"0{i}_{name}.ipynb" for i, name in enumerate("abc"))
    write_notebook(folder, "00_a", "1 + 1")
    write_notebook(folder, "01_b", "# read_evidence(study)")
    write_notebook(folder, "02_c", "1 + 1")
    assert run._next_to_start([b, a, c], []) == a
    assert run._next_to_start([b, c], [a]) == c
    assert run._next_to_start([b], [a, c]) is None
    assert run._next_to_start([b], [c]) == b


def test_less_than_one_notebook_at_a_time_is_refused(folder):
    with pytest.raises(ValueError, match="0 notebooks side by side cannot run; pass at least 1"):
        what_happened(folder=folder, jobs=0)


def test_threads_are_shared_out_and_one_notebook_alone_has_them_all(folder, monkeypatch):
    given = {}

    def execute(path, out, profile, n_threads, messages):
        given[path.stem] = n_threads
        return subprocess.Popen(["cp", str(path), str(out)])

    monkeypatch.setattr(run, "_papermill", execute)
    monkeypatch.setattr(run.joblib, "cpu_count", lambda: 9)
    for name in ("00_a", "01_b"):
        write_notebook(folder, name, "1 + 1")
    write_notebook(folder, "02_c", "# read_evidence(study)")
    what_happened(folder=folder, jobs=2)
    assert given == {"00_a": 4, "01_b": 4, "02_c": 9}


def test_the_users_own_number_of_threads_counts_where_it_is_smaller(monkeypatch):
    given = {}
    monkeypatch.setattr(run.subprocess, "Popen", lambda command, env, **_: given.update(env))
    for wanted, share, expected in (("1", 4, "1"), ("8", 4, "4"), ("", 4, "4"), ("all", 4, "4")):
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        run._papermill(Path("00_a.ipynb"), Path("out.ipynb"), "tiny", share, None)
        assert given["OMP_NUM_THREADS"] == expected and given["LOKY_MAX_CPU_COUNT"] == "4"


def started(folder: Path, name: str) -> tuple[Path, str]:
    """A notebook that says its kernel's process number in a file and goes on for minutes."""
    sign = folder.parent / f"{name}.pid"
    return sign, (f"import os, pathlib, time\nsign = pathlib.Path({str(sign)!r})\n"
                  "sign.with_suffix('.new').write_text(str(os.getpid()))\n"
                  "sign.with_suffix('.new').rename(sign)\ntime.sleep(300)")


def wait_until(is_so, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "this did not happen"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether the process runs (one that ended and was not collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
def test_a_failure_stops_what_runs_beside_it(folder):
    sign, source = started(folder, "00_a")
    write_notebook(folder, "00_a", source)
    write_notebook(folder, "01_b", f"import os, time\nwhile not os.path.exists({str(sign)!r}):\n"
                                   "    time.sleep(0.1)\n1 / 0")
    with pytest.raises(RuntimeError, match=r"^01_b\.ipynb failed in code cell 2: ZeroDivision"):
        what_happened(folder=folder, jobs=2)
    wait_until(lambda: not is_alive(int(sign.read_text())))
    assert {path.name for path in run_dir(folder).iterdir()} == {"01_b.failed.ipynb"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_kernels_and_leaves_no_partial(folder, number):
    """Ctrl-C, as a terminal sends it, to every process of the group; kill, to the first alone."""
    sign, source = started(folder, "00_a")
    write_notebook(folder, "00_a", source)
    code = ("import pathlib, signal, sys, tsp_utils.study, tsp_utils.run\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's &\n"
            "tsp_utils.run.stop_when_terminated()\n"
            "tsp_utils.study.runs_dir = lambda: pathlib.Path(sys.argv[1]) / 'runs'\n"
            "list(tsp_utils.run.reproduce('tiny', folder=pathlib.Path(sys.argv[2])))")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.parent), str(folder)], cwd=run.REPOSITORY,
        start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(sign.exists)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said = process.communicate(timeout=30)[1]
        assert "KeyboardInterrupt" in said or process.returncode == 128 + number
    finally:
        process.kill()
    wait_until(lambda: not is_alive(int(sign.read_text())))
    assert not list(run_dir(folder).iterdir())


def test_a_kernel_that_dies_is_named(folder):
    write_notebook(folder, "00_a", "import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match=r"^00_a\.ipynb stopped because its kernel died.*memory"):
        what_happened(folder=folder)
    assert not list(run_dir(folder).iterdir())


def test_a_notebook_that_cannot_be_run_says_why(folder):
    path = write_notebook(folder, "00_a", "1 + 1")
    path.write_text(path.read_text().replace('"nbformat": 4', '"nbformat": 99'))
    with pytest.raises(RuntimeError, match=r"^00_a\.ipynb could not be run: "):
        what_happened(folder=folder)
    assert not list(run_dir(folder).iterdir())


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

    what_happened(folder=folder)
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
