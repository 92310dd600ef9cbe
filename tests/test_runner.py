"""The runner: order, parameters, skipping, resuming, failing, refreshing, publishing."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import nbformat
import nbval.kernel
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from readings import PATHS, code_of

import tsp_utils.__main__ as command
from conftest import patiently
from tsp_utils.study import publish, runner, staleness
from tsp_utils.study.profile import load_study
from tsp_utils.study.runner import Step, reproduce
from tsp_utils.study.staleness import about_of, notebook_paths

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(),
                                reason="processes are read from /proc")


@pytest.fixture
def folder(tmp_path, monkeypatch, own_folders) -> Path:
    """An empty notebook folder."""
    for name in ("PYTHONPATH", "TSP_DATA"):  # the runner sets them for its kernels
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


class StandIn:
    """Stands for papermill: copies the notebook, which does and leaves what is said here."""

    def __init__(self):
        self.calls, self.leaves = [], {}  # leaves: {notebook: {table: text}}
        self.does, self.command = lambda: None, ["cp"]

    def __call__(self, path, out, profile, n_threads, log, noted):
        self.calls.append((path.stem, profile, n_threads))
        self.does()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TSP_LEFT", str(noted))
            for name, text in self.leaves.get(path.stem, {}).items():
                load_study(profile).save_table(text, name)
        return subprocess.Popen([*self.command, str(path), str(out)])


@pytest.fixture
def papermill(monkeypatch) -> StandIn:
    monkeypatch.setattr(runner, "_papermill", stand_in := StandIn())
    return stand_in


def write(folder: Path, name: str, *sources: str, **tsp) -> Path:
    """Title, parameters cell, then one code cell a source; what it says to the runner."""
    parameters = new_code_cell('profile = "offline"', metadata={"tags": ["parameters"]})
    kernel = dict(name="python3", display_name="Python 3", language="python")
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(
        cells=[new_markdown_cell(f"# {name}"), parameters,
               *map(new_code_cell, sources or ["1 + 1"])],
        metadata={"kernelspec": kernel, "tsp": tsp}), path)
    return path


def ran(folder: Path, profile="tiny", jobs=1, **options) -> list[str]:
    """The notebooks that ran, as they ended; the others were skipped."""
    steps = [step for step in reproduce(profile, folder=folder, jobs=jobs, **options) if step.ended]
    assert {step.what for step in steps} <= {"ran", "unchanged, skipped"}
    return [step.name for step in steps if step.what == "ran"]


def run_dir(folder: Path, profile="tiny") -> Path:
    return folder.parent / "runs" / profile


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_notebooks_run_in_order_fail_by_name_and_resume(folder, monkeypatch):
    """The real thing, with kernels."""
    log = folder.parent / "log.txt"
    note = f"open({str(log)!r}, 'a').write(%r + profile + ' ')"
    write(folder, "01_second", note % "second:",
          "if profile == 'tiny':\n    raise ValueError('too few\\nimages')")
    write(folder, "00_first", note % "first:")
    write(folder, "02_third", note % "third:")
    write(folder, "draft", note % "draft:")  # no number, no part of the study
    # Papermill's injected cell is not the reader's: the failing one is the third of the source.
    with pytest.raises(RuntimeError, match=r"^01_second\.ipynb failed in code cell 3: ValueError: "
                                           r"too few \(all of it: .*01_second\.failed") as failed:
        ran(folder)
    assert "\n" not in str(failed.value) and log.read_text() == "first:tiny second:tiny "
    assert names(run_dir(folder)) == {"00_first.ipynb", "01_second.failed.ipynb"}

    write(folder, "01_second", note % "mended:")
    monkeypatch.setattr(runner, "_papermill", StandIn())
    assert ran(folder) == ["01_second", "02_third"]
    assert names(run_dir(folder)) == {"00_first.ipynb", "01_second.ipynb", "02_third.ipynb"}


def test_only_what_changed_or_is_torn_runs_again_and_force_runs_all(folder, papermill):
    papermill.leaves["00_a"] = {"00_kept": "text"}
    left = run_dir(folder) / "figures" / "00_kept.md"
    names_of_all = ["00_a", "01_b", "02_c"]
    for name in names_of_all:
        write(folder, name)
    assert ran(folder) == names_of_all == [name for name, _, _ in papermill.calls]
    for change, again in (
            (lambda: None, []), (lambda: write(folder, "01_b", "1 + 2"), ["01_b"]),
            (lambda: (run_dir(folder) / "02_c.ipynb").write_text("{ torn"), ["02_c"]),
            (left.unlink, ["00_a"]), (lambda: left.write_text("mine"), ["00_a"])):
        change()
        assert (ran(folder), left.read_text()) == (again, "text")
    assert ran(folder, force=True) == names_of_all


def test_a_changed_profile_library_or_weights_run_again(folder, papermill, tmp_path, monkeypatch):
    write(folder, "00_a")
    (tmp_path / "weights" / "fashion-mnist").mkdir(parents=True)
    (tmp_path / "weights" / "a").write_bytes(b"old")
    monkeypatch.setattr(staleness, "bundled_dir", lambda: tmp_path / "weights")
    assert ran(folder) == ran(folder, "tiny n_neighbors=5") == ["00_a"]
    assert papermill.calls[-1][1] == "tiny n_neighbors=5"
    assert run_dir(folder, "tiny+n_neighbors=5").is_dir()
    assert ran(folder) == []

    (tmp_path / "weights" / "a").write_bytes(b"new")  # learned again: of the same size
    assert ran(folder) == ["00_a"]
    write(folder, "00_a", "%matplotlib inline\n6 * 7")
    called = []
    monkeypatch.setattr(staleness, "code_called_by",
                        lambda source: called.append(source) or "other")
    assert (ran(folder), ran(folder)) == (["00_a"], [])
    assert "6 * 7" in called[0] and "%" not in called[0]
    monkeypatch.setattr(staleness, "code_called_by", lambda source: "another")
    assert ran(folder) == ["00_a"]


@pytest.mark.parametrize(("name", "first", "second"), [
    ("cifar10", "cifar10/test/cat/1.png", "cifar10/test/dog/1.png"),
    ("cifar10", "cifar-10-batches-py/test_batch", "cifar-10-batches-py/data_batch_2"),
    ("cifar100-20", "cifar-100-python/test", "cifar-100-python/meta"),
    ("stl10", "stl10_binary/test_X.bin", "stl10_binary/train_X.bin"),
    ("fashion-mnist", "FashionMNIST/raw/train-images-idx3-ubyte",
     "FashionMNIST/raw/train-labels-idx1-ubyte.gz")])
def test_images_that_are_others_run_again(folder, papermill, name, first, second):
    write(folder, "00_a", data=["study"])
    first, second = (Path(os.environ["TSP_DATA"]) / file for file in (first, second))
    profile = f"tiny datasets={name} protocol=split"
    for path in (first, second):
        path.parent.mkdir(parents=True, exist_ok=True)
    for change in (lambda: first.write_bytes(b"images"), lambda: first.write_bytes(b"other images"),
                   lambda: second.write_bytes(b"more"), first.unlink,
                   lambda: second.rename(first)):  # perhaps of another class
        change()
        assert (ran(folder, profile), ran(folder, profile)) == (["00_a"], [])
    first.with_name(".unseen").write_bytes(b"no image of this set")
    assert ran(folder, profile) == []


def test_a_download_by_the_notebook_itself_and_images_not_loaded_are_no_change(folder, papermill):
    file, of_train = (Path(os.environ["TSP_DATA"]) / "cifar10" / split / "cat" / "1.png"
                      for split in ("test", "train"))
    write(folder, "00_a", data=["cifar10"])

    def download():
        file.parent.mkdir(parents=True)
        file.write_bytes(b"1")

    papermill.does = download
    assert (ran(folder), ran(folder)) == (["00_a"], [])
    of_train.parent.mkdir(parents=True)
    of_train.write_bytes(b"1")  # of a set that is named: its test split
    assert ran(folder) == []
    file.write_bytes(b"22")
    papermill.does = lambda: None
    assert ran(folder) == ["00_a"]


# What a notebook leaves.


def test_what_a_notebook_leaves_no_more_is_removed(folder, papermill):
    figures = run_dir(folder) / "figures"
    figures.mkdir(parents=True)
    (figures / "00_of_the_reader.md").touch()  # left by nobody
    write(folder, "00_a")

    def leaving(*stems, fails=False, **options) -> set[str]:
        papermill.leaves["00_a"] = dict.fromkeys(stems, "")
        papermill.command = ["false"] if fails else ["cp"]
        with pytest.raises(RuntimeError, match="not be run") if fails else nullcontext():
            assert ran(folder, **options) == ["00_a"]
        return {name[3:-3] for name in names(figures) - {"00_of_the_reader.md"}}

    leaving("00_old", "00_kept", fails=True)
    assert leaving("00_kept", "00_second") == {"kept", "second"}
    left = about_of(run_dir(folder) / "00_a.ipynb")["left"]
    assert set(left) == {"figures/00_kept.md", "figures/00_second.md"}
    assert leaving("00_kept", force=True) == {"kept"}
    assert names(run_dir(folder)) == {"00_a.ipynb", "figures"}
    write(folder, "00_a", "1 + 2")
    leaving("00_kept", "00_other", fails=True)
    write(folder, "00_a")  # as in the run before that one, which ended
    assert leaving("00_kept") == {"kept"} and (figures / "00_of_the_reader.md").exists()


def test_a_reader_runs_again_when_what_it_reads_has_changed(folder, papermill):
    for name in ("00_a", "01_b"):
        write(folder, name)
    write(folder, "02_c", reads=["00"])
    assert ran(folder) == ["00_a", "01_b", "02_c"]
    for name, text, again in (("01_b", "other", []), ("00_a", "other", ["02_c"]),
                              ("00_a", "other", []), ("00_a", "a third", ["02_c"])):
        papermill.leaves[name] = {name: text}
        write(folder, name, f"{len(papermill.calls)}")
        assert ran(folder) == [name, *again]


# Order.


def test_side_by_side_the_longest_begins_and_one_at_a_time_the_first(folder, papermill):
    for name, seconds, reads in (
            ("00_a", {}, []), ("01_b", {"tiny": 20, "paper": 900}, []), ("02_c", {"tiny": 155}, []),
            ("03_d", {"tiny": 900}, ["00"]),  # the longest, but for what it reads
            ("04_e", {"offline": 30, "small": 1}, ["04", "05"]),  # itself and a later one: no wait
            ("05_f", {"tiny": 1}, [])):
        write(folder, name, seconds=seconds, reads=reads)
    ran(folder)
    ran(folder, "tiny n_neighbors=5", jobs=2)
    began = [name for name, _, _ in papermill.calls]
    assert began[:6] == ["00_a", "01_b", "02_c", "03_d", "04_e", "05_f"]
    assert began[6:10] == ["02_c", "04_e", "01_b", "05_f"]  # 04: at most 30
    assert began[10:] == ["00_a", "03_d"]
    with pytest.raises(ValueError, match="0 notebooks side by side cannot run; pass at least 1"):
        ran(folder, jobs=0)


def test_threads_are_shared_out_and_a_reader_of_both_waits_and_has_them_all(
        folder, papermill, monkeypatch):
    monkeypatch.setattr(runner.joblib, "cpu_count", lambda: 9)
    papermill.command = ["sh", "-c", 'sleep 0.5; cp "$0" "$1"']  # so that a wait is one
    for name in ("00_a", "01_b"):
        write(folder, name)
    write(folder, "02_c", reads=["00", "01"])
    ran(folder, jobs=2)
    assert [(name, n) for name, _, n in papermill.calls] == [("00_a", 4), ("01_b", 4), ("02_c", 9)]


# Failures, kills and locks.


class Kernel:
    """One that says its process number in a file, and goes on for minutes."""

    def __init__(self, folder: Path):
        self.sign = folder.parent / "pid"
        self.source = (f"import os, pathlib, time\nsign = pathlib.Path({str(self.sign)!r})\n"
                       "sign.with_suffix('.new').write_text(str(os.getpid()))\n"
                       "sign.with_suffix('.new').rename(sign)\ntime.sleep(300)")

    def is_gone(self) -> bool:
        """Whether it ended, be it that nobody collected it."""
        try:
            stat = Path(f"/proc/{self.sign.read_text()}/stat").read_text()
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] == "Z"


def wait_until(is_so) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "this did not happen"
        time.sleep(0.1)


@needs_proc
def test_a_failure_stops_what_runs_beside_it(folder):
    kernel = Kernel(folder)
    write(folder, "00_a", kernel.source)
    write(folder, "01_b", "import os, time\n"
          f"while not os.path.exists({str(kernel.sign)!r}):\n    time.sleep(0.1)\n1 / 0")
    with pytest.raises(RuntimeError, match=r"^01_b\.ipynb failed in code cell 2: ZeroDivision"):
        ran(folder, jobs=2)
    wait_until(kernel.is_gone)
    assert names(run_dir(folder)) == {"01_b.failed.ipynb"}


def run_apart(folder: Path):
    """`reproduce` of the folder's notebooks, in a group and process of its own.

    A fork, that need not import for ten seconds.
    """
    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's &
        runner.stop_when_terminated()
        try:
            list(reproduce("tiny", folder=folder, jobs=2))
        except KeyboardInterrupt:
            sys.exit(130)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@needs_proc
@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_one_run_at_a_time_and_a_stopped_one_leaves_no_kernel_no_lock_and_no_trace(
        folder, monkeypatch, number, status):
    """Ctrl-C, as a terminal sends it, to every process of the group; kill, to the first alone."""
    kernel = Kernel(folder)
    left = run_dir(folder) / "figures" / "half.md"  # as a study leaves a table
    write(folder, "00_a", f"import os, pathlib\nleft = pathlib.Path({str(left)!r})\n"
          "left.parent.mkdir()\nleft.write_text('text')\n"
          "open(os.environ['TSP_LEFT'], 'a').write('figures/half.md\\n')", kernel.source)
    process = run_apart(folder)
    try:
        wait_until(kernel.sign.exists)
        with pytest.raises(RuntimeError, match=r"Another run of tiny is under way in .*; wait"):
            ran(folder)
        assert ran(folder.parent / "none", "tiny n_seeds=1") == []
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        process.join(30)
    finally:
        process.kill()
    assert process.exitcode == status
    wait_until(kernel.is_gone)
    if number != signal.SIGKILL:  # no half of an executed copy
        assert names(run_dir(folder)) == {"figures", ".00_a.left"}
    monkeypatch.setattr(runner, "_papermill", papermill := StandIn())
    papermill.leaves["00_a"] = {"whole": ""}
    assert ran(folder) == ["00_a"]
    assert names(run_dir(folder)) == {"00_a.ipynb", "figures"}
    assert names(run_dir(folder) / "figures") == {"whole.md"}


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("1 + 1", "import os, time; os.kill(os.getpid(), 9)", "stopped because its process died"),
    ("", "", "stopped because its process died"),  # papermill itself
    ('"nbformat": 4', '"nbformat": 99', "could not be run: ")])
def test_what_dies_or_cannot_be_run_is_named(folder, monkeypatch, old, new, sentence):
    path = write(folder, "00_a")
    path.write_text(path.read_text().replace(old, new))
    if not old:
        monkeypatch.setattr(runner, "PAPERMILL", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match=rf"^00_a\.ipynb {sentence}"):
        ran(folder)
    assert not names(run_dir(folder))


# What is said meanwhile.


def test_it_says_which_cell_runs_in_a_kernel_that_finds_package_folders_and_threads(
        folder, monkeypatch):
    """Kernels start in the notebooks' folder, so that a relative TSP_CACHE would be another."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(runner.joblib, "cpu_count", lambda: 4)
    for name, value in dict(TSP_CACHE="my_cache", OMP_NUM_THREADS="1", MKL_NUM_THREADS="8",
                            NUMBA_NUM_THREADS="all", LOKY_MAX_CPU_COUNT="").items():
        monkeypatch.setenv(name, value)
    said = folder.parent / "environment.json"
    write(folder, "00_a", "import json, os, pathlib, time\ntime.sleep(2.5)\n"
          f"pathlib.Path({str(said)!r}).write_text(json.dumps(dict(os.environ)))", "1 + 1")
    first, *others, last = reproduce("tiny", folder=folder, jobs=1)
    assert first == ("00_a", "starts", 0.0, False) and (last.what, last.ended) == ("ran", True)
    assert not any(step.ended for step in others)
    # The parameters' cell is the first of three, and papermill's own is not counted.
    slow = [step.seconds for step in others if step.what == "code cell 2 of 3"]
    assert len(slow) >= 2 and slow == sorted(slow)
    assert json.loads(said.read_text()).items() >= {
        "TSP_CACHE": str(folder.parent / "my_cache"),
        "PYTHONPATH": os.pathsep.join([str(runner.REPOSITORY), str(folder.parent / "pythonpath")]),
        "OMP_NUM_THREADS": "1",  # the user's own number, where it is smaller
        "MKL_NUM_THREADS": "4", "NUMBA_NUM_THREADS": "4", "LOKY_MAX_CPU_COUNT": "4"}.items()


STEPS = [(clock, Step(name, what, seconds, what == "ran")) for clock, name, what, seconds in [
    (0, "00_a", "starts", 0), (1, "00_a", "code cell 1 of 9", 1),
    (12, "00_a", "code cell 2 of 9", 12), (13, "00_a", "code cell 3 of 9", 13),
    (40, "00_a", "code cell 3 of 9", 40), (60, "00_a", "code cell 3 of 9", 60),
    (101, "00_a", "code cell 3 of 9", 101), (102, "01_b", "starts", 0), (103, "00_a", "ran", 103),
    (104, "01_b", "code cell 1 of 2", 2), (105, "01_b", "ran", 3)]]


def test_lines_are_few_and_a_terminal_has_one_that_is_written_again(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(command.time, "perf_counter", lambda: clock[0])

    def said(terminal: bool) -> str:
        def on_the_clock():
            for clock[0], step in STEPS:
                yield step

        monkeypatch.setattr(command.sys.stdout, "isatty", lambda: terminal, raising=False)
        command.report(on_the_clock())
        return capsys.readouterr().out

    assert [" ".join(line.split()) for line in said(terminal=False).splitlines()] == [
        "00_a starts", "00_a code cell 2 of 9 12 s", "00_a code cell 3 of 9 40 s",
        "00_a code cell 3 of 9 101 s", "01_b starts", "00_a ran 103 s", "01_b ran 3 s",
        "all 105 s"]
    monkeypatch.setenv("COLUMNS", "60")
    pieces = said(terminal=True).split("\r\x1b[K")
    lasting = [piece.split() for piece in pieces if piece.endswith("\n")]
    assert lasting[:3] == [["00_a", "starts"], ["01_b", "starts"], ["00_a", "ran", "103", "s"]]
    assert {"00_a: code cell 3 of 9, 101 s",
            "00_a: code cell 3 of 9, 101 s | 01_b: starts, 0 s"} <= set(pieces)
    assert max(len(piece) for piece in pieces) < 60 and pieces[-1].split()[0] == "all"


# What the committed notebooks say to the runner.


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_says_what_it_loads_and_reads_and_how_long_it_takes(path):
    about, code = about_of(path), code_of(path)
    assert set(about) == {"data", "reads", "seconds"}
    assert set(about["seconds"]) == {"offline", "small"} and min(about["seconds"].values()) > 0

    loads = re.search(r"study\.(images|features|fit_and_score|train|kmeans_table)\(|"
                      r"compare_heads\(|run_heads\(", code)
    named = set(re.findall(r"(?:load_dataset|study\.images)\(\"([\w-]+)\"", code))
    assert set(about["data"]) == named | ({"study"} if loads else set())

    read = {number for number in re.findall(r"\"(\d\d)_\w+\"", code) if number != path.name[:2]}
    if "read_evidence(study)" in code:
        read |= {other.name[:2] for other in PATHS[:PATHS.index(path)]
                 if "save_evidence(study" in code_of(other)}
    assert set(about["reads"]) == read


# From a finished run back into the repository.


@pytest.fixture
def repository(folder, monkeypatch) -> Path:
    monkeypatch.setattr(publish, "REPOSITORY", folder.parent)
    monkeypatch.setattr(publish, "notebook_paths", lambda: notebook_paths(folder))
    return folder.parent


def test_refresh_writes_outputs_without_traces_of_the_run(folder, repository):
    path = write(folder, "00_a", "print(profile, 6 * 7)", "import sys\nfrom tqdm import tqdm\n"
                 "list(tqdm(range(3), unit='image'))\nprint('mind this', file=sys.stderr)\n"
                 "display({'application/vnd.jupyter.widget-view+json': {}}, raw=True)\n1 + 1",
                 data=["study"])
    before = json.loads(path.read_text())
    ran(folder)
    assert publish.refresh("tiny") == [path] and ran(folder) == []
    after = json.loads(path.read_text())
    title, parameters, printed, warned = after["cells"]
    assert [cell["execution_count"] for cell in (parameters, printed, warned)] == [1, 2, 3]
    assert printed["outputs"][0]["text"] == ["tiny 42\n"]
    message, result = warned["outputs"]  # the bars are gone, the message stays
    assert "".join(message["text"]) == "mind this\n" and result["execution_count"] == 3
    for cell in after["cells"][1:]:  # nothing else is another one
        cell |= {"execution_count": None, "outputs": []}
    assert after == before
    before["cells"][0]["source"] = ["# What came of it"]  # prose is written with a run in sight
    path.write_text(json.dumps(before))
    publish.refresh("tiny")
    after = json.loads(path.read_text())["cells"]
    assert after[0]["source"] == ["# What came of it"] and after[3]["outputs"] == [message, result]


def test_refresh_is_refused_where_a_notebook_was_not_run_as_it_is(folder, repository, papermill):
    for name, cell in (("00_a", "1 + 1"), ("01_b", "1 + 1"), ("00_a", "1 + 2")):
        path = write(folder, name, cell)
        before = path.read_bytes()
        with pytest.raises(FileNotFoundError, match=rf"^{name}\.ipynb has not been run as it is "
                                                    r"now; run make reproduce first\.$"):
            publish.refresh("tiny")
        assert path.read_bytes() == before
        ran(folder)


def test_publishing_copies_a_finished_run_and_says_what_is_missing(folder, repository, papermill):
    for name in ("00_a", "01_b"):
        write(folder, name)
    with pytest.raises(FileNotFoundError, match=r"missing: 00_a, 01_b\); run make reproduce "
                                                r"PROFILE=tiny first"):
        publish.publish_figures("tiny")
    assert not (repository / "figures").exists()

    ran(folder)
    figures, target = run_dir(folder) / "figures", repository / "figures" / "tiny"
    for place, files in ((figures, ("00_a_curve.png", "00_a_curve.csv", "01_b_sheet_local.png")),
                         (target, ("00_a_of_an_earlier_run.png", "notes.md"))):
        place.mkdir(parents=True)
        for name in files:
            (place / name).write_text(name)
    copied = publish.publish_figures("tiny")
    assert [path.name for path in copied] == ["00_a_curve.csv", "00_a_curve.png"]
    assert names(target) == {"00_a_curve.png", "00_a_curve.csv", "notes.md"}
    assert copied[0] == target / copied[0].read_text()


DIED = "Kernel died before replying to kernel_info"


@pytest.mark.parametrize(("dies", "words", "ends"), [
    (1, DIED, 0), (3, DIED, 1), (1, "another error", 1)])
def test_a_kernel_that_dies_as_it_starts_is_started_again(dies, words, ends, tmp_path):
    """Under papermill, by one that stands for it."""
    (tmp_path / "papermill").mkdir()
    (tmp_path / "papermill" / "__init__.py").touch()
    (tmp_path / "papermill" / "__main__.py").write_text(
        f"import sys\ntries = []\ndef papermill():\n    tries.append(1)\n"
        f"    if len(tries) <= {dies}:\n        raise RuntimeError({words!r})\n    sys.exit()")
    with subprocess.Popen([sys.executable, "-c", runner.PAPERMILL], stdin=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)}
                          ) as started:  # an input that is closed would end it
        error = started.stderr.read().decode()
    assert (started.returncode, words in error) == (ends, bool(ends))


@pytest.mark.parametrize(("dies", "words", "n_tries"), [
    (0, DIED, 1), (2, DIED, 3), (3, DIED, 3), (1, "no such kernel", 1)])
def test_nbval_starts_a_kernel_three_times_at_most_and_says_another_error_at_once(
        dies, words, n_tries):
    start = mock.Mock(side_effect=[RuntimeError(words)] * dies + ["kernel"])
    with pytest.raises(RuntimeError, match=words) if dies == n_tries else nullcontext():
        assert patiently(start)("python") == "kernel"
    assert start.call_args_list == [mock.call("python")] * n_tries
    assert nbval.kernel.start_new_kernel.__qualname__ == "patiently.<locals>.started"
