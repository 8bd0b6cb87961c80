"""What other packages do to a LeMo model: patch its modules, or call its parts themselves."""

import functools

import pytest
import torch
from references.tiny_models import assert_same_gradients, lemo_model, loss_and_gradients, random_tokens, stock_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

TOKENS = random_tokens(50, 1)[None]
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def patched_forward(norm, seen):
    """As fused kernels and offloading hooks do it: a method of the instance."""
    stock = norm.forward

    @functools.wraps(stock)
    def forward(rows):
        seen.append(norm)
        return stock(rows)

    norm.forward = forward


PATCHES = {
    "method": patched_forward,
    "hook": lambda norm, seen: norm.register_forward_hook(lambda *call: seen.append(norm)),
    "pre-hook": lambda norm, seen: norm.register_forward_pre_hook(lambda *call: seen.append(norm)),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_norm_is_called_as_it_is(patch):
    wanted_loss, wanted = loss_and_gradients(lemo_model(stock_model()), BATCH)
    model, seen = lemo_model(stock_model()), []
    norms = [module for layer in model.model.layers for module in layer.modules() if isinstance(module, LlamaRMSNorm)]
    assert len(norms) == 4
    for norm in norms:
        PATCHES[patch](norm, seen)
    loss, got = loss_and_gradients(model, BATCH)
    assert {id(norm) for norm in seen} == {id(norm) for norm in norms}
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(got, wanted, rtol=1e-4, atol=1e-5)
