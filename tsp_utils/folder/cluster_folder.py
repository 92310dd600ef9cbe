"""A folder of images -> clusters.csv and report.html."""

import contextlib
import csv
import logging
import os
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from tsp_utils import cache
from tsp_utils.approximate import find_neighbors
from tsp_utils.datasets import ImageDataset
from tsp_utils.estimator import TSPClustering
from tsp_utils.features import cached_features
from tsp_utils.files.image_folders import (
    HEIF_SUFFIXES,
    IMAGE_SUFFIXES,
    LARGEST_ARRAY_PX,
    kinds_of,
    labels_from_folders,
    list_images,
    read_images,
    split_folders,
)
from tsp_utils.files.paths import cache_dir, without_empty, write_together
from tsp_utils.folder.choice import choose_backbone, usual_px
from tsp_utils.folder.readable_files import ReadableFiles
from tsp_utils.neighbors import Neighbors

logger = logging.getLogger(__name__)

ENOUGH = 50  # images a cluster, measured in notebook 09
FEWEST = 4  # images: Eq. 4 takes the distance to the third neighbour


@dataclass(frozen=True, eq=False)
class FolderClusters:
    """What the report shows: the images of a folder that could be read, and their clusters.

    paths relative to folder; features float32 [N, D]; clusters int64 [N]; probabilities [N, C];
    stability [N], the share of the heads' votes that put an image there; neighbors of the N images;
    labels int64 [N] and classes where the images lie in class folders; unreadable: path -> reason;
    notes: sentences for the reader; made: settings, versions, place of the results; changed: paths
    whose files are no longer what was clustered.
    """

    folder: Path
    paths: tuple[str, ...]
    features: np.ndarray
    clusters: np.ndarray
    probabilities: np.ndarray
    stability: np.ndarray
    neighbors: Neighbors
    history: dict[str, np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    unreadable: dict[str, str]
    notes: list[str] = field(default_factory=list)
    made: dict = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def told(self) -> list[str]:
        """The notes, and a sentence about what changed, if anything did."""
        return self.notes + ([
            f"{len(self.changed)} of {len(self.paths)} files changed or went away during the run "
            f"({_three(sorted(self.changed))}): they were clustered as they were when they were "
            f"read. Run it again."] if self.changed else [])


def cluster_folder(folder: str | Path, n_clusters: int, *, backbone: str = "auto",
                   out: str | Path | None = None, force: bool = False, seed: int = 0,
                   **settings) -> Path:
    """Cluster all images under a folder, whatever their sizes; returns the folder of the results.

    Writes clusters.csv (path, cluster, probability, stability) and report.html, both or none, into
    `out`, by default `clusters/<name of the folder>` under the working directory, or beside the
    folder where that lies in it. Unreadable files are skipped and listed, files that are no images
    counted by kind. backbone: a name, or "auto" (`choose_backbone`); settings go to
    `TSPClustering`.
    Raises FileNotFoundError for what is no folder, FileExistsError for results that are there
    without `force` or come from another run meanwhile, ValueError for too few images or too few
    that differ, OSError for an `out` that cannot be written; nothing of the images' folder is
    changed.
    """
    from tsp_utils.folder.page import folder_page

    folder, others = Path(folder).expanduser(), Counter()
    paths = list_images(folder, others)
    _check_number(folder, len(paths), n_clusters)
    out = results_folder(folder, out, seed)
    with _alone(out), without_empty(out):
        check_out(folder, out, force)
        before = {path: _stamp(folder / path) for path in paths}
        found = cluster_images(folder, paths, n_clusters, backbone, seed, **settings)
        if said := kinds_of(others):
            found.notes.append(f"Passed over, as junk or as what Pillow does not read: {said}.")
        found.made["out"] = str(out)
        found.changed.update(p for p in found.paths if before[p] != _stamp(folder / p))
        page = folder_page(found)
        for note in found.told():
            logger.warning(note)
        if not force:
            check_out(folder, out, force)  # another run may have written meanwhile
        write_results(found, page, out)
    return out


def results_folder(folder: Path, out: str | Path | None, seed: int) -> Path:
    """`out`, or its default. Raises ValueError for a seed that scikit-learn would refuse."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}: pass a whole number from 0 to {2**32 - 1:,}.")
    whole, here = folder.resolve(), Path.cwd()
    place = whole.parent if here.is_relative_to(whole) else Path()
    return Path(out).expanduser() if out else place / "clusters" / whole.name


def cluster_images(folder: Path, paths: list[str], n_clusters: int, backbone: str, seed: int,
                   **settings) -> FolderClusters:
    """Features (cached), heads and neighbours of a folder's images, with what there is to tell."""
    network, advice = choose_backbone(backbone, usual_px(folder, paths))
    features, files = features_of(network, folder, paths, n_clusters)
    readable = [path for path in paths if path not in files.unreadable]
    one_color = (f"{len(files.constant)} of {len(readable)} images are of one colour throughout "
                 f"({_three(sorted(files.constant))})")
    if 2 * len(files.constant) > len(readable) and (
            distinct := len(np.unique(features, axis=0))) < n_clusters:
        raise ValueError(f"{one_color}, which leaves too few that differ ({distinct}) for "
                         f"{n_clusters} clusters: replace or delete these files, or pass a smaller "
                         f"--n-clusters.")
    labels, classes = labels_from_folders(readable, ())
    notes = []
    if files.unreadable:
        notes.append(f"{len(files.unreadable)} of {len(paths)} files could not be read and were "
                     f"skipped; the end of the report names them.")
    if files.constant:
        notes.append(f"{one_color}: look at these files, and replace or delete them "
                     f"(docs/odd_inputs.md says how each kind is read).")
    if files.pages:
        pages = [f"{path} (page {page})" for path, page in sorted(files.pages.items())]
        notes.append(f"Of files with several pages the first that is not of one colour was taken: "
                     f"{_three(pages)}.")
    if splits := split_folders(readable):
        are = "are not" if labels is None else "are"
        notes.append(f"Folders named like the splits of a data set ({_three(splits)}) {are} taken "
                     f"as classes: pass one of them alone, if that is what you want clustered.")
    notes += advice
    if len(readable) < ENOUGH * n_clusters:
        notes.append(f"{len(readable)} images are about {len(readable) // n_clusters} a cluster: "
                     f"with fewer than about {ENOUGH} the heads were no better than K-means by "
                     f"NMI where we measured it (docs/your_own_images_measured.md).")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        model = TSPClustering(n_clusters, random_state=seed, **settings).fit(features)
    notes += [str(warning.message) for warning in told if warning.category is UserWarning]
    neighbors = find_neighbors(features, min(model.n_neighbors, len(features) - 1), model.metric,
                               search=model.neighbor_search)
    return FolderClusters(
        folder, tuple(readable), features, model.labels_, model.predict_proba(features),
        model.stability_, neighbors, model.history_, labels, classes, files.unreadable, notes,
        {"backbone": network.name, "weights": (network.describe()["weights_sha256"] or "none")[:16],
         "seed": seed, "settings": model.get_params() | {"random_state": seed},
         "rate": model.learning_rate_,
         "versions": cache.versions()})


def features_of(network, folder: Path, paths: list[str], n_clusters: int):
    """Features float32 [N, D] of the N images that can be read, and the `ReadableFiles`.

    Begins again where a file goes away meanwhile. Raises ValueError for too few images.
    """
    files = ReadableFiles(folder, paths)

    def readable() -> np.ndarray:
        files.look_at_all()
        kept = np.array([path not in files.unreadable for path in paths])
        _check_number(folder, int(kept.sum()), n_clusters, len(files.unreadable))
        return kept

    sizes = (max(image.shape[:2]) for path, image in zip(paths, files, strict=False)
             if path not in files.unreadable)  # known once the image was asked for
    if next(sizes, 0) <= LARGEST_ARRAY_PX:  # decoded at once, as `load_dataset` does it
        kept = readable()
        try:
            images = read_images(folder, [paths[i] for i in np.flatnonzero(kept)])
        except OSError:  # one went away since
            return features_of(network, folder, paths, n_clusters)
        if isinstance(images, np.ndarray):
            return np.asarray(cached_features(network, ImageDataset("", None, images))), files
    features = cached_features(network, ImageDataset("", None, files))  # decoded meanwhile
    return np.asarray(features[readable()]), files


def _three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_results(found: FolderClusters, page: str, out: Path) -> None:
    """The page and the table, a row an image: path, cluster, its probability, its stability."""
    table = pd.DataFrame({
        "path": [_written(path) for path in found.paths], "cluster": found.clusters,
        "probability": found.probabilities[np.arange(len(found.paths)), found.clusters].round(4),
        "stability": found.stability.round(4)})
    quoting = csv.QUOTE_NONNUMERIC if table["path"].str.contains("\r").any() else csv.QUOTE_MINIMAL
    write_together({
        out / "clusters.csv": table.to_csv(index=False, quoting=quoting).encode(),
        out / "report.html": page.encode("utf-8", "backslashreplace")})


def _written(path: str) -> str:
    """A path as clusters.csv has it, in UTF-8 and such that `path_of` gives it back.

    What a spreadsheet or pandas could take for a formula, a number or nothing begins with "./".
    """
    if path.startswith("file:") or any("\ud800" <= letter <= "\udfff" for letter in path):
        return "file:" + quote(os.fsencode(path))
    known = path.lower().endswith(HEIF_SUFFIXES + IMAGE_SUFFIXES)
    return path if known and path[0] not in "=+-@\t\r\n" else f"./{path}"


def path_of(written: str) -> str:
    """The path, relative to the folder of the images, that a row of clusters.csv is about."""
    if written.startswith("file:"):  # a name that is no UTF-8, byte by byte
        return os.fsdecode(unquote_to_bytes(written[5:]))
    return written.removeprefix("./")


@contextlib.contextmanager
def _alone(out: Path):
    """Refuse a second run into one folder; the system frees the lock of a killed one."""
    lock = FileLock(cache_dir() / "files" / f"{cache.hash_of(str(out.resolve()))}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"Another run writes into {out}: wait for it, or pass another folder "
                              f"as --out.") from None
    except OSError:
        pass  # no cache to write in: found out later
    try:
        yield
    finally:
        lock.release()


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells that a file was changed; None for one that is gone."""
    with contextlib.suppress(OSError):
        there = path.stat()
        return there.st_mtime_ns, there.st_size
    return None


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


def check_out(folder: Path, out: Path, force: bool,
              names: tuple[str, ...] = ("clusters.csv", "report.html")) -> None:
    """Make `out`; refuse results that are there and folders that cannot be written.

    Raises ValueError (out lies among the images), FileExistsError, OSError. `out` may then be left
    empty: whoever called it removes it.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in the folder of the images, which is not to be changed: "
                         f"pass another folder as --out.")
    for path in (out / name for name in names):
        if os.path.isdir(path):
            raise FileExistsError(f"{path} is a folder, where a file would be written: pass "
                                  f"another folder as --out.")
        if not force and os.path.lexists(path):  # a link that leads nowhere is somebody's, too
            raise FileExistsError(f"{path} is there already: pass --force to replace it, or "
                                  f"another folder as --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # under a name that nobody has
            pass
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error.strerror}): pass another folder as "
                      f"--out.") from None
