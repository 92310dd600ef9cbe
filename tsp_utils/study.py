"""A profile, read and checked; the features it works on; the record that every run leaves."""

import difflib
import hashlib
import json
import platform
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from tsp_utils.paths import PACKAGE, REPOSITORY, bundled_dir, cache_dir, runs_dir

CORE = ("features", "neighbors", "losses", "heads", "metrics")  # what a trained head depends on


@dataclass(frozen=True)
class Study:
    """The settings of a profile, each with its reason."""

    profile: str  # its name, with the overrides if there are any: also the folder under runs/
    datasets: tuple[str, ...]  # targets, the first is the one that lessons and claims use
    backbones: tuple[str, ...]  # feature extractors that are compared
    default_backbone: str  # the one that lessons and claims use
    protocol: str  # split: fit on train, score on test; all: fit and score on the test images
    bundled_vectors: bool = False  # use the vectors that ship instead of images, where there are any
    n_images: int | None = None  # only the first so many images of a split (tests); None: all
    n_seeds: int = 10  # independent runs, as in Table 1
    n_neighbors: int = 20  # K (Sec. 4.2)
    metric: str = "cosine"  # of the neighbours; Figs 1 and 2 use the inner product
    scaling: str = "mean-norm"  # one scalar, so that the learning rate means the same everywhere
    entropy_weight: float = 3.0  # lambda of Eq. 5 (Sec. 4.2)
    max_epochs: int = 100  # Sec. 4.2
    min_steps: int = 2000  # so that a small set is trained as long as it needs
    batch_size: int = 256  # Sec. 4.2
    learning_rate: float = 1e-4  # Adam, Sec. 4.2
    umap_points: int = 2000  # points of a map, chosen once by seed

    @cached_property
    def run_dir(self) -> Path:
        """Folder of the executed notebooks, figures and records of this profile."""
        return runs_dir() / self.profile

    @property
    def seeds(self) -> range:
        return range(self.n_seeds)

    def cells(self) -> list[tuple[str, str]]:
        """The (dataset, backbone) pairs of the study; bundled vectors exist for networks only."""
        return [(dataset, backbone) for dataset in self.datasets for backbone in self.backbones
                if not self.uses_vectors(dataset) or vectors_path(dataset, backbone).exists()]

    def uses_vectors(self, dataset: str) -> bool:
        """Whether a target is there as bundled vectors only, without its images."""
        return self.bundled_vectors and any(
            vectors_path(dataset, backbone).exists() for backbone in self.backbones)

    def features(self, dataset: str, backbone: str, split: str = "test") -> "FeatureSet":
        """Features of one split, from the bundled vectors or by extraction through the cache."""
        if self.uses_vectors(dataset):
            found = load_vectors(dataset, backbone)
        else:
            from tsp_utils.datasets import load_dataset
            images = _load_images(load_dataset, dataset, split, self.n_images)
            found = _extract(backbone, images)
        return found

    def fit_and_score(self, dataset: str, backbone: str) -> "tuple[FeatureSet, FeatureSet]":
        """Features that heads are fitted on, and those that they are scored on (the protocol)."""
        score = self.features(dataset, backbone, "test")
        return (self.features(dataset, backbone, "train") if self.protocol == "split" else score,
                score)

    def train(self, dataset: str, backbone: str, **changes) -> "HeadRuns":
        """All seeds of one setting: K-means, then the head; read back if it was run before.

        changes override the study's own settings for this run, for example n_neighbors=5.
        """
        study = replace(self, **changes)
        fit, score = study.fit_and_score(dataset, backbone)
        return run_heads(study, fit, score)

    def caption(self, dataset: str, backbone: str, what: str = "") -> str:
        """The line under a figure: data, backbone, protocol, n, and what the +- is."""
        where = {"all": "fitted and scored on the test images", "split": "fitted on train, scored "
                 "on test"}[self.protocol]
        return f"{dataset}, {backbone}; {where}" + (f"; {what}" if what else "")

    def save_figure(self, figure, name: str, data: pd.DataFrame, caption: str) -> None:
        """Write figures/NAME.png beside the NAME.csv it was drawn from, the caption below it."""
        folder = self.run_dir / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        data.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
        figure.text(0.5, -0.01, caption, ha="center", va="top", fontsize=8, color="0.35", wrap=True)
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight",
                       metadata={"Software": None})


def load_study(profile: str = "offline") -> Study:
    """Read profiles/NAME.yaml; "NAME key=value key=a,b" overrides single settings.

    Raises ValueError for an unknown profile, key (the nearest known one is named) or bad value.
    """
    name, *overrides = profile.split()
    path = REPOSITORY / "profiles" / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ValueError(f"There is no profile {name!r}; pass one of {', '.join(known)}.")
    settings = yaml.safe_load(path.read_text()) or {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"The override {override!r} has no value; write {key}=VALUE.")
        many = key in ("datasets", "backbones")
        settings[key] = value.split(",") if many else yaml.safe_load(value)
    known = {field.name: field for field in fields(Study)}
    for key, value in settings.items():
        if key not in known or key == "profile":
            near = difflib.get_close_matches(key, known, 1, 0)[0]
            raise ValueError(f"The profile {name!r} has no setting {key!r}; the nearest one is "
                             f"{near!r}.")
        settings[key] = _checked(key, value, known[key].type)
    missing = [key for key in ("datasets", "backbones", "default_backbone", "protocol")
               if key not in settings]
    if missing:
        raise ValueError(f"The profile {name!r} lacks {', '.join(missing)}; add them to {path.name}.")
    if settings["default_backbone"] not in settings["backbones"]:
        settings["default_backbone"] = settings["backbones"][0]
    return Study(profile="+".join([name, *(re.sub(r"[^\w=.,-]", "-", o) for o in overrides)]),
                 **settings)


def _checked(key: str, value, kind):
    """A setting as its field's type; raises ValueError saying what it should be."""
    text = str(kind)
    try:
        if "tuple" in text:
            if isinstance(value, str) or not value:
                raise TypeError
            return tuple(str(item) for item in value)
        if key == "protocol" and value not in ("split", "all"):
            raise TypeError
        if value is None or "bool" in text:
            return {"None": None, "True": True, "False": False}[str(value)]
        number = float if "float" in text else int if "int" in text else str
        converted = number(value)
        if number is not str and (converted != float(value) or converted < 0):
            raise TypeError
        return converted
    except (TypeError, ValueError, KeyError):
        wanted = {"protocol": "split or all"}.get(key, getattr(kind, "__name__", text))
        raise ValueError(f"The setting {key} is {value!r}; pass a value of the kind {wanted}."
                         ) from None


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Vectors of one split under one backbone: features float32 [N, D], labels int64 [N]."""

    dataset: str
    split: str
    backbone: str
    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.features)).hexdigest()[:16]


def vectors_path(dataset: str, backbone: str) -> Path:
    """Where the bundled vectors of a data set's test images under a backbone are."""
    return bundled_dir() / "vectors" / f"{dataset}_test_{backbone}.safetensors"


def load_vectors(dataset: str, backbone: str) -> FeatureSet:
    """Bundled vectors (fp16 on disk). Raises FileNotFoundError where none ship."""
    from safetensors import safe_open

    path = vectors_path(dataset, backbone)
    if not path.exists():
        raise FileNotFoundError(f"No vectors of {dataset} under {backbone} are bundled; run the "
                                f"profile small, which extracts them from the images.")
    with safe_open(path, "np") as file:
        return FeatureSet(dataset, "test", backbone, file.get_tensor("features").astype(np.float32),
                          file.get_tensor("labels").astype(np.int64),
                          tuple(json.loads(file.metadata()["classes"])))


def save_vectors(found: FeatureSet) -> Path:
    """Write a feature set as bundled vectors: fp16 features, uint8 labels, its provenance."""
    from safetensors.numpy import save_file

    path = vectors_path(found.dataset, found.backbone)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": found.features.astype(np.float16),
               "labels": found.labels.astype(np.uint8)}, path,
              {"classes": json.dumps(found.classes), "dataset": found.dataset,
               "split": found.split, "backbone": found.backbone})
    return path


def _load_images(load_dataset, dataset: str, split: str, n_images: int | None):
    images = load_dataset(dataset, split)
    return images if n_images is None else images.subset(np.arange(min(n_images, len(images))))


@lru_cache(maxsize=4)
def _backbone(name: str):
    from tsp_utils.backbones import load_backbone
    return load_backbone(name)


def _extract(backbone: str, images) -> FeatureSet:
    from tsp_utils.features import cached_features
    return FeatureSet(images.name, images.split, backbone,
                      cached_features(_backbone(backbone), images), images.labels, images.classes)


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
        from tsp_utils.heads import scale_features
        if self.settings["scaling"] == "l2":
            return scale_features(features, "l2")
        return features * np.float32(self.scale)

    def head_clusters(self, features) -> np.ndarray:
        """Clusters by the heads, int64 [S, N], of unscaled features [N, D]."""
        return self.heads.predict(self.scaled(features))

    def kmeans_clusters(self, features) -> np.ndarray:
        """Clusters by nearest K-means centre, int64 [S, N], of unscaled features [N, D]."""
        x = self.scaled(features)
        return np.stack([(np.square(c).sum(1) - 2 * (x @ c.T)).argmin(1) for c in self.centers])


def run_heads(study: Study, fit: FeatureSet, score: FeatureSet) -> HeadRuns:
    """Train (or read back) all seeds of one setting and score them; leaves one JSON record."""
    import torch

    from tsp_utils.heads import LinearHeads, init_heads, kmeans, scale_features, train_heads
    from tsp_utils.neighbors import nearest_neighbors

    n_clusters = int(fit.labels.max()) + 1  # C is assumed known (Sec. 3.2), as in every row
    settings = {key: value for key, value in asdict(study).items()
                if key not in ("profile", "datasets", "backbones", "default_backbone",
                               "bundled_vectors", "umap_points")}
    settings |= dict(dataset=fit.dataset, backbone=fit.backbone, n_clusters=n_clusters, n=len(fit.labels),
                     dim=fit.features.shape[1], fit=fit.fingerprint, score=score.fingerprint,
                     sources=source_hash(CORE))
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    weights_path = cache_dir() / "heads" / f"{key}.npz"
    record_path = study.run_dir / "records" / f"{fit.dataset}_{fit.backbone}_{key}.json"
    if weights_path.exists():
        with np.load(weights_path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        heads = LinearHeads(arrays["weight"], study.seeds)
        heads.bias.data = torch.from_numpy(arrays["bias"])
    else:
        start = time.perf_counter()
        scaled = scale_features(fit.features, study.scaling)
        runs = kmeans(scaled, n_clusters, study.seeds)
        heads = init_heads(scaled, n_clusters, study.seeds, centers=runs.centers)
        history = train_heads(
            heads, scaled, nearest_neighbors(scaled, study.n_neighbors, study.metric),
            entropy_weight=study.entropy_weight, max_epochs=study.max_epochs,
            min_steps=study.min_steps, batch_size=study.batch_size,
            learning_rate=study.learning_rate, device=_device())
        ratio = np.linalg.norm(scaled[0]) / np.linalg.norm(fit.features[0])
        arrays = {f"curve_{name}": curve for name, curve in history.arrays().items()} | dict(
            weight=heads.weight.detach().numpy(), bias=heads.bias.detach().numpy(),
            centers=runs.centers, scale=ratio, seconds=time.perf_counter() - start)
        _write_whole(weights_path, lambda file: np.savez(file, **arrays))
    run = HeadRuns(settings, arrays["centers"], heads,
                   {name.removeprefix("curve_"): arrays[name] for name in arrays
                    if name.startswith("curve_")},
                   float(arrays["scale"]), pd.DataFrame(), float(arrays["seconds"]))
    table = _score(run, study, fit, score)
    _write_record(record_path, settings, run, table)
    return replace(run, table=table)


def _score(run: HeadRuns, study: Study, fit: FeatureSet, score: FeatureSet) -> pd.DataFrame:
    from tsp_utils.metrics import clustering_metrics

    scored = {"test": score} if study.protocol == "all" else {"test": score, "train": fit}
    rows = []
    for split, found in scored.items():
        for method, clusters in (("k-means", run.kmeans_clusters(found.features)),
                                 ("head", run.head_clusters(found.features))):
            for seed, predicted in zip(study.seeds, clusters, strict=True):
                metrics = clustering_metrics(found.labels, predicted)
                rows.append(dict(dataset=fit.dataset, backbone=fit.backbone,
                                 protocol=study.protocol, scored=split, method=method, seed=seed)
                            | {name: 100 * value for name, value in metrics.items()})
    return pd.DataFrame(rows)


def _write_record(path: Path, settings: dict, run: HeadRuns, table: pd.DataFrame) -> None:
    record = {
        "settings": settings, "versions": versions(), "machine": platform.machine(),
        "seconds": round(run.seconds, 2), "final_loss": run.curves["loss"][-1].tolist(),
        "final_n_nonempty": run.curves["n_nonempty"][-1].tolist(),
        "metrics": table.round(4).to_dict("records"),
    }
    _write_whole(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def _write_whole(path: Path, write) -> None:
    """Write a file beside its place and move it there when it is whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path.parent} cannot be written ({error.strerror}); make it writable or "
                      f"point TSP_CACHE to another folder.") from error


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
    """Hash of library sources: of the named modules, or of all."""
    paths = sorted(PACKAGE.glob("*.py")) if modules is None else [
        PACKAGE / f"{name}.py" for name in modules]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _device() -> str:
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"
