"""The house: who may import whom, how large it is, and that a wheel holds all of it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("folder", "pretraining", "study", "systems")
# Lines that there may be: lower them where something was deleted. The aim is 1,600 on top and
# 5,500 in all.
MOST_ON_TOP, MOST_IN_ALL = 3_250, 8_200


def test_the_doors_are_those_of_pyproject():
    """Layers as data flows, folders that know the top alone, only `study` knows them all."""
    done = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT,
                          text=True, capture_output=True)
    assert done.returncode == 0 and "Rooms KEPT" in done.stdout, done.stdout[-3000:] + done.stderr


def test_the_package_does_not_grow():
    package = ROOT / "tsp_utils"
    lines = {path.relative_to(package).as_posix(): len(path.read_text("utf-8").splitlines())
             for path in package.rglob("*.py")}
    top = sum(n for path, n in lines.items() if "/" not in path and not path.startswith("__"))
    largest = ", ".join(f"{path} {lines[path]}" for path in sorted(lines, key=lines.get)[:-9:-1])
    said = f"{top:,} lines on top, {sum(lines.values()):,} in all; the largest: {largest}"
    print(said)
    assert top <= MOST_ON_TOP and sum(lines.values()) <= MOST_IN_ALL, said


def test_a_wheel_holds_the_rooms_and_what_ships(tmp_path):
    source = tmp_path / "source"  # a copy: a build leaves files that the next one would take in
    shutil.copytree(ROOT / "tsp_utils", source / "tsp_utils", ignore=lambda *_: ["__pycache__"])
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
                    "-w", str(tmp_path), "."], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("tsp_utils/")}
    package = ROOT / "tsp_utils"
    wanted = [*package.rglob("*.py"), *(package / "bundled").rglob("*.*"),
              package / "folder" / "report.html.jinja"]
    assert {path.relative_to(ROOT).as_posix() for path in wanted} <= held
