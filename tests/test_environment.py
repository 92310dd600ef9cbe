"""The set-up: one list of packages, said in four places."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import tsp_utils

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAMES = {"pytorch": "torch", "pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}


def declared() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    return dict(re.match(r"([\w-]+)(.*)", line).groups() for line in lines)


@pytest.mark.parametrize("file", ["environment.yml", "environment-cpu.yml"])
def test_conda_environments_name_the_same_packages_and_versions(file):
    entries = yaml.safe_load((ROOT / file).read_text())["dependencies"]
    conda = dict(re.match(r"([\w-]+)(.*)", entry).groups() for entry in entries)
    conda.pop("python")
    assert {CONDA_NAMES.get(name, name): rest for name, rest in conda.items()} == declared()


def test_every_conda_line_gives_a_reason():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    assert all("#" in line for line in lines if line.startswith("  - ") and ">=" in line)


def test_lock_pins_every_declared_package_for_three_systems_and_names_no_index():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([\w.-]+)==", lock, re.M))
    assert {name.lower() for name in declared()} <= {name.lower() for name in pinned}
    entries = [line for line in lock.splitlines() if not line.lstrip().startswith("#")]
    assert not re.search(r"://|file:|--index-url|--find-links|@", "\n".join(entries))
    for marker in ("linux", "win32", "darwin"):
        assert marker in lock, f"no line of requirements.lock is for {marker}"


@pytest.mark.parametrize("module, absent", [("tsp_utils", {"torch", "numpy"}),
                                            ("tsp_utils.datasets", {"torch"})])
def test_importing_loads_no_torch(module, absent):
    code = f"import sys, {module}; sys.exit(bool({absent} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_api_page_is_of_these_docstrings_and_every_name_has_one():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run make api"
    assert not [name for name in tsp_utils.__all__ if callable(getattr(tsp_utils, name))
                and not getattr(tsp_utils, name).__doc__]
