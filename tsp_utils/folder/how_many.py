"""How many clusters? A range of candidates, scored without labels by criteria of the literature."""

import io
import logging
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import cut_tree, ward
from scipy.sparse import csgraph, csr_array, eye_array, linalg
from scipy.stats import entropy
from sklearn.metrics import adjusted_rand_score, pairwise_distances, silhouette_score
from sklearn.utils import check_random_state

from tsp_utils.files.image_folders import list_images
from tsp_utils.files.paths import without_empty, write_together
from tsp_utils.folder.choice import choose_backbone, usual_px
from tsp_utils.folder.cluster_folder import check_out, features_of, results_folder
from tsp_utils.heads import init_heads, train_heads
from tsp_utils.k_means import kmeans
from tsp_utils.maps import umap_points
from tsp_utils.metrics import confusion
from tsp_utils.neighbors import Neighbors, nearest_neighbors, neighbor_weights
from tsp_utils.scaling import scale_features

logger = logging.getLogger(__name__)

MOST = FEWEST = 30  # clusters by default, samples
# The numbers worth looking at (docs/how_many_clusters.md), as the picture names them.
WORTH = {"silhouette_umap": "silhouette on the UMAP",
         "excess_loss": "loss corrected for C, low is good", "stability": "stability of heads"}


class HowMany(NamedTuple):
    """table: a row a candidate, a column a criterion, and their picks (1: it sees no clusters);
    of the n samples that were looked at, features [n, D] and points of their UMAP [n, 2]."""

    table: pd.DataFrame
    picks: dict[str, int]
    features: np.ndarray
    points: np.ndarray


def suggest_n_clusters(features: np.ndarray, candidates=None, *, max_samples: int = 2000,
                       random_state=None) -> HowMany:
    """Score candidate numbers of clusters of features [N, D], without labels.

    One head a candidate is trained (300 steps, learning rate 1e-3) on all samples and on both
    halves of two random splits; of more than max_samples, so many are drawn. candidates: by
    default 2 to 30, or to what half of the samples can make. Columns of `HowMany.table`:

    stability: adjusted Rand index, on all samples, of the heads of both halves (after Lange et al.,
    2004); prediction_strength (Tibshirani and Walther, 2005), whose pick is the largest with 0.8;
    silhouette of the heads' clusters by cosine, silhouette_umap on a UMAP, silhouette_ward: of
    Ward's clusters there; eigengap of the neighbour graph's normalised Laplacian (von Luxburg,
    2007); excess_loss, the less the better: Eq. 5 above its least value, over log C. Raises
    ValueError for candidates outside 2 to N // 2 - 1, and too few samples or distinct ones.
    """
    x, rng = scale_features(features), check_random_state(random_state)
    x = x[np.sort(rng.permutation(len(x))[:max_samples])]
    ks = _checked(candidates, len(x))
    splits = [np.array_split(rng.permutation(len(x)), 2) for _ in range(2)]
    distinct = min(len(np.unique(x[half], axis=0)) for split in splits for half in split)
    if distinct < ks[-1]:
        raise ValueError(f"Half of the {len(x)} samples hold {distinct} distinct feature vectors, "
                         f"too few for {ks[-1]} clusters; remove duplicates, or pass fewer.")
    seed = int(rng.randint(2**31 - 1))
    points = umap_points(x, len(x), seed)[1].astype(np.float64)
    whole, neighbors = _fit(x, np.arange(len(x)), ks, seed)
    apart, on_map = pairwise_distances(x, metric="cosine"), pairwise_distances(points)
    heads, merged = [whole[k].argmax(1) for k in ks], cut_tree(ward(points), ks).T  # [N] each
    table = pd.DataFrame(
        np.mean([list(_agreement(x, split, ks, seed)) for split in splits], axis=0),  # [ks, 2]
        pd.Index(ks, name="n_clusters"), ["stability", "prediction_strength"])
    table["silhouette"] = [_silhouette(apart, clusters) for clusters in heads]
    table["silhouette_umap"] = [_silhouette(on_map, clusters) for clusters in heads]
    table["silhouette_ward"] = [_silhouette(on_map, clusters) for clusters in merged]
    table["eigengap"] = eigengaps(neighbors, ks)
    table["excess_loss"] = [excess_loss(whole[k], neighbors) for k in ks]
    strong = table.index[table["prediction_strength"] >= 0.8]  # its authors' threshold
    picks = table.idxmax().to_dict() | {"excess_loss": table["excess_loss"].idxmin(),
                                        "prediction_strength": max(strong, default=1)}
    return HowMany(table, {name: int(k) for name, k in picks.items()}, x, points)


def candidates_between(low: int, high: int) -> list[int]:
    """Numbers from low to high, both among them: all up to 12, then in ratios of about 1.15."""
    some = [*range(low, 13), *(round(12 * 1.15**i) for i in range(1, 100)), low, high]
    return sorted({k for k in some if low <= k <= high})


def _checked(candidates, n: int) -> list[int]:
    most = n // 2 - 1
    if n < FEWEST:
        raise ValueError(f"How many clusters {n} samples make is not told; pass {FEWEST} or more.")
    ks = range(2, min(MOST, most) + 1) if candidates is None else candidates
    ks = sorted({int(k) for k in ks})
    if not ks or ks[0] < 2 or ks[-1] > most:
        said = f"{ks[0]} to {ks[-1]}" if ks else "none"
        raise ValueError(f"The numbers of clusters to try are {said}, and halves of {n} samples "
                         f"can make 2 to {most}; pass numbers among these.")
    return ks


def _fit(x: np.ndarray, rows: np.ndarray, ks: list[int], seed: int):
    """Probabilities [N, C] by candidate, of heads fitted on x[rows]; the neighbours of these."""
    own, probs = x[rows], {}
    neighbors = nearest_neighbors(own, min(20, len(own) - 1))
    for octave in sorted({k.bit_length() for k in ks}):  # train at once, padded to the largest
        group = [k for k in ks if k.bit_length() == octave]
        centers = np.zeros((len(group), group[-1], x.shape[1]))
        for padded, k in zip(centers, group, strict=True):
            padded[:k] = kmeans(own, k, [seed]).centers[0]
        heads = init_heads(own, group[-1], [seed] * len(group), centers=centers)
        heads.bias.data[np.arange(group[-1]) >= np.array(group)[:, None]] = -1e4  # p = 0, for good
        with warnings.catch_warnings():  # what is padded is not in use
            warnings.filterwarnings("ignore", "Collapse", UserWarning)
            train_heads(heads, own, neighbors, max_epochs=0, min_steps=300, learning_rate=1e-3,
                        batch_size=min(256, max(32, len(own) // 8)), progress=False)
        probs |= {k: p[:, :k] for k, p in zip(group, heads.predict_proba(x), strict=True)}
    return probs, neighbors


def _agreement(x: np.ndarray, halves: list[np.ndarray], ks: list[int], seed: int):
    """Adjusted Rand index and prediction strength of heads fitted on two halves, by candidate."""
    fits = [_fit(x, half, ks, seed)[0] for half in halves]
    for one, other in ([fit[k].argmax(1) for fit in fits] for k in ks):
        strengths = [prediction_strength(own[half], told[half])
                     for half, own, told in zip(halves, (one, other), (other, one), strict=True)]
        yield adjusted_rand_score(one, other), np.mean(strengths)


def prediction_strength(own: np.ndarray, told: np.ndarray) -> float:
    """The least share, over clusters `own` [N], of their pairs that `told` [N] keeps together."""
    counts = confusion(own, told).astype(float)
    sizes = counts.sum(1)
    pairs = (counts * (counts - 1)).sum(1)[sizes > 1] / (sizes * (sizes - 1))[sizes > 1]
    return float(pairs.min(initial=1.0))


def excess_loss(probs: np.ndarray, neighbors: Neighbors, entropy_weight: float = 3.0) -> float:
    """Eq. 5 above its least value, over log C: 0 for sure and even clusters, 1 by chance."""
    products = np.einsum("nc,nkc->nk", probs, probs[neighbors.indices])  # [N, K]
    agree = (neighbor_weights(neighbors) * np.log(np.maximum(products, 1e-30))).sum(1).mean()
    most = math.log(probs.shape[1])
    return float((entropy_weight * (most - entropy(probs.mean(0))) - agree) / most)


def _silhouette(distances: np.ndarray, clusters: np.ndarray) -> float:
    """-1, the least there is, where all are in one cluster."""
    return (silhouette_score(distances, clusters, metric="precomputed")
            if 1 < len(np.unique(clusters)) < len(clusters) else -1.0)


def eigengaps(neighbors: Neighbors, ks: list[int]) -> np.ndarray:
    """What the Laplacian's eigenvalue k + 1 is above the k-th, of the graph of neighbours."""
    n, n_neighbors = neighbors.indices.shape
    ends = np.arange(0, n * n_neighbors + 1, n_neighbors)
    graph = csr_array((np.ones(n * n_neighbors), neighbors.indices.ravel(), ends), (n, n))
    laplacian = csgraph.laplacian((graph + graph.T) / 2, normed=True)
    shifted = linalg.eigsh(2 * eye_array(n) - laplacian, max(ks) + 1,
                           return_eigenvectors=False,  # the largest ones are found faster
                           v0=np.random.default_rng(0).standard_normal(n))
    return -np.diff(np.sort(shifted)[::-1])[np.array(ks) - 1]


def suggest_folder(folder: str | Path, min_clusters: int = 2, max_clusters: int | None = None, *,
                   backbone: str = "auto", out: str | Path | None = None,
                   force: bool = False, seed: int = 0) -> tuple[Path, HowMany]:
    """`suggest_n_clusters` of a folder's images: how_many.csv and .png in `out`, by default that of
    `cluster_folder`, whose errors are raised. Returns `out` and what was found."""
    import tsp_utils.plots  # noqa: F401  where matplotlib is missing, before any work
    paths = list_images(folder := Path(folder).expanduser())
    out = results_folder(folder, out, seed)
    most = min(MOST, len(paths) // 2 - 1) if max_clusters is None else max_clusters
    candidates = _checked(candidates_between(min_clusters, most), len(paths))
    with without_empty(out):  # that it can be written, and not more
        check_out(folder, out, force, ("how_many.csv", "how_many.png"))
    network, advice = choose_backbone(backbone, usual_px(folder, paths))
    for sentence in advice:
        logger.warning(sentence)
    features, _ = features_of(network, folder, paths, candidates[-1])
    found = suggest_n_clusters(features, candidates, random_state=seed)
    draw(found).savefig(picture := io.BytesIO(), format="png")
    write_together({out / "how_many.csv": found.table.round(4).to_csv().encode(),
                    out / "how_many.png": picture.getvalue()})
    return out, found


def draw(found: HowMany):
    """The figure: a panel a number worth looking at, its pick marked."""
    from tsp_utils import plots  # with matplotlib, which clustering does not need
    plots.set_style()
    figure, axes = plots.plt.subplots(1, len(WORTH), figsize=(12, 3), layout="constrained")
    for ax, (name, words) in zip(axes, WORTH.items(), strict=True):
        ax.plot(found.table[name], color=plots.METHOD_COLORS["k-means"], marker=".")
        ax.axvline(found.picks[name], color=plots.METHOD_COLORS["head"], linestyle=":")
        ax.set(xlabel="clusters", title=f"{words}: {found.picks[name]}")
    return figure
