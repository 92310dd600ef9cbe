"""How many clusters? Criteria without labels on real cells whose number of classes is known.

What a user would pick instead is here: FINCH, HDBSCAN, a cut of Ward's tree, K-means of two halves.
docs/how_many_clusters.md has the tables that `tables` makes of the records.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import ward
from scipy.sparse import coo_array, csgraph
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_rand_score, pairwise_distances, silhouette_score

from tsp_utils import cache
from tsp_utils.cache import hardware, versions
from tsp_utils.files.paths import bundled_dir, shipped_records, write_lines
from tsp_utils.folder.how_many import (
    WORTH,
    HowMany,
    candidates_between,
    suggest_n_clusters,
)
from tsp_utils.k_means import kmeans
from tsp_utils.study.feature_sets import FeatureSet, extract, load_images, spread_rows
from tsp_utils.study.profile import load_study
from tsp_utils.study.rungs import consistency

logger = logging.getLogger(__name__)

ONE, TWO = "patch_kmeans", "resnet_contrast_cifar10"
USUAL, WIDE = (2, 30), (2, 200)
# Data set, backbone, how many of its classes (None: all), range of candidates, images at most.
CELLS = (
    ("digits", "pixels", None, USUAL, 2000), ("digits", ONE, None, USUAL, 2000),
    ("cifar10", ONE, None, USUAL, 2000), ("cifar10", TWO, None, USUAL, 2000),
    ("cifar10", "invariant_patches", None, USUAL, 2000),
    ("fashion-mnist", ONE, None, USUAL, 2000), ("fashion-mnist", TWO, None, USUAL, 2000),
    ("fashion-mnist", ONE, 3, USUAL, 2000), ("fashion-mnist", TWO, 3, USUAL, 2000),
    ("fashion-mnist", ONE, 5, USUAL, 2000), ("fashion-mnist", TWO, 5, USUAL, 2000),
    ("tinyimagenet32", ONE, 20, USUAL, 2000), ("tinyimagenet32", TWO, 20, USUAL, 2000),
    ("tinyimagenet32", ONE, 100, WIDE, 5000), ("tinyimagenet32", TWO, 100, WIDE, 5000),
)

# What the page calls them: of the library, K-means' own stability, what a user would pick instead.
NAMES = {
    "stability": "stability of heads", "prediction_strength": "prediction strength",
    "silhouette": "silhouette", "silhouette_umap": "silhouette on the UMAP",
    "silhouette_ward": "silhouette, UMAP + Ward", "eigengap": "eigengap",
    "excess_loss": "loss corrected", "stability_kmeans": "stability of K-means",
    "ward_cut": "UMAP + Ward, longest branch", "finch": "FINCH",
    "hdbscan_map": "HDBSCAN on the UMAP", "hdbscan_map_1%": "the same, clusters of 1 %",
    "hdbscan_features": "HDBSCAN", "always 10": "ten, always",
}


def cells() -> Iterator[tuple[FeatureSet, tuple[int, int], int]]:
    """Features of each cell, the range of candidates, images at most.

    Of Fashion-MNIST the first classes, of Tiny-ImageNet's val images evenly spaced ones: its
    classes lie in the order of WordNet, where neighbours are alike.
    """
    study = load_study("offline")
    for dataset, backbone, n_classes, between, most in CELLS:
        tiny = dataset == "tinyimagenet32"
        found = (extract(backbone, load_images(dataset, "val")) if tiny
                 else study.features(dataset, backbone))
        if n_classes:
            chosen = spread_rows(len(found.classes), n_classes) if tiny else np.arange(n_classes)
            rows = np.isin(found.labels, chosen)
            found = replace(found, features=np.asarray(found.features[rows]),
                            labels=found.labels[rows])
        yield found, between, most


def ask(n_seeds: int = 3) -> Path:
    """Every cell, each seed with images of its own; resumed one by one. The path of the records.

    One seed where the range is wide: that takes minutes.
    """
    records = []
    for found, between, most in cells():
        agree = consistency(found)
        for seed in range(n_seeds if between == USUAL else 1):
            wanted = {"dataset": found.dataset, "backbone": found.backbone,
                      "n_classes": found.n_clusters, "n": min(most, len(found.labels)),
                      "between": list(between), "seed": seed, "fit": found.fingerprint,
                      "code": cache.code_of(picks)}
            label = f"how many {found.dataset} {found.backbone} {found.n_clusters} {seed}"
            records.append(wanted | cache.record(
                "records", label, wanted, [],
                lambda found=found, between=between, most=most, seed=seed, agree=agree: {
                    "consistency": agree, **picks(found.features, between, most, seed),
                    "hardware": hardware("cpu"), "versions": versions()}))
            logger.info("%s, %.0f s: %s", label, records[-1]["seconds"], records[-1]["picks"])
    return write_lines(bundled_dir() / "readouts" / "how_many.json", records)


def picks(features: np.ndarray, between: tuple[int, int], most: int, seed: int) -> dict:
    """The number of clusters by every criterion and rival; FINCH's levels; seconds of one core."""
    start = time.process_time()
    found = suggest_n_clusters(features, candidates_between(*between), max_samples=most,
                               random_state=seed)
    levels = finch(found.features)
    return {"picks": found.picks | rivals(found, levels, seed),
            "finch_levels": [int(level.max()) + 1 for level in levels],
            "seconds": round(time.process_time() - start, 1)}


def rivals(found: HowMany, levels: list[np.ndarray], seed: int) -> dict[str, int]:
    """What a user would pick instead, in the same range: 1 where nothing is seen."""
    ks, n = found.table.index, len(found.points)
    heights = ward(found.points)[:, 2]
    cut = {k: heights[n - k] - heights[n - k - 1] for k in ks}
    apart = pairwise_distances(found.features, metric="cosine")
    within = {int(level.max()) + 1: level for level in levels if level.max() < ks[-1]}
    scores = {k: silhouette_score(apart, level, metric="precomputed")
              for k, level in within.items()}
    halves = [kmeans_stability(found.features, ks, seed + split) for split in (0, 1000)]
    return {"ward_cut": int(max(cut, key=cut.get)),
            "finch": max(scores, key=scores.get, default=1),
            "stability_kmeans": int(ks[np.mean(halves, axis=0).argmax()]),
            "hdbscan_map": seen_by_hdbscan(found.points, 5),
            "hdbscan_map_1%": seen_by_hdbscan(found.points, max(5, n // 100)),
            "hdbscan_features": seen_by_hdbscan(found.features, 5)}


def kmeans_stability(x: np.ndarray, ks, seed: int) -> list[float]:
    """Adjusted Rand index of K-means fitted on two halves of x [N, D], by candidate."""
    halves = np.array_split(np.random.default_rng(seed).permutation(len(x)), 2)
    return [adjusted_rand_score(*(
        pairwise_distances(x, kmeans(x[half], k, [seed]).centers[0]).argmin(1)
        for half in halves)) for k in ks]


def seen_by_hdbscan(x: np.ndarray, min_cluster_size: int) -> int:
    """Clusters of at least so many samples, what it calls noise left out; 1 where it sees none."""
    return max(1, int(HDBSCAN(min_cluster_size, copy=True).fit_predict(x).max()) + 1)


def finch(x: np.ndarray) -> list[np.ndarray]:
    """FINCH (Sarfraz et al., 2019): clusters [N] of each level, the finest first.

    Samples linked to their first neighbour, by cosine, are a cluster; its mean is a sample of the
    next level. The level at which all are one cluster is left out.
    """
    levels: list[np.ndarray] = []
    means = x
    while len(means) > 2:
        distances = pairwise_distances(means, metric="cosine")
        np.fill_diagonal(distances, np.inf)
        links = coo_array((np.ones(len(means)), (np.arange(len(means)), distances.argmin(1))),
                          (len(means), len(means)))
        n_joined, joined = csgraph.connected_components(links, directed=False)
        if n_joined == 1:
            break
        levels.append(joined[levels[-1]] if levels else joined)
        means = np.stack([x[levels[-1] == c].mean(0) for c in range(n_joined)])
    return levels


def errors() -> pd.DataFrame:
    """|picked - K| / K of each cell, seed and criterion of the records, a row each."""
    return pd.DataFrame([
        {"data": record["dataset"].split(",")[0], "backbone": record["backbone"],
         "K": record["n_classes"], "up to": record["between"][1], "images": record["n"],
         "consistency": record["consistency"], "seed": record["seed"], "criterion": name,
         "picked": k, "error": abs(k - record["n_classes"]) / record["n_classes"]}
        for record in shipped_records("how_many")
        for name, k in (record["picks"] | {"always 10": 10}).items()])


def tables() -> list[str]:
    """The page's tables: criteria; what the picture's three say together; cells, ours and rivals'.

    Neighbours are clear where at least 85 % of the 20 nearest have the image's own class.
    """
    rows = errors()
    usual = rows[rows["up to"] == USUAL[1]]
    cell = ["data", "backbone", "K", "up to", "images", "consistency"]
    by_cell = usual.groupby(["criterion", *cell])["error"].mean().round(6).reset_index()
    summary = []
    for name, words in NAMES.items():
        found, of_cells = usual[usual["criterion"] == name], by_cell[by_cell["criterion"] == name]
        error, clear = of_cells["error"], of_cells["consistency"] >= 85
        by_seed, tens = found.groupby("seed")["error"].mean(), of_cells["K"] == 10
        summary.append({
            "criterion": words, f"mean, {len(error)} cells": f"{error.mean():.2f} +- "
            f"{by_seed.std():.2f}", "within 0.2": str((error <= 0.2).sum()),
            f"neighbours clear, {clear.sum()}": f"{error[clear].mean():.2f}",
            f"not, {(~clear).sum()}": f"{error[~clear].mean():.2f}",
            f"K = 10, {tens.sum()}": f"{error[tens].mean():.2f}",
            f"another K, {(~tens).sum()}": f"{error[~tens].mean():.2f}",
            "picked 2": f"{100 * (found['picked'] == 2).mean():.0f} %"})
    pages = [markdown(pd.DataFrame(summary)), markdown(together(usual))]
    for some in (list(NAMES)[:8], list(NAMES)[8:-1]):
        shown = []
        for place, found in rows.groupby(cell, sort=False):
            row = dict(zip(cell, place, strict=True))
            for name in some:
                of = found[found["criterion"] == name]
                row[NAMES[name]] = f"{', '.join(map(str, of['picked']))} ({of['error'].mean():.2f})"
            shown.append(row)
        pages.append(markdown(pd.DataFrame(shown)))
    return pages


def together(rows: pd.DataFrame) -> pd.DataFrame:
    """How right the median of the picture's three is, by whether they are within a quarter of it.

    rows: of `errors`.
    """
    wide = rows[rows["criterion"].isin(WORTH)].pivot_table(
        index=["data", "backbone", "K", "seed"], columns="criterion", values="picked")
    middle, truth = wide.median(axis=1), wide.index.get_level_values("K")
    agree = (wide.sub(middle, axis=0).abs().max(axis=1) <= middle / 4)
    error = (middle - truth).abs() / truth
    kinds = {"agree on more than 2": agree & (middle > 2), "agree on 2": agree & (middle == 2),
             "do not agree": ~agree}
    return pd.DataFrame([
        {"the three": kind, "runs": str(runs.sum()), "mean error of their median":
         f"{error[runs].mean():.2f}", "largest": f"{error[runs].max():.2f}",
         "within 0.2": str((error[runs].round(6) <= 0.2).sum())} for kind, runs in kinds.items()])


def markdown(table: pd.DataFrame) -> str:
    lines = [list(table), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
