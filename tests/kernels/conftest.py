"""Memory that kernels are given is poisoned, and no reference is a kernel."""

import pytest
import torch

from lemo_hf.models.kernel_switch import kernel_mode

# A device context knows constructors by identity and collects them once, at its first use: before any is replaced. Else every
# later `with torch.device("meta")` of the process would build its tensors on the CPU.
with torch.device("meta"):
    assert torch.empty(0).is_meta


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fills what `torch.empty` and its kin return with NaN, so that an output that nothing wrote shows."""

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return make_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def reference_unless_kernels_are_asked_for():
    """On CUDA functions of lemo_hf/models would otherwise run the very kernels that they are compared with."""
    with kernel_mode("reference"):
        yield
