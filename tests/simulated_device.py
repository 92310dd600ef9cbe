"""A device for tests on a CPU: tensors that say they lie on "sim", and every transfer is noted.

It computes what the CPU computes. What CUDA refuses is refused (a tensor of the host among those of
the device), and what makes the host wait for a GPU is counted: copies either way, a number that is
read (`item`, `float`, `if`), results whose size depends on values (boolean masks, `nonzero`).
"""

from collections import Counter

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2,
         aten.unique_dim, aten.unique_consecutive, aten.equal, aten.is_nonzero, aten.histc}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_}


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


# Torch's spare device takes the name "sim" as tests are collected: at the first backward pass of a
# process autograd counts the devices, and knows none that comes later.
if torch._C._get_privateuse1_backend_name() != "sim":
    backend_registration._setup_privateuseone_for_python_backend("sim", _Module())


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the device, around one of the CPU."""

    @staticmethod
    def __new__(cls, inner):
        outer = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("sim", 0))
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} after the device was left")


class Device(TorchDispatchMode):
    """While it is entered, device="sim" works; `waits` counts what makes the host wait."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __enter__(self):
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=) as a copy
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = dict(kwargs or {}), func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        target = kwargs.get("device")
        to_us = target is not None and torch.device(target).type == "sim"
        leaves = bool(ours) and target is not None and not to_us
        if not ours and not to_us:
            return func(*args, **kwargs)
        strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        if op in COPIES:
            if strangers or leaves:
                self.waits["to the device" if to_us or (isinstance(args[0], OnDevice) and strangers)
                           else "from the device"] += 1
        elif any(tensor.ndim for tensor in strangers):  # CUDA takes numbers of the host, no more
            raise RuntimeError(f"{op}: a tensor of the CPU among those of the device")
        elif op in READS or (op in INDEXED and any(
                index is not None and index.dtype in (torch.bool, torch.uint8)
                for index in args[1])):
            self.waits[op._qualified_op_name] += 1
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        inner = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnDevice) else leaf,
                         (args, kwargs))
        found = func(*inner[0], **inner[1])
        if leaves:
            return found
        known = {id(tensor.inner): tensor for tensor in ours}  # what was changed in place
        return tree_map(lambda leaf: known.get(id(leaf)) if id(leaf) in known else OnDevice(leaf)
                        if isinstance(leaf, torch.Tensor) else leaf, found)
