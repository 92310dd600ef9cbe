"""K-means and heads of one setting, all seeds: trained or read back, scored, and their record."""

import json
import logging
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from tsp_utils import cache
from tsp_utils.devices import find_device
from tsp_utils.heads import (
    LinearHeads,
    MLPHeads,
    best_head,
    init_heads,
    train_heads,
    warn_of_collapse,
)
from tsp_utils.k_means import kmeans
from tsp_utils.metrics import clustering_metrics
from tsp_utils.neighbors import WEIGHTINGS, nearest_neighbors
from tsp_utils.scaling import Scaler
from tsp_utils.study.feature_sets import FeatureSet

logger = logging.getLogger(__name__)

# Of a study's settings, what shapes K-means, and what shapes a head.
KMEANS_SETTINGS = ("scaling",)
HEAD_SETTINGS = (*KMEANS_SETTINGS, "n_neighbors", "metric", "weighting", "init", "row_norm",
                 "n_hidden", "entropy_weight", "max_epochs", "min_steps", "batch_size",
                 "learning_rate")


@dataclass(frozen=True, eq=False)
class HeadRuns:
    """K-means and trained heads of one setting, all seeds.

    centers [S, C, D] and heads (`LinearHeads`) work on scaled features, `scaled(features)`; curves
    are the training's [E, S]; table has one row a method, seed and scored split (acc, nmi, ari in
    percent).
    """

    settings: dict
    centers: np.ndarray
    heads: LinearHeads
    curves: dict[str, np.ndarray]
    scaler: Scaler
    table: pd.DataFrame
    seconds: float

    @property
    def best(self) -> int:
        """The seed with the lowest training loss: chosen without labels."""
        return best_head(self.curves["loss"][-1])

    def scaled(self, features) -> np.ndarray:
        """Features [N, D] as the heads receive them, by what was learned from the fitted ones."""
        return self.scaler.transform(features)

    def head_clusters(self, features) -> np.ndarray:
        """Clusters by the heads, int64 [S, N], of unscaled features [N, D]."""
        return self.heads.predict(self.scaled(features))

    def kmeans_clusters(self, features) -> np.ndarray:
        """Clusters by nearest K-means centre, int64 [S, N], of unscaled features [N, D]."""
        return _nearest_centers(self.scaled(features), self.centers)


def _nearest_centers(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return np.stack([(np.square(c).sum(1) - 2 * (x @ c.T)).argmin(1) for c in centers])


def run_heads(study, fit: FeatureSet, score: FeatureSet) -> HeadRuns:
    """Train (or read back) all seeds of one setting and score them; leaves one JSON record."""
    import torch

    settings = settings_of(study, fit)
    centers, scaler = fit_kmeans(study, fit)
    arrays, n_read = cache.seeds(
        "heads", f"{fit.dataset}_{fit.backbone}", _inputs(settings, HEAD_SETTINGS),
        code_of_training(study), study.seeds,
        lambda seeds: fit_heads(study, fit, scaler, centers[list(seeds)], seeds))
    curves = {name.removeprefix("curve_"): arrays[name].T for name in arrays if "curve_" in name}
    if n_read:  # a collapse is said again, whenever its heads are used
        warn_of_collapse({name: curve[:, :n_read] for name, curve in curves.items()},
                         study.seeds[:n_read], fit.n_clusters, study.entropy_weight)
    heads = new_heads(study, fit, scaler, centers, study.seeds)
    heads.load_state_dict({name.removeprefix("state_"): torch.from_numpy(array)
                           for name, array in arrays.items() if name.startswith("state_")})
    run = HeadRuns(settings, centers, heads, curves, scaler, pd.DataFrame(),
                   float(arrays["seconds"].sum()))
    table = score_clusters(study, fit, score,
                            {"k-means": run.kmeans_clusters, "head": run.head_clusters})
    _leave_record(study, run, table, arrays["made_with"].tolist())
    return replace(run, table=table)


def fit_heads(study, fit: FeatureSet, scaler: Scaler, centers: np.ndarray, seeds) -> dict:
    """Heads of some seeds, trained: their curves [S, E], weights and seconds as arrays by name."""
    start, scaled = time.perf_counter(), scaler.transform(fit.features)
    heads = new_heads(study, fit, scaler, centers, seeds)
    neighbors = nearest_neighbors(scaled, study.n_neighbors, study.metric, find_device())
    history = train_heads(
        heads, scaled, neighbors, weights=WEIGHTINGS[study.weighting](neighbors),
        entropy_weight=study.entropy_weight, max_epochs=study.max_epochs,
        min_steps=study.min_steps, batch_size=study.batch_size,
        learning_rate=study.learning_rate, device=find_device())
    return {f"curve_{name}": curve.T for name, curve in history.curves.items()} | {
        f"state_{name}": array.numpy() for name, array in heads.state_dict().items()} | {
        "seconds": np.full(len(seeds), (time.perf_counter() - start) / len(seeds))}


def new_heads(study, fit: FeatureSet, scaler: Scaler, centers: np.ndarray, seeds) -> LinearHeads:
    """Untrained heads of a setting: Appendix A's start, another one, or a hidden layer."""
    if study.n_hidden:
        return MLPHeads(fit.features.shape[1], fit.n_clusters, seeds, study.n_hidden)
    return init_heads(fit.features, fit.n_clusters, seeds, study.init, study.row_norm, centers)


def code_of_training(study) -> list:
    """What trains a head of these settings: its code is a part of the key."""
    return [fit_heads, WEIGHTINGS[study.weighting], Scaler.fit, Scaler.transform]


def run_kmeans(study, fit: FeatureSet, score: FeatureSet) -> pd.DataFrame:
    """K-means alone, all seeds of one setting, scored as in `HeadRuns.table`."""
    centers, scaler = fit_kmeans(study, fit)
    return score_clusters(study, fit, score, {
        "k-means": lambda x: _nearest_centers(scaler.transform(x), centers)})


def fit_kmeans(study, fit: FeatureSet) -> tuple[np.ndarray, Scaler]:
    """K-means centres [S, C, D] of the scaled features, all seeds (cached), and the scaler."""
    scaler = Scaler(study.scaling).fit(fit.features)
    arrays, _ = cache.seeds(
        "kmeans", f"{fit.dataset}_{fit.backbone}",
        _inputs(settings_of(study, fit), KMEANS_SETTINGS),
        [kmeans, Scaler.fit, Scaler.transform], study.seeds,
        lambda seeds: {"centers": kmeans(scaler.transform(fit.features), fit.n_clusters, seeds,
                                         device=find_device()).centers})
    return arrays["centers"], scaler


def settings_of(study, fit: FeatureSet) -> dict:
    """A study's settings that concern one feature set, and what the set is, as JSON values."""
    of_the_profile = ("profile", "datasets", "backbones", "default_backbone", "bundled_vectors",
                      "umap_points", "n_fit", "full_seeds", "vit_and_resnet", "larger_and_smaller",
                      "source_and_target", "kmeans_only", "lesson_backbone")
    return {key: value for key, value in asdict(study).items() if key not in of_the_profile} | dict(
        dataset=fit.dataset, backbone=fit.backbone, n_clusters=fit.n_clusters, n=len(fit.labels),
        dim=fit.features.shape[1], fit=fit.fingerprint)


def _inputs(settings: dict, names) -> dict:
    return {name: settings[name] for name in (*names, "fit", "n_clusters")}  # no labels


def code_of_heads(study) -> str:
    """The key of the code that trains and scores: records of another one are not mixed in."""
    return cache.code_of(*code_of_training(study), score_clusters)


def score_clusters(study, fit: FeatureSet, score: FeatureSet, methods: dict,
                   only: str | None = None) -> pd.DataFrame:
    """One row a method, seed and scored split (or `only` one); methods: name -> its function."""
    scored = {"test": score} if study.protocol == "all" else {"test": score, "train": fit}
    scored = {split: found for split, found in scored.items() if only in (None, split)}
    return pd.DataFrame([
        dict(dataset=fit.dataset, backbone=fit.backbone, protocol=study.protocol, scored=split,
             method=method, seed=seed)
        | {name: 100 * value for name, value in clustering_metrics(found.labels, clusters).items()}
        for split, found in scored.items() for method, cluster in methods.items()
        for seed, clusters in zip(study.seeds, cluster(found.features), strict=True)])


def _leave_record(study, run: HeadRuns, table: pd.DataFrame, made_with: list[str]) -> None:
    """The JSON of one setting; made_with has an entry more where seeds were added later."""
    settings, code = run.settings, code_of_heads(study)
    record = {
        "settings": settings, "code": code, "seconds": round(run.seconds, 2),
        "made_with": [json.loads(text) for text in dict.fromkeys(made_with)],
        "final_loss": run.curves["loss"][-1].tolist(),
        "final_n_nonempty": run.curves["n_nonempty"][-1].tolist(),
        "metrics": table.round(4).to_dict("records"),
    }
    name = f"{settings['dataset']}_{settings['backbone']}_{cache.key_of([settings, code])}.json"
    study.leave(f"records/{cache.file_name(name)}",
                lambda file: file.write(json.dumps(record, indent=1).encode()))


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over the seeds, percent; one row a setting."""
    keys = ["dataset", "backbone", "protocol", "scored", "method"]
    grouped = table.groupby(keys, sort=False)[["acc", "nmi", "ari"]]
    found = grouped.agg(["mean", "std"])
    found.columns = found.columns.map("_".join)
    return found.assign(n=grouped.size()).reset_index()
