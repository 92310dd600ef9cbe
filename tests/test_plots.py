"""Figures with many classes: what cannot be read is left out, and no colour is used twice."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tsp_utils import plots


@pytest.fixture
def ax():
    yield plt.figure().gca()
    plt.close("all")


@pytest.mark.parametrize("n, named", [(10, True), (20, True), (100, False)])
def test_a_map_has_a_colour_a_class_and_a_legend_that_fits(ax, n, named):
    names = [f"class {c}" for c in range(n)]
    plots.plot_map(np.zeros((n, 2)), np.arange(n), names, ax)
    colors = {tuple(group.get_facecolor()[0]) for group in ax.collections}
    assert len(colors) == n
    shown = [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []
    assert shown == (names if named else [])


@pytest.mark.parametrize("n, named", [(10, True), (100, False)])
def test_a_confusion_is_in_percent_of_each_class_with_clusters_in_their_classes_order(ax, n, named):
    counts = np.roll(np.diag(np.full(n, 7)), 1, axis=1)  # cluster c + 1 is class c
    names = [f"class {c}" for c in range(n)]
    plots.plot_confusion(counts, names, np.roll(np.arange(n), 1), ax)
    drawn = ax.collections[0].get_array().reshape(n, n)
    np.testing.assert_array_equal(drawn, 100 * np.eye(n))
    assert [text.get_text() for text in ax.get_yticklabels()] == (names if named else [])
    assert len(ax.texts) == (n * n if named else 0)


def test_heads_are_drawn_in_the_order_given_and_the_map_leaves_gaps():
    table = pd.DataFrame(dict(method=["scan", "tsp", "k-means", "gmm"],
                              acc_mean=[30.0, 31.0, 28.0, np.nan],
                              acc_std=[1.0, np.nan, 2.0, np.nan]))
    order = ["tsp", "scan", "k-means", "gmm"]
    ax = plots.plot_heads(table, order, plt.figure().gca(), bound=50.0)
    assert [label.get_text() for label in ax.get_yticklabels()] == order
    assert list(ax.get_yticks()) == [3, 2, 1, 0]
    assert [text.xy[1] for text in ax.texts if text.get_text() == "not run"] == [0]
    drawn = {round(line.get_xdata()[0], 1) for line in ax.lines if len(line.get_xdata()) == 1}
    assert {30.0, 31.0, 28.0} <= drawn
    cells = pd.DataFrame(dict(row=["TSP", "ICBPL"], column=["1 block", "2 blocks"], n=[1, 5],
                              d=[0.5, -1.5]))
    ax = plots.plot_finetuning_map(cells, "d", ["1 block", "2 blocks"], plt.figure().gca())
    texts = [text.get_text() for text in ax.texts]
    assert "+0.5\nn = 1" in texts and "-1.5\nn = 5" in texts
    assert len([text for text in texts if text]) == 2
    plt.close("all")
