import pytest
import torch
from lemo_kernels import gated_activation
from lemo_kernels.gated_mlp import (
    ACTIVATIONS,
    gated_activation_backward_operator,
    gated_activation_operator,
)
from lemo_kernels.host import KernelInputError
from references.kernel_inputs import DEVICE, DTYPES, assert_close, far_rows, random, strided, transposed
from transformers.activations import ACT2FN

from lemo_hf.models import row_operations

# numpy, which the interpreter computes with, says what floating point does at the ends.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

STOCK = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SHAPES = [(1, 1), (63, 65), (65, 160), (2000, 8), (3, 2000), (0, 8), (4, 0)]


def both(gate, up, name, upstream):
    results = []
    for kernels in (True, False):
        g, u = (part.detach().clone().requires_grad_() for part in (gate, up))
        h = gated_activation(g, u, name) if kernels else row_operations.gated_activation(g, u, ACT2FN[STOCK[name]])
        results.append((h, *torch.autograd.grad(h, (g, u), upstream.to(h.dtype))))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_product_and_its_gradients_equal_the_reference(name, dtype):
    for rows, width in SHAPES:
        gate, up = random(rows, width, dtype=dtype, scale=3), random(rows, width, dtype=dtype, seed=1)
        for got, wanted in zip(*both(gate, up, name, random(rows, width, seed=2)), strict=True):
            assert_close(got, wanted)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_values_neither_overflow_nor_vanish(name):
    gate = torch.tensor([[-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, torch.inf]], device=DEVICE)
    up = torch.ones_like(gate)
    got, wanted = both(gate, up, name, up)
    finite = torch.isfinite(wanted[1])
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine[:, :-1], reference[:, :-1], rtol=1e-5, atol=1e-6)
    assert finite[:, :-1].all()
    assert torch.isnan(gated_activation(torch.full_like(gate, torch.nan), up, name)).all()


def test_mixed_dtypes_promote_as_a_product_does():
    gate, up = random(5, 9, dtype=torch.float16), random(5, 9, seed=1)
    for got, wanted in zip(*both(gate, up, "silu", random(5, 9, seed=2)), strict=True):
        assert_close(got, wanted, torch.float16)


@pytest.mark.parametrize("lay_out", [strided, transposed])
def test_rows_that_are_not_contiguous(lay_out):
    gate, up, grad = (random(33, 40, seed=seed) for seed in range(3))
    assert torch.equal(gated_activation(lay_out(gate), lay_out(up), "silu"), gated_activation(gate, up, "silu"))
    fused = torch.cat((gate, up), 1)  # one projection of both
    got = gated_activation_backward_operator(lay_out(grad), fused[:, :40], fused[:, 40:], "silu")
    wanted = gated_activation_backward_operator(grad, gate, up, "silu")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_saved_are_gate_and_up_and_a_second_backward_finds_them_unchanged():
    gate, up = random(5, 9).requires_grad_(), random(5, 9, seed=1).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        product = gated_activation(gate, up, "silu")
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]
    product = gated_activation(gate, up, "silu").sum()
    first = torch.autograd.grad(product, (gate, up), retain_graph=True)
    second = torch.autograd.grad(product, (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_32_bits():
    gate, up, grad = far_rows(8, 3)
    near = gate.clone(), up.clone(), grad.clone()
    assert torch.equal(gated_activation(gate, up, "silu"), gated_activation(*near[:2], "silu"))
    got = gated_activation_backward_operator(grad, gate, up, "silu")
    wanted = gated_activation_backward_operator(near[2], *near[:2], "silu")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("gate", "up", "name", "message"),
    [
        (
            torch.zeros(2, 8),
            torch.zeros(2, 8),
            "tanh",
            "activation must be one of silu, .*; got 'tanh'; use the PyTorch reference",
        ),
        (torch.zeros(2, 8), torch.zeros(2, 7), "silu", "up must have rows of width 8; got 7"),
        (torch.zeros(2, 8), torch.zeros(3, 8), "silu", "up must have 2 rows; got 3"),
        (torch.zeros(2, 8), torch.zeros(2, 8, device="meta"), "silu", "up must be on .*; got meta"),
        (torch.zeros(2, 8).double(), torch.zeros(2, 8), "silu", "gate must be float32, .*; got torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused_by_fact_value_and_fix(gate, up, name, message):
    up = up if up.device.type == "meta" else up.to(DEVICE)
    with pytest.raises(KernelInputError, match=message):
        gated_activation(gate.to(DEVICE), up, name)


def test_registered_operators_pass_opcheck():
    gate, up = random(5, 9), random(5, 9, seed=1)
    torch.library.opcheck(gated_activation_operator, (gate, up, "gelu"))
    torch.library.opcheck(gated_activation_backward_operator, (gate, gate, up, "gelu"))
