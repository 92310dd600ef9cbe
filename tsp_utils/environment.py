"""The set-up: a .venv from requirements.lock, made once and skipped when it is there.

Standard library only, and no syntax younger than Python 3.6: this is what a bare Python runs first,
and a Python that is too old must reach the sentence that says so.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
VENV = REPOSITORY / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".complete"  # holds the hash of the lock that was installed
NEEDED = ("torch", "torchvision", "timm", "faiss", "sklearn", "umap", "papermill", "jupyterlab")
IS_CLONE = (REPOSITORY / "requirements.lock").exists()  # an installed package has no .venv to make
DISK_GB = 7  # measured on Linux, where the lock brings torch with its CUDA libraries


def is_ready() -> bool:
    """Whether this interpreter has what the study needs (then it is used as it is)."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDED)


def set_up() -> Path:
    """Create or complete .venv from requirements.lock; returns its Python. Raises OSError."""
    if not IS_CLONE:
        raise OSError("setup makes the .venv of a clone, and this is an installed package; what "
                      "the notebooks need comes with pip install 'tsp_utils[study]'.")
    lock = REPOSITORY / "requirements.lock"
    wanted = hashlib.sha256(lock.read_bytes()).hexdigest()
    if STAMP.exists() and VENV_PYTHON.exists() and STAMP.read_text().strip() == wanted:
        STAMP.touch()  # make compares times
        return VENV_PYTHON
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise OSError(
            "Python 3.11 to 3.13 is needed and this is {}.{}; name another one, for example "
            "make setup PYTHON3=python3.12.".format(*sys.version_info[:2])
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise OSError("This Python cannot make virtual environments; on Debian and Ubuntu "
                      "install them with apt install python3-venv.")
    free_gb = shutil.disk_usage(str(REPOSITORY)).free / 1e9
    if not VENV_PYTHON.exists() and free_gb < DISK_GB:
        raise OSError(f"The environment takes {DISK_GB} GB and {free_gb:.1f} GB are free in "
                      f"{REPOSITORY}; make room or clone elsewhere.")
    if not _has_pip(VENV_PYTHON):  # none yet, or one whose making was interrupted
        print(f"Creating .venv (once; {DISK_GB} GB on disk, a few minutes)", flush=True)
        _run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _run([*pip, "-r", str(lock)])
    _run([*pip, "--no-deps", "--no-build-isolation", "-e", str(REPOSITORY)])
    STAMP.write_text(wanted + "\n")
    return VENV_PYTHON


def run_in_venv(arguments) -> int:
    """Set up if need be, run `python -m tsp_utils ARGUMENTS` in .venv; returns its exit status."""
    python = set_up()
    if Path(sys.prefix).resolve() == VENV.resolve():
        raise OSError(".venv lacks packages that requirements.lock names; remove .venv and run "
                      "make setup again.")
    return subprocess.call([str(python), "-m", "tsp_utils", *arguments], cwd=str(REPOSITORY))


def _has_pip(python: Path) -> bool:
    return python.exists() and subprocess.run(
        [str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def _run(command) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise OSError("Set-up stopped at `{}` (exit status {}); its message stands above, and "
                      "running the same command again resumes.".format(
                          " ".join(command[1:5]), error.returncode)) from None
