"""What the TSP paper printed, as data: its Tables 1 and 2, and two systems beyond them.

Source: Zhou and Zhang, "Deep Clustering with Features from Self-Supervised Pretraining" (2022).
All values are percent. Its "CIFAR-100" stands here as `cifar100-20`, the 20 superclasses: that is
an INFERENCE (the 47.7 it cites as the state of the art is NNM's figure for that task), the paper
does not say so. Its deviations are over 10 independent runs and belong to the TSP rows alone; the
rows K-means to NNM were quoted by it from earlier papers, each with a protocol of its own. Table 2
is of TSP-ViT1 on CIFAR-10.
"""

import csv
from pathlib import Path

from pydantic.dataclasses import dataclass

DATASETS = ("cifar10", "cifar100-20", "stl10")


@dataclass(frozen=True)
class PublishedRow:
    """One method on one data set, in percent; None where the source prints nothing."""

    method: str
    dataset: str
    nmi: float | None
    acc: float | None
    ari: float | None
    nmi_std: float | None = None
    acc_std: float | None = None
    ari_std: float | None = None
    n: int | None = None  # runs behind a deviation
    n_neighbors: int | None = None  # K, where the row is about it (Table 2)


def _rows(table: str) -> tuple[PublishedRow, ...]:
    with (Path(__file__).parent / "published.csv").open(newline="", encoding="utf-8") as file:
        return tuple(PublishedRow(**{name: text or None for name, text in row.items()})
                     for row in csv.DictReader(file) if row.pop("table") == table)


TABLE_1, TABLE_2 = _rows("Table 1"), _rows("Table 2")
# Not in the paper, though out when it was written: the second bar of claim C0. From Niu, Shan and
# Wang, "SPICE" (IEEE Transactions on Image Processing, 2022), Table III, train/test split, the best
# result of each method; SPICE with a ResNet-34.
EXTERNAL = _rows("SPICE, Table III")
