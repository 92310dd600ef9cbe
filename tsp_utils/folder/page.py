"""The report on a clustered folder: what it holds, in which order; page.html.jinja is its look."""

import base64
import io
import math
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from numbers import Number
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np
from PIL import Image
from scipy.stats import entropy
from sklearn.metrics import confusion_matrix

from tsp_utils.estimator import TSPClustering
from tsp_utils.files.image_folders import ImageFiles
from tsp_utils.metrics import clustering_metrics, confusion, match_clusters

CLUSTER_PX, MAP_PX = 96, 64  # longer side of a thumbnail in a cluster's rows, on the map
CLUSTER_IMAGES = 1000  # thumbnails in all clusters' rows: keeps the page below 10 MB
EACH = 8  # most confident images a cluster, as many drawn at random, as many doubtful ones
CHANGED = "data:image/svg+xml," + quote(
    '<svg xmlns="http://www.w3.org/2000/svg" width="96" height="96"><rect width="96" height="96" '
    'fill="#ddd"/><text x="48" y="52" text-anchor="middle" font-size="14">changed</text></svg>')
MAP_POINTS, MAP_IMAGES = 2000, 500
FEWEST_FOR_UMAP = 30  # images; fewer are laid out by principal axes
PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#ff9da7", "#797979",
           "#b6992d", "#499894")


def folder_page(found) -> str:
    """The page about `FolderClusters`: clusters, doubts, neighbours, map, how it was made."""
    shares = neighbor_shares(found.clusters, found.neighbors.indices, found.probabilities.shape[1])
    sizes = np.bincount(found.clusters, minlength=len(shares))
    order = np.argsort(-sizes, kind="stable").tolist()
    shown = {c: chosen_images(found, c, max(1, min(EACH, CLUSTER_IMAGES // 3 // len(shares))))
             for c in order[:CLUSTER_IMAGES // 3]}
    rows, points = map_points(found.features)
    step = math.ceil(len(rows) / MAP_IMAGES)
    hovered = rows[::step]
    in_rows = _thumbnails(found, {i for kinds in shown.values() for kind in kinds for i in kind},
                          CLUSTER_PX)
    on_map = _thumbnails(found, set(hovered.tolist()), MAP_PX)
    sure = found.probabilities[np.arange(len(found.paths)), found.clusters]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))
    return page.render(
        found=found, name=found.folder.resolve().name, n=len(found.paths), sizes=sizes.tolist(),
        order=order, shown=shown, thumbnails=in_rows, sure=sure,
        mean_of=[float(sure[found.clusters == c].mean()) if n else 0.0
                 for c, n in enumerate(sizes)],
        links={i: _link(found, i) for i in in_rows},
        nearby=[[(other, 100 * share[other]) for other in np.argsort(-share, kind="stable").tolist()
                 if other != c and share[other] >= 0.01][:3] for c, share in enumerate(shares)],
        color=lambda c: PALETTE[c] if len(shares) <= len(PALETTE) else (
            f"hsl({360 * c / len(shares):.0f} {55 + 20 * (c % 2)}% {42 + 8 * (c % 3)}%)"),
        step=step, points=_on_canvas(points, rows, found, on_map),
        curve=_curve(found.history["loss"]), entropy=entropy(found.probabilities.mean(0)),
        most=math.log(len(shares)), after_the_fact=after_the_fact(found), command=_command(found))


def neighbor_shares(clusters: np.ndarray, indices: np.ndarray, n_clusters: int) -> np.ndarray:
    """Share of the neighbours of each cluster's images in every cluster, rows sum to 1: [C, C].

    clusters int [N], indices [N, K]. Rows of empty clusters are 0.
    """
    return confusion_matrix(np.repeat(clusters, indices.shape[1]), clusters[indices].ravel(),
                            labels=range(n_clusters), normalize="true")


def chosen_images(found, cluster: int, n: int) -> tuple[list[int], list[int], list[int]]:
    """The n most probable images of a cluster, n of the others by seed, and the n least probable.

    Of few a third each, none twice. The surest alone may look like another cluster than it is.
    """
    members = np.flatnonzero(found.clusters == cluster)
    order = members[np.argsort(-found.probabilities[members, cluster], kind="stable")]
    n = min(n, -(-len(order) // 3))
    sure, doubtful = order[:n], order[n:][::-1][:n]
    others = order[n:len(order) - len(doubtful)]
    drawn = np.sort(np.random.default_rng([0, cluster]).permutation(len(others))[:n])
    return sure.tolist(), others[drawn].tolist(), doubtful.tolist()


def map_points(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images drawn by seed [n] and their places [n, 2]: UMAP, or principal axes where few."""
    if len(features) < FEWEST_FOR_UMAP:
        from sklearn.decomposition import PCA

        return np.arange(len(features)), PCA(2, random_state=0).fit_transform(features)
    from tsp_utils.maps import umap_points

    return umap_points(features, MAP_POINTS)


def after_the_fact(found) -> dict | None:
    """ACC, NMI, ARI and the confusion [classes, clusters] against class folders, if any."""
    if found.labels is None:
        return None
    matched = match_clusters(found.labels, found.clusters)
    order = np.argsort(np.where(matched < 0, len(found.classes), matched), kind="stable")
    counts = confusion(found.labels, found.clusters)
    sizes = [np.sort(np.bincount(numbers, minlength=max(counts.shape)))[::-1]
             for numbers in (np.unique(found.labels, return_inverse=True)[1], found.clusters)]
    return {"metrics": clustering_metrics(found.labels, found.clusters),
            "ceiling": np.minimum(*sizes).sum() / len(found.clusters),  # the larger to the larger
            "clusters": order.tolist(), "rows": list(zip(found.classes, counts[:, order].tolist(),
                                                         strict=True)),
            "largest": max(1, int(counts.max()))}


def _thumbnails(found, rows: set[int], size: int) -> dict[int, str]:
    """Row -> data URI of a JPEG, `size` pixels on its longer side (smaller ones as they are).

    Of what changed since it was clustered, a drawing that says so.
    """
    images = ImageFiles(found.folder, found.paths)

    def make(row: int) -> str:
        try:
            image = None if found.paths[row] in found.changed else Image.fromarray(images[row])
        except OSError:
            image = found.changed.add(found.paths[row])
        if image is None:
            return CHANGED
        image.thumbnail((size, size))
        image.save(file := io.BytesIO(), "JPEG", quality=75)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(rows, pool.map(make, rows), strict=True))


def _on_canvas(points, rows, found, thumbnails) -> list[dict]:
    """Points, 1000 from left to right or less, with cluster, path and, for some, a thumbnail."""
    low, high = points.min(0), points.max(0)
    places = 20 + 960 * (points - low) / np.maximum(high - low, 1e-12).max()
    return [{"x": round(float(x), 1), "y": round(float(y), 1), "cluster": int(found.clusters[row]),
             "path": found.paths[row], "image": thumbnails.get(int(row))}
            for (x, y), row in zip(places, rows, strict=True)]


def _link(found, row: int) -> str:
    """From the page to the file of an image."""
    path = os.path.join(found.folder, found.paths[row])
    try:
        path = os.path.relpath(path, found.made["out"])
    except ValueError:  # on another drive
        return Path(path).resolve().as_uri()
    return quote(os.fsencode(path.replace(os.sep, "/")), safe="/")


def _curve(loss: np.ndarray) -> str:
    """Points of an SVG line, 300 x 60, through the loss of each epoch."""
    height = (loss - loss.min()) / max(float(np.ptp(loss)), 1e-12)
    x = np.linspace(2, 298, len(loss))
    return " ".join(f"{a:.1f},{58 - 56 * b:.1f}" for a, b in zip(x, height, strict=True))


def _command(found) -> str:
    """What makes these clusters again in a shell: the command, or Python for other settings."""
    made, n_clusters, settings = found.made, found.probabilities.shape[1], found.made["settings"]
    own = {"backbone": made["backbone"], "n_neighbors": settings["n_neighbors"],
           "entropy_weight": settings["entropy_weight"], "seed": made["seed"], "out": made["out"]}
    others = {name: settings[name] for name, value in TSPClustering().get_params().items()
              if name not in (*own, "n_clusters", "random_state") and settings[name] != value}
    if others:
        call = ", ".join([repr(str(found.folder)), str(n_clusters)] + [
            f"{name}={value if isinstance(value, Number) else repr(str(value))}"
            for name, value in (own | others).items()])
        words = ["python", "-c", "from tsp_utils.folder.cluster_folder import cluster_folder; "
                                 f"cluster_folder({call})"]
    else:  # a path must not be taken for an option
        folder, own["out"] = (f"./{path}" if str(path).startswith("-") else str(path)
                              for path in (found.folder, made["out"]))
        words = ["python", "-m", "tsp_utils", "cluster", folder, "--n-clusters", n_clusters]
        for name, value in own.items():
            words += ["--" + name.replace("_", "-"), value]
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    """A word for the shell; a name that is no UTF-8 byte by byte, as bash and zsh read it."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"
    return shlex.quote(word)
