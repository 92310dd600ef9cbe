"""A folder of images -> clusters.csv and report.html."""

import logging
import os
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from tsp_utils import cache
from tsp_utils.backbones import load_backbone
from tsp_utils.datasets import ImageDataset
from tsp_utils.estimator import TSPClustering
from tsp_utils.features import cached_features
from tsp_utils.image_folders import (
    LARGEST_ARRAY_PX,
    ImageFiles,
    ReadableFiles,
    kinds_of,
    labels_from_folders,
    list_images,
    read_images,
    split_folders,
)
from tsp_utils.neighbors import Neighbors, nearest_neighbors
from tsp_utils.paths import write_whole

logger = logging.getLogger(__name__)

ENOUGH = 50  # images a cluster, measured in notebook 09
FEWEST = 4  # images: Eq. 4 takes the distance to the third neighbour
SMALL_PX = 64  # a backbone that sees no more than this wastes what a photo shows


@dataclass(frozen=True, eq=False)
class FolderClusters:
    """What the report shows: the images of a folder that could be read, and their clusters.

    paths relative to folder; features float32 [N, D]; clusters int64 [N]; probabilities [N, C];
    neighbors of the N images; labels int64 [N] and classes where the images lie in class folders;
    unreadable: path -> reason; notes: sentences for the reader; made: settings, versions, seconds.
    """

    folder: Path
    paths: tuple[str, ...]
    features: np.ndarray
    clusters: np.ndarray
    probabilities: np.ndarray
    neighbors: Neighbors
    history: dict[str, np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    unreadable: dict[str, str]
    notes: list[str] = field(default_factory=list)
    made: dict = field(default_factory=dict)


def cluster_folder(folder: str | Path, n_clusters: int, *, backbone: str = "patch_kmeans",
                   out: str | Path | None = None, force: bool = False, seed: int = 0,
                   **settings) -> Path:
    """Cluster all images under a folder, whatever their sizes; returns the folder of the results.

    Writes clusters.csv (path, cluster, probability) and report.html into `out`, by default
    `clusters/<name of the folder>` under the working directory. Unreadable files are skipped and
    listed, files that are no images counted by kind. settings go to `TSPClustering`.
    Raises FileNotFoundError for what is no folder, FileExistsError for results that are there
    without `force`, ValueError for too few images or too few that differ, OSError for an `out` that
    cannot be written; nothing of the images' folder is changed.
    """
    from tsp_utils.folder.page import folder_page

    folder = Path(folder).expanduser()
    others = Counter()
    paths = list_images(folder, others)
    _check_number(folder, len(paths), n_clusters)
    out = Path(out).expanduser() if out else Path("clusters") / folder.resolve().name
    if seed < 0:
        raise ValueError(f"The seed is {seed}: pass 0 or more.")
    made_here = _check_out(folder, out, force)
    try:
        passed = f"Passed over, as junk or as what Pillow does not read: {kinds_of(others)}."
        if kinds_of(others):
            logger.warning(passed)
        found = cluster_images(folder, paths, n_clusters, backbone, seed, **settings)
        if kinds_of(others):
            found.notes.append(passed)
        found.made["out"] = str(out)
        write_csv(found, out / "clusters.csv")
        page = folder_page(found).encode("utf-8", "backslashreplace")
        write_whole(out / "report.html", lambda file: file.write(page))
    except BaseException:
        _remove_empty(made_here)
        raise
    return out


def cluster_images(folder: Path, paths: list[str], n_clusters: int, backbone: str, seed: int,
                   **settings) -> FolderClusters:
    """Features (cached), heads and neighbours of a folder's images, with what there is to tell."""
    start = time.perf_counter()
    network = load_backbone(backbone)
    features, told = _features(network, folder, paths, n_clusters)
    unreadable = told["unreadable"]
    readable = [path for path in paths if path not in unreadable]
    notes = [f"{len(unreadable)} of {len(paths)} files could not be read and were skipped; the "
             f"end of the report names them."] if unreadable else []
    notes += _about_files(told, readable)
    if 2 * len(told["constant"]) > len(readable) and (
            distinct := len(np.unique(features, axis=0))) < n_clusters:
        raise ValueError(f"{_of_one_color(told, readable)}, which leaves too few that differ "
                         f"({distinct}) for {n_clusters} clusters: replace or delete these files, "
                         f"or pass a smaller --n-clusters.")
    notes += _advice(network, ImageFiles(folder, readable))
    if len(readable) < ENOUGH * n_clusters:
        notes.append(f"{len(readable)} images are about {len(readable) // n_clusters} a cluster: "
                     f"with fewer than about {ENOUGH} the head was no better than K-means where "
                     f"we measured it (docs/your_own_images.md).")
    extracted = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        model = TSPClustering(n_clusters, random_state=seed, **settings).fit(features)
    notes += [str(warning.message) for warning in told if warning.category is UserWarning]
    for note in notes:
        logger.warning(note)
    neighbors = nearest_neighbors(features, min(model.n_neighbors, len(features) - 1), model.metric)
    labels, classes = labels_from_folders(readable, ())
    return FolderClusters(
        folder, tuple(readable), features, model.labels_, model.predict_proba(features), neighbors,
        model.history_, labels, classes, unreadable, notes,
        {"backbone": backbone, "weights": (network.describe()["weights_sha256"] or "none")[:16],
         "seed": seed, "settings": model.get_params() | {"random_state": seed},
         "seconds": {"features": round(extracted - start, 1),
                     "clusters": round(time.perf_counter() - extracted, 1)},
         "versions": cache.versions()})


def _features(network, folder: Path, paths: list[str], n_clusters: int):
    """Features float32 of the images that can be read, and what was found out about the files:

    {"unreadable": path -> reason, "constant": paths, "pages": path -> page taken}.
    """
    files, name = ReadableFiles(folder, paths), folder.resolve().name
    sizes = (max(image.shape[:2]) for path, image in zip(paths, files, strict=False)
             if path not in files.unreadable)  # known once the image was asked for

    def told() -> dict:  # features from the cache have not seen every file
        for i in set(range(len(paths))) - files.seen:
            files[i]
        return {"unreadable": files.unreadable, "constant": sorted(files.constant),
                "pages": files.pages}

    if next(sizes, 0) <= LARGEST_ARRAY_PX:  # decoded at once, as `load_dataset` does it
        found = told()
        readable = [path for path in paths if path not in files.unreadable]
        _check_number(folder, len(readable), n_clusters, len(files.unreadable))
        images = read_images(folder, readable)
        return np.asarray(cached_features(network, ImageDataset(name, None, images))), found
    dataset = ImageDataset(name, None, files)  # photos: decoded while the network computes
    features = cached_features(network, dataset)
    found = cache.record("files", name, dataset.fingerprint, [ReadableFiles], told)
    kept = np.array([path not in found["unreadable"] for path in paths])
    _check_number(folder, int(kept.sum()), n_clusters, len(found["unreadable"]))
    return np.asarray(features[kept]), found


def _about_files(told: dict, readable: list[str]) -> list[str]:
    """Sentences about files that may not be what they were meant to be, and folders likewise."""
    notes = []
    if told["constant"]:
        notes.append(f"{_of_one_color(told, readable)}: look at these files, and replace or delete "
                     f"them (docs/your_own_images.md says how each kind is read).")
    if told["pages"]:
        pages = [f"{path} ({page})" for path, page in sorted(told["pages"].items())]
        notes.append(f"Of files with several pages the first that is not of one colour was taken: "
                     f"{_three(pages)}.")
    if splits := split_folders(readable):
        are = "are not" if labels_from_folders(readable, ())[0] is None else "are"
        notes.append(f"Folders named like the splits of a data set ({_three(splits)}) {are} taken "
                     f"as classes: pass one of them alone, if that is what you want clustered.")
    return notes


def _of_one_color(told: dict, readable: list[str]) -> str:
    return (f"{len(told['constant'])} of {len(readable)} images are of one colour throughout "
            f"({_three(told['constant'])})")


def _three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_csv(found: FolderClusters, path: Path) -> None:
    """One row an image: path, cluster, probability of that cluster."""
    table = pd.DataFrame({
        "path": found.paths, "cluster": found.clusters,
        "probability": found.probabilities[np.arange(len(found.paths)), found.clusters].round(4)})
    content = table.to_csv(index=False).encode("utf-8", "surrogateescape")  # names as they are
    write_whole(path, lambda file: file.write(content))


def _check_number(folder: Path, n: int, n_clusters: int, n_unreadable: int = 0) -> None:
    what = "image" if n == 1 else "images"
    what = f"readable {what} ({n_unreadable} could not be read)" if n_unreadable else what
    if n < FEWEST:
        raise ValueError(f"{folder} holds {n} {what}, and clustering needs at least {FEWEST}: "
                         f"pass a folder with more.")
    if n_clusters < 2:
        raise ValueError(f"--n-clusters is {n_clusters}, which leaves nothing to tell apart: pass "
                         f"2 or more.")
    if n < n_clusters:
        raise ValueError(f"{folder} holds {n} {what}, which cannot make {n_clusters} clusters: "
                         f"pass at most {n} as --n-clusters.")


def _check_out(folder: Path, out: Path, force: bool) -> list[Path]:
    """Refuse results that are there and folders that cannot be written, before any work."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in the folder of the images, which is not to be changed: "
                         f"pass another folder as --out.")
    there = [out / name for name in ("clusters.csv", "report.html")
             if os.path.lexists(out / name)]  # a link that leads nowhere is somebody's, too
    for path in there:
        if path.is_dir():
            raise FileExistsError(f"{path} is a folder, where a file would be written: pass "
                                  f"another folder as --out.")
        if not force:
            raise FileExistsError(f"{path} is there already: pass --force to replace it, or "
                                  f"another folder as --out.")
    new = [path for path in (out, *out.parents) if not os.path.exists(path)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # under a name that nobody has
            pass
    except OSError as error:
        _remove_empty(new)
        raise OSError(f"{out} cannot be written ({error.strerror}): pass another folder as "
                      f"--out.") from None
    return new


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made here, the inner one first, where they are still empty."""
    for folder in folders:
        if os.path.isdir(folder) and not any(folder.iterdir()):
            folder.rmdir()


def _advice(network, images: ImageFiles) -> list[str]:
    """One sentence where photos are shown to a backbone that was made for small images."""
    size = network.spec.input_size
    if size is None or size > SMALL_PX:
        return []
    some = [max(images[i].shape[:2]) for i in range(0, len(images), max(1, len(images) // 20))]
    if np.median(some) <= SMALL_PX:
        return []
    return [f"These images are about {int(np.median(some))} px wide and {network.name} sees "
            f"{size} px of them: --backbone dino_vits16 serves photos better (it downloads 85 MB "
            f"once)."]
