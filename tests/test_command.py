"""The command: its exit status, its one sentence on stderr, and the set-up behind it."""

import hashlib
import os
import runpy
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tsp_utils import environment
from tsp_utils.__main__ import main, parser

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("setup", "reproduce", "figures", "refresh", "learn-patches", "pretrain", "bundle",
            "dictionary-arms", "bundle-vectors")


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tsp_utils", *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)


def failure(monkeypatch, *arguments) -> str:
    """What `python -m tsp_utils ARGUMENTS` exits with, in this process; a text is status 1."""
    monkeypatch.setattr(sys, "argv", ["tsp_utils", *arguments])
    monkeypatch.delitem(sys.modules, "tsp_utils.__main__", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module("tsp_utils", run_name="__main__")
    return left.value.code


def is_one_sentence(text: str) -> bool:
    return text.startswith("error: ") and text.rstrip("\n").count("\n") == 0


def test_help_lists_every_command():
    done = command("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("arguments, sentence", [
    (["reproduce", "--profile", "ofline"], "no profile 'ofline'; pass one of"),
    (["reproduce", "--profile", "tiny", "--set", "n_neighbor=5"], "nearest one is 'n_neighbors'"),
])
def test_bad_arguments_end_in_one_sentence(arguments, sentence):
    done = command(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert sentence in done.stderr and is_one_sentence(done.stderr)


@pytest.mark.parametrize("arguments", [[], ["reproduc"], ["reproduce", "--profil"],
                                       ["learn-patches", "--seed", "one"]])
def test_what_is_no_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        parser().parse_args(arguments)
    assert left.value.code == 2 and "error:" in capsys.readouterr().err


def test_figures_before_a_run_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tsp_utils.study.profile.runs_dir", lambda: tmp_path)
    error = failure(monkeypatch, "figures", "--profile", "tiny")
    assert is_one_sentence(error) and "run make reproduce PROFILE=tiny first" in error
    assert not (ROOT / "figures" / "tiny").exists()


def test_a_failing_notebook_ends_in_one_sentence(monkeypatch):
    def fails(*_, **__):
        yield "00_overview", "ran", 1.0
        raise RuntimeError("01_feature_extraction.ipynb failed in code cell 3")

    monkeypatch.setattr("tsp_utils.study.runner.reproduce", fails)
    assert failure(monkeypatch, "reproduce") == (
        "error: 01_feature_extraction.ipynb failed in code cell 3")


def test_reproduce_passes_its_arguments_on_and_reports(monkeypatch, capsys):
    calls = []

    def reproduce(profile, force, jobs):
        calls.append((profile, force, jobs))
        yield "00_overview", "ran", 61.0
        yield "01_feature_extraction", "unchanged, skipped", 0.0

    monkeypatch.setattr("tsp_utils.study.runner.reproduce", reproduce)
    assert main(["reproduce", "--profile", "tiny", "--set", "n_seeds=1", "n_neighbors=5",
                 "--force", "--jobs", "3"]) == 0
    assert calls == [("tiny n_seeds=1 n_neighbors=5", True, 3)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["00_overview", "ran", "61", "s"] and "skipped" in lines[1]
    assert lines[2].split() == ["all", "0", "s"]  # on the clock: notebooks run side by side
    assert lines[3].endswith("runs/tiny+n_seeds=1+n_neighbors=5")


# The set-up.


@pytest.fixture
def bare(tmp_path, monkeypatch) -> list:
    """A clone without .venv; returns the commands that the set-up would have run."""
    commands = []
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "VENV_PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv" / ".complete")
    monkeypatch.setattr(environment.sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(environment.shutil, "disk_usage", disk_with(100e9))
    (tmp_path / "requirements.lock").write_text("torch==1\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)

    def run(arguments):
        commands.append([str(a) for a in arguments])
        if "venv" in arguments:
            environment.VENV_PYTHON.touch()

    monkeypatch.setattr(environment, "_run", run)
    monkeypatch.setattr(environment, "_has_pip", lambda python: python.exists())
    return commands


def disk_with(free: float):
    return lambda path: namedtuple("usage", "total used free")(10**12, 0, free)


def test_set_up_once_and_never_again_until_the_lock_changes(bare, capsys):
    assert environment.set_up() == environment.VENV_PYTHON
    assert [("venv" in c, "-r" in c, "-e" in c) for c in bare] == [
        (True, False, False), (False, True, False), (False, False, True)]
    lock = environment.REPOSITORY / "requirements.lock"
    assert environment.STAMP.read_text().strip() == hashlib.sha256(lock.read_bytes()).hexdigest()
    assert environment.set_up() == environment.VENV_PYTHON and len(bare) == 3

    lock.write_text("torch==2\n")
    environment.set_up()
    assert len(bare) == 5 and "venv" not in bare[3]  # packages only


def test_a_venv_without_pip_is_made_again(bare, monkeypatch, capsys):
    environment.VENV_PYTHON.touch()
    monkeypatch.setattr(environment, "_has_pip", lambda python: False)
    environment.set_up()
    assert "venv" in bare[0] and "--clear" in bare[0]


def test_a_set_up_that_stopped_is_not_taken_for_whole(bare, monkeypatch, capsys):
    def stops(arguments):
        environment.VENV_PYTHON.touch()
        if "pip" in arguments:
            raise OSError("Set-up stopped")

    monkeypatch.setattr(environment, "_run", stops)
    with pytest.raises(OSError, match="Set-up stopped"):
        environment.set_up()
    assert not environment.STAMP.exists()


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 14, 0)])
def test_another_python_is_refused(bare, monkeypatch, version):
    monkeypatch.setattr(environment.sys, "version_info", version)
    with pytest.raises(OSError, match=r"3\.11 to 3\.13 is needed and this is 3\.1[04]; .*PYTHON3="):
        environment.set_up()
    assert bare == []


def test_a_python_without_ensurepip_is_told_what_to_install(bare, monkeypatch):
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name, *rest:
                        None if name == "ensurepip" else find(name, *rest))
    with pytest.raises(OSError, match="apt install python3-venv"):
        environment.set_up()
    assert bare == []


def test_too_little_disk_is_said_before_anything_is_made(bare, monkeypatch):
    monkeypatch.setattr(environment.shutil, "disk_usage", disk_with(1.5e9))
    with pytest.raises(OSError, match=r"takes \d+ GB and 1\.5 GB are free in .*make room"):
        environment.set_up()
    assert bare == []


def test_a_step_that_fails_is_named():
    with pytest.raises(OSError, match=r"stopped at `-c raise SystemExit\(3\)` \(exit status 3\)"):
        environment._run([sys.executable, "-c", "raise SystemExit(3)"])


def test_an_environment_that_lacks_packages_does_not_call_itself_for_ever(monkeypatch):
    monkeypatch.setattr(environment, "set_up", lambda: Path(sys.executable))
    monkeypatch.setattr(environment, "VENV", Path(sys.prefix))
    monkeypatch.setattr(environment.subprocess, "call", lambda *_, **__: pytest.fail("called"))
    monkeypatch.setattr(environment, "is_ready", lambda: False)
    with pytest.raises(OSError, match=r"remove \.venv and run make setup"):
        main(["reproduce"])


def test_a_bare_python_hands_the_command_to_the_venv(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(environment, "set_up", lambda: tmp_path / "python")
    monkeypatch.setattr(environment, "VENV", tmp_path)
    monkeypatch.setattr(environment, "is_ready", lambda: False)
    monkeypatch.setattr(environment.subprocess, "call", lambda arguments, cwd:
                        calls.append((arguments, cwd)) or 7)
    assert main(["figures", "--profile", "tiny"]) == 7
    assert calls == [([str(tmp_path / "python"), "-m", "tsp_utils", "figures", "--profile",
                       "tiny"], str(environment.REPOSITORY))]


@pytest.mark.skipif(os.name == "nt", reason="make is a Unix tool here")
def test_make_help_is_the_default_and_lists_the_targets():
    try:
        done = subprocess.run(["make", "PYTHON=python"], cwd=ROOT, text=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("make is not installed")
    assert done.returncode == 0, done.stderr
    for target in ("help", "setup", "reproduce", "test", "notebooks", "refresh", "figures", "bench",
                   "clean"):
        assert sum(line.split()[0] == target for line in done.stdout.splitlines()) == 1
