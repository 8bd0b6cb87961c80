"""What a call costs a device, counted on the CPU: waits for it, copies to it, memory that is made."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Functions that wait for the device, whatever they are called by; operators that size their result by values do as well.
READING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique", "_unique2", "repeat_interleave", "_local_scalar_dense", "equal"}


class HostReads(TorchFunctionMode):
    """Counts calls from Python that read a tensor's values, or copy a Python number to the device (which waits as well)."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READING:
            self.seen[name] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("tensor", "as_tensor") and result.device.type != "cpu":
            self.seen["a number copied to the device"] += 1
        return result


class DeviceWaits(TorchDispatchMode):
    """Counts operators that wait for the device: copies between devices, and results sized by values."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        tensors = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, torch.Tensor)]
        if name in ("_to_copy", "copy_") and any(tensor.device != result.device for tensor in tensors):
            self.seen["copy between devices"] += 1
        if name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1]):
            self.seen["index by marks"] += 1
        if name in SIZED_BY_VALUES:
            self.seen[name] += 1
        return result


class NewStorages(TorchDispatchMode):
    """Bytes of the largest storage that an operator makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {part.untyped_storage().data_ptr() for part in tree_leaves(args) if isinstance(part, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, part.untyped_storage().nbytes())
        return result
