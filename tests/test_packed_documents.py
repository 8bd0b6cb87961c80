"""Documents that share a row, or a batch, do not see each other: whatever one of them holds, the others stay what they are."""

import functools

import pytest
import torch
from references.tiny_models import (
    batches_of,
    chosen_blocks,
    lemo_model,
    place,
    random_tokens,
    stock_model,
    trainable_gradients,
    with_varied_vectors,
)
from transformers import DataCollatorWithFlattening

from lemo_hf.evaluation.layer_scores import visit_layers
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.sparse_decoder import sparse_backbone

FORMS = ["sparse", "exact", "kept_keys"]
# With thresholds about which half of the blocks lie.
ARCHITECTURES = {"llama": [6.4, 2.7], "mistral": [6.4, 2.6], "opt": [-1.7, 2.1], "qwen2": [6.9, -1.5]}
SELECTIONS = {
    "ratio": {"selection": "ratio"},
    "true": {"selection": "ratio", "score_source": "true"},
    "uniform": {},
    "informed": {"sampling_temperature": 1.0},
    "threshold": {"selection": "threshold"},
}
# Of several blocks of 4, of one, of one token; the third is the one that changes.
LENGTHS = (21, 3, 40, 1, 33)
CHANGED = 2


def flattened(tokens, **says):
    samples = [{"input_ids": part, "labels": part} for part in tokens]
    return DataCollatorWithFlattening(**says)(samples)


def as_trl_does(tokens):
    """The keys of trl's padding-free collator, a tail of padding that counts as documents of one token included."""
    batch = flattened([*tokens, *(torch.zeros(1, dtype=torch.long) for _ in range(6))], return_seq_idx=True)
    ends = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    longest = max(map(len, tokens))
    batch["labels"][:, -6:] = -100
    lengths = torch.tensor(ends, dtype=torch.int32)
    return {**batch, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


BATCHES = {
    "positions": flattened,
    "numbers": lambda tokens: flattened(tokens, return_position_ids=False, return_seq_idx=True),
    "lengths": lambda tokens: flattened(tokens, return_position_ids=False, return_flash_attn_kwargs=True),
    "trl": as_trl_does,
    "left": lambda tokens: place(tokens, "left", extra=3).batch,
    "right": lambda tokens: place(tokens, "right", extra=3).batch,
}
PACKED = ["positions", "numbers", "lengths", "trl"]


def tokens_of(changed):
    tokens = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    if changed:
        tokens[CHANGED] = random_tokens(LENGTHS[CHANGED], 99)
    return tokens


@functools.cache
def stock_of(architecture):
    return with_varied_vectors(stock_model(architecture=architecture))


@functools.cache
def model_of(architecture, selection="ratio", form="exact", attention="sdpa"):
    lemo = {"block_size": 4, "keep_ratio": 0.4, "thresholds": ARCHITECTURES[architecture], **SELECTIONS[selection]}
    model = lemo_model(stock_of(architecture), {}, attention_forward=form, **lemo)
    # As if loaded for it. Training calls no attention function of transformers, so flash_attention_2, which installs on a GPU
    # only, trains here too.
    model.config._attn_implementation = sparse_backbone(model).config._attn_implementation = attention
    return model


def spans_of(batch, tokens):
    """Where each document lies in the flattened batch: found by its tokens, not by the code under test."""
    flat = batch["input_ids"].flatten().tolist()
    parts = [part.tolist() for part in tokens]
    starts = [next(at for at in range(len(flat)) if flat[at : at + len(part)] == part) for part in parts]
    return [slice(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]


def trained(model, batch, span, poison=None):
    """A training step whose labels are one document's: loss, gradients of weights and stream, hidden states, chosen blocks."""
    sparse_backbone(model).lemo_draw = 3
    model.train().zero_grad()
    labels = torch.full_like(batch["labels"], -100)
    labels.view(-1)[span] = batch["labels"].view(-1)[span]
    stream = model.get_input_embeddings()(batch["input_ids"]).detach()
    if poison is not None:
        stream.flatten(0, 1)[poison] = torch.nan
    inputs = {**batch, "labels": labels, "inputs_embeds": stream.requires_grad_()}
    del inputs["input_ids"]
    with batches_of(model) as batches:
        output = model(**inputs, num_items_in_batch=7, output_hidden_states=True)
    output.loss.backward()
    hidden = output.hidden_states[-1].flatten(0, 1).detach()
    return output.loss.detach(), trainable_gradients(model), stream.grad.flatten(0, 1), hidden, chosen_blocks(batches[0])


def assert_others_are_the_same(model, said, poisoned):
    tokens = tokens_of(changed=False)
    before = BATCHES[said](tokens)
    after = before if poisoned else BATCHES[said](tokens_of(changed=True))
    spans = spans_of(before, tokens)
    poison = spans[CHANGED] if poisoned else None
    for index in (0, 4):
        loss, grads, stream, hidden, blocks = trained(model, before, spans[index])
        loss_2, grads_2, stream_2, hidden_2, blocks_2 = trained(model, after, spans[index], poison)
        assert torch.equal(loss, loss_2)
        assert loss > 0
        assert not torch.equal(hidden[spans[CHANGED]], hidden_2[spans[CHANGED]])
        for other, span in enumerate(spans):
            if other != CHANGED:
                assert torch.equal(hidden[span], hidden_2[span])
                assert [layer[other] for layer in blocks] == [layer[other] for layer in blocks_2]
        assert torch.equal(stream[spans[index]], stream_2[spans[index]])
        stream[spans[index]] = 0
        assert not stream.any(), "a document's loss moves its own rows only"
        if not poisoned:  # a weight's gradient sums over rows, and 0 * nan is nan
            assert grads.keys() == grads_2.keys()
            assert all(torch.equal(grads[name], grads_2[name]) for name in grads)


@pytest.mark.parametrize(("said", "selection"), list(zip(BATCHES, [*SELECTIONS, "true"], strict=True)))
@pytest.mark.parametrize("form", FORMS)
def test_in_training_documents_stay_what_they_are_when_another_one_changes(form, said, selection):
    assert_others_are_the_same(model_of("llama", selection, form), said, poisoned=False)


@pytest.mark.slow
def test_the_stand_in_for_trl_s_collator_says_what_that_says():
    collators = pytest.importorskip("trl.trainer.sft_trainer")
    collator = collators.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)
    tokens = tokens_of(changed=False)
    batch = collator([{"input_ids": part.tolist()} for part in tokens])
    mine = as_trl_does(tokens)
    assert batch.keys() == mine.keys()
    for name, value in batch.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(mine[name])), name
        assert getattr(value, "dtype", int) == getattr(mine[name], "dtype", int)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_training_nothing_of_a_document_of_nan_reaches_another(architecture):
    for form in FORMS:
        assert_others_are_the_same(model_of(architecture, "ratio", form, "flash_attention_2"), "trl", poisoned=True)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("said", BATCHES)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_combination_in_training(architecture, form, selection, said, attention):
    for poisoned in (False, True):
        assert_others_are_the_same(model_of(architecture, selection, form, attention), said, poisoned)


# --- Evaluation, which is dense ---


def evaluated(model, batch, **options):
    sparse_backbone(model).lemo_draw = 0
    with torch.no_grad():
        output = model.eval()(**batch, **options)
    assert getattr(output, "past_key_values", None) is None
    return output.logits.flatten(0, 1)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("said", PACKED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_evaluation_packed_documents_are_those_of_the_stock_model_alone(architecture, said, attention):
    model, stock = model_of(architecture, attention=attention), stock_of(architecture)
    tokens = tokens_of(changed=False)
    batch, other = BATCHES[said](tokens), BATCHES[said](tokens_of(changed=True))
    spans = spans_of(batch, tokens)
    model.disable_adapter_layers()
    logits, changed = evaluated(model, batch), evaluated(model, other, use_cache=True)
    model.enable_adapter_layers()
    for index, (span, part) in enumerate(zip(spans, tokens, strict=True)):
        torch.testing.assert_close(logits[span], stock(part[None]).logits[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(logits[span], changed[span]) == (index != CHANGED)
    assert sparse_backbone(model).lemo_draw == 0


@pytest.mark.parametrize("said", PACKED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_scores_and_predictions_are_those_of_each_document_alone(architecture, said):
    """What predictors are fitted to and judged by, on the frozen model in evaluation mode."""
    backbone = sparse_backbone(model_of(architecture))

    def scores(tokens):
        found = []
        visit_layers(backbone, BATCHES[said](tokens), found.append)
        return [(layer.scores, layer.predicted()) for layer in found]

    tokens = tokens_of(changed=False)
    together, changed = scores(tokens), scores(tokens_of(changed=True))
    for index, part in enumerate(tokens):
        alone = scores([part])
        for layer in range(2):
            for kind in (0, 1):
                mine, theirs = together[layer][kind][index], changed[layer][kind][index]
                assert torch.equal(mine, theirs) == (index != CHANGED or len(mine) == 1)
                torch.testing.assert_close(mine, alone[layer][kind][0], rtol=1e-4, atol=1e-4)


def test_in_evaluation_every_other_batch_is_the_stock_model_s():
    """Bit for bit: one document a row, masks that training refuses, generation without a cache, LeMo switched off."""
    model, stock = model_of("llama"), stock_of("llama")
    model.disable_adapter_layers()
    tokens = torch.stack([random_tokens(30, seed) for seed in (1, 2)])
    hole = torch.ones(2, 30, dtype=torch.long).index_fill_(1, torch.tensor([7]), 0)
    triangle = torch.ones(30, 30).tril().bool()[None, None]
    for extra in (
        {"position_ids": torch.arange(30)[None]},
        {"position_ids": torch.arange(30).expand(2, -1), "attention_mask": hole},
        {"position_ids": torch.arange(30).expand(2, -1), "attention_mask": triangle},
        {"cu_seq_lens_q": torch.tensor([0, 30, 60]), "cu_seq_lens_k": torch.tensor([0, 30, 60])},
    ):
        assert torch.equal(model.eval()(tokens, **extra).logits, stock(tokens, **extra).logits)
    left = place([random_tokens(30, 1), random_tokens(11, 2)], "left").batch
    inputs = {name: left[name] for name in ("input_ids", "attention_mask")}
    got, wanted = (each.generate(**inputs, max_new_tokens=5, use_cache=False) for each in (model, stock))
    assert torch.equal(got, wanted)
    batch = flattened(tokens_of(changed=False))
    model.config.lemo.update(enabled=False)
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    model.config.lemo.update(enabled=True)
    assert not torch.allclose(model(**batch).logits, stock(**batch).logits, atol=1e-2)
    model.enable_adapter_layers()


def test_what_evaluation_of_packed_documents_cannot_do_is_refused():
    model = model_of("llama").eval()
    batch = flattened(tokens_of(changed=False), return_flash_attn_kwargs=True)
    with pytest.raises(LemoConfigError, match=r"got output_attentions=True; ask for them .*, one document a row"):
        model(**batch, output_attentions=True)
    with pytest.raises(LemoConfigError, match="cu_seq_lens must end at the 98 tokens"):
        model(**batch | {"cu_seq_lens_q": torch.tensor([0, 5])})
