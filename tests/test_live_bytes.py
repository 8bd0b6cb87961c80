from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.live_bytes import LiveBytes

ROW = 64 * 4  # bytes of a float32 row of 64


def weightless() -> nn.Module:
    return nn.Identity()


@pytest.mark.parametrize("fake", [False, True])
def test_peak_of_a_chain_of_operators(fake):
    with FakeTensorMode() if fake else nullcontext(), LiveBytes(weightless()) as live:
        first = torch.zeros(8, 64)
        second = first.exp()  # 2 alive
        del first
        third = second.exp().exp()  # 3 alive while the last exp runs: second, its exp, and the result
        del second, third
        torch.zeros(2, 64)
    assert live.peak_bytes == 3 * 8 * ROW
    assert all(one.died is not None for one in live.allocations)


def test_views_and_writes_in_place_make_no_bytes():
    with LiveBytes(weightless()) as live:
        rows = torch.zeros(8, 64)
        rows.view(64, 8).t()[1:].add_(1)
        rows[:4].copy_(rows[4:])
    assert live.peak_bytes == 8 * ROW


def test_parameters_live_from_the_start_and_a_label_names_a_storage():
    linear = nn.Linear(64, 8, bias=False)
    with LiveBytes(linear) as live:
        linear(torch.zeros(1, 64)).sum().backward()
        live.label([linear.weight.grad], "gradients")
    assert [one.size for one in live.allocations if one.born == 1] == [8 * ROW]
    (gradient,) = [one for one in live.allocations if one.label == "gradients"]
    assert gradient.size == 8 * ROW
    assert gradient.in_backward
    assert gradient.died is None


def test_what_an_operator_holds_within_itself_counts_while_it_runs():
    def workspace(operator, args, kwargs):
        return 100 * ROW if operator is torch.ops.aten.exp.default else 0

    with LiveBytes(weightless(), workspace=workspace) as live:
        kept = torch.zeros(8, 64).exp()
        del kept
        torch.zeros(16, 64)
    assert live.peak_bytes == (2 * 8 + 100) * ROW


def test_backward_bytes_are_told_from_forward_ones(tiny_llama):
    ids = torch.zeros(1, 64, dtype=torch.long)
    with LiveBytes(tiny_llama) as live:
        tiny_llama(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert any(one.in_backward for one in live.allocations)
    mlp = [one for one in live.allocations if one.owner.part == "mlp" and not one.in_backward]
    assert {one.owner.layer for one in mlp} == {0, 1, 2}


def test_what_lives_after_the_forward_is_what_autograd_saves(tiny_llama):
    ids = torch.zeros(1, 128, dtype=torch.long)
    model = tiny_llama.bfloat16().train()
    with LiveBytes(model) as live, ActivationMemory(model) as memory:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    resident = sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))
    alive = sum(one.size for one in live.allocations if one.died is None) - resident
    # Beside what is saved: the loss itself. The embedding saves the tokens' ids, which were there before.
    assert alive == memory.saved.total - ids.untyped_storage().nbytes() + loss.untyped_storage().nbytes()
