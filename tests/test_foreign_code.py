"""What other packages do to a LeMo model: patch its modules, or call its parts themselves."""

import functools
import types

import pytest
import torch
from references.tiny_models import (
    assert_same_gradients,
    batches_of,
    chosen_blocks,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
)
from remote_process import run_remote
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lemo_hf.models.sparse_decoder import sparse_backbone

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


def foreign_forward(self, input_ids, attention_mask=None, position_ids=None, labels=None, num_items_in_batch=None, **kwargs):
    """As trainers with a loss of their own put it in place of a model's: the backbone, then their loss by chunks of tokens."""
    outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **kwargs)
    hidden, targets = outputs.last_hidden_state[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = hidden.new_zeros(())
    for rows in (targets != -100).nonzero().squeeze(1).split(16):
        total = total + torch.nn.functional.cross_entropy(self.lm_head(hidden[rows]), targets[rows], reduction="sum")
    return CausalLMOutputWithPast(loss=total / (num_items_in_batch or (targets != -100).sum()))


@pytest.mark.parametrize("layout", ["left", "packed_positions", "packed_seq_idx"])
@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
def test_a_trainer_that_calls_the_backbone_itself_trains_sparsely_too(form, layout):
    """A stand-in for trl.SFTTrainer, which is not installed here."""
    batch = place([random_tokens(length, length) for length in (37, 50, 9)], layout).batch
    results = []
    for forward in (None, foreign_forward):
        model = lemo_model(stock_model(), {}, selection="ratio", keep_ratio=0.4, attention_forward=form)
        causal_lm = model.get_base_model()
        if forward is not None:
            causal_lm.forward = types.MethodType(forward, causal_lm)
        with batches_of(model) as batches:
            loss, grads = loss_and_gradients(model, batch)
        assert batches[0].documents.lengths == [37, 50, 9]
        assert max(sparse_backbone(model).lemo_kept_shares) < 0.6
        results.append((loss, grads, chosen_blocks(batches[0])))
    (wanted_loss, wanted, wanted_blocks), (loss, got, blocks) = results
    assert blocks == wanted_blocks
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_saved_model_runs_and_trains_as_remote_code_without_this_package(tmp_path):
    stock = stock_model()
    model = lemo_model(stock, selection="ratio", keep_ratio=0.4)
    model.save_pretrained(tmp_path / "model")
    loss, wanted = loss_and_gradients(model, BATCH)
    logits = stock(TOKENS).logits
    for found in run_remote(tmp_path / "model", tmp_path / "remote", TOKENS):
        assert torch.equal(found.pop("logits"), logits)
        assert torch.equal(found.pop("loss"), loss)
        assert_same_gradients({name.removeprefix("grad."): grad for name, grad in found.items()}, wanted, rtol=1e-5, atol=1e-7)
