"""A profile, read and checked: the settings of a run, its entrance to features and heads."""

import os
import re
import textwrap
from dataclasses import fields, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal, get_args

import pandas as pd
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from tsp_utils.datasets import ImageDataset
from tsp_utils.files.paths import runs_dir, write_whole
from tsp_utils.files.unknown_names import unknown
from tsp_utils.neighbors import WEIGHTINGS
from tsp_utils.study.claims import claim_of
from tsp_utils.study.feature_sets import (
    FeatureSet,
    draw_rows,
    extract,
    load_images,
    load_vectors,
    spread_rows,
    vectors_path,
)
from tsp_utils.study.training import HeadRuns, run_heads, run_kmeans

PROFILES = Path(__file__).parent / "profiles"
WITH_IMAGES = ("fashion-mnist",)  # sets whose test images ship, whatever vectors do

# The types of settings, each with what to pass in words.
Name = Annotated[str, Field(min_length=1, description="a name")]
NameOrNone = Annotated[str | None, Field(min_length=1, description="a name or null")]
AnyNames = Annotated[
    tuple[Name, ...], Field(strict=False, description="names, with commas between")]
Names = Annotated[AnyNames, Field(min_length=1)]
Switch = Annotated[bool, Field(description="true or false")]
Count = Annotated[int, Field(ge=1, description="a whole number of at least 1")]
CountOrNone = Annotated[int | None, Field(ge=1, description="a whole number of at least 1 or null")]
CountOrZero = Annotated[int, Field(ge=0, description="a whole number of at least 0")]
# YAML reads 1e-3, without a point, as a word.
Number = Annotated[float, BeforeValidator(lambda x: float(x) if isinstance(x, str) else x)]
Rate = Annotated[Number, Field(gt=0, description="a number above 0")]
Weight = Annotated[Number, Field(ge=0, description="a number of at least 0")]
Weighting = Literal[tuple(WEIGHTINGS)]
WeightOrNone = Annotated[Number | None, Field(ge=0, description="a number of at least 0 or null")]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Settings:
    """The settings of a profile, each with its reason."""

    profile: Name  # its name, with the overrides if there are any: also the folder under runs/
    datasets: Names  # targets, the first is the one that lessons and claims use
    backbones: Names  # feature extractors that are compared
    default_backbone: Name  # the one that lessons and claims use
    protocol: Literal["split", "all"]  # split: fit on train, score on test; all: both on test
    bundled_vectors: Switch = False  # use the vectors that ship, where there are any, not images
    n_images: CountOrNone = None  # so many images of a split, evenly spaced (tests); None: all
    n_seeds: Count = 10  # independent runs, as in Table 1
    n_neighbors: Count = 20  # K (Sec. 4.2)
    metric: Literal["cosine", "euclidean", "inner"] = "cosine"  # of neighbours; Figs 1, 2: inner
    scaling: Literal["mean-norm", "raw", "l2"] = "mean-norm"  # one scalar, so that rates compare
    entropy_weight: Weight = 3.0  # lambda of Eq. 5 (Sec. 4.2)
    max_epochs: CountOrZero = 100  # Sec. 4.2
    min_steps: CountOrZero = 2000  # so that a small set is trained as long as it needs
    batch_size: Count = 256  # Sec. 4.2
    learning_rate: Rate = 1e-4  # Adam, Sec. 4.2
    init: Literal["k-means", "random"] = "k-means"  # of the head (Appendix A), or random
    row_norm: WeightOrNone = None  # of its rows at the start; None: Appendix A's 1 / sqrt(D)
    weighting: Weighting = "gaussian"  # of the neighbours (Eq. 4), or uniform
    n_hidden: CountOrNone = None  # units of a hidden layer in the head; None: no such layer
    n_fit: CountOrNone = None  # so many of the fitted images, drawn once (C8 to C12); None: all
    kmeans_only: AnyNames = ()  # backbones without heads in Table 1, as the paper's pixels
    vit_and_resnet: Names = ("vit_nano_cpu", "resnet_nano_cpu")  # of C1 and C5
    larger_and_smaller: Names = ("vit_nano_cpu", "vit_pico_cpu")  # of C4
    source_and_target: Names = ("vit_nano_cpu", "vit_nano_cpu_cifar10_4k")  # of C6
    full_seeds: Switch = False  # verdicts with the seeds that docs/rules.md asks for, not n_seeds
    umap_points: Count = 2000  # points of a map, chosen once by seed
    lesson_backbone: NameOrNone = None  # in the default's place in 03 to 05, once taken in


class Study(Settings):
    """A profile's settings, and the entrance to its features, heads and files."""

    def __init__(self, **settings):
        """Raises ValueError, in one sentence, for the first setting that is wrong or missing."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ValueError(_refusal(error, settings)) from None
        if self.max_epochs == self.min_steps == 0:
            raise ValueError("With max_epochs=0 and min_steps=0 nothing would be trained; pass at "
                             "least 1 for one of them.")

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
        return [(dataset, backbone) for dataset in self.datasets
                for backbone in dict.fromkeys((*self.backbones, self.backbone_for(dataset)))
                if not self.uses_vectors(dataset) or vectors_path(dataset, backbone).exists()]

    def backbone_for(self, dataset: str) -> str:
        """The backbone of the lessons on head, K and start: the default, or vectors taken in."""
        other = self.lesson_backbone if self.uses_vectors(dataset) else None
        return other if other and vectors_path(dataset, other).exists() else self.default_backbone

    def head_cells(self) -> list[tuple[str, str]]:
        """The cells whose heads are trained for Table 1."""
        return [cell for cell in self.cells() if cell[1] not in self.kmeans_only]

    def uses_vectors(self, dataset: str) -> bool:
        """Whether a target is there as bundled vectors only, without its images."""
        return self.bundled_vectors and dataset not in WITH_IMAGES and any(
            vectors_path(dataset, backbone).exists() for backbone in self.backbones)

    def features(self, dataset: str, backbone: str, split: str = "test") -> FeatureSet:
        """Features of one split, from the bundled vectors or by extraction through the cache.

        Raises ValueError for another split than test of a target that is there as vectors only.
        """
        bundled = vectors_path(dataset, backbone, split).exists()
        if self.uses_vectors(dataset) or (self.bundled_vectors and bundled):
            if split != "test" and not bundled:
                raise ValueError(f"Of {dataset} only the test images' vectors are bundled, and "
                                 f"split {split!r} is asked for; pass protocol=all, or "
                                 f"bundled_vectors=false to extract from the images.")
            found = load_vectors(dataset, backbone, split)
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

    def save_figure(self, figure, name: str, data: pd.DataFrame, caption: str,
                    title: str = "") -> None:
        """Write figures/NAME.png beside the NAME.csv it was drawn from, and print the caption.

        title: the figure's one result, above it. With TSP_SVG set NAME.svg is written as well.
        """
        if title:
            figure.suptitle(textwrap.fill(title, int(10.5 * figure.get_figwidth())), x=0.01,
                            ha="left", fontsize=12, fontweight="bold")
        print(textwrap.fill(caption, 100))
        self.save_table(data, name)
        drawn, said, whole = BytesIO(), PngInfo(), dict(bbox_inches="tight", pad_inches=0.15)
        figure.savefig(drawn, format="png", dpi=110, **whole)  # then 256 colours: a third as large
        said.add_itxt("Description", caption)
        image = Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE)
        self.leave(f"figures/{name}.png", partial(image.save, format="png", optimize=True,
                                                  pnginfo=said))
        if os.environ.get("TSP_SVG"):  # only points of maps and small images are pixels there
            self.leave(f"figures/{name}.svg", partial(
                figure.savefig, format="svg", dpi=72 if len(figure.axes) < 40 else 40, **whole,
                metadata={"Date": None, "Description": caption}))

    def save_table(self, table: pd.DataFrame | str, name: str) -> None:
        """Write a table as figures/NAME.csv, without its index, or a text as figures/NAME.md."""
        kind, text = ("md", table) if isinstance(table, str) else (
            "csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        self.leave(f"figures/{name}.{kind}", lambda file: file.write(text.encode()))

    def leave(self, name: str, write) -> None:
        """Write a file of the run folder whole, by `write(binary file)`, and say so to the runner.

        `make reproduce` runs a notebook again of which such a file is missing or was changed, and
        removes what an earlier version of it left.
        """
        # Noted first: what a kill leaves behind is then known, too.
        if os.environ.get("TSP_LEFT"):
            with open(os.environ["TSP_LEFT"], "a", encoding="utf-8") as noted:
                noted.write(f"{name}\n")
        write_whole(self.run_dir / name, write)


def load_study(profile: str = "offline") -> Study:
    """Read study/profiles/NAME.yaml; "NAME key=value key=a,b" overrides single settings.

    Raises ValueError for an unknown profile, key (the nearest known one is named) or bad value.
    """
    name, *overrides = profile.split() or [""]
    path = PROFILES / f"{name}.yaml"
    if not path.exists():
        raise ValueError(unknown("profile", name, sorted(p.stem for p in PROFILES.glob("*.yaml"))))
    settings = _read_yaml(path.read_text(), path.name) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} is not a list of settings; write lines of KEY: VALUE.")
    if any(override.startswith(("backbones=", "default_backbone=")) for override in overrides):
        settings.pop("lesson_backbone", None)  # whoever chooses means the lessons, too
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"The override {override!r} has no value; write {key}=VALUE.")
        many = any(field.name == key and "tuple" in str(field.type) for field in fields(Study))
        settings[key] = value.split(",") if many else _read_yaml(value, f"the override {override}")
    if "profile" in settings:
        raise ValueError(_unknown("profile"))
    study = Study(profile="+".join([name, *(re.sub(r"[^\w=.,-]", "-", o) for o in overrides)]),
                  **settings)
    if study.default_backbone in study.backbones:
        return study
    if any(override.startswith("default_backbone=") for override in overrides):
        raise ValueError(f"The default backbone {study.default_backbone!r} is not among the "
                         f"backbones; pass one of {', '.join(study.backbones)}.")
    return replace(study, default_backbone=study.backbones[0])


def _refusal(error: ValidationError, settings: dict) -> str:
    """What pydantic finds wrong first, as a sentence; what is missing comes last."""
    wrong = [found["loc"][0] for found in error.errors()]
    key = next((key for key in wrong if key in settings), None)
    if key is None:
        return (f"The profile {settings.get('profile')!r} lacks {', '.join(wrong)}; add them to "
                f"its file.")
    field = Study.__pydantic_fields__.get(key)
    if field is None:
        return _unknown(key)
    wanted = field.description or " or ".join(get_args(field.annotation))
    return f"The setting {key} is {settings[key]!r}; pass {wanted}."


def _unknown(key) -> str:
    return unknown("setting", key, [field.name for field in fields(Settings)
                                    if field.name != "profile"])


def _read_yaml(text: str, where: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"The YAML of {where} cannot be read; write plain KEY: VALUE lines, or "
                         f"KEY=VALUE for an override.") from None
