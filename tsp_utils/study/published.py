"""What the TSP paper printed, as data: its Tables 1 and 2 and three figures of its text.

Source: Zhou and Zhang, "Deep Clustering with Features from Self-Supervised Pretraining" (2022).
All values are percent. Its "CIFAR-100" stands here as `cifar100-20`, the 20 superclasses: that is
an INFERENCE (the 47.7 it cites as the state of the art is NNM's figure for that task), the paper
does not say so. Its deviations are over 10 independent runs and belong to the TSP rows alone; the
rows K-means to NNM were quoted by it from earlier papers, each with a protocol of its own.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pandas as pd


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


@dataclass(frozen=True)
class PublishedFigure:
    """One ACC (percent) that the text gives without deviation, number of runs or protocol."""

    name: str
    dataset: str
    acc: float
    against: float  # the ACC of TSP-ViT1 that the text sets it against
    where: str


DATASETS = ("cifar10", "cifar100-20", "stl10")


def _means(method: str, *cells: tuple) -> list[PublishedRow]:
    """A row without deviations; cells are (NMI, ACC, ARI), one a data set."""
    return [PublishedRow(method, name, *cell) for name, cell in zip(DATASETS, cells, strict=True)]


def _runs(method: str, *cells: tuple) -> list[PublishedRow]:
    """A row over ten runs; cells are (NMI, std, ACC, std, ARI, std), one a data set."""
    return [
        PublishedRow(method, name, *cell[0::2], *cell[1::2], n=10)
        for name, cell in zip(DATASETS, cells, strict=True)
    ]


# NMI, ACC, ARI on CIFAR-10, then CIFAR-100 (20 superclasses, inferred), then STL-10.
TABLE_1 = (
    *_means("K-means", (8.7, 22.9, 4.9), (8.4, 13.0, 2.8), (12.5, 19.2, 6.1)),
    *_means("DEC", (25.7, 30.1, 16.1), (13.6, 18.5, 5.0), (27.6, 35.9, 18.6)),
    *_means("DAC", (39.6, 52.2, 30.6), (18.5, 23.8, 8.8), (36.6, 47.0, 25.7)),
    *_means("DCCM", (49.6, 62.3, 40.8), (28.5, 32.7, 17.3), (37.6, 48.2, 26.2)),
    *_means("IIC", (None, 61.7, None), (None, 25.7, None), (None, 61.0, None)),
    *_means("PICA", (59.1, 69.6, 51.2), (31.0, 33.7, 17.1), (61.1, 71.3, 53.1)),
    *_means("SCAN", (71.5, 81.6, 66.5), (44.9, 44.0, 28.3), (67.3, 79.2, 61.8)),
    *_means("NNM", (74.8, 84.3, 70.9), (48.4, 47.7, 31.6), (69.4, 80.8, 65.0)),
    *_runs(
        "TSP-ResNet",
        (50.8, 1.1, 58.5, 2.0, 40.2, 1.1),
        (40.3, 1.3, 39.0, 1.8, 22.8, 1.5),
        (74.5, 2.4, 78.9, 4.8, 66.8, 4.2),
    ),
    *_runs(
        "TSP-ViT1",
        (84.7, 1.0, 92.1, 0.8, 83.8, 1.5),
        (58.2, 1.4, 54.9, 2.5, 40.8, 2.1),
        (94.1, 1.4, 97.0, 1.2, 93.8, 2.3),
    ),
    *_runs(
        "TSP-ViT2",
        (88.0, 1.2, 94.0, 1.3, 87.5, 2.3),
        (61.4, 1.4, 55.6, 2.5, 43.3, 1.8),
        (95.8, 2.0, 97.9, 1.7, 95.6, 3.1),
    ),
    *_means("supervised", (91.5, 96.6, 92.2), (81.9, 89.2, 78.9), (97.0, 98.9, 97.6)),
    *_runs(
        "TSP K-means",
        (77.5, 2.2, 74.9, 6.2, 67.7, 4.6),
        (56.2, 1.2, 50.9, 2.8, 35.7, 1.9),
        (89.2, 3.0, 81.7, 9.2, 80.2, 8.1),
    ),
)

# TSP-ViT1 on CIFAR-10. Columns as printed: K, then ACC, NMI and ARI, each with its deviation.
TABLE_2 = tuple(
    PublishedRow("TSP-ViT1", "cifar10", nmi, acc, ari, nmi_std, acc_std, ari_std, 10, n_neighbors)
    for n_neighbors, acc, acc_std, nmi, nmi_std, ari, ari_std in (
        (5, 92.41, 1.01, 85.10, 1.25, 84.33, 1.85),
        (10, 92.59, 0.87, 85.31, 1.08, 84.64, 1.57),
        (15, 92.25, 0.98, 84.84, 1.16, 84.01, 1.73),
        (20, 92.11, 0.88, 84.59, 1.04, 83.72, 1.55),
        (25, 92.03, 0.91, 84.50, 1.10, 83.58, 1.62),
        (30, 91.88, 0.90, 84.23, 1.12, 83.27, 1.59),
    )
)

FIGURES = (
    PublishedFigure("pretrained on CIFAR-10", "cifar10", 80.2, 92.1, "Sec. 4.3, Fig. 4b"),
    PublishedFigure("backbone fine-tuned", "cifar10", 65.7, 92.1, "Sec. 4.4, Fig. 6"),
    PublishedFigure("random start of the head", "cifar10", 85.6, 92.1, "Sec. 4.5"),
)

# Not in the paper, though out when it was written: the second bar of claim C0. From Niu, Shan and
# Wang, "SPICE" (IEEE Transactions on Image Processing, 2022), Table III, train/test split, the best
# result of each method; SPICE with a ResNet-34.
EXTERNAL = (
    *_means(
        "SCAN + self-labelling", (79.7, 88.3, 77.2), (48.6, 50.7, 33.3), (69.8, 80.9, 64.6)
    ),
    *_means("SPICE", (85.8, 91.7, 83.6), (58.3, 58.4, 42.2), (86.0, 92.9, 85.3)),
)


def to_frame(rows: Iterable[PublishedRow], dataset: str | None = None) -> pd.DataFrame:
    """The rows as a data frame, of one data set or of all; percent, NaN where nothing is printed.

    Raises ValueError for a data set that has no row.
    """
    rows = list(rows)
    known = list(dict.fromkeys(row.dataset for row in rows))
    if dataset is not None and dataset not in known:
        raise ValueError(f"No published row for {dataset!r}: pass one of {', '.join(known)}.")
    return pd.DataFrame([asdict(row) for row in rows if dataset in (None, row.dataset)])
