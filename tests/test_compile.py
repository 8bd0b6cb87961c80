import pytest
import torch
from references.tiny_models import (
    ARCHITECTURES,
    assert_same_gradients,
    lemo_model,
    loss_and_gradients,
    random_tokens,
    stock_model,
)
from torch._dynamo.utils import counters

from lemo_hf.models import kept_row_checkpoint
from lemo_hf.models.sparse_decoder import sparse_backbone, sparse_evaluation

TOKENS = random_tokens(50, 1)[None]
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def ratio_model(form, architecture="llama", **lemo):
    lemo |= {"nearby_tokens": 7} if form == "kept_keys" else {}
    stock = stock_model(architecture=architecture, num_hidden_layers=1)
    return lemo_model(stock, {}, selection="ratio", keep_ratio=0.4, attention_forward=form, **lemo)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Dynamo instantiates an autograd.Function while it traces; torch warns of that, to itself.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
def test_a_compiled_model_trains_as_an_uncompiled_one_and_compiles_once(form, architecture, fresh_dynamo):
    compare_compiled(lambda: ratio_model(form, architecture))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["shifted_groups", "block_sparse"])
def test_patterns_compile_too(pattern, fresh_dynamo):
    compare_compiled(lambda: ratio_model("sparse", attention_pattern=pattern))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
def test_kept_row_checkpointing_compiles_too(form, fresh_dynamo):
    compare_compiled(lambda: ratio_model(form, checkpoint="kept_rows"))


def compare_compiled(make):
    wanted_loss, wanted = loss_and_gradients(make(), BATCH)
    model = make()
    compiled = torch.compile(model, backend="eager")
    loss = compiled(**BATCH).loss
    loss.backward()
    assert counters["frames"]["ok"] > 0
    torch.testing.assert_close(loss, wanted_loss)
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert_same_gradients(grads, wanted, rtol=1e-5, atol=1e-6)
    frames = counters["frames"]["ok"]
    for _ in range(2):
        compiled(**BATCH).loss.backward()
    assert counters["frames"]["ok"] == frames, "a step of the same shape must not compile anew"


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_forward": "exact"},
        {"attention_forward": "kept_keys", "nearby_tokens": 7},
        {"attention_forward": "sparse", "nearby_tokens": 7},
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_what_kept_row_checkpointing_does_in_a_graph_has_the_same_gradients(settings, dropout, monkeypatch):
    """Run as it is, without the compiler. An adapter's dropout must be the same in attention's forward and backward."""
    traced, found = kept_row_checkpoint._traced, []
    for compiling in (False, True):
        calls = []
        monkeypatch.setattr(kept_row_checkpoint, "_traced", lambda *args, calls=calls: calls.append(1) or traced(*args))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        model = lemo_model(stock_model(), {"lora_dropout": dropout}, checkpoint="kept_rows", **settings)
        torch.manual_seed(5)
        found.append(loss_and_gradients(model, BATCH))
        assert bool(calls) == (compiling and not dropout)
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)


def test_only_sampled_selection_counts_its_forwards():
    for selection, drawn in (("ratio", 0), ("sampled", 2)):
        model = lemo_model(stock_model(), selection=selection)
        for _ in range(2):
            model(**BATCH)
        with sparse_evaluation(sparse_backbone(model.eval())):
            model(**BATCH)
        assert sparse_backbone(model).lemo_draw == drawn, "evaluation must not advance the draws of training"
