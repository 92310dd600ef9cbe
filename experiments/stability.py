"""Do two fits of the estimator agree? The best head alone against the votes of all ten.

TEMPERATURE of the votes was chosen at a learning rate of 1e-4, for agreement on TUNED, with their
ACC in sight, from trials of which no record was kept; FRESH were not looked at before.
"""

import copy
import logging
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from tsp_utils import cache
from tsp_utils.estimator import TSPClustering
from tsp_utils.files.paths import bundled_dir, write_lines
from tsp_utils.metrics import clustering_metrics, match_clusters
from tsp_utils.study.profile import load_study
from tsp_utils.study.rungs import consistency

logger = logging.getLogger(__name__)

TUNED = (("cifar10", "patch_kmeans", 10), ("cifar10", "invariant_patches", 10),
         ("cifar10", "resnet_contrast_cifar10", 10), ("fashion-mnist", "patch_kmeans", 10),
         ("digits", "patch_kmeans", 10))
FRESH = (("cifar10", "vit_nano_cpu", 10), ("fashion-mnist", "invariant_patches", 10),
         ("fashion-mnist", "pixels", 5), ("digits", "resnet_contrast_cifar10", 10))
N_FITS = 2  # on all, and as many on four fifths drawn anew
SURE = 0.9  # votes from which an image counts as stable


def best_alone(fitted: TSPClustering) -> TSPClustering:
    """The same fit with keep="best": its first head alone."""
    alone = copy.copy(fitted)
    alone.votes_ = np.ones(1)
    alone.coef_, alone.intercept_ = fitted.coef_[:1], fitted.intercept_[:1]
    return alone


def agreement(x, whole: list, parts: list, left_out: list) -> dict:
    """Percent: two fits on all of x, and a fit on four fifths with one on all, on the rest."""
    shared = [clustering_metrics(one.predict(x[rows]), other.predict(x[rows]))["acc"]
              for one, (other, rows) in product(whole, zip(parts, left_out, strict=True))]
    return {"two_seeds": round(100 * clustering_metrics(*(fit.predict(x) for fit in whole))["acc"],
                               2), "four_fifths": [round(100 * share, 2) for share in shared]}


def read_cell(found) -> dict:
    """Agreement and ACC of one feature set, by the best head and by all; what stability foretells.

    kept: percent of the images left out that both fits put alike, of the stable ones and the rest.
    """
    x, rng, n = found.features, np.random.default_rng(0), len(found.labels)
    left_out = [rng.permutation(n)[:n // 5] for _ in range(N_FITS)]
    fits = [TSPClustering(found.n_clusters, random_state=seed) for seed in range(2 * N_FITS)]
    whole = [fit.fit(x) for fit in fits[:N_FITS]]
    parts = [fit.fit(np.delete(x, rows, 0))
             for fit, rows in zip(fits[N_FITS:], left_out, strict=True)]
    record: dict = {"consistency": consistency(found),
                    "learning_rate": [fit.learning_rate_ for fit in whole + parts],
                    "kept": {"stable": [], "others": []}}
    for name, change in (("best", best_alone), ("all", lambda fitted: fitted)):
        record[name] = agreement(x, [*map(change, whole)], [*map(change, parts)], left_out) | {
            "acc": [round(100 * clustering_metrics(found.labels, change(fit).predict(x))["acc"], 2)
                    for fit in whole]}
    for one, (other, rows) in product(whole, zip(parts, left_out, strict=True)):
        theirs = other.predict(x[rows])
        ours = one.labels_[rows]
        alike = match_clusters(ours, theirs)[theirs] == ours
        stable = one.stability_[rows] >= SURE
        for kind, chosen in (("stable", stable), ("others", ~stable)):
            record["kept"][kind].append([int(alike[chosen].sum()), int(chosen.sum())])
    return record


def code_of_a_cell() -> str:
    """The key of the code behind a record."""
    return cache.code_of(read_cell)


def read_stability() -> Path:
    """Every cell; returns the path of the records."""
    study, records = load_study("offline"), []
    for kind, cells in (("tuned", TUNED), ("fresh", FRESH)):
        for dataset, backbone, n_classes in cells:
            found = study.features(dataset, backbone)
            rows = found.labels < n_classes
            found = replace(found, features=found.features[rows], labels=found.labels[rows])
            records.append({"kind": kind, "dataset": dataset, "backbone": backbone,
                            "n": len(found.labels), "n_clusters": found.n_clusters}
                           | read_cell(found) | {"code": code_of_a_cell(),
                                                 "hardware": cache.hardware("cpu"),
                                                 "versions": cache.versions()})
            logger.info("%s under %s: %s", dataset, backbone,
                        {name: records[-1][name] for name in ("best", "all")})
    return write_lines(bundled_dir() / "readouts" / "stability.json", records)
