"""What trl's `OffloadActivations` moves of the same step and what it leaves on the device, on a CPU that is told to be an accelerator."""

import math
from dataclasses import dataclass

import pytest
import torch
from offload_models import STEADY, assert_same_bits, batch_of, gradients
from training_runs import tiny_lemo_model
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.training.sensitive_offload import OffloadSettings, SensitiveOffload

LEMO = {**STEADY, "attention_forward": "sparse"}


@dataclass
class Offloaded:
    """One step's offload.

    Args:
        gradients: Of the step.
        copied_bytes: What was copied to the host.
        storage_bytes: Of the storages that were copied, each once.
        copied_and_held_bytes: Of these, what views of them that were saved later still held on the device after the forward.
        indices: Tensors among the copied that are no floats.
    """

    gradients: dict[str, torch.Tensor]
    copied_bytes: int
    storage_bytes: int
    copied_and_held_bytes: int
    indices: int


def by_trl(monkeypatch):
    for owner, name in ((torch.cpu.Stream, "synchronize"), (torch.cpu, "empty_cache")):
        monkeypatch.setattr(owner, name, lambda *_: None, raising=False)
    model = tiny_lemo_model(**LEMO).train()
    with monkeypatch.context() as told:
        told.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        offload = get_act_offloading_ctx_manager(model, use_pin_memory=False, min_offload_size=1, warn_if_no_head=False)
    saved, pack = [], offload.pack_hook

    def noting(tensor):
        saved.append(tensor.untyped_storage())  # held, so that no address comes twice
        return pack(tensor)

    offload.pack_hook = noting
    with offload:
        loss = model(**batch_of(0, 1)).loss
        # The segmented loss has used up what its own backward asked for.
        tracked = [(storage, *offload.tracker[number]) for number, storage in enumerate(saved, 1) if number in offload.tracker]
        copied = {storage.data_ptr(): storage.nbytes() for storage, _, is_copied, *_ in tracked if is_copied}
        held = {storage.data_ptr() for storage, _, is_copied, *_ in tracked if not is_copied}
        moved = [tensor for _, tensor, is_copied, *_ in tracked if is_copied]
        loss.backward()
    return Offloaded(
        gradients(model),
        sum(tensor.untyped_storage().nbytes() for tensor in moved),
        sum(copied.values()),
        sum(size for address, size in copied.items() if address in held),
        sum(not tensor.is_floating_point() for tensor in moved),
    )


def by_lemo(budget):
    model = tiny_lemo_model(**LEMO).train()
    settings = OffloadSettings(budget=budget, smallest=1, seconds=[(1, 1)] * 2)
    with SensitiveOffload(sparse_backbone(model), settings) as offload:
        for _ in range(2):
            model.zero_grad()
            loss = model(**batch_of(0, 1)).loss
            moved, there = offload.host_bytes, offload.device_bytes
            whole = sum(each.size for each in offload._storages.values() if each.moved)
            held = sum(each.size for each in offload._storages.values() if each._original is not None)
            loss.backward()
    report = offload.report()
    assert (moved, there) == (sum(report.moved_bytes), sum(report.saved_bytes) - moved)
    return Offloaded(gradients(model), moved, whole, held, 0), report


def test_the_same_step_under_both(monkeypatch):
    """trl copies a view anew unless its storage was one of the last five, and holds it on the device if it was; ours moves storages, once."""
    model = tiny_lemo_model(**LEMO).train()
    with ActivationMemory(model) as memory:
        loss = model(**batch_of(0, 1)).loss
    saved = memory.saved.by("layer")
    loss.backward()
    wanted = gradients(model)
    theirs, (ours, report) = by_trl(monkeypatch), by_lemo(math.inf)
    part, _ = by_lemo(100_000.0)
    for each in (theirs, ours, part):
        assert_same_bits(each.gradients, wanted)
    # All floats that layers save, each byte once, none of them left; the indices stay.
    assert ours.copied_bytes == ours.storage_bytes == sum(report.saved_bytes)
    assert (ours.copied_and_held_bytes, ours.indices) == (0, 0)
    assert 0 < sum(saved[layer] for layer in range(2)) - ours.copied_bytes < 0.05 * ours.copied_bytes
    assert part.copied_bytes == pytest.approx(100_000, abs=2)
    # The table of docs/memory_features.md.
    assert (theirs.copied_bytes, theirs.storage_bytes, theirs.copied_and_held_bytes, theirs.indices) == (
        316_336,
        315_184,
        86_784,
        4,
    )
    assert ours.copied_bytes == 262_464
