"""From a finished run back into the repository: outputs into notebooks/, figures into figures/."""

import json
import re
import shutil
from pathlib import Path

from tsp_utils.files.paths import REPOSITORY, write_whole
from tsp_utils.study.profile import load_study
from tsp_utils.study.staleness import notebook_paths, own_cells


def refresh(profile: str = "offline") -> list[Path]:
    """Put the outputs of a finished run's notebooks into those of notebooks/; returns these.

    Timing metadata and papermill's own cell are left out, so that a diff shows what changed.
    Prose may have changed since (for which `make refresh` would run the notebook again). Raises
    FileNotFoundError where a notebook with this code has not been run.
    """
    run_dir, texts = load_study(profile).run_dir, {}
    for path in notebook_paths():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code, done = ([cell for cell in cells if cell["cell_type"] == "code"]
                      for cells in (notebook["cells"], own_cells(run_dir / path.name)))
        if [cell["source"] for cell in code] != [cell["source"] for cell in done]:
            raise FileNotFoundError(f"{path.name} has not been run as it is now; run make "
                                    f"reproduce first.")
        for count, (cell, executed) in enumerate(zip(code, done, strict=True), 1):
            cell["execution_count"] = count
            cell["outputs"] = _without_progress(executed["outputs"])
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = count
        texts[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    for path, text in texts.items():  # all of them, or none
        write_whole(path, lambda file, text=text: file.write(text.encode()))
    return list(texts)


def _without_progress(outputs: list) -> list:
    """Outputs less tqdm's bars, which say something only while they run; warnings beside stay."""
    kept = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if output.get("name") == "stderr":
            pieces = [piece for piece in re.split(r"[\r\n]+|\x1b\[A", "".join(output["text"]))
                      if piece.strip() and not re.search(r"\[[\d:]+[<,].*/\w+[],]", piece)]
            if not pieces:
                continue
            output["text"] = "\n".join(pieces) + "\n"
        kept.append(output)
    return kept


def publish_figures(profile: str) -> list[Path]:
    """Copy a finished run's figures, CSVs and tables into figures/PROFILE; returns what was copied.

    Raises FileNotFoundError where there is no finished run to copy from.
    """
    study = load_study(profile)
    source = study.run_dir / "figures"
    missing = [path.stem for path in notebook_paths() if not (study.run_dir / path.name).exists()]
    if missing or not source.exists():
        raise FileNotFoundError(f"There is no finished run of {profile} to take figures from "
                                f"(missing: {', '.join(missing) or 'figures'}); run make reproduce "
                                f"PROFILE={profile} first.")
    target = REPOSITORY / "figures" / study.profile
    target.mkdir(parents=True, exist_ok=True)
    for old in (p for kind in ("png", "svg", "csv") for p in target.glob(f"*.{kind}")):  # earlier
        old.unlink()
    # Sheets of images that are not ours to republish stay in runs/.
    return [Path(shutil.copy2(path, target)) for path in sorted(source.iterdir())
            if not path.stem.endswith("_local")]
