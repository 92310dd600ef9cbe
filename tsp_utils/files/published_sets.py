"""The data sets that have a name: what is published about each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """What is published about a set: images a split, its source, the names of its classes."""

    splits: dict[str, int]
    source: str
    classes: tuple[str, ...] = ()  # in label order; empty: read from the files
    torchvision: str | None = None  # torchvision's class of this set; None: image folder only


CIFAR_SOURCE = "Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html; no licence stated"
DATASETS = {
    "fashion-mnist": DatasetInfo(
        {"train": 60_000, "test": 10_000},
        "Xiao et al. (2017), https://github.com/zalandoresearch/fashion-mnist; MIT",
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
         "Bag", "Ankle boot"),
        "FashionMNIST",
    ),
    "digits": DatasetInfo(
        {"test": 1_797},
        "Alpaydin and Kaynak (1998), the test part, 8 px, as it comes with scikit-learn; CC BY 4.0",
        tuple("0123456789"),
    ),
    "cifar10": DatasetInfo(
        {"train": 50_000, "test": 10_000}, CIFAR_SOURCE,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "CIFAR10",
    ),
    "cifar100": DatasetInfo(
        {"train": 50_000, "test": 10_000}, CIFAR_SOURCE, torchvision="CIFAR100"),
    "cifar100-20": DatasetInfo(
        {"train": 50_000, "test": 10_000}, CIFAR_SOURCE + "; the 20 superclasses",
        torchvision="CIFAR100"),
    "stl10": DatasetInfo(
        {"train": 5_000, "test": 8_000, "unlabeled": 100_000},
        "Coates et al. (2011), https://cs.stanford.edu/~acoates/stl10/; drawn from ImageNet, "
        "no licence stated",
        ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        "STL10",
    ),
    "tinyimagenet32": DatasetInfo(
        {"train": 100_000, "val": 10_000},
        "Tiny-ImageNet-200 (Stanford CS231n) at 32 px, http://cs231n.stanford.edu/; "
        "ImageNet's terms: research only",
    ),
}  # fmt: skip
