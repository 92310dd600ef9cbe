"""The runner: order, parameters, skipping, resuming, failing, refreshing, publishing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import tsp_utils.__main__ as command
from tsp_utils.study import needs, runner
from tsp_utils.study.needs import notebook_hash, notebook_paths
from tsp_utils.study.profile import load_study
from tsp_utils.study.publish import publish_figures, refresh
from tsp_utils.study.runner import Step, reproduce


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty notebook folder, with a run folder of its own."""
    monkeypatch.setattr("tsp_utils.study.profile.runs_dir", lambda: tmp_path / "runs")
    for name in ("PYTHONPATH", "TSP_DATA", "TSP_CACHE"):  # the runner sets them for its kernels
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


@pytest.fixture
def executed(monkeypatch) -> list:
    """Stands for papermill: copies the notebook and keeps (name, profile)."""
    calls = []

    def execute(path, out, profile, n_threads, log, noted):
        calls.append((path.stem, profile))
        return subprocess.Popen(["cp", str(path), str(out)])

    monkeypatch.setattr(runner, "_papermill", execute)
    return calls


def write_notebook(folder: Path, name: str, *sources: str, **tsp) -> Path:
    """Title, parameters cell, then one code cell a source; what it says to the runner."""
    parameters = new_code_cell('profile = "offline"', metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), parameters,
                                   *map(new_code_cell, sources)])
    notebook.metadata["kernelspec"] = dict(name="python3", display_name="Python 3",
                                           language="python")
    notebook.metadata["tsp"] = tsp
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def what_happened(profile="tiny", folder=None, jobs=1, **options) -> list[tuple[str, str]]:
    steps = reproduce(profile, folder=folder, jobs=jobs, **options)
    return [(step.name, step.what) for step in steps if step.ended]


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

    steps = (step for step in reproduce("tiny", folder=folder, jobs=1) if step.ended)
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
    monkeypatch.setattr(runner, "bundled_dir", lambda: bundled)
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert what_happened("tiny n_neighbors=5", folder=folder) == [("00_a", RAN)]
    assert executed[-1] == ("00_a", "tiny n_neighbors=5")
    assert run_dir(folder, "tiny+n_neighbors=5").is_dir()
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]

    (bundled / "weights").write_bytes(b"new")  # learned again: of the same size
    assert what_happened(folder=folder) == [("00_a", RAN)]
    write_notebook(folder, "00_a", "%matplotlib inline\n6 * 7")
    called = []
    monkeypatch.setattr(runner, "code_called_by", lambda source: called.append(source) or "other")
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert "6 * 7" in called[0] and "%" not in called[0]
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]


IMAGE_FOLDER = "cifar10/test/cat/1.png", "cifar10/test/dog/1.png"
PICKLES = "cifar-10-batches-py/test_batch", "cifar-10-batches-py/data_batch_2"
BINARIES = "stl10_binary/test_X.bin", "stl10_binary/train_X.bin"
IDX = "FashionMNIST/raw/train-images-idx3-ubyte", "FashionMNIST/raw/train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(("name", "files"), [
    ("cifar10", IMAGE_FOLDER), ("cifar10", PICKLES), ("stl10", BINARIES), ("fashion-mnist", IDX),
    ("cifar100-20", ("cifar-100-python/test", "cifar-100-python/meta"))])
def test_images_that_were_replaced_added_or_removed_run_again(folder, executed, name, files):
    write_notebook(folder, "00_a", "1 + 1", data=["study"])
    first, second = (Path(os.environ["TSP_DATA"]) / file for file in files)
    profile = f"tiny datasets={name} protocol=split"

    def again():
        return what_happened(profile, folder=folder)[0][1]

    def put(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    put(first, b"images")
    assert (again(), again()) == (RAN, SKIPPED)
    put(first, b"other images")
    assert (again(), again()) == (RAN, SKIPPED)
    put(second, b"more images")
    assert (again(), again()) == (RAN, SKIPPED)
    first.unlink()
    assert (again(), again()) == (RAN, SKIPPED)
    put(first.with_name(".unseen"), b"no image of this set")
    assert again() == SKIPPED


def test_images_in_another_class_folder_run_again_and_those_not_loaded_do_not(folder, executed):
    write_notebook(folder, "00_a", "1 + 1", data=["cifar10"])
    cat, dog = (Path(os.environ["TSP_DATA"]) / file for file in IMAGE_FOLDER)
    for path in (cat, dog, cat.parents[2] / "train" / "cat" / "1.png"):
        path.parent.mkdir(parents=True)
    cat.write_bytes(b"image")
    assert what_happened(folder=folder) == [("00_a", RAN)]
    cat.rename(dog)
    assert what_happened(folder=folder) == [("00_a", RAN)]
    (cat.parents[2] / "train" / "cat" / "1.png").write_bytes(b"image")  # named: its test split
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]


def test_a_download_by_the_notebook_itself_is_no_change(folder):
    file = Path(os.environ["TSP_DATA"]) / PICKLES[0]
    write_notebook(folder, "00_a", f"import pathlib\nfile = pathlib.Path({str(file)!r})\n"
                   "file.parent.mkdir(parents=True)\nfile.write_bytes(b'1')", data=["cifar10"])
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]
    file.write_bytes(b"22")
    with pytest.raises(RuntimeError, match="FileExistsError"):
        what_happened(folder=folder)


# What a notebook leaves.


@pytest.fixture
def leaves(folder, monkeypatch) -> list:
    """Stands for papermill: a notebook leaves the tables named here; with FAILS it fails then."""
    names = []

    def execute(path, out, profile, n_threads, log, noted):
        monkeypatch.setenv("TSP_LEFT", str(noted))
        for name in names:
            if name != "FAILS":
                load_study(profile).save_table(pd.DataFrame({"x": [1]}), name)
        load_study(profile).save_table("text", "notes")
        monkeypatch.delenv("TSP_LEFT")
        return subprocess.Popen(["false"] if "FAILS" in names else ["cp", str(path), str(out)])

    monkeypatch.setattr(runner, "_papermill", execute)
    return names


def test_what_a_notebook_leaves_no_more_is_removed(folder, leaves):
    figures = run_dir(folder) / "figures"
    figures.mkdir(parents=True)
    (figures / "00_of_the_reader.csv").touch()  # left by nobody
    write_notebook(folder, "00_a", "1 + 1")
    leaves[:] = ["00_old", "00_kept", "FAILS"]
    with pytest.raises(RuntimeError, match="could not be run"):
        what_happened(folder=folder)
    leaves[:] = ["00_kept", "00_second"]
    assert what_happened(folder=folder) == [("00_a", RAN)]
    here = {"00_kept.csv", "00_second.csv", "notes.md", "00_of_the_reader.csv"}
    assert {path.name for path in figures.iterdir()} == here
    left = source_of(run_dir(folder) / "00_a.ipynb")["metadata"]["tsp"]["left"]
    assert set(left) == {f"figures/{name}" for name in here - {"00_of_the_reader.csv"}}

    leaves[:] = ["00_kept"]
    assert what_happened(folder=folder, force=True) == [("00_a", RAN)]
    assert {path.name for path in figures.iterdir()} == here - {"00_second.csv"}
    assert {path.name for path in run_dir(folder).iterdir()} == {"00_a.ipynb", "figures"}


def test_what_a_notebook_left_is_made_again_where_it_is_missing_or_changed(folder, leaves):
    leaves[:] = ["00_kept"]
    figures = run_dir(folder) / "figures"
    write_notebook(folder, "00_a", "1 + 1")
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]
    (figures / "00_kept.csv").unlink()
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert (figures / "00_kept.csv").read_text() == "x\n1\n"
    (figures / "notes.md").write_text("mine")
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert what_happened(folder=folder) == [("00_a", SKIPPED)]


def test_after_a_run_that_left_something_and_did_not_end_it_runs_again(folder, leaves):
    """Even where the notebook is again as it was in the run before that: all is as in that one."""
    leaves[:] = ["00_kept"]
    first = write_notebook(folder, "00_a", "1 + 1").read_text()
    what_happened(folder=folder)
    leaves[:] = ["00_kept", "00_other", "FAILS"]
    write_notebook(folder, "00_a", "1 + 2")
    with pytest.raises(RuntimeError, match="could not be run"):
        what_happened(folder=folder)
    leaves[:] = ["00_kept"]
    (folder / "00_a.ipynb").write_text(first)
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert not (run_dir(folder) / "figures" / "00_other.csv").exists()


def test_a_reader_runs_again_when_what_it_reads_has_changed(folder, executed):
    for name in ("00_a", "01_b"):
        write_notebook(folder, name, "1 + 1")
    write_notebook(folder, "02_c", "1 + 1", reads=["00"])
    what_happened(folder=folder)
    for name, happened in (("01_b", SKIPPED), ("00_a", RAN)):
        path = run_dir(folder) / f"{name}.ipynb"
        notebook = source_of(path)
        (path.parent / "claims").mkdir(exist_ok=True)
        (path.parent / "claims" / f"{name}.json").write_text("{}")
        notebook["metadata"]["tsp"]["left"] = {
            f"claims/{name}.json": needs.sha256_of(path.parent / "claims" / f"{name}.json")}
        path.write_text(json.dumps(notebook))
        assert what_happened(folder=folder) == [("00_a", SKIPPED), ("01_b", SKIPPED),
                                                ("02_c", happened)]


# Order.


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
    write_notebook(folder, "02_c", f"import pathlib\nhere = pathlib.Path({str(here)!r})\n"
                   "assert all((here / f'{name}.ended').exists() for name in 'ab')",
                   reads=["00", "01"])
    write_notebook(folder, "03_d", "1 + 1")
    happened = what_happened(folder=folder, jobs=2)
    assert sorted(happened) == [(name, RAN) for name in ("00_a", "01_b", "02_c", "03_d")]
    assert [name for name, _ in happened].index("02_c") >= 2


def test_side_by_side_the_longest_begins_and_one_at_a_time_the_first(folder, executed):
    for name, seconds in (("00_a", {}), ("01_b", {"tiny": 20, "paper": 900}),
                          ("02_c", {"tiny": 155}), ("03_d", {"tiny": 900}),
                          ("04_e", {"offline": 30, "small": 1})):
        write_notebook(folder, name, "1 + 1", seconds=seconds,
                       reads=["00", "04"] if name == "03_d" else [])
    what_happened(folder=folder, jobs=1)
    assert [name for name, _ in executed] == ["00_a", "01_b", "02_c", "03_d", "04_e"]
    executed.clear()
    what_happened("tiny n_neighbors=5", folder=folder, jobs=2)
    assert [name for name, _ in executed[:3]] == ["02_c", "04_e", "01_b"]  # 04: at most 30
    assert {name for name, _ in executed[3:]} == {"00_a", "03_d"}


def test_a_reader_waits_for_those_before_it_that_it_reads(folder):
    a, b, c = (folder / f"0{i}_{name}.ipynb" for i, name in enumerate("abc"))
    about = {a: {}, b: {"reads": ["00", "01", "02"]}, c: {}}  # itself and a later one: no wait
    assert runner._next_to_start([b, a, c], [], about) == a
    assert runner._next_to_start([b, c], [a], about) == c
    assert runner._next_to_start([b], [a, c], about) is None
    assert runner._next_to_start([b], [c], about) == b


def test_less_than_one_notebook_at_a_time_is_refused(folder):
    with pytest.raises(ValueError, match="0 notebooks side by side cannot run; pass at least 1"):
        what_happened(folder=folder, jobs=0)


def test_threads_are_shared_out_and_one_notebook_alone_has_them_all(folder, monkeypatch):
    given = {}

    def execute(path, out, profile, n_threads, log, noted):
        given[path.stem] = n_threads
        return subprocess.Popen(["cp", str(path), str(out)])

    monkeypatch.setattr(runner, "_papermill", execute)
    monkeypatch.setattr(runner.joblib, "cpu_count", lambda: 9)
    for name in ("00_a", "01_b"):
        write_notebook(folder, name, "1 + 1")
    write_notebook(folder, "02_c", "1 + 1", reads=["00", "01"])
    what_happened(folder=folder, jobs=2)
    assert given == {"00_a": 4, "01_b": 4, "02_c": 9}


def test_the_users_own_number_of_threads_counts_where_it_is_smaller(monkeypatch):
    given = {}
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, env, **_: given.update(env))
    for wanted, share, expected in (("1", 4, "1"), ("8", 4, "4"), ("", 4, "4"), ("all", 4, "4")):
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        runner._papermill(Path("00_a.ipynb"), Path("out.ipynb"), "tiny", share, None, Path("left"))
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


def run_apart(folder: Path) -> subprocess.Popen:
    """`reproduce` of the folder's notebooks in a process of its own."""
    code = ("import pathlib, signal, sys\n"
            "from tsp_utils.study import profile, runner\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's &\n"
            "runner.stop_when_terminated()\n"
            "profile.runs_dir = lambda: pathlib.Path(sys.argv[1]) / 'runs'\n"
            "list(runner.reproduce('tiny', folder=pathlib.Path(sys.argv[2]), jobs=2))")
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder.parent), str(folder)], cwd=runner.REPOSITORY,
        start_new_session=True, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_kernels_and_leaves_no_partial(folder, number):
    """Ctrl-C, as a terminal sends it, to every process of the group; kill, to the first alone."""
    sign, source = started(folder, "00_a")
    write_notebook(folder, "00_a", source)
    process = run_apart(folder)
    try:
        wait_until(sign.exists)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said = process.communicate(timeout=30)[1]
        assert "KeyboardInterrupt" in said or process.returncode == 128 + number
    finally:
        process.kill()
    wait_until(lambda: not is_alive(int(sign.read_text())))
    assert not list(run_dir(folder).iterdir())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
def test_one_run_at_a_time_and_a_killed_one_leaves_no_lock_no_kernel_and_no_trace(folder):
    sign, source = started(folder, "00_a")
    leave = ("import pathlib\nfrom tsp_utils.study import profile as p\n"
             f"p.runs_dir = lambda: pathlib.Path({str(folder.parent / 'runs')!r})\n"
             "p.load_study(profile).save_table('text', %r)")
    write_notebook(folder, "00_a", leave % "half", source)
    process = run_apart(folder)
    try:
        wait_until(sign.exists)
        with pytest.raises(RuntimeError, match=r"Another run of tiny is under way in .*; wait"):
            what_happened(folder=folder)
        assert what_happened("tiny n_seeds=1", folder=folder.parent / "none") == []
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: not is_alive(int(sign.read_text())))
    write_notebook(folder, "00_a", leave % "whole")
    assert what_happened(folder=folder) == [("00_a", RAN)]
    assert {path.name for path in run_dir(folder).iterdir()} == {"00_a.ipynb", "figures"}
    assert [path.name for path in (run_dir(folder) / "figures").iterdir()] == ["whole.md"]


def test_a_process_that_dies_is_named(folder):
    for dies in ("os.getpid()", "os.getppid()"):  # the kernel, papermill
        write_notebook(folder, "00_a", f"import os, time\nos.kill({dies}, 9)\ntime.sleep(60)")
        with pytest.raises(RuntimeError, match=r"^00_a\.ipynb stopped because its process died"):
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
    assert paths[0] == str(runner.REPOSITORY) and len(paths) == len(set(paths)) == 2


# What is said meanwhile.


def test_it_says_when_a_notebook_starts_and_which_cell_runs(folder):
    write_notebook(folder, "00_a", "import time\ntime.sleep(2.5)", "1 + 1")
    steps = [step for step in reproduce("tiny", folder=folder, jobs=1)]
    assert steps[0] == ("00_a", "starts", 0.0, False)
    assert steps[-1].what == RAN and [step.ended for step in steps] == [False] * (
        len(steps) - 1) + [True]
    # The parameters' cell is the first of three, and papermill's own is not counted.
    slow = [step.seconds for step in steps if step.what == "code cell 2 of 3"]
    assert len(slow) >= 2 and slow == sorted(slow)


def said(steps, monkeypatch, capsys, terminal: bool) -> str:
    """What `report` prints of (clock, step) pairs."""
    clock = [0.0]

    def on_the_clock():
        for clock[0], step in steps:
            yield step

    monkeypatch.setattr(command.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: terminal, raising=False)
    command.report(on_the_clock())
    return capsys.readouterr().out


STEPS = [(0, Step("00_a", "starts", ended=False)), (1, Step("00_a", "code cell 1 of 9", 1, False)),
         (12, Step("00_a", "code cell 2 of 9", 12, False)),
         (13, Step("00_a", "code cell 3 of 9", 13, False)),
         (40, Step("00_a", "code cell 3 of 9", 40, False)),
         (60, Step("00_a", "code cell 3 of 9", 60, False)),
         (101, Step("00_a", "code cell 3 of 9", 101, False)),
         (102, Step("01_b", "starts", ended=False)), (103, Step("00_a", "ran", 103)),
         (104, Step("01_b", "code cell 1 of 2", 2, False)), (105, Step("01_b", "ran", 3))]


def test_lines_are_few_where_the_output_is_no_terminal(monkeypatch, capsys):
    lines = said(STEPS, monkeypatch, capsys, terminal=False).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "00_a starts", "00_a code cell 2 of 9 12 s", "00_a code cell 3 of 9 40 s",
        "00_a code cell 3 of 9 101 s", "01_b starts", "00_a ran 103 s", "01_b ran 3 s",
        "all 105 s"]


def test_a_terminal_has_one_line_that_is_written_again(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    pieces = said(STEPS, monkeypatch, capsys, terminal=True).split("\r\x1b[K")
    lasting = [piece.split() for piece in pieces if piece.endswith("\n")]
    assert lasting[:3] == [["00_a", "starts"], ["01_b", "starts"], ["00_a", "ran", "103", "s"]]
    assert "00_a: code cell 3 of 9, 101 s" in pieces
    assert "00_a: code cell 3 of 9, 101 s | 01_b: starts, 0 s" in pieces
    assert max(len(piece) for piece in pieces) < 60 and pieces[-1].split()[0] == "all"


# What the committed notebooks say to the runner.


def code_of(path: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in source_of(path)["cells"]
                     if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", notebook_paths(), ids=lambda path: path.stem)
def test_a_notebook_says_what_it_loads_and_reads_and_how_long_it_takes(path):
    about, code = source_of(path)["metadata"]["tsp"], code_of(path)
    assert set(about) == {"data", "reads", "seconds"}
    assert set(about["seconds"]) == {"offline", "small"} and min(about["seconds"].values()) > 0

    loads = re.search(r"study\.(images|features|fit_and_score|train|kmeans_table)\(|"
                      r"compare_heads\(|run_heads\(", code)
    named = set(re.findall(r"(?:load_dataset|study\.images)\(\"([\w-]+)\"", code))
    assert set(about["data"]) == named | ({"study"} if loads else set())

    others = [other for other in notebook_paths() if other.name < path.name]
    leave_evidence = {other.name[:2] for other in others if "save_evidence(study" in code_of(other)}
    read = leave_evidence if "read_evidence(study)" in code else set()
    read |= {number for number in re.findall(r"\"(\d\d)_\w+\"", code) if number != path.name[:2]}
    assert set(about["reads"]) == read


# Outputs back into the notebooks.


def test_refresh_writes_outputs_without_traces_of_the_run(folder):
    path = write_notebook(folder, "00_a", "print(profile, 6 * 7)", "import sys, warnings\n"
                          "from tqdm import tqdm\n"
                          "for _ in tqdm(range(3), unit='image'):\n    pass\n"
                          "print('mind this', file=sys.stderr)", data=["study"])
    failing = write_notebook(folder, "01_b", "print('never written')", "1 / 0")
    before = failing.read_bytes()
    steps = (step for step in refresh(folder) if step.ended)
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
    assert set(notebook["metadata"]) == {"kernelspec", "language_info", "tsp"}
    assert notebook["metadata"]["tsp"] == {"data": ["study"]}
    assert not [c for c in notebook["cells"] if "injected-parameters" in c["metadata"].get("tags",
                                                                                            [])]


# Figures.


def test_publishing_copies_a_finished_run_and_says_what_is_missing(folder, executed, tmp_path,
                                                                   monkeypatch):
    monkeypatch.setattr(runner, "REPOSITORY", tmp_path)
    monkeypatch.setattr(runner, "notebook_paths", lambda _=None: notebook_paths(folder))
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
