"""Figures: one style, the colours of backbones and methods; a plot_* draws into given axes."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from tsp_utils.maps import umap_points as umap_points  # what plot_map draws
from tsp_utils.networks.words import BACKBONE_COLORS, in_words

CLASS_PALETTE = sns.color_palette("tab10")
MOST_NAMED = 20  # classes whose names still fit beside a map or a matrix
MARKERS = "osD^vPX<>*"  # a shape beside the colour
METHOD_COLORS = {"k-means": "#9aa5b1", "head": "#d1605e"}


def set_style() -> None:
    """The style of every figure: readable at half its size."""
    sns.set_theme(style="whitegrid", rc={
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": "0.92",
        "figure.dpi": 80, "savefig.dpi": 110, "axes.titlesize": "medium", "legend.frameon": False,
        "axes.titlelocation": "left", "svg.hashsalt": "0", "svg.fonttype": "none"})


def backbone_color(name: str):
    """The colour of a backbone, the same in every figure."""
    return BACKBONE_COLORS.get(name) or sns.color_palette("husl", 8)[sum(map(ord, name)) % 8]


def label_lines(ax, size: float = 9) -> None:
    """Each labelled line's name in words beside its right end, pushed up from the one below."""
    height, low, ends = np.ptp(ax.get_ylim()) * size / 130, -np.inf, []
    for line, label in zip(*ax.get_legend_handles_labels(), strict=True):
        ends.append((np.asarray(line.get_ydata())[-1], in_words(label), line.get_color()))
    for y, label, color in sorted(ends):
        low = max(y, low + height)
        ax.text(1.01, low, label, color=color, fontsize=size, va="center",
                transform=ax.get_yaxis_transform())


def plot_confusion(counts: np.ndarray, classes, class_of, ax):
    """Row-normalised confusion [n_classes, n_clusters], clusters ordered by their matched class."""
    order = np.argsort(np.where(class_of < 0, len(classes), class_of), kind="stable")
    shares = np.round(100 * counts[:, order] / counts.sum(1, keepdims=True), 6)  # halves stay so
    few = len(classes) <= MOST_NAMED  # else names and numbers would cover each other
    sns.heatmap(shares, ax=ax, cmap="Blues", vmin=0, vmax=100, annot=few, fmt=".0f",
                annot_kws={"fontsize": 8}, cbar=False, square=True,
                yticklabels=list(classes) if few else False,
                xticklabels=[classes[c] if c >= 0 else "-" for c in class_of[order]] if few
                else False)
    ax.set(xlabel="cluster, named by its matched class", ylabel="class")
    plt.setp(ax.get_xticklabels(), rotation=60, ha="right", rotation_mode="anchor")


def plot_map(points: np.ndarray, groups: np.ndarray, names, ax, legend: bool = True):
    """A map [N, 2], colour and shape by group [N]; no legend for more than twenty names."""
    colors = CLASS_PALETTE if len(names) <= len(CLASS_PALETTE) else sns.husl_palette(len(names))
    for c, name in enumerate(names):
        chosen = points[groups == c]
        ax.scatter(chosen[:, 0], chosen[:, 1], s=8 if len(points) > 1000 else 18, alpha=0.7,
                   color=colors[c], label=name, linewidths=0, marker=MARKERS[c % len(MARKERS)],
                   rasterized=True)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    if legend and len(names) <= MOST_NAMED:
        ax.legend(markerscale=2, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
