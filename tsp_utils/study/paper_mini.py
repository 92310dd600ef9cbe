"""The paper's central row stage by stage: TSP-ViT1 on CIFAR-10, and where ours departs, if it does.

A stage is a gate: what is expected, what came, whether it passes and what that means. What a stage
made is in the cache, so that the same command goes on where it stopped.
"""

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from tsp_utils.backbones import load_backbone
from tsp_utils.cache import versions
from tsp_utils.devices import find_device, hardware
from tsp_utils.neighbors import knn_accuracy, label_consistency, nearest_neighbors
from tsp_utils.paths import data_dir, write_json
from tsp_utils.study.against_paper import ROWS, welch_interval
from tsp_utils.study.parity import TOLERANCE, departure, seeded_backbone
from tsp_utils.study.profile import Study, load_study
from tsp_utils.study.published import DATASETS, TABLE_1
from tsp_utils.weights import file_sha256


@dataclass(frozen=True)
class Gate:
    """One stage; passed is None where nothing is published to hold it against."""

    stage: str
    expected: str
    came: str
    passed: bool | None
    means: str
    seconds: float = 0.0


def paper_mini(overrides: str = "", go_on: bool = False) -> Iterator[Gate]:
    """Run the stages; yields each gate, and writes all so far to paper_mini.json in the run folder.

    Ends after the first gate that does not pass, unless it is to go on. Raises ValueError where
    the paper has no row for the data set and the backbone, and what the stages raise:
    ConnectionError for a failed download, OSError for a damaged file or a full disk.
    """
    study = load_study(f"paper-mini {overrides}")
    dataset, backbone = study.datasets[0], study.default_backbone
    if dataset not in DATASETS or backbone not in ROWS["K-means"]:
        raise ValueError(f"The paper's K-means and head rows are of {', '.join(DATASETS)} under "
                         f"{', '.join(ROWS['K-means'])}, and these are {dataset} under "
                         f"{backbone}; leave datasets and backbones out.")
    gates: list[Gate] = []
    for stage in (file_of_weights, forward_parity, features, knn, consistency,
                  *(partial(row_of_table_1, protocol=protocol, stage=name)
                    for protocol in ("split", "all") for name in ("K-means", "head"))):
        start = time.perf_counter()
        gate = stage(study, dataset, backbone)
        gates.append(replace(gate, seconds=round(time.perf_counter() - start, 1)))
        write_json(study.run_dir / "paper_mini.json", {
            "profile": study.profile, "gates": [asdict(gate) for gate in gates],
            "versions": versions(), "machine": platform.platform(), "device": find_device(),
            "hardware": hardware(find_device())}, indent=1)
        yield gates[-1]
        if gate.passed is False and not go_on:
            return


def file_of_weights(study: Study, dataset: str, backbone: str) -> Gate:
    network = load_backbone(backbone)  # downloads, and refuses by name what does not fit
    path = data_dir() / "weights" / network.spec.file
    return Gate("weights", "the official file, every name and shape",
                f"{path.name}, {len(network.model.state_dict())} tensors, "
                f"SHA-256 {file_sha256(path)[:16]}",
                True, "DINO publishes no hash: compare these digits with others' runs")


def forward_parity(study: Study, dataset: str, backbone: str) -> Gate:
    largest = max(departure(seeded_backbone(backbone), side) for side in (32, 224))
    return Gate("forward parity", f"the official code's features to {TOLERANCE:g}",
                f"{largest:.1e}, seeded weights, four images of 32 and of 224 px, float32, cpu",
                largest < TOLERANCE, "network, resize, normalisation and pooling are the official")


def features(study: Study, dataset: str, backbone: str) -> Gate:
    found = {split: study.features(dataset, backbone, split) for split in ("test", "train")}
    wanted = {split: len(study.images(dataset, split)) for split in found}
    norms = np.concatenate([np.linalg.norm(part.features, axis=1) for part in found.values()])
    same = all(len(part.features) == wanted[split] for split, part in found.items())
    dtype = load_backbone(backbone).describe()["dtype"]
    return Gate("features", "one vector an image, none of length 0",
                f"{len(norms):,} x {found['test'].features.shape[1]} in {dtype}, lengths "
                f"{norms.min():.1f} to {norms.max():.1f}", same and bool(norms.min() > 0),
                "kept: another run begins here")


def knn(study: Study, dataset: str, backbone: str) -> Gate:
    train, test = (study.features(dataset, backbone, split) for split in ("train", "test"))
    accuracy = 100 * knn_accuracy(train.features, train.labels, test.features, test.labels)
    return Gate("k-NN", f"nothing is published for {dataset}", f"{accuracy:.1f} %", None,
                "labels vote here and nowhere else; K = 20, temperature 0.07")


def consistency(study: Study, dataset: str, backbone: str) -> Gate:
    test = study.features(dataset, backbone)
    found = nearest_neighbors(test.features, 20, "inner")
    share = 100 * label_consistency(found, test.labels)[-1]
    return Gate("label consistency", "Fig. 1 draws it without numbers", f"{share:.1f} %, K = 20",
                None, "how often a neighbour, by inner product, has the image's label")


def row_of_table_1(study: Study, dataset: str, backbone: str, protocol: str, stage: str) -> Gate:
    table = replace(study, protocol=protocol).train(dataset, backbone).table
    table = table[table["method"].str.lower() == stage.lower()]
    ours = table[table["scored"] == "test"]["acc"]
    name = ROWS[stage][backbone]
    (paper,) = (row for row in TABLE_1 if (row.method, row.dataset) == (name, dataset))
    difference, low, high = welch_interval(
        ours.mean(), ours.std(), len(ours), paper.acc, paper.acc_std, paper.n)
    return Gate(f"{stage}, {protocol}", f"{paper.acc} +- {paper.acc_std} ACC ({name}, n = 10)",
                f"{ours.mean():.1f} +- {ours.std():.1f}, n = {len(ours)}; ours less the paper's "
                f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]",
                None if len(ours) < 2 else not (low > 1 or high < -1),
                "passes unless the 95 % Welch interval lies wholly beyond one point"
                + "; of which backbone its K-means is the paper does not say" * (
                    stage == "K-means"))
