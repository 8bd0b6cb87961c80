import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lemo_hf.models.row_operations import gated_activation, rms_norm, shared_adapter_input


def saved_bytes(compute, leave_out=()):
    """Bytes of distinct storages that autograd saves while `compute` runs, those in `leave_out` aside."""
    seen = {}

    def note(tensor):
        seen[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    known = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    return result, sum(nbytes for pointer, (_, nbytes) in seen.items() if pointer not in known)


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", ["same", torch.float32])
def test_norm_is_the_stock_norm_bit_for_bit(dtype, weight_dtype):
    stock = LlamaRMSNorm(48, eps=1e-5).to(dtype if weight_dtype == "same" else weight_dtype)
    stock.weight.data.copy_(1 + 0.3 * rows(48, seed=3))
    hidden = 5 * rows(7, 48, dtype=dtype)
    got, wanted = rms_norm(hidden, stock.weight, 1e-5), stock(hidden)
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


def test_norm_passes_gradcheck():
    hidden, weight = rows(3, 5, dtype=torch.float64).requires_grad_(), rows(5, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, 1e-3), (hidden, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_norm_gradients_are_the_stock_ones(dtype, tolerance):
    stock = LlamaRMSNorm(48).to(dtype)
    hidden = rows(2, 9, 48, dtype=dtype).requires_grad_()
    upstream = rows(2, 9, 48, dtype=dtype, seed=1)
    wanted = torch.autograd.grad(stock(hidden), (hidden, stock.weight), upstream)
    got = torch.autograd.grad(rms_norm(hidden, stock.weight, stock.variance_epsilon), (hidden, stock.weight), upstream)
    for mine, reference in zip(got, wanted, strict=True):
        assert mine.dtype == reference.dtype
        scale = reference.float().abs().max()
        torch.testing.assert_close(mine.float() / scale, reference.float() / scale, rtol=0, atol=tolerance)


def test_norm_saves_its_input_and_one_number_a_row():
    hidden = rows(100, 64, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(64, dtype=torch.bfloat16)
    _, nbytes = saved_bytes(lambda: rms_norm(hidden, weight, 1e-6), leave_out=(weight,))
    assert nbytes == 100 * 64 * 2 + 100 * 4
    stock = LlamaRMSNorm(64).bfloat16()
    _, stock_bytes = saved_bytes(lambda: stock(hidden), leave_out=(stock.weight,))
    assert nbytes < 0.4 * stock_bytes


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_gated_activation_passes_gradcheck(name):
    gate, up = rows(4, 6, dtype=torch.float64).requires_grad_(), rows(4, 6, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, ACT2FN[name]), (gate, up))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_gated_activation_when_one_input_needs_no_gradient(needs):
    gate, up = rows(4, 6).requires_grad_(needs[0]), rows(4, 6, seed=1).requires_grad_(needs[1])
    gated_activation(gate, up, ACT2FN["silu"]).sum().backward()
    wanted = torch.autograd.grad((ACT2FN["silu"](gate) * up).sum(), gate if needs[0] else up)[0]
    torch.testing.assert_close((gate if needs[0] else up).grad, wanted)
    assert (up if needs[0] else gate).grad is None


def test_gated_activation_saves_two_tensors_and_has_the_stock_bits():
    gate, up = rows(50, 32, dtype=torch.bfloat16).requires_grad_(), rows(50, 32, dtype=torch.bfloat16, seed=1).requires_grad_()
    product, nbytes = saved_bytes(lambda: gated_activation(gate, up, ACT2FN["silu"]))
    assert nbytes == 2 * 50 * 32 * 2
    assert torch.equal(product, ACT2FN["silu"](gate) * up)


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, width, bias=False) for width in (24, 12, 12))


def adapted(dtype=torch.bfloat16, targets=("q", "k", "v"), **lora):
    """Projections in `dtype` with float32 adapters, PEFT's default for 16-bit models."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Projections().to(dtype)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **lora))
    assert all(weight.dtype == torch.float32 for name, weight in model.named_parameters() if "lora_" in name)
    return model.base_model.model


def run(projections, hidden, shared):
    modules = projections.q, projections.k, projections.v
    if not shared:
        return torch.cat([module(hidden) for module in modules], -1)
    with shared_adapter_input(*modules):
        return torch.cat([module(hidden) for module in modules], -1)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_sharing_the_cast_changes_no_bit(dropout):
    results = []
    for shared in (False, True):
        projections = adapted(lora_dropout=dropout).train()
        hidden = rows(30, 24, dtype=torch.bfloat16).requires_grad_()
        torch.manual_seed(11)
        output = run(projections, hidden, shared)
        output.square().sum().backward()
        grads = [weight.grad for weight in projections.parameters() if weight.grad is not None]
        assert len(grads) == 6
        results.append((output, *grads, hidden.grad))
    plain, shared = results
    # The gradient of the input sums three bf16-rounded parts, shared: one float32 sum, rounded once.
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], shared[:-1], strict=True))
    torch.testing.assert_close(shared[-1].float(), plain[-1].float(), rtol=2e-2, atol=2e-2 * plain[-1].float().abs().max().item())


def test_sharing_saves_one_float32_copy_instead_of_three():
    projections = adapted()
    hidden = rows(500, 24, dtype=torch.bfloat16).requires_grad_()
    weights = [*projections.parameters()]
    _, plain = saved_bytes(lambda: run(projections, hidden, False), leave_out=weights)
    _, shared = saved_bytes(lambda: run(projections, hidden, True), leave_out=weights)
    assert plain - shared == 2 * 500 * 24 * 4


def test_the_method_comes_back_even_after_an_error():
    projections = adapted()
    method = type(projections.q)._cast_input_dtype

    def broken(input):
        with shared_adapter_input(projections.q, projections.k):
            assert projections.q._cast_input_dtype is not method
            projections.q(input)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken(rows(2, 24, dtype=torch.bfloat16))
    for module in (projections.q, projections.k, projections.v):
        assert "_cast_input_dtype" not in vars(module)
        assert module._cast_input_dtype.__func__ is method


def test_another_input_within_the_context_is_cast_anew():
    projections = adapted()
    first, second = rows(5, 24, dtype=torch.bfloat16), rows(5, 24, dtype=torch.bfloat16, seed=9)
    with shared_adapter_input(projections.q):
        got = projections.q(first), projections.q(second), projections.q(first)
    assert all(torch.equal(a, projections.q(b)) for a, b in zip(got, (first, second, first), strict=True))


def test_projections_without_adapters_are_left_alone():
    plain = nn.Linear(4, 4)
    with shared_adapter_input(plain):
        assert "_cast_input_dtype" not in vars(plain)
    mixed = adapted(targets=("q",))
    hidden = rows(5, 24, dtype=torch.bfloat16)
    assert torch.equal(run(mixed, hidden, True), run(copy.deepcopy(mixed), hidden, False))


def test_under_autocast_the_values_are_peft_s():
    projections = adapted(dtype=torch.float32)
    hidden = rows(30, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(projections, hidden, True), run(projections, hidden, False))
        narrow = hidden.bfloat16()
        assert torch.equal(run(projections, narrow, True), run(projections, narrow, False))
