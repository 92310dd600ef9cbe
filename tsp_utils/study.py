"""A profile, read and checked: the settings of a run, its entrance to features and heads."""

import difflib
import re
import textwrap
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pandas as pd
import yaml

from tsp_utils.claims import claim_of
from tsp_utils.datasets import ImageDataset
from tsp_utils.feature_sets import (
    FeatureSet,
    draw_rows,
    extract,
    load_images,
    load_vectors,
    spread_rows,
    vectors_path,
)
from tsp_utils.head_runs import HeadRuns, run_heads, run_kmeans
from tsp_utils.paths import REPOSITORY, runs_dir

CHOICES = {"protocol": ("split", "all"), "metric": ("cosine", "euclidean", "inner"),
           "scaling": ("mean-norm", "raw", "l2"), "init": ("k-means", "random"),
           "weighting": ("gaussian", "uniform")}


@dataclass(frozen=True)
class Study:
    """The settings of a profile, each with its reason."""

    profile: str  # its name, with the overrides if there are any: also the folder under runs/
    datasets: tuple[str, ...]  # targets, the first is the one that lessons and claims use
    backbones: tuple[str, ...]  # feature extractors that are compared
    default_backbone: str  # the one that lessons and claims use
    protocol: str  # split: fit on train, score on test; all: fit and score on the test images
    bundled_vectors: bool = False  # use the vectors that ship, where there are any, not images
    n_images: int | None = None  # so many images of a split, evenly spaced (tests); None: all
    n_seeds: int = 10  # independent runs, as in Table 1
    n_neighbors: int = 20  # K (Sec. 4.2)
    metric: str = "cosine"  # of the neighbours; Figs 1 and 2 use the inner product
    scaling: str = "mean-norm"  # one scalar, so that the learning rate means the same everywhere
    entropy_weight: float = 3.0  # lambda of Eq. 5 (Sec. 4.2)
    max_epochs: int = 100  # Sec. 4.2
    min_steps: int = 2000  # so that a small set is trained as long as it needs
    batch_size: int = 256  # Sec. 4.2
    learning_rate: float = 1e-4  # Adam, Sec. 4.2
    init: str = "k-means"  # of the head (Appendix A), or random
    row_norm: float | None = None  # of its rows at the start; None: Appendix A's 1 / sqrt(D)
    weighting: str = "gaussian"  # of the neighbours (Eq. 4), or uniform
    n_hidden: int | None = None  # units of a hidden layer in the head; None: no such layer
    n_fit: int | None = None  # so many of the fitted images, drawn once (C8 to C12); None: all
    kmeans_only: tuple[str, ...] = ()  # backbones without heads in Table 1, as the paper's pixels
    vit_and_resnet: tuple[str, ...] = ("vit_nano_cpu", "resnet_nano_cpu")  # of C1 and C5
    larger_and_smaller: tuple[str, ...] = ("vit_nano_cpu", "vit_pico_cpu")  # of C4
    source_and_target: tuple[str, ...] = ("vit_nano_cpu", "vit_nano_cpu_cifar10_4k")  # of C6
    full_seeds: bool = False  # verdicts with the seeds that docs/rules.md asks for, not n_seeds
    umap_points: int = 2000  # points of a map, chosen once by seed

    @property
    def run_dir(self) -> Path:
        """Folder of the executed notebooks, figures and records of this profile."""
        return runs_dir() / self.profile

    @property
    def seeds(self) -> range:
        return range(self.n_seeds)

    def claim_seeds(self, claim_id: str) -> int:
        """Heads for a verdict: as many as `docs/rules.md` asks for, or the study's n_seeds."""
        return claim_of(claim_id).n_head if self.full_seeds else self.n_seeds

    def cells(self) -> list[tuple[str, str]]:
        """The (dataset, backbone) pairs of the study; bundled vectors exist for networks only."""
        return [(dataset, backbone) for dataset in self.datasets for backbone in self.backbones
                if not self.uses_vectors(dataset) or vectors_path(dataset, backbone).exists()]

    def head_cells(self) -> list[tuple[str, str]]:
        """The cells whose heads are trained for Table 1."""
        return [cell for cell in self.cells() if cell[1] not in self.kmeans_only]

    def uses_vectors(self, dataset: str) -> bool:
        """Whether a target is there as bundled vectors only, without its images."""
        return self.bundled_vectors and any(
            vectors_path(dataset, backbone).exists() for backbone in self.backbones)

    def features(self, dataset: str, backbone: str, split: str = "test") -> FeatureSet:
        """Features of one split, from the bundled vectors or by extraction through the cache.

        Raises ValueError for another split than test of a target that is there as vectors only.
        """
        if self.uses_vectors(dataset):
            if split != "test":
                raise ValueError(f"Of {dataset} only the test images' vectors are bundled, and "
                                 f"split {split!r} is asked for; pass protocol=all, or "
                                 f"bundled_vectors=false to extract from the images.")
            found = load_vectors(dataset, backbone)
            rows = spread_rows(len(found.labels), self.n_images)
            return replace(found, features=found.features[rows], labels=found.labels[rows])
        return extract(backbone, self.images(dataset, split))

    def images(self, dataset: str, split: str = "test") -> ImageDataset:
        """The images of one split that `features` are extracted from."""
        return load_images(dataset, split, self.n_images)

    def fit_and_score(self, dataset: str, backbone: str) -> tuple[FeatureSet, FeatureSet]:
        """Features that heads are fitted on, and those that they are scored on (the protocol)."""
        score = self.features(dataset, backbone, "test")
        fit = self.features(dataset, backbone, "train") if self.protocol == "split" else score
        if self.n_fit and self.n_fit < len(fit.labels):
            rows = draw_rows(len(fit.labels), self.n_fit)
            fit = replace(fit, features=fit.features[rows], labels=fit.labels[rows])
        return fit, score

    def train(self, dataset: str, backbone: str, **changes) -> HeadRuns:
        """All seeds of one setting: K-means, then the head; read back if it was run before.

        changes override the study's own settings for this run, for example n_neighbors=5.
        """
        study = replace(self, **changes)
        return run_heads(study, *study.fit_and_score(dataset, backbone))

    def kmeans_table(self, dataset: str, backbone: str, **changes) -> pd.DataFrame:
        """K-means alone, all seeds of one setting, scored as in `train`'s table."""
        study = replace(self, **changes)
        return run_kmeans(study, *study.fit_and_score(dataset, backbone))

    def caption(self, dataset: str, backbone: str, what: str = "") -> str:
        """The line under a figure: data, backbone, protocol, n, and what the +- is."""
        fitted = f"{self.n_fit:,} train images drawn once" if self.n_fit else "train"
        where = {"all": "fitted and scored on the test images",
                 "split": f"fitted on {fitted}, scored on test"}[self.protocol]
        return f"{dataset}, {backbone}; {where}" + (f"; {what}" if what else "")

    def save_figure(self, figure, name: str, data: pd.DataFrame, caption: str) -> None:
        """Write figures/NAME.png beside the NAME.csv it was drawn from, the caption below it."""
        folder = self.run_dir / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        data.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
        lines = textwrap.fill(caption, int(13 * figure.get_figwidth()))  # characters an inch
        figure.text(0.5, -0.01, lines, ha="center", va="top", fontsize=9.5, color="0.25")
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight", pad_inches=0.15,
                       metadata={"Software": None})


def load_study(profile: str = "offline") -> Study:
    """Read profiles/NAME.yaml; "NAME key=value key=a,b" overrides single settings.

    Raises ValueError for an unknown profile, key (the nearest known one is named) or bad value.
    """
    name, *overrides = profile.split() or [""]
    path = REPOSITORY / "profiles" / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ValueError(f"There is no profile {name!r}; pass one of {', '.join(known)}.")
    settings = _read_yaml(path.read_text(), path.name) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} is not a list of settings; write lines of KEY: VALUE.")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"The override {override!r} has no value; write {key}=VALUE.")
        many = any(field.name == key and "tuple" in str(field.type) for field in fields(Study))
        settings[key] = value.split(",") if many else _read_yaml(value, f"the override {override}")
    known = {field.name: field for field in fields(Study) if field.name != "profile"}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0)[0]
            raise ValueError(f"The profile {name!r} has no setting {key!r}; the nearest one is "
                             f"{near!r}, all are {', '.join(known)}.")
        settings[key] = _checked(key, value, known[key].type)
    missing = [key for key in ("datasets", "backbones", "default_backbone", "protocol")
               if key not in settings]
    if missing:
        raise ValueError(f"The profile {name!r} lacks {', '.join(missing)}; add them to "
                         f"{path.name}.")
    if settings["default_backbone"] not in settings["backbones"]:
        if any(override.startswith("default_backbone=") for override in overrides):
            raise ValueError(f"The default backbone {settings['default_backbone']!r} is not among "
                             f"the backbones; pass one of {', '.join(settings['backbones'])}.")
        settings["default_backbone"] = settings["backbones"][0]
    return Study(profile="+".join([name, *(re.sub(r"[^\w=.,-]", "-", o) for o in overrides)]),
                 **settings)


def _read_yaml(text: str, where: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"The YAML of {where} cannot be read; write plain KEY: VALUE lines, or "
                         f"KEY=VALUE for an override.") from None


def _checked(key: str, value, kind):
    """A setting as its field's type; raises ValueError saying what it should be."""
    text = str(kind)
    try:
        if "tuple" in text:
            if isinstance(value, str) or not value or not all(value):
                raise TypeError
            return tuple(str(item) for item in value)
        if value not in CHOICES.get(key, (value,)):
            raise TypeError
        if value is None and "None" in text:
            return None
        if value is None or isinstance(value, bool) != ("bool" in text):
            raise TypeError
        if isinstance(value, bool) or ("str" in text and isinstance(value, str)):
            return value
        converted = (int if "int" in text else float)(value) if "str" not in text else None
        least = 1 if "int" in text and key != "min_steps" else 0
        if converted is None or converted != float(value) or not least <= converted < float("inf"):
            raise TypeError
        return converted
    except (TypeError, ValueError, OverflowError):
        kinds = {"tuple": "names, with commas between", "bool": "true or false", "str": "a name",
                 "int": "a whole number of at least 1", "float": "a number of at least 0"}
        wanted = " or ".join(CHOICES.get(key, ())) or next(
            wanted for name, wanted in kinds.items() if name in text)
        wanted = "a whole number of at least 0" if key == "min_steps" else wanted
        raise ValueError(f"The setting {key} is {value!r}; pass {wanted}.") from None
