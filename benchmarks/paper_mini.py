"""What `paper-mini` costs, and what bfloat16 changes: the tables of docs/paper_mini.md.

python -m benchmarks.paper_mini, in the repository; `bf16` alone where TSP_DATA has CIFAR-10.
"""

import sys
import time

import numpy as np
import torch

from benchmarks.bench import machine
from tsp_utils.backbones import Backbone, load_backbone
from tsp_utils.features import extract_features
from tsp_utils.neighbors import knn_accuracy, label_consistency, nearest_neighbors
from tsp_utils.study.feature_sets import load_images
from tsp_utils.study.parity import seeded_backbone

TRAINED = ("vit_nano_cpu", "resnet_nano_cpu")  # the bundled networks, of both kinds
K = 20


def speeds(n_images=None, rounds: int = 8) -> list[str]:
    """Images a second of both official ViTs, from bytes of 32 px to vectors, seeded weights.

    By the clock, the best of short runs, and by processor time, which other programs hardly change:
    what one thread would do with a core for itself.
    """
    rows = []
    for name, n in (n_images or {"dino_vits16": 16, "dino_vitb16": 8}).items():
        network = seeded_backbone(name)
        images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8)
        for dtype in (torch.float32, torch.bfloat16):
            backbone = Backbone(network.spec, network.model, network.device, dtype)
            extract_features(backbone, images, progress=False)  # warms up
            taken = []
            for _ in range(rounds):
                start, busy = time.perf_counter(), time.process_time()
                extract_features(backbone, images, progress=False)
                taken.append((time.perf_counter() - start, time.process_time() - busy))
            rate, by_core = (n / best for best in np.min(taken, 0))
            rows.append(f"| {name} | {str(dtype).removeprefix('torch.')} | {rate:.1f} | "
                        f"{by_core:.1f} | {60_000 / by_core / 60:.0f} min |")
    return rows


def bf16_against_float32(name: str, train, test) -> dict[str, float]:
    """What bfloat16 (autocast, as `load_backbone` has it) changes for two labelled `ImageDataset`s.

    All in percent: kNN accuracy and label consistency in float32, and bfloat16's less these; the
    share of the 20 nearest that are the same; the largest and the mean |b - a| / |a|.
    """
    found = {}
    for dtype in ("float32", "bfloat16"):
        backbone = load_backbone(name, "cpu", dtype=dtype)
        a, b = (extract_features(backbone, part.images, progress=False) for part in (train, test))
        found[dtype] = dict(
            features=b, knn=knn_accuracy(a, train.labels, b, test.labels),
            consistency=label_consistency(nearest_neighbors(b, K, "inner"), test.labels)[-1],
            nearest=nearest_neighbors(b, K).indices)
    one, two = found["float32"], found["bfloat16"]
    same = np.mean([len(np.intersect1d(*pair)) / K
                    for pair in zip(one["nearest"], two["nearest"], strict=True)])
    gaps = np.linalg.norm(two["features"] - one["features"], axis=1)
    gaps /= np.linalg.norm(one["features"], axis=1)
    found = {"knn_float32": one["knn"], "knn": two["knn"] - one["knn"], "same": same,
             "consistency_float32": one["consistency"],
             "consistency": two["consistency"] - one["consistency"],
             "largest": gaps.max(), "mean": gaps.mean()}
    return {name: 100 * float(value) for name, value in found.items()}


def main(parts=("speeds", "bf16")) -> None:
    print(f"{machine()} {torch.get_num_threads()} threads\n")
    if "speeds" in parts:
        print("| network | dtype | images/s | by processor time | 60,000 images on a core |\n"
              + "|---" * 5 + "|\n" + "\n".join(speeds()) + "\n")
    if "bf16" in parts:
        train, test = (load_images("cifar10", split, 10_000) for split in ("train", "test"))
        for name in TRAINED:
            print(name, {key: round(value, 4) for key, value in
                         bf16_against_float32(name, train, test).items()})


if __name__ == "__main__":
    main(sys.argv[1:] or ("speeds", "bf16"))
