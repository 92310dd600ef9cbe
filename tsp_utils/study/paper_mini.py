"""The paper's central row stage by stage: TSP-ViT1 on CIFAR-10, and where ours departs, if it does.

A stage is a gate: what is expected, what came, whether it passes and what that means. What a stage
made is in the cache, so that the same command goes on where it stopped.
"""

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from tsp_utils import datasets
from tsp_utils.backbones import load_backbone
from tsp_utils.cache import hardware, versions
from tsp_utils.devices import find_device
from tsp_utils.files.paths import data_dir, write_json
from tsp_utils.neighbors import knn_accuracy, label_consistency, nearest_neighbors
from tsp_utils.networks.weights import file_sha256
from tsp_utils.study.against_paper import ROWS, welch_interval
from tsp_utils.study.parity import TOLERANCE, departure, seeded_backbone
from tsp_utils.study.profile import Study, load_study
from tsp_utils.study.published import DATASETS, TABLE_1

# Percent of all of CIFAR-10, by the bundled dictionary of patches; DINO's should lie above.
FLOORS = {"k-NN": 65.0, "label consistency": 34.5}


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

    Ends after the first gate that does not pass, unless it is to go on. Raises ValueError where the
    paper has no such row, ConnectionError (no download), OSError (a damaged file, a full disk).
    """
    study = load_study(f"paper-mini {overrides}")
    dataset, backbone = study.datasets[0], study.default_backbone
    if dataset not in DATASETS or backbone not in ROWS["K-means"]:
        raise ValueError(f"The paper's rows are of {', '.join(DATASETS)} under dino_vits16, and "
                         f"these are {dataset}, {backbone}; leave datasets and backbones out.")
    gates, start = [], time.perf_counter()
    for gate in _stages(study, dataset, backbone):
        gates.append(replace(gate, seconds=round(time.perf_counter() - start, 1)))
        write_json(study.run_dir / "paper_mini.json", {
            "profile": study.profile, "gates": [asdict(gate) for gate in gates],
            "versions": versions(), "machine": platform.platform(), "device": find_device(),
            "hardware": hardware(find_device())}, indent=1)
        yield gates[-1]
        if gate.passed is False and not go_on:
            return
        start = time.perf_counter()


def _stages(study: Study, dataset: str, backbone: str) -> Iterator[Gate]:
    """Every stage in its order, run when its gate is asked for."""
    network = load_backbone(backbone)  # downloads, and refuses by name what does not fit
    path = data_dir() / "weights" / network.spec.file
    yield Gate("weights", "the official file, every name and shape",
               f"{path.name}, {len(network.model.state_dict())} tensors, "
               f"SHA-256 {file_sha256(path)[:16]}",
               True, "DINO publishes no hash: compare these digits with others' runs")

    largest = max(map(partial(departure, seeded_backbone(backbone)), (32, 224)))
    yield Gate("forward parity", f"the official code's features to {TOLERANCE:g}",
               f"{largest:.1e}, seeded weights, four images of 32 and of 224 px, float32, cpu",
               largest < TOLERANCE, "network, resize, normalisation and pooling are the official")

    test, train = (study.features(dataset, backbone, split) for split in ("test", "train"))
    published = datasets.DATASETS[dataset].splits
    wanted = sum(min(n, study.n_images or n) for n in (published["test"], published["train"]))
    norms = np.concatenate([np.linalg.norm(part.features, axis=1) for part in (test, train)])
    yield Gate("features", f"{wanted:,} vectors, one an image, none of length 0",
               f"{len(norms):,} x {test.features.shape[1]}, lengths {norms.min():.1f} to "
               f"{norms.max():.1f}, {network.dtype}",
               len(norms[norms > 0]) == wanted, "all were seen; kept: another run begins here")

    judged = dataset == "cifar10" and study.n_images is None  # fewer images, farther neighbours
    for stage, measure, means in (
            ("k-NN", lambda: knn_accuracy(train.features, train.labels, test.features, test.labels),
             "high where weights and labels are right"),
            ("label consistency", lambda: label_consistency(
                nearest_neighbors(test.features, 20, "inner"), test.labels)[-1],
             "nearest of the same label: Fig. 1")):
        found = 100 * measure()
        yield Gate(stage, f"above {FLOORS[stage]} %, our floor: nothing is published" if judged
                   else "nothing is published, and our floor is of all of CIFAR-10",
                   f"{found:.1f} %", bool(found > FLOORS[stage]) if judged else None, means)

    for protocol, stage in product(("split", "all"), ("K-means", "head")):
        run = replace(study, protocol=protocol)
        table = (run.kmeans_table(dataset, backbone) if stage == "K-means" else
                 run.train(dataset, backbone).table)
        ours = table.query("scored == 'test' and method == @stage.lower()")["acc"]
        name = ROWS[stage][backbone]
        (paper,) = (row for row in TABLE_1 if (row.method, row.dataset) == (name, dataset))
        difference, low, high = welch_interval(
            ours.mean(), ours.std(), len(ours), paper.acc, paper.acc_std, paper.n)
        yield Gate(f"{stage}, {protocol}", f"{paper.acc} +- {paper.acc_std} ACC ({name}, n = 10)",
                   f"{ours.mean():.1f} +- {ours.std():.1f}, n = {len(ours)}; ours less the "
                   f"paper's {difference:+.1f} [{low:+.1f}, {high:+.1f}]",
                   None if len(ours) < 2 else not (low > 1 or high < -1),
                   "passes unless the 95 % Welch interval lies wholly beyond one point" + (
                       "; of which backbone its row is the paper does not say"
                       * (stage == "K-means")))
