"""`load_backbone`: a frozen network with its transform, by the name it has in the registry."""

import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tsp_utils.devices import find_device, gains_from_bf16
from tsp_utils.networks.registry import BACKBONES as BACKBONES
from tsp_utils.networks.registry import find_spec
from tsp_utils.networks.weights import OF_PATCHES, BackboneSpec, load_model, state_sha256


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


def load_backbone(name: str | BackboneSpec, device: str = "auto",
                  checkpoint: str | os.PathLike | None = None, dtype: str = "auto") -> Backbone:
    """Load a backbone of the table, or any `timm:<name>`, frozen and ready to call.

    A finished arm of `python -m experiments pretrain` loads by its name, too, and so does a row
    made by hand, a `BackboneSpec`. checkpoint: a file to take the weights from instead: a bare
    state dict or a full DINO checkpoint (.pth; its teacher is taken), or .safetensors. device:
    auto, cuda, cuda:N, mps or cpu. dtype: float32, bfloat16 (autocast), or auto: bfloat16 where the
    hardware gains from it.
    Raises ValueError for an unknown name, device or dtype and for weights that do not fit,
    FileNotFoundError for a missing file, ConnectionError for a failed download.
    """
    spec = name if isinstance(name, BackboneSpec) else find_spec(name)
    place = torch.device(find_device(device, mps=True))
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"unknown dtype {dtype!r}: pass auto, float32 or bfloat16")
    own = spec.architecture in ("pixels", *OF_PATCHES)
    if dtype == "auto":
        dtype = "bfloat16" if not own and gains_from_bf16(place) else "float32"
    if own and dtype != "float32":
        raise ValueError(f"{spec.name} is computed in float32 only: leave dtype at 'auto'")
    return Backbone(spec, load_model(spec, checkpoint), place, getattr(torch, dtype))
