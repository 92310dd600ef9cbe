"""Data sets in their published files, as torchvision fetches and reads them."""

import errno
import gzip
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np

from tsp_utils.files.paths import check_reachable, without_empty


def read_published(name: str, kind: str, split: str, root: Path, download: bool):
    """Images, labels and class names of one split of torchvision's data set `kind`, under `root`.

    Returns uint8 [N,H,W,C], int64 [N] or None (unlabeled), and a tuple, empty where the files name
    no classes. Raises FileNotFoundError (not there, and not to be downloaded), ConnectionError (no
    download), OSError (a corrupt file, named).
    """
    import torchvision.datasets

    source = getattr(torchvision.datasets, kind)
    checksums = published_files(kind, split)
    with without_empty(root):
        _fetch(name, source, root, list(checksums), download)
    if kind == "FashionMNIST":
        return *read_idx_pair(root / kind / "raw", split), ()
    folder = root / source.base_folder
    try:
        data = source(root, split=split) if kind == "STL10" else source(root, split == "train")
    except Exception as error:  # torchvision does not say which file
        check = torchvision.datasets.utils.check_integrity
        bad = [Path(f).name for f, md5 in checksums.items() if not check(root / f, md5)]
        raise OSError(f"{', '.join(bad) or name} in {folder} is corrupt (not the published "
                      f"checksum): delete it and load {name} again to fetch it anew.") from error
    if kind == "STL10":
        labels = None if split == "unlabeled" else data.labels.astype(np.int64)
        return data.data.transpose(0, 2, 3, 1), labels, ()
    labels, classes = data.targets, data.classes
    if name == "cifar100-20":  # torchvision has just checked these pickles' checksums
        labels = pickle.loads((folder / split).read_bytes(), encoding="latin1")["coarse_labels"]
        meta = pickle.loads((folder / "meta").read_bytes(), encoding="latin1")
        classes = meta["coarse_label_names"]
    images = np.ascontiguousarray(data.data)  # torchvision's is a view in another order
    return images, np.array(labels, dtype=np.int64), tuple(classes)


def published_files(kind: str, split: str) -> dict[str, str | None]:
    """Name under the root -> MD5 of the files that a split of torchvision's `kind` is read from.

    FashionMNIST's, which may also end in .gz, have none once unpacked: `_read_idx` is stricter.
    """
    import torchvision.datasets

    if kind == "FashionMNIST":
        return {f"{kind}/raw/{file}": None for file in _idx_files(split)}
    source = getattr(torchvision.datasets, kind)
    checksums = dict(source.train_list + source.test_list)
    if kind != "STL10":
        checksums[source.meta["filename"]] = source.meta["md5"]
    return {f"{source.base_folder}/{file}": md5 for file, md5 in checksums.items()}


def _fetch(name: str, source, root: Path, files: list[str], download: bool):
    """Complete `files` under `root` from an archive there or a download; a failure leaves none."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    if all((root / f).exists() or (root / f"{f}.gz").exists() for f in files):
        return
    if hasattr(source, "filename"):
        archive, packed = root / source.filename, (root / source.filename).exists()
        by_hand = f"put {source.filename} from {source.url} into {root}"
    else:  # single files
        archive, packed = root, False
        by_hand = f"put {files[0]}.gz and {files[1]}.gz from {source.mirrors[0]} into {root}"
    if packed and not check_integrity(archive, source.tgz_md5):
        raise OSError(f"{archive} is corrupt or incomplete: delete it and load {name} again.")
    if not packed and not download:
        raise FileNotFoundError(f"{name} is not in {root}: pass download=True, or {by_hand}.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as staging:
            if packed:
                extract_archive(str(archive), staging)
            else:
                check_reachable(*getattr(source, "mirrors", [getattr(source, "url", "")]))
                source(staging, download=True)
            for path in Path(staging).rglob("*"):
                target = root / path.relative_to(staging)
                if path.is_file() and path.suffix != ".gz" and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
    except Exception as error:  # URLError, HTTPException, RuntimeError, TarError, OSError ...
        refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
        if getattr(error, "errno", None) in refused:
            raise OSError(f"Cannot write {name} into {root} ({getattr(error, 'strerror', error)}): "
                          f"set TSP_DATA or pass root= to a folder that can be written.") from error
        raise ConnectionError(f"Could not fetch {name} ({' '.join(str(error).split())}): check the "
                              f"network and the free space, or {by_hand} and load it again."
                              ) from error


def read_idx_pair(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,H,W,1] and labels int64 [N] from a folder of MNIST's files, plain or .gz.

    Raises FileNotFoundError and OSError naming a file that is missing or corrupt.
    """
    images, labels = (_read_idx(folder / file) for file in _idx_files(split))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise OSError(f"The images and labels of {split} in {folder} do not match: replace them.")
    return images[..., None], labels.astype(np.int64)


def _idx_files(split: str) -> list[str]:
    prefix = "train" if split == "train" else "t10k"
    return [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]


def _read_idx(path: Path) -> np.ndarray:
    """A file in MNIST's format, plain or .gz: magic, sizes (big-endian int32), then uint8."""
    path = path if path.exists() else path.with_name(path.name + ".gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        n_dims = data[3]
        shape = np.frombuffer(data, ">i4", n_dims, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * n_dims).reshape(shape).copy()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: put it there again.") from None
    except Exception as error:  # gzip, zlib, struct and numpy each raise their own
        raise OSError(f"{path} is corrupt ({error}): replace or delete it.") from error


