"""The command: its exit status, its one sentence on stderr, and the set-up behind it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readings import ROOT

from experiments.__main__ import EXPERIMENTS
from experiments.__main__ import parser as experiments
from tsp_utils.__main__ import main, parser

needs_make = pytest.mark.skipif(shutil.which("make") is None or os.name == "nt",
                                reason="needs make and a system with /bin/sh")


def call(*command, **options) -> subprocess.CompletedProcess:
    options = dict(cwd=ROOT, text=True, capture_output=True, timeout=120) | options
    return subprocess.run(command, **options)


def is_one_sentence(text: str) -> bool:
    return text.startswith("error: ") and text.rstrip("\n").count("\n") == 0


@pytest.mark.parametrize(("helps", "names"), [
    ([sys.executable, "-m", "tsp_utils", "--help"], "reproduce figures refresh cluster"),
    ([sys.executable, "-m", "experiments", "--help"], " ".join(EXPERIMENTS)),
    pytest.param(["make", "PYTHON=python"], "help setup reproduce test notebooks refresh figures "
                 "bench clean", marks=needs_make)])
def test_help_lists_every_command_and_each_target(helps, names):
    done = call(*helps)
    assert done.returncode == 0 and done.stderr == ""
    for name in names.split():
        assert name in done.stdout
        assert helps[0] != "make" or len(re.findall(rf"^{name} ", done.stdout, re.M)) == 1


@pytest.mark.parametrize("arguments, sentence", [
    ("reproduce --profile ofline", "'ofline' is not known; the nearest one is 'offline'"),
    ("reproduce --profile tiny --set n_neighbor=5", "nearest one is 'n_neighbors'"),
    ("figures --profile tiny", "run make reproduce PROFILE=tiny first")])
def test_what_cannot_be_done_is_one_sentence(left_by, own_folders, capsys, arguments, sentence):
    error = left_by(*arguments.split())
    assert is_one_sentence(error) and sentence in error and capsys.readouterr().out == ""
    assert not (ROOT / "figures" / "tiny").exists()


@pytest.mark.parametrize("parse, arguments", [
    (parser, []), (experiments, []), (experiments, ["learn-patches", "--seed", "one"])])
def test_what_is_no_command_is_refused(parse, arguments, capsys):
    with pytest.raises(SystemExit) as left:
        parse().parse_args(arguments)
    assert left.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("error, code", [
    (KeyboardInterrupt(), 130), (MemoryError("no"), "error: no"),
    (RuntimeError("01_b.ipynb failed"), "error: 01_b.ipynb failed")])
def test_ctrl_c_too_little_memory_and_a_failed_notebook_are_one_sentence(
        left_by, monkeypatch, capsys, error, code):
    def stops(*_, **__):
        yield "00_overview", "ran", 61.0
        raise error

    monkeypatch.setattr("tsp_utils.study.runner.reproduce", stops)
    assert left_by("reproduce") == code
    assert capsys.readouterr().err.count("\n") == (code == 130)


def test_reproduce_passes_arguments_on_and_prints_a_line_a_notebook(monkeypatch, capsys):
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


def set_up(place: Path, version: str = "3, 12, 0", **environ) -> subprocess.CompletedProcess:
    """`make setup` with a Python of that version, whose venv only says what it is asked for."""
    venv = place / ".venv" / "bin"
    fake = place / "python"
    fake.write_text(f"""#!/bin/sh
if [ "$1" = -c ]; then exec {sys.executable} -c "import sys; sys.version_info = ({version}); $2"; fi
echo "$@" >> {place}/said
if [ "$2" = venv ]; then mkdir -p {venv}; cp $0 {venv}/python; fi
if [ -n "$FAILS" ]; then case "$*" in *"$FAILS"*) exit 3;; esac; fi
""")
    fake.chmod(0o755)
    for name in ("Makefile", "requirements.lock"):
        if not (place / name).exists():
            shutil.copy(ROOT / name, place)
    return call("make", "setup", f"PYTHON3={fake}", cwd=place, env=os.environ | environ)


@needs_make
def test_set_up_once_until_the_lock_changes_and_again_after_it_stopped(tmp_path):
    def said() -> list[str]:
        assert set_up(tmp_path).returncode == 0
        return (tmp_path / "said").read_text().splitlines()

    stopped = set_up(tmp_path, FAILS="-r requirements.lock")
    assert stopped.returncode and not (tmp_path / ".venv" / ".complete").exists()
    first = said()
    assert [line.split()[1] for line in first] == ["venv", "pip", "venv", "pip", "pip"]
    assert "-r requirements.lock" in first[-2] and first[-1].endswith("-e .")
    assert said() == first  # nothing more
    os.utime(tmp_path / "requirements.lock", (2**32, 2**32))
    assert len(said()) > len(first)


@needs_make
@pytest.mark.parametrize("version", ["3, 10, 14", "3, 14, 0"])
def test_another_python_is_refused(tmp_path, version):
    done = set_up(tmp_path, version)
    assert re.search(r"3\.11 to 3\.13 is needed and this is 3\.1[04]; .*PYTHON3=", done.stderr)
    assert done.returncode and not (tmp_path / ".venv").exists()


def test_a_python_without_the_packages_says_what_installs_them():
    done = call(sys.executable, "-I", "-S", "-c", "import runpy, sys; sys.path.insert(0, '.'); "
                "sys.argv[1:] = ['reproduce']; runpy.run_module('tsp_utils', run_name='__main__')")
    assert done.returncode == 1 and is_one_sentence(done.stderr) and "make setup" in done.stderr
