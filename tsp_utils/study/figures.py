"""Figures of the study alone: the method, training, the ledger, sources and heads compared."""

import re

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.patches import FancyBboxPatch

from tsp_utils.plots import METHOD_COLORS
from tsp_utils.study.claims import claim_of

SOURCE_COLOR, TARGET_COLOR = "#7d5ba6", "#e0a03b"  # claim C6, in every figure
VERDICT_COLORS = {"holds": "#4a9d5b", "does not hold": "#c9504c", "inconclusive": "#e0a03b",
                  "not tested": "0.6"}
DISPLAY_NAMES = {"k-means": "K-means", "head": "TSP head"}
WITHOUT_HEAD = ("k-means", "k-means-20", "spherical k-means", "gmm", "spectral")


def plot_method(ax):
    """Fig. 3 in our words: what is frozen, what is trained, where labels come in."""
    boxes = [
        (0.0, "images of\nthe target", "0.93"),
        (1.0, "backbone,\npretrained without\nlabels on a larger\nsource (DINO)", "#dce8f2"),
        (2.0, "features\nx in R$^D$", "0.93"),
        (3.0, "K nearest\nneighbours,\nweights P(j|i)\n(Eq. 4)", "#dce8f2"),
        (4.0, "linear head\nsoftmax(Wx + b),\nfrom K-means,\nby Eq. 5", "#f4d9d8"),
        (5.0, "clusters", "0.93"),
    ]
    for x, text, color in boxes:
        ax.add_patch(FancyBboxPatch((x * 1.25, 0), 1.06, 0.9, boxstyle="round,pad=0.02",
                                    facecolor=color, edgecolor="0.5", linewidth=0.8))
        ax.text(x * 1.25 + 0.53, 0.45, text, ha="center", va="center", fontsize=9)
        if x:
            ax.annotate("", (x * 1.25 - 0.02, 0.45), (x * 1.25 - 0.17, 0.45),
                        arrowprops=dict(arrowstyle="-|>", color="0.35"))
    ax.text(1.78, -0.12, "frozen", ha="center", va="top", fontsize=9.5, color="#3a78a8")
    ax.text(5.53, -0.12, "learned: this alone", ha="center", va="top", fontsize=9.5,
            color="#b04a48")
    ax.text(6.78, -0.12, "labels: only to score", ha="center", va="top", fontsize=9.5, color="0.35")
    ax.set(xlim=(-0.1, 7.45), ylim=(-0.3, 1.0))
    ax.axis("off")


def plot_curves(curves: np.ndarray, label: str, ax, reference: float | None = None):
    """Training curves [E, S], one thin line a seed and their mean; an optional reference line."""
    epochs = np.arange(1, len(curves) + 1)
    color = METHOD_COLORS["head"]
    ax.plot(epochs, curves, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(epochs, curves.mean(1), color=color, linewidth=2)
    if reference is not None:
        ax.axhline(reference, color="0.4", linestyle=":", linewidth=1.2)
    ax.set(xlabel="epoch", title=label)


def plot_kmeans_against_head(table: pd.DataFrame, metric: str, ax):
    """Each seed as a line from its K-means to its head. table: columns method, seed, <metric>."""
    wide = table.pivot(index="seed", columns="method", values=metric)[["k-means", "head"]]
    ax.plot([0, 1], wide.T, color="0.75", linewidth=1, zorder=1)
    for x, method in enumerate(wide):
        ax.scatter(np.full(len(wide), x), wide[method], color=METHOD_COLORS[method], zorder=2, s=28)
        ax.errorbar(x + (0.14 if x else -0.14), wide[method].mean(), wide[method].std(),
                    color=METHOD_COLORS[method], marker="_", markersize=14, capsize=3)
    ax.set(xticks=[0, 1], xticklabels=[DISPLAY_NAMES[m] for m in wide], xlim=(-0.5, 1.5),
           ylabel=f"{metric.upper()} (%)")


def plot_crossover(table: pd.DataFrame, metric: str, ax):
    """Target-only arms over the number of their images, the source's arm as a band.

    table: one row an arm, with columns arm, n_images, <metric>_mean and <metric>_std.
    """
    mean, std = f"{metric}_mean", f"{metric}_std"
    source = table[table["arm"] == "source"].iloc[0]
    ax.axhspan(source[mean] - source[std], source[mean] + source[std], alpha=0.15,
               color=SOURCE_COLOR, linewidth=0)
    ax.axhline(source[mean], color=SOURCE_COLOR, label="source")
    target = table[table["arm"].str.fullmatch(r"target [\d,]+")].sort_values("n_images")
    ax.errorbar(target["n_images"], target[mean], target[std], color=TARGET_COLOR, marker="o",
                capsize=3, label="target alone")
    rest = table[~table.index.isin(target.index) & (table["arm"] != "source")]
    for marker, (_, row) in zip("sDv^", rest.iterrows(), strict=False):
        ax.errorbar(row["n_images"], row[mean], row[std], color="0.35", marker=marker, capsize=3,
                    linestyle="none", label=row["arm"])
    ax.set(xscale="log", xlabel="images learned from", ylabel=f"{metric.upper()} (%)")
    sizes = sorted({int(n) for n in table["n_images"]})
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=35)
    ax.set_xticks([], minor=True)
    ax.legend(fontsize=9)


def plot_ledger(table: pd.DataFrame, ax):
    """One line a claim: difference and interval, the margin as a bar, the verdict as its colour.

    table: columns id, mean, low, high, rule ("m = 2; ..."), verdict, qualifier, backbone, target;
    the first claim on top. An equivalence (C9) has a bar at both ends of its band; a verdict that
    another metric capped says so.
    """
    y = np.arange(len(table))[::-1]
    margins = table["rule"].str.extract(r"m = ([\d.]+)")[0].astype(float)
    for verdict, color in VERDICT_COLORS.items():
        rows = (table["verdict"] == verdict).to_numpy()
        points = table[rows]
        spread = np.abs(points[["low", "high"]].to_numpy() - points[["mean"]].to_numpy()).T
        ax.errorbar(points["mean"], y[rows], xerr=np.nan_to_num(spread), fmt="o", capsize=3,
                    color=color, label=f"{verdict} ({rows.sum()})")
    ax.scatter(margins, y, marker="|", s=160, color="0.35", linewidths=1.6)
    both = table["rule"].str.contains("equivalence").to_numpy()
    ax.scatter(-margins[both], y[both], marker="|", s=160, color="0.35", linewidths=1.6)
    ax.axvline(0, color="0.75", linewidth=1)
    ax.set(yticks=y, yticklabels=[f"{claim_of(i).name}  {i}" for i in table["id"]],
           xlabel="difference (points)", ylim=(-0.7, y[0] + 0.7))
    for (_, row), height in zip(table.fillna("").iterrows(), y, strict=True):
        capped = re.search(r"[A-Z]{3}( and [A-Z]{3})? pointing the other way", row["qualifier"])
        where = ", ".join(filter(None, (row["backbone"], row["target"])))
        ax.text(1.01, height, "; ".join(filter(None, (where, capped and capped[0]))), fontsize=9,
                color="0.35", va="center", transform=ax.get_yaxis_transform())
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=4, fontsize=9.5,
              columnspacing=1, handletextpad=0.3)


def plot_heads(table: pd.DataFrame, order, ax, bound: float | None = None):
    """One line a clustering method on one feature set: mean ACC and standard deviation.

    table: columns method, acc_mean, acc_std (percent); order: the methods, best on top; bound: the
    linear probe's ACC. Trained heads are red, TSP filled; what has no head is grey. A method
    without numbers gets the words "not run" at the left edge.
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
        ax.errorbar(row["acc_mean"], height, xerr=np.nan_to_num(row["acc_std"]), fmt="o", capsize=2,
                    color=color, markerfacecolor=color if name == "tsp" else "white")
    if bound is not None:
        ax.axvline(bound, color="0.35", linestyle="--", linewidth=1.2)
        ax.annotate("probe", (bound, y[0] + 0.5), fontsize=9, color="0.35", ha="right", rotation=90,
                    va="top", xytext=(-2, 0), textcoords="offset points")
    ax.set(yticks=y, yticklabels=order, xlabel="ACC (%)", ylim=(-0.7, y[0] + 0.7))


def plot_finetuning_map(table: pd.DataFrame, value: str, columns, ax):
    """Loss and batch (rows) by depth and learning rate (columns): change against frozen, points.

    table: columns row, column, <value>, n; columns: their order; what was not run stays empty.
    """
    wide = table.pivot(index="row", columns="column", values=value)
    wide = wide.reindex(index=table["row"].unique(), columns=columns)
    n = table.pivot(index="row", columns="column", values="n").reindex_like(wide)
    text = wide.map("{:+.1f}".format) + n.map(lambda count: f"\nn = {count:.0f}")
    limit = max(2.0, float(np.nanmax(np.abs(wide.to_numpy()))))  # half a point is not a colour
    sns.heatmap(wide, annot=text.where(wide.notna(), ""), fmt="", cmap="RdBu", vmin=-limit,
                vmax=limit, ax=ax, annot_kws={"fontsize": 9.5}, cbar=False, linewidths=1)
    ax.set(xlabel="", ylabel="")
    ax.grid(False)
    ax.tick_params(axis="y", rotation=0)
