import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lemo_hf.profiling.estimate.fake_model import fake_model
from lemo_hf.profiling.flops import FlopCounter, attention_pairs

MADD = 2  # FLOPs of a multiply-add


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (64, 64), (5, 9), (9, 5)])
def test_pairs_are_those_of_the_causal_mask(queries, keys):
    mask = torch.ones(queries, keys).tril()
    assert attention_pairs(queries, keys, True) == int(mask.sum())
    assert attention_pairs(queries, keys, False) == queries * keys


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("fake", [False, True])
def test_attention_equals_the_closed_form(is_causal, heads, key_heads, fake):
    batch, rows, size = 2, 48, 16
    pairs = rows * (rows + 1) // 2 if is_causal else rows * rows
    with FakeTensorMode() if fake else torch.enable_grad():
        query = torch.randn(batch, heads, rows, size, requires_grad=True)
        key, value = (torch.randn(batch, key_heads, rows, size, requires_grad=True) for _ in range(2))
        with FlopCounter(nn.Identity()) as counter:
            output = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=heads != key_heads)
            output.sum().backward()
    unit = MADD * batch * heads * pairs * size
    assert counter.flops.by("phase") == {"backward": 5 * unit, "forward": 2 * unit}
    assert counter.flops.by("part") == {"attention": 7 * unit}


def test_frozen_weights_have_no_gradient_to_form():
    frozen = nn.Linear(64, 32).requires_grad_(False)
    with FlopCounter(frozen) as counter:
        frozen(torch.randn(10, 64, requires_grad=True)).sum().backward()
    assert counter.flops.by("phase") == {"forward": MADD * 10 * 64 * 32, "backward": MADD * 10 * 64 * 32}


class Nested(nn.Module):
    """Two linears that are told apart, one of them called by a function with its own backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def test_backward_belongs_to_the_module_that_ran_forward():
    module = Nested()
    with FlopCounter(module) as counter:
        module(torch.randn(10, 16, requires_grad=True)).sum().backward()
    unit = MADD * 10 * 16
    assert counter.flops.by("module", "phase") == {
        ("first", "forward"): unit * 16,
        ("first", "backward"): unit * 16 * 2,
        ("second", "forward"): unit * 8,
        ("second", "backward"): unit * 8 * 2,
    }


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_as_backward(use_reentrant):
    module, x = Nested(), torch.randn(10, 16, requires_grad=True)
    with FlopCounter(module) as counter:
        checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
    unit = MADD * 10 * 16
    counts = counter.flops.by("module", "phase")
    assert counts["first", "forward"] == unit * 16
    assert counts["first", "backward"] == unit * 16 * 3
    # the non-reentrant form ends recomputation as soon as the last saved tensor is back
    assert counts["second", "backward"] == unit * 8 * (3 if use_reentrant else 2)


class _GradInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, head):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(head(leaf).sum(), leaf)
        ctx.save_for_backward(grad)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None


def test_gradients_formed_within_the_forward_count_as_backward():
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "lm_head": nn.Linear(16, 8).requires_grad_(False)})
    with FlopCounter(model) as counter:
        _GradInForward.apply(model["body"](torch.randn(10, 16)), model["lm_head"]).backward()
    unit = MADD * 10 * 16
    assert counter.flops.by("part", "phase") == {
        ("other", "forward"): unit * 16,
        ("other", "backward"): unit * 16,
        ("loss", "forward"): unit * 8,
        ("loss", "backward"): unit * 8,
    }


def test_stock_layer_at_8b_proportions_equals_the_closed_form():
    tokens, hidden, rank = 4096, 4096, 8
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    lora = LoraConfig(r=rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    mode = FakeTensorMode()
    model = fake_model(lambda: get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), lora), mode).train()
    with mode:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with FlopCounter(model) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
    key_width = hidden // 4
    attention_weights, mlp_weights = 2 * hidden * (hidden + key_width), 3 * hidden * 14336
    adapters = rank * (4 * hidden + 2 * hidden + 2 * key_width)
    pairs = hidden * (tokens + 1) // 2  # per token: 2 products of H multiply-adds for (N + 1) / 2 keys each
    layer = {part: flops / tokens / MADD for (index, part), flops in counter.flops.by("layer", "part").items() if index == 1}
    assert layer["mlp"] == 2 * mlp_weights
    assert layer["attention"] == 3.5 * 2 * pairs
    assert layer["q,k,v"] + layer["o_proj"] == 2 * attention_weights + 3 * adapters
    assert sum(layer.values()) == pytest.approx(494.9e6 + 0.6e6, rel=1e-3)  # the module docstring's figure
