"""Figures of the study: method, sheets of images, consistency, ledger, sources, heads compared."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.patches import FancyBboxPatch, Rectangle

from tsp_utils.networks.words import WORDS, in_words
from tsp_utils.plots import METHOD_COLORS, backbone_color, label_lines
from tsp_utils.study.claims import claim_of

SOURCE_COLOR, TARGET_COLOR = "#7d5ba6", "#e0a03b"  # claim C6, in every figure
VERDICTS = {"holds": ("o", "#2f7fb8"), "does not hold": ("X", "#c9504c"),  # shape and colour
            "inconclusive": ("D", "#b98213"), "not tested": ("s", "0.5")}
WITHOUT_HEAD = ("k-means", "k-means-20", "spherical k-means", "gmm", "spectral")


def plot_method(ax):
    """Fig. 3 in our words: what is frozen, what is trained, where labels come in."""
    grey, blue, red = ("0.93", "0.35"), ("#dce8f2", "#2f6690"), ("#f4d9d8", "#b04a48")
    boxes = (("images of\nthe target", grey, ""),
             ("backbone,\npretrained\nwithout labels on\na larger source\n(DINO)", blue, "frozen"),
             ("features\nx in R$^D$", grey, ""),
             ("K nearest\nneighbours,\nweights P(j|i)\n(Eq. 4)", blue, "searched once"),
             ("linear head\nsoftmax(Wx + b),\nfrom K-means,\nby Eq. 5", red, "all that learns"),
             ("clusters", grey, "labels only\nto score"))
    for i, (text, (face, dark), below) in enumerate(boxes):
        x = 1.7 * i
        ax.add_patch(FancyBboxPatch((x, 0), 1.4, 1, boxstyle="round,pad=0.02", facecolor=face,
                                    edgecolor="0.5", linewidth=0.8))
        ax.text(x + 0.7, 0.5, text, ha="center", va="center", fontsize=9)
        ax.text(x + 0.7, -0.1, below, ha="center", va="top", fontsize=9.5, color=dark)
        if i:
            ax.annotate("", (x - 0.02, 0.5), (x - 0.28, 0.5),
                        arrowprops=dict(arrowstyle="-|>", color="0.35"))
    ax.set(xlim=(-0.1, 10.05), ylim=(-0.45, 1.1))
    ax.axis("off")


def plot_consistency(table: pd.DataFrame, ax):
    """Label consistency against K (Fig. 1). table: columns backbone, k, consistency (percent)."""
    for name, rows in table.groupby("backbone", sort=False):
        ax.plot(rows["k"], rows["consistency"], marker="o", markersize=4, label=name,
                color=backbone_color(name))
    ax.set(xlabel="neighbours K", ylabel="label consistency (%)", ylim=(0, 100))
    label_lines(ax)


def plot_images(images: np.ndarray, titles=None, n_columns: int = 10, colors=None):
    """A sheet of images uint8 [N, H, W, C]; returns the figure. titles and edge colors by image."""
    n_rows = -(-len(images) // n_columns)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(n_columns * 0.95, n_rows * 1.12),
                                squeeze=False, layout="constrained")
    for ax in axes.flat[len(images) :]:
        ax.set_visible(False)
    for i, ax in enumerate(axes.flat[: len(images)]):
        grey = images[i].shape[-1] == 1
        ax.imshow(images[i][..., 0] if grey else images[i], cmap="gray", interpolation="nearest")
        if titles is not None:
            ax.set_title(titles[i], fontsize=7.5, loc="center", pad=2)
        ax.set_axis_off()
        if colors is not None:
            ax.add_patch(plt.Rectangle((0, 0), 1, 1, transform=ax.transAxes, clip_on=False,
                                       fill=False, linewidth=2.5, edgecolor=colors[i]))
    return figure


def plot_ledger(table: pd.DataFrame, ax, paper: dict[str, float] | None = None):
    """One line a claim: difference and interval, the margin as a bar, the verdict in words.

    table: columns id, mean, low, high, rule ("m = 2; ..."), verdict, qualifier, backbone, target;
    the first claim on top. paper: its own difference by id, a star. An equivalence (C9) has a bar
    at both ends of its band. What lies beyond the axis stands at its right end as a number.
    """
    limit = 1.5 * max(1.0, float(np.nanmax(np.abs(table[["mean", "low", "high"]].to_numpy(float)))))
    ax.axvline(0, color="0.75", linewidth=1)
    for y, (_, row) in zip(range(len(table))[::-1], table.iterrows(), strict=True):
        marker, color = VERDICTS[row["verdict"]]
        reach = np.nan_to_num([[row["mean"] - row["low"]], [row["high"] - row["mean"]]])
        ax.errorbar(row["mean"], y, xerr=reach, fmt=marker, capsize=3, color=color)
        margin = float(re.search(r"m = ([\d.]+)", row["rule"])[1])
        marks = [(margin, "|"), ((paper or {}).get(row["id"], np.nan), "*")]
        marks += [(-margin, "|")] * ("equivalence" in row["rule"])
        for x, shape in marks:
            if abs(x) <= limit:
                ax.scatter(x, y - 0.3 * (shape == "*"), marker=shape, s=90, color="0.35")
        beyond = [f"{'margin' if shape == '|' else 'paper'} {x:.3g} " + "\u2190\u2192"[x > 0]
                  for x, shape in marks if abs(x) > limit]
        ax.text(limit, y - 0.3, "  ".join(beyond), ha="right", va="center", fontsize=9,
                color="0.35")
        capped = re.search(r"[A-Z]{3}( and [A-Z]{3})? pointing the other way", f"{row.qualifier}")
        where = [in_words(row[key]) for key in ("backbone", "target") if row[key] == row[key]]
        words = (row["verdict"], ", ".join(filter(None, where)), capped and capped[0])
        ax.text(1.01, y, "; ".join(filter(None, words)), fontsize=9, color=color, va="center",
                transform=ax.get_yaxis_transform())
    ax.set(yticks=range(len(table))[::-1], xlim=(-limit, limit), ylim=(-0.7, len(table) - 0.3),
           yticklabels=[f"{claim_of(i).name}  {i}" for i in table["id"]],
           xlabel="difference (points); bar: margin; star: paper")


def plot_heads(table: pd.DataFrame, order, ax, bound: float | None = None):
    """One line a clustering method on one feature set: mean ACC and standard deviation.

    table: columns method, acc_mean, acc_std (percent); order: the methods, best on top; bound: the
    linear probe's ACC. Trained heads are red circles, TSP's filled; what has no head is a grey
    square. A method without numbers gets the words "not run" at the left edge.
    """
    rows = table.set_index("method").reindex(order)
    y = np.arange(len(rows))[::-1]
    for height, (name, row) in zip(y, rows.iterrows(), strict=True):
        if np.isnan(row["acc_mean"]):
            ax.annotate("not run", (0, height), xycoords=("axes fraction", "data"), fontsize=9,
                        color="0.5", va="center", xytext=(4, 0), textcoords="offset points")
            continue
        trained = name not in WITHOUT_HEAD
        color = METHOD_COLORS["head"] if trained else "0.5"
        ax.errorbar(row["acc_mean"], height, xerr=np.nan_to_num(row["acc_std"]), capsize=2,
                    fmt="o" if trained else "s", color=color,
                    markerfacecolor=color if name == "tsp" else "white")
    if bound is not None:
        ax.axvline(bound, color="0.35", linestyle="--", linewidth=1.2)
        ax.annotate("with labels", (bound, y[0] + 0.5), fontsize=9, color="0.35", ha="right",
                    rotation=90, va="top", xytext=(-2, 0), textcoords="offset points")
    words = [WORDS.get(name, name.upper()) for name in order]
    ax.set(yticks=y, yticklabels=words, xlabel="ACC (%)", ylim=(-0.7, y[0] + 0.7))


def plot_finetuning_map(table: pd.DataFrame, value: str, columns, ax):
    """Loss and batch (rows) by depth and learning rate (columns): change against frozen, points.

    table: columns row, column, <value>, n; columns: their order; what was not run stays empty, and
    what is one seed is hatched.
    """
    wide = table.pivot(index="row", columns="column", values=value)
    wide = wide.reindex(index=table["row"].unique(), columns=columns)
    n = table.pivot(index="row", columns="column", values="n").reindex_like(wide)
    text = wide.map(lambda change: f"{change:+.1f}".replace("-0.0", "+0.0"))
    text += n.map(lambda count: f"\nn = {count:.0f}")
    limit = max(2.0, float(np.nanmax(np.abs(wide.to_numpy()))))  # half a point is not a colour
    sns.heatmap(wide, annot=text.where(wide.notna(), ""), fmt="", cmap="RdBu", vmin=-limit,
                vmax=limit, ax=ax, annot_kws={"fontsize": 9.5}, linewidths=1,
                cbar_kws={"label": "points"})
    for i, j in np.argwhere(n.to_numpy() == 1):
        ax.add_patch(Rectangle((j, i), 1, 1, fill=False, hatch="//", edgecolor=(0.5, 0.5, 0.5, 0.4),
                               linewidth=0))
    ax.set(xlabel="", ylabel="")
    ax.grid(False)
    ax.tick_params(axis="y", rotation=0)
