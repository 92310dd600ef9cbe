"""Where tensors live: one finder of devices for backbones, heads and the estimator."""

import torch


def find_device(name: str | torch.device = "auto", mps: bool = False) -> str:
    """The device of that name; auto is the first GPU, else Apple's where mps is allowed, else cpu.

    Raises ValueError for one that is not there, naming those that are.
    """
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cuda"] * bool(there) + there + ["mps"] * (mps and torch.backends.mps.is_available())
    if name == "auto":
        return [*there, "cpu"][0]
    if str(name) not in [*there, "cpu"]:
        raise ValueError(f"The device {str(name)!r} is not there; pass auto, "
                         f"{', '.join([*there, 'cpu'])}.")
    return str(name)


def gains_from_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is quicker than float32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    except (AttributeError, RuntimeError):  # a build of torch that does not ask
        return False
