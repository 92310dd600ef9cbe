"""Every head of notebook 10 in full: all methods, ten seeds, two backbones, every target."""

import json
import logging
from itertools import product
from pathlib import Path

import pandas as pd

from tsp_utils import cache
from tsp_utils.cache import versions
from tsp_utils.devices import find_device
from tsp_utils.files.paths import bundled_dir, write_json
from tsp_utils.study import head_comparison as compared
from tsp_utils.study.profile import load_study
from tsp_utils.systems.rivals import RIVALS

logger = logging.getLogger(__name__)


def code_of_the_comparison() -> str:
    """The key of all the code behind the records."""
    return cache.code_of(compared.compare_heads, compared.linear_probe, *(
        part for rival in RIVALS.values() for part in rival.code))


def run_heads_compared(profile: str = "offline") -> Path:
    """All methods, ten seeds, two backbones on every target of the profile; writes the records."""
    path = bundled_dir() / "readouts" / "heads.json"
    study, rows, trials, probes = load_study(profile), [], [], []
    for dataset, backbone in product(study.datasets, compared.compared_backbones(study)):
        found, tried = compared.compare_heads(
            study, dataset, backbone, (*compared.METHODS, *compared.ABLATIONS))
        rows, trials = [*rows, found], [*trials, tried]
        probes.append(dict(dataset=dataset, backbone=backbone, protocol=study.protocol,
                           acc=compared.linear_probe(*study.fit_and_score(dataset, backbone))))
        logger.info("%s under %s: done", dataset, backbone)
    write_json(path, {
        "made_with": versions() | {"device": find_device()}, "n_steps": study.min_steps,
        "code": code_of_the_comparison(), "probes": probes,
        "trials": json.loads(pd.concat(trials).to_json(orient="records", double_precision=5)),
        "rows": json.loads(pd.concat(rows).to_json(orient="records", double_precision=4))},
        indent=1)
    return path
