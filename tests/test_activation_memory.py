import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from references.tiny_models import checkpoint_stock_layers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.estimate.fake_model import fake_model

ROWS, WIDTH, RANK = 32, 64, 4
FLOAT = 4  # bytes


class WithAdapter(nn.Module):
    """y = W x + B A x with W frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.base = frozen_linear()
        self.lora_A = nn.Linear(WIDTH, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def frozen_linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)


def rows(requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, requires_grad=requires_grad)


def saved_bytes(module: nn.Module, run) -> int:
    with ActivationMemory(module) as memory:
        output = run()
    assert output is not None
    return memory.saved.total


def test_frozen_linear_saves_nothing():
    linear, x = frozen_linear(), rows()
    assert saved_bytes(linear, lambda: linear(x)) == 0


def test_trained_linear_saves_its_input():
    linear, x = nn.Linear(WIDTH, WIDTH), rows(requires_grad=False)
    assert saved_bytes(linear, lambda: linear(x)) == ROWS * WIDTH * FLOAT


def test_adapter_saves_its_input_and_its_own_rows():
    module, x = WithAdapter(), rows()
    with ActivationMemory(module) as memory:
        output = module(x)
    assert output.requires_grad
    assert memory.saved.by("module") == {"lora_A": ROWS * WIDTH * FLOAT, "lora_B": ROWS * RANK * FLOAT}


def test_adapters_of_one_input_share_it():
    modules, x = nn.ModuleList([WithAdapter() for _ in range(3)]), rows()
    assert saved_bytes(modules, lambda: [module(x) for module in modules]) == ROWS * (WIDTH + 3 * RANK) * FLOAT


def test_nothing_is_saved_without_autograd_or_without_a_graph():
    module, x = WithAdapter(), rows()
    with torch.no_grad():
        assert saved_bytes(module, lambda: module(x)) == 0
    with ActivationMemory(module) as memory:
        module(x)  # the output goes, and the graph with it
    assert memory.saved.total == 0
    assert memory.peak_bytes == ROWS * (WIDTH + RANK) * FLOAT


def test_views_count_their_whole_storage_once():
    module, x = nn.Identity(), rows()
    assert saved_bytes(module, lambda: x[:4].exp() * x.t()[:, :4].t()) == (ROWS + 4) * WIDTH * FLOAT


def test_results_that_operators_save_are_freed_with_the_graph():
    module, x = nn.Identity(), rows()
    gc.disable()  # a reference cycle through the graph would stay
    try:
        with ActivationMemory(module) as memory:
            output = (x.exp() * 2).sigmoid()
            assert memory.saved.total == 2 * ROWS * WIDTH * FLOAT
            del output
            assert memory.saved.total == 0
    finally:
        gc.enable()


def test_backward_frees_what_was_saved():
    module, x = WithAdapter(), rows()
    with ActivationMemory(module) as memory:
        output = module(x).sum()
        assert memory.saved.total == memory.peak_bytes > 0
        output.backward()
        assert memory.saved.total == 0


def test_gradients_are_those_of_an_unmeasured_run():
    module, x = WithAdapter(), rows()
    module(x).tanh().square().sum().backward()
    wanted = [x.grad, *(p.grad for p in module.parameters())]
    x.grad = None
    module.zero_grad()
    with ActivationMemory(module):
        output = module(x).tanh().square().sum()
    output.backward()
    for grad, want in zip([x.grad, *(p.grad for p in module.parameters())], wanted, strict=True):
        assert (grad is None and want is None) or torch.equal(grad, want)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x[:1].half())
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_tensors_saved_by_custom_functions_count_by_dtype():
    module, x = nn.Identity(), rows()
    with ActivationMemory(module) as memory:
        output = _Doubled.apply(x)
    assert output.requires_grad
    assert memory.saved.by("dtype") == {"float32": ROWS * WIDTH * FLOAT, "float16": WIDTH * 2}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_saves_its_input_only(use_reentrant):
    module, x = nn.Sequential(WithAdapter(), nn.GELU(), WithAdapter()), rows()
    run = lambda: checkpoint(module, x, use_reentrant=use_reentrant)  # noqa: E731 - the measured call
    assert saved_bytes(module, run) == ROWS * WIDTH * FLOAT


def test_wrapper_subclasses_count_what_they_hold():
    module = nn.Identity()
    x = TwoTensor(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)).requires_grad_()
    assert saved_bytes(module, lambda: x.sin()) == 2 * ROWS * WIDTH * FLOAT


def test_fake_tensors_give_the_same_bytes():
    def run() -> dict:
        ids = torch.zeros(2, 48, dtype=torch.long)
        with ActivationMemory(model) as memory:
            loss = model(input_ids=ids, labels=ids).loss
        assert loss.requires_grad
        return memory.saved.by("module", "dtype")

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    build = lambda: get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj", "v_proj"]))  # noqa: E731
    model = build()
    real = run()
    mode = FakeTensorMode()
    model = fake_model(build, mode)
    with mode:
        assert run() == real


def test_unknown_fields_are_refused():
    with ActivationMemory(nn.Identity()) as memory:
        pass
    with pytest.raises(ValueError, match=r"no such field .*'leyer'.*choose among"):
        memory.saved.by("leyer")


TOKENS, ROW = 256, 4096 * 2  # H: a bf16 row of Llama-3-8B


def layer_rows_of_h(
    adapter_dtype: torch.dtype, autocast: bool = False, checkpointed: bool = False, layer: int | None = 1
) -> dict[str, float]:
    """Rows of H that a layer of two stock ones of Llama-3-8B saves per token, the second if not said, LoRA r=8 on q, k, v, o."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
    )

    def build() -> nn.Module:
        lora = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        model = get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), lora)
        return model.to(torch.bfloat16) if adapter_dtype == torch.bfloat16 else model

    mode = FakeTensorMode()
    model = fake_model(build, mode).train()
    with mode:
        model.enable_input_require_grads()
        if checkpointed:
            checkpoint_stock_layers(model)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        with ActivationMemory(model) as memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return {part: size / TOKENS / ROW for (at, part), size in memory.saved.by("layer", "part").items() if at == layer}


# Small float32 rows: log-sum-exp of 32 heads, one statistic for each norm.
LSE, STATISTICS = 32 * 4 / ROW, 2 * 4 / ROW


@pytest.mark.parametrize(
    ("adapter_dtype", "autocast", "inputs_of_qkv", "own_input_of_o", "adapter_row", "total"),
    [
        (torch.bfloat16, False, 1, 0, 8 * 2, 18.02),
        (torch.float32, False, 6, 2, 8 * 4, 25.03),
        (torch.float32, True, 3, 1, 8 * 2, 21.02),
    ],
)
def test_stock_layer_at_8b_proportions(adapter_dtype, autocast, inputs_of_qkv, own_input_of_o, adapter_row, total):
    parts = layer_rows_of_h(adapter_dtype, autocast)
    weights = 0.0
    if autocast:  # autocast saves its bf16 copies of the float32 adapters, which do not grow with the tokens
        weights = 1 / TOKENS
    assert parts["mlp"] == 3 * 3.5
    assert parts["norm"] == pytest.approx(4 + STATISTICS)
    assert parts["attention"] == pytest.approx(1 + 1 + 2 * 0.25 + LSE)
    # 4096 -> 8 and 8 -> 4096 or 1024: in H, 16 and 16 or 4 rows of weights
    assert parts["q,k,v"] == pytest.approx(inputs_of_qkv + 3 * adapter_row / ROW + weights * (3 * 8 + 8 + 2 + 2))
    assert parts["o_proj"] == pytest.approx(own_input_of_o + adapter_row / ROW + weights * (8 + 8))
    without_weights = sum(parts.values()) - weights * 52
    assert without_weights == pytest.approx(total, abs=0.01)


def test_checkpointed_stock_layer_saves_one_row():
    # Older releases of transformers checkpoint around a layer's call, where the row is counted but belongs to no layer.
    if "__call__" in vars(GradientCheckpointingLayer):
        layers = 2
        assert layer_rows_of_h(torch.bfloat16, checkpointed=True) == {}
        assert layer_rows_of_h(torch.bfloat16, checkpointed=True, layer=None)["other"] == layers
    else:
        assert layer_rows_of_h(torch.bfloat16, checkpointed=True) == {"residual": 1.0}
