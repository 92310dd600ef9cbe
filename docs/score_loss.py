"""A loss of your own among those of notebook 10: make score LOSS=my_loss.py.

The file defines `loss(a, b, step)`, as in `tsp_utils/systems/other_losses.py`, and may say
DRAW = "gaussian" (Eq. 4) in place of "uniform". It is tuned, trained and scored as every other head
(ten seeds, four trials, no label in training), and printed in their table. The name of the file is
the name of the head.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import pandas as pd
import torch

from tsp_utils.files.paths import shipped_records, write_whole
from tsp_utils.neighbors import WEIGHTINGS
from tsp_utils.study import head_comparison
from tsp_utils.study.head_tables import heads_markdown, heads_table
from tsp_utils.study.profile import load_study
from tsp_utils.systems.other_losses import Step
from tsp_utils.systems.rivals import RIVALS, Rival


def read_loss(path: Path) -> Rival:
    """The loss of a file, tried on a small batch; raises ValueError saying what it lacks."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}; pass the Python file of a loss, for example "
                         f"docs/example_loss.py.")
    if path.stem in (*head_comparison.METHODS, *head_comparison.ABLATIONS):
        raise ValueError(f"{path.stem} is a head of notebook 10 already; rename the file.")
    name = f"loss_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; pass one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the cache follows its code from there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} could not be read as Python: {type(error).__name__}: "
                         f"{error}.") from error
    loss, draw = getattr(module, "loss", None), getattr(module, "DRAW", "uniform")
    if not callable(loss):
        raise ValueError(f"{path} defines no function loss; write def loss(a, b, step).")
    if draw not in WEIGHTINGS:
        raise ValueError(f"DRAW in {path} is {draw!r}; pass one of {', '.join(WEIGHTINGS)}.")
    rival = Rival(loss, draw=draw)
    x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    heads = rival.heads(x[0].numpy(), 5, [0, 1], x[:, :5].numpy())
    a, b = heads(x).mT.contiguous().split(32, 2)  # [2, 5, 32]
    try:
        value = loss(a, b, Step(heads, x[0], x[:, :32], x[:, 32:]))
    except Exception as error:
        raise ValueError(f"loss in {path} fails on logits [S, C, B] = [2, 5, 32]: "
                         f"{type(error).__name__}: {error}.") from error
    if not torch.is_tensor(value) or value.shape != (2,):
        got = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"loss in {path} returns {got} for two heads; return one value per head, "
                         f"a tensor [S] = [2].")
    if not value.requires_grad or not torch.isfinite(value).all():
        raise ValueError(f"loss in {path} returns {value.tolist()}, which cannot be trained on; "
                         f"return finite numbers that depend on a or b.")
    return rival


def score(path: Path, profile: str = "offline", dataset: str | None = None,
          backbone: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The heads' table with the loss of this file, and the probe; on the profile's first set.

    The others' rows are the shipped records where these hold the set and the settings are the
    profile's own; else K-means and TSP are run beside it.
    """
    rival, study = read_loss(path), load_study(profile)
    dataset, backbone = dataset or study.datasets[0], backbone or study.default_backbone
    if (dataset, backbone) not in study.head_cells():
        raise ValueError(f"{dataset} under {backbone} is no feature set of {profile}; pass one of "
                         f"{', '.join(map(' under '.join, study.head_cells()))}.")
    records, known = shipped_records("heads"), head_comparison.METHODS
    shipped = [row for row in records["rows"] if row["method"] in known and profile == "offline"
               and (row["dataset"], row["backbone"]) == (dataset, backbone)]
    RIVALS[path.stem] = rival
    try:
        head_comparison.METHODS = (*known, path.stem)
        rows, _ = head_comparison.compare_heads(
            study, dataset, backbone, [*([] if shipped else ["k-means", "tsp"]), path.stem])
    finally:
        head_comparison.METHODS = known
        del RIVALS[path.stem]
    probe = head_comparison.linear_probe(*study.fit_and_score(dataset, backbone))
    return (heads_table(pd.DataFrame([*shipped, *rows.to_dict("records")])),
            pd.DataFrame([dict(dataset=dataset, backbone=backbone, acc=probe)]))


def sentence(table: pd.DataFrame, name: str) -> str:
    own = table.set_index("method").loc[name]
    return (f"{name}: {own['acc_mean']:.1f} ± {own['acc_std']:.1f} ACC, {own['minus_tsp']:+.1f} "
            f"against TSP [{own['low']:+.1f}, {own['high']:+.1f}], n = {own['n']:.0f} seeds; "
            f"{own['n_used']:.1f} clusters in use")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--profile", default="offline", help='e.g. "offline n_seeds=3": quicker')
    parser.add_argument("--dataset")
    parser.add_argument("--backbone")
    parser.add_argument("--csv", type=Path, help="keep the row of this loss there")
    options = parser.parse_args()
    try:
        table, probe = score(options.file, options.profile, options.dataset, options.backbone)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(heads_markdown(table, probe))
    print(sentence(table, options.file.stem))
    if options.csv:
        own = table[table["method"] == options.file.stem]
        write_whole(options.csv, lambda file: own.to_csv(file, index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
