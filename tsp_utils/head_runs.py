"""K-means and heads of one setting, all seeds: trained or read back, scored, and their record.

A run depends on a study's settings, on the fitted features and on the library sources that train
and score: its files are named by a hash of these.
"""

import ast
import hashlib
import io
import json
import logging
import platform
import re
import time
import tokenize
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from tsp_utils.feature_sets import FeatureSet
from tsp_utils.paths import PACKAGE, cache_dir, write_json, write_whole

logger = logging.getLogger(__name__)

CORE = ("features", "neighbors", "losses", "heads", "metrics")  # what a trained head depends on


@dataclass(frozen=True, eq=False)
class HeadRuns:
    """K-means and trained heads of one setting, all seeds.

    centers [S, C, D] and heads (`LinearHeads`) work on scaled features, `scaled(features)`; curves
    are the training's [E, S]; table has one row a method, seed and scored split (acc, nmi, ari in
    percent).
    """

    settings: dict
    centers: np.ndarray
    heads: object
    curves: dict[str, np.ndarray]
    scale: float
    table: pd.DataFrame
    seconds: float

    @property
    def best(self) -> int:
        """The seed with the lowest training loss: chosen without labels."""
        return int(self.curves["loss"][-1].argmin())

    def scaled(self, features) -> np.ndarray:
        """Features [N, D] by the scalar that was learned from the fitted ones."""
        return apply_scaling(features, self.settings["scaling"], self.scale)

    def head_clusters(self, features) -> np.ndarray:
        """Clusters by the heads, int64 [S, N], of unscaled features [N, D]."""
        return self.heads.predict(self.scaled(features))

    def kmeans_clusters(self, features) -> np.ndarray:
        """Clusters by nearest K-means centre, int64 [S, N], of unscaled features [N, D]."""
        return _nearest_centers(self.scaled(features), self.centers)


def apply_scaling(features, scaling: str, scale: float) -> np.ndarray:
    """Features [N, D] as heads receive them: each row by itself for "l2", else by one scalar."""
    from tsp_utils.heads import scale_features
    return scale_features(features, "l2") if scaling == "l2" else features * np.float32(scale)


def _nearest_centers(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return np.stack([(np.square(c).sum(1) - 2 * (x @ c.T)).argmin(1) for c in centers])


def run_heads(study, fit: FeatureSet, score: FeatureSet) -> HeadRuns:
    """Train (or read back) all seeds of one setting and score them; leaves one JSON record."""
    import torch

    from tsp_utils.heads import train_heads, warn_of_collapse
    from tsp_utils.neighbors import nearest_neighbors

    settings = settings_of(study, fit) | dict(score=score.fingerprint)
    centers, scale = fit_kmeans(study, fit)

    def train(seeds) -> dict:
        start = time.perf_counter()
        scaled = apply_scaling(fit.features, study.scaling, scale)
        heads = _new_heads(study, settings, scaled, centers, seeds)
        neighbors = nearest_neighbors(scaled, study.n_neighbors, study.metric)
        uniform = np.full(neighbors.indices.shape, 1 / study.n_neighbors, np.float32)
        history = train_heads(
            heads, scaled, neighbors, weights=uniform if study.weighting == "uniform" else None,
            entropy_weight=study.entropy_weight, max_epochs=study.max_epochs,
            min_steps=study.min_steps, batch_size=study.batch_size,
            learning_rate=study.learning_rate, device=find_device())
        made_with = json.dumps(versions() | {"machine": platform.machine(),
                                             "device": find_device()})
        return {f"curve_{name}": curve.T for name, curve in history.arrays().items()} | {
            f"state_{name}": array.numpy() for name, array in heads.state_dict().items()} | dict(
            seconds=np.full(len(seeds), (time.perf_counter() - start) / len(seeds)),
            made_with=np.full(len(seeds), made_with))

    arrays, n_read = arrays_of_seeds(fit, settings, "heads", study.seeds, train)
    curves = {name.removeprefix("curve_"): arrays[name].T for name in arrays if "curve_" in name}
    if n_read:  # a collapse is said again, whenever its heads are used
        warn_of_collapse({name: curve[:, :n_read] for name, curve in curves.items()},
                         study.seeds[:n_read], settings["n_clusters"], study.entropy_weight)
    heads = _new_heads(study, settings, fit.features, centers, study.seeds)
    heads.load_state_dict({name.removeprefix("state_"): torch.from_numpy(array)
                           for name, array in arrays.items() if name.startswith("state_")})
    run = HeadRuns(settings, centers, heads, curves, scale, pd.DataFrame(),
                   float(arrays["seconds"].sum()))
    table = score_clusters(study, fit, score,
                            {"k-means": run.kmeans_clusters, "head": run.head_clusters})
    _write_record(study.run_dir / "records" / f"{_file_name(fit)}_{_key(settings)}.json", run,
                  table, [json.loads(text) for text in dict.fromkeys(arrays["made_with"].tolist())])
    return replace(run, table=table)


def _new_heads(study, settings: dict, features: np.ndarray, centers: np.ndarray, seeds):
    """Untrained heads of a setting: Appendix A's start, another one, or a hidden layer."""
    from tsp_utils.heads import MLPHeads, init_heads

    if study.n_hidden:
        return MLPHeads(features.shape[1], settings["n_clusters"], seeds, study.n_hidden)
    return init_heads(features, settings["n_clusters"], seeds, study.init, study.row_norm,
                      centers[list(seeds)])


def run_kmeans(study, fit: FeatureSet, score: FeatureSet) -> pd.DataFrame:
    """K-means alone, all seeds of one setting, scored as in `HeadRuns.table`."""
    centers, scale = fit_kmeans(study, fit)
    return score_clusters(study, fit, score, {
        "k-means": lambda x: _nearest_centers(apply_scaling(x, study.scaling, scale), centers)})


def fit_kmeans(study, fit: FeatureSet) -> tuple[np.ndarray, float]:
    """K-means centres [S, C, D] of the scaled features, all seeds, and the scalar; cached."""
    from tsp_utils.heads import kmeans, scale_features

    needed = ("scaling", "dataset", "backbone", "n_clusters", "fit", "sources")

    def make(seeds) -> dict:
        scaled = scale_features(fit.features, study.scaling)
        return dict(centers=kmeans(scaled, _n_clusters(fit), seeds).centers,
                    scale=np.full(len(seeds), scalar_between(fit.features, scaled)))

    settings = settings_of(study, fit)
    arrays, _ = arrays_of_seeds(fit, {name: settings[name] for name in needed}, "kmeans",
                                study.seeds, make)
    return arrays["centers"], float(arrays["scale"][0])


def scalar_between(features: np.ndarray, scaled: np.ndarray) -> float:
    """The scalar by which features [N, D] were multiplied."""
    row = int(np.linalg.norm(scaled, axis=1).argmax())  # any row that is not 0
    return float(np.linalg.norm(scaled[row]) / np.linalg.norm(features[row]))


def arrays_of_seeds(fit: FeatureSet, settings: dict, what: str, seeds: range,
                    make) -> tuple[dict, int]:
    """Arrays [S, ...] by name of the first S seeds, and how many of these were read.

    A seed gives the same run alone or among others, so the cache's file grows: `make(seeds)` is
    called for the seeds that it lacks, and more seeds cost no more than the difference.
    """
    settings = {name: value for name, value in settings.items() if name != "n_seeds"}
    path = _arrays_path(fit, settings, what)
    arrays = _read_arrays(path)
    n_read = min(len(seeds), len(next(iter(arrays.values())))) if arrays else 0
    if n_read < len(seeds):
        made = make(seeds[n_read:])
        arrays = {name: np.concatenate([arrays[name], made[name]]) for name in made} if n_read \
            else made
        write_whole(path, lambda file: np.savez(file, **arrays))
    return {name: array[:len(seeds)] for name, array in arrays.items()}, n_read


def cached_arrays(fit: FeatureSet, settings: dict, what: str, make) -> dict:
    """Arrays by name, read from the cache of heads or made by `make()` and written there."""
    path = _arrays_path(fit, settings, what)
    arrays = _read_arrays(path)
    if arrays is None:
        arrays = make()
        write_whole(path, lambda file: np.savez(file, **arrays))
    return arrays


def _arrays_path(fit: FeatureSet, settings: dict, what: str) -> Path:
    return cache_dir() / "heads" / f"{_file_name(fit)}_{_key(settings)}_{what}.npz"


def _n_clusters(fit: FeatureSet) -> int:
    return int(fit.labels.max()) + 1  # C is assumed known (Sec. 3.2): all that training takes


def settings_of(study, fit: FeatureSet) -> dict:
    """Everything that a trained head depends on, as JSON values."""
    of_the_profile = ("profile", "datasets", "backbones", "default_backbone", "bundled_vectors",
                      "umap_points", "n_fit", "full_seeds", "vit_and_resnet", "larger_and_smaller",
                      "source_and_target", "kmeans_only")
    return {key: value for key, value in asdict(study).items() if key not in of_the_profile} | dict(
        dataset=fit.dataset, backbone=fit.backbone, n_clusters=_n_clusters(fit), n=len(fit.labels),
        dim=fit.features.shape[1], fit=fit.fingerprint, sources=source_hash(CORE))


def _key(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _read_arrays(path: Path) -> dict | None:
    """Arrays of a cached .npz; None where there is none, or one that cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read (%s) and is made again.", path.name, error)
        return None


def score_clusters(study, fit: FeatureSet, score: FeatureSet, methods: dict,
                   only: str | None = None) -> pd.DataFrame:
    """One row a method, seed and scored split (or `only` one); methods: name -> its function."""
    from tsp_utils.metrics import clustering_metrics

    scored = {"test": score} if study.protocol == "all" else {"test": score, "train": fit}
    scored = {split: found for split, found in scored.items() if only in (None, split)}
    return pd.DataFrame([
        dict(dataset=fit.dataset, backbone=fit.backbone, protocol=study.protocol, scored=split,
             method=method, seed=seed)
        | {name: 100 * value for name, value in clustering_metrics(found.labels, clusters).items()}
        for split, found in scored.items() for method, cluster in methods.items()
        for seed, clusters in zip(study.seeds, cluster(found.features), strict=True)])


def _file_name(fit: FeatureSet) -> str:
    return re.sub(r"[^\w.-]+", "-", f"{fit.dataset}_{fit.backbone}")


def _write_record(path: Path, run: HeadRuns, table: pd.DataFrame, made_with: list) -> None:
    """The JSON of one setting; versions, machine and device are those of the training.

    Usually one entry; more where seeds were added later, with other versions.
    """
    record = {
        "settings": run.settings, "made_with": made_with, "seconds": round(run.seconds, 2),
        "final_loss": run.curves["loss"][-1].tolist(),
        "final_n_nonempty": run.curves["n_nonempty"][-1].tolist(),
        "metrics": table.round(4).to_dict("records"),
    }
    write_json(path, record, indent=1)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over the seeds, percent; one row a setting."""
    keys = ["dataset", "backbone", "protocol", "scored", "method"]
    grouped = table.groupby(keys, sort=False)[["acc", "nmi", "ari"]]
    return (grouped.agg(["mean", "std"]).set_axis(
        [f"{m}_{s}" for m in ("acc", "nmi", "ari") for s in ("mean", "std")], axis=1)
        .assign(n=grouped.size()).reset_index())


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    from importlib.metadata import version
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "timm", "faiss-cpu", "scikit-learn", "numpy")}


def source_hash(modules=None) -> str:
    """Hash of library sources, of the named modules or of all: comments and docstrings left out."""
    paths = sorted(PACKAGE.glob("*.py")) if modules is None else [
        PACKAGE / f"{name}.py" for name in modules]
    codes = [code_alone(path.read_text(encoding="utf-8")) for path in paths]
    return hashlib.sha256("\0".join(codes).encode()).hexdigest()[:16]


def code_alone(source: str) -> str:
    """Python source without comments, docstrings and empty lines: what can change a number."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            text = node.body[0]
            lines[text.lineno - 1:text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def find_device() -> str:
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"
