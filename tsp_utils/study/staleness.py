"""What an executed notebook depends on, as one hash: its text, settings, code, images, readings.

A notebook's own metadata says what the runner has to know of it:

    "tsp": {"data": ["study", "fashion-mnist"],  the images it loads: the study's, or a set's test
            "reads": ["03", "04"],               the notebooks whose evidence and tables it reads
            "seconds": {"offline": 40, "small": 70}}                 how long it takes, at first

Its executed copy adds the hash that it was run for and the files that it left, with their hashes.
"""

import hashlib
import json
from pathlib import Path

from tsp_utils.cache import code_called_by, hash_of
from tsp_utils.datasets import DATASETS
from tsp_utils.files.downloads import published_files
from tsp_utils.files.image_folders import find_images
from tsp_utils.files.paths import REPOSITORY, bundled_dir, data_dir
from tsp_utils.study.profile import Study

NOTEBOOKS = REPOSITORY / "notebooks"


def notebook_paths(folder: Path = NOTEBOOKS) -> list[Path]:
    """The study's notebooks in their order."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def parts_of(path: Path, study: Study) -> dict:
    """All that an executed notebook depends on: text, settings, code called, what ships, images,
    what the notebooks that it reads left."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    about = notebook["metadata"].get("tsp", {})
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    return {"cells": cells, "study": repr(study),
            "code": _code_called("\n".join(text for kind, text in cells if kind == "code")),
            "bundled": sorted((file.relative_to(bundled_dir()).as_posix(), sha256_of(file))
                              for file in bundled_dir().rglob("*") if file.is_file()),
            "data": data_stamps(about, study),
            "reads": {other.stem: about_of(study.run_dir / other.name).get("left")
                      for other in notebook_paths(path.parent)
                      if other.name[:2] in about.get("reads", ())}}


def _code_called(source: str) -> str:
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return code_called_by(TransformerManager().transform_cell(source))  # %magic and !shell
    except SyntaxError:
        return ""  # it will fail, and is not skipped


def data_stamps(about: dict, study: Study) -> dict:
    """Number of files, and a hash of names and sizes (not times), of each split that is loaded."""
    splits = {"all": ("test",), "split": ("test", "train")}[study.protocol]
    of_study = [(target, split) for target in study.datasets if not study.uses_vectors(target)
                for split in splits]
    stamps = {}
    for name in about.get("data", ["study"]):
        for target, split in of_study if name == "study" else [(name, "test")]:
            files = dataset_files(target, split)
            stamps[f"{target}/{split}"] = [len(files), hash_of(sorted(
                [file.parent.name, file.name, file.stat().st_size] for file in files))]
    return stamps


def dataset_files(name: str, split: str) -> list[Path]:
    """The files that `load_dataset` would read, of those that are there: none before a download."""
    root = data_dir()
    if name == "fashion-mnist" and split == "test":
        return sorted((bundled_dir() / name).iterdir())
    folder = root / name / split if name in DATASETS else Path(name).expanduser()
    if folder.is_dir() and (paths := find_images(folder)):
        return [folder / path for path in paths]
    kind = DATASETS[name].torchvision if name in DATASETS else None
    files = [root / f"{file}{packed}" for file in (published_files(kind, split) if kind else ())
             for packed in ("", ".gz")]
    return [file for file in files if file.is_file()]


def is_done(path: Path, study: Study, wanted: str) -> bool:
    """Whether the executed copy is what a run would give, and what it left is still as it was."""
    about = about_of(study.run_dir / path.name)
    return about.get("hash") == wanted and not noted_by(path, study).exists() and all(
        sha256_of(study.run_dir / name) == left for name, left in about["left"].items())


def noted_by(path: Path, study: Study) -> Path:
    """Where a notebook's files are noted, from its start until it is finished and no longer."""
    return study.run_dir / f".{path.stem}.left"


def about_of(path: Path) -> dict:
    """What a notebook's metadata say to the runner; nothing where there is none to be read."""
    return _read(path).get("metadata", {}).get("tsp", {})


def own_cells(path: Path) -> list[dict]:
    """The cells of an executed copy without papermill's own; none where there is none to read."""
    return [cell for cell in _read(path).get("cells", ())
            if "injected-parameters" not in cell["metadata"].get("tags", [])]


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def sha256_of(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
