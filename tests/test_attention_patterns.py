"""Attention patterns as parts of a model that trains: settings, runs, estimates, counts."""

import json
from pathlib import Path

import pytest
import torch
from references.tiny_models import (
    assert_close_gradients,
    assert_same_gradients,
    batches_of,
    checkpoint_stock_layers,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
)
from training_runs import tiny_trainer
from transformers import AutoConfig

from lemo_hf.hub.card_tables import selection_rows
from lemo_hf.models.block_pair_attention import BlockPairs
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError
from lemo_hf.models.pattern_predictor import predicted_block_scores
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.two_dimensional_sparsity import (
    ShiftedGroups,
    choose_pairs,
    group_beyond,
    pair_counts,
)
from lemo_hf.profiling.bench.counts import saved_on_fake_tensors
from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.bench.step import measure_step
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.estimate.step_model import StepSettings, build_model, layer_kinds, runs_flex_attention

PATTERNS = [{"attention_pattern": "shifted_groups"}, {"attention_pattern": "shifted_groups", "group_size": 6},
            {"attention_pattern": "block_sparse"}]  # fmt: skip


def pattern_model(lora=None, stock=None, **lemo):
    return lemo_model(stock or stock_model(), {} if lora is None else lora, attention_forward="sparse", **lemo)


TEXTS = [random_tokens(length, length) for length in (61, 100, 37)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("scores", ["predicted", "true"])
def test_documents_train_alike_padded_packed_and_checkpointed(pattern, scores):
    wanted_loss, wanted = loss_and_gradients(pattern_model(score_source=scores, **pattern), place(TEXTS, "left", 3).batch)
    for layout in ("right", "packed_positions", "packed_cu"):
        loss, got = loss_and_gradients(pattern_model(score_source=scores, **pattern), place(TEXTS, layout).batch)
        torch.testing.assert_close(loss, wanted_loss)
        assert_close_gradients(got, wanted)
    for checkpoint, stock_checkpointing in (("kept_rows", None), ("none", False), ("none", True)):
        model = pattern_model(score_source=scores, checkpoint=checkpoint, **pattern)
        if stock_checkpointing is not None:
            checkpoint_stock_layers(model, stock_checkpointing)
            model.enable_input_require_grads()
        loss, got = loss_and_gradients(model, place(TEXTS, "left", 3).batch)
        torch.testing.assert_close(loss, wanted_loss, rtol=0, atol=0)
        assert_close_gradients(got, wanted, rtol=1e-5, share=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "qwen2", "qwen3"])
def test_every_architecture_trains_in_a_pattern_and_evaluates_as_the_stock_model(architecture):
    stock = stock_model(architecture=architecture)
    batch = {"input_ids": TEXTS[0][None], "labels": TEXTS[0][None]}
    losses = set()
    for pattern in ({}, *PATTERNS):
        model = pattern_model(stock=stock, **pattern)
        loss, grads = loss_and_gradients(model, batch)
        losses.add(loss.item())
        assert all(grad.isfinite().all() for grad in grads.values())
        assert len(grads) > 20
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model.eval()(**batch).logits, stock.eval()(**batch).logits)
    # Mistral's narrow window lets a kept block see two others at most, which are those that its pairs name.
    assert len(losses) == (3 if architecture == "mistral" else 4), "each pattern is another forward pass"


def test_one_value_spares_dense_layers_and_a_list_says_it_by_layer():
    config = LemoConfig(attention_forward="sparse", attention_pattern="block_sparse", dense_layers=[0, -1], keep_ratio=1.0)
    assert [config.pattern_of(layer, 4) for layer in range(4)] == ["full", "block_sparse", "block_sparse", "full"]
    batch = place(TEXTS, "left").batch
    model = pattern_model(attention_pattern=["full", "shifted_groups"])
    with batches_of(model) as seen:
        loss_and_gradients(model, batch)
    assert list(seen[0].patterns) == [1]
    assert isinstance(seen[0].patterns[1], ShiftedGroups)
    model = pattern_model(attention_pattern="block_sparse", dense_layers=[0])
    with batches_of(model) as seen:
        loss_and_gradients(model, batch)
    assert list(seen[0].patterns) == [1]
    assert isinstance(seen[0].patterns[1], BlockPairs)
    # Layers that keep every token because of their share follow the pattern.
    everything = {"keep_ratio": 1.0, "group_size": 6}
    plain, _ = loss_and_gradients(pattern_model(**everything), batch)
    grouped, _ = loss_and_gradients(pattern_model(attention_pattern="shifted_groups", **everything), batch)
    assert not torch.equal(plain, grouped)


def test_full_is_what_there_was_bit_for_bit():
    batch = place(TEXTS, "packed_positions").batch
    loss, grads = loss_and_gradients(pattern_model(), batch)
    same_loss, same = loss_and_gradients(
        pattern_model(attention_pattern=["full", "full"], group_size=7, pattern_share=0.1), batch
    )
    assert torch.equal(loss, same_loss)
    assert_same_gradients(same, grads)


def test_the_model_at_full_share_is_the_model_without_a_pattern():
    batch = place(TEXTS, "left").batch
    wanted_loss, wanted = loss_and_gradients(pattern_model(), batch)
    loss, got = loss_and_gradients(pattern_model(attention_pattern="block_sparse", pattern_share=1.0), batch)
    torch.testing.assert_close(loss, wanted_loss)
    assert_close_gradients(got, wanted)


def test_pairs_follow_the_predictor():
    """The default draw reads no scores, so predictors are needed for the pattern alone; theirs are the pairs that are chosen."""
    config = LemoConfig(attention_forward="sparse", attention_pattern="block_sparse")
    assert config.needs_predictors
    assert not config.needs_scores
    assert not LemoConfig(attention_forward="sparse", attention_pattern="block_sparse", score_source="true").needs_predictors
    assert not LemoConfig(attention_forward="sparse", attention_pattern="shifted_groups").needs_predictors
    model = pattern_model(attention_pattern="block_sparse", pattern_share=0.4)
    layer = sparse_backbone(model).layers[1]
    inputs = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args[0], kwargs["sparse_batch"])), with_kwargs=True
    )
    loss_and_gradients(model, place(TEXTS, "left").batch)
    hook.remove()
    (hidden, batch), documents = inputs[0], inputs[0][1].documents
    normed = layer.attention_norm(hidden.detach().flatten(0, 1)[documents.rows])
    features = [documents.split_blocks(part) for part in layer.lemo_predictor(normed, documents)]
    scores = [
        predicted_block_scores(q, k, layer.lemo_predictor.distance.by_distance(len(q))) for q, k in zip(*features, strict=True)
    ]
    wanted = choose_pairs(scores, batch.selections[1], documents, 0.4)
    assert torch.equal(batch.patterns[1].marks, wanted.marks)
    assert not torch.equal(batch.patterns[0].marks, wanted.marks), "layers choose by their own scores"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attention_pattern": "block_sparse"},
            "in the other forms dropped tokens attend too; got attention_pattern='block_sparse' with",
        ),
        ({"attention_pattern": ["full", "shifted_groups"]}, "set attention_forward='sparse', or attention_pattern='full'"),
        ({"attention_pattern": "sparse"}, "attention_pattern must be one of full, shifted_groups, block_sparse"),
        ({"attention_pattern": []}, "or one per layer"),
        ({"attention_pattern": None}, "got None"),
        ({"group_size": 1}, "group_size must be a whole number from 2"),
        ({"group_size": True}, "got True; leave it out"),
        ({"pattern_share": 0}, r"must be in \(0, 1\]; got 0; 0.25 sees"),
        ({"pattern_share": "a"}, "got 'a'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(LemoConfigError, match=message):
        LemoConfig(**fields)


def test_a_list_must_name_every_layer():
    config = LemoConfig(attention_forward="sparse", attention_pattern=["full", "shifted_groups"])
    with pytest.raises(LemoConfigError, match="attention_pattern lists 2 layers, the model has 3"):
        config.validate_for(3)


def test_documents_that_fill_no_group_are_one_group_in_whichever_batch():
    """The first batch of a run says nothing of the next ones, and the longest document of one nothing of the others."""
    groups = {"attention_pattern": "shifted_groups", "group_size": 60}
    short, mixed = (
        place([random_tokens(length, length) for length in lengths], "left").batch for lengths in ([90, 30], [130, 90])
    )
    trained = pattern_model(**groups)
    for batch, same in ((short, True), (mixed, False), (short, True)):
        sparse_backbone(trained).lemo_draw = 0
        got_loss, got = loss_and_gradients(trained, batch)
        loss, grads = loss_and_gradients(pattern_model(), batch)
        if same:
            torch.testing.assert_close(got_loss, loss)
            assert_close_gradients(got, grads)
        assert torch.isclose(got_loss, loss) == same


def test_a_group_that_no_document_fills_is_named():
    config = LemoConfig(attention_forward="sparse", attention_pattern="shifted_groups", group_size=60, block_size=8)
    assert group_beyond(config, [90, 130], 2) is None
    said = group_beyond(config, [40, 90], 2)
    assert said == (
        "no document fills a group: of 2 looked at a layer keeps 42 tokens at most, of one with 90; "
        "got group_size=60; set it to 11, or leave it out for a quarter of each document"
    )
    # 17 blocks keep 9, and 18 too, of which the last holds one token.
    config.update(group_size=72)
    assert group_beyond(config, [136, 137], 2) is None
    assert "keeps 65 tokens" in group_beyond(config, [137], 2)
    config.update(selection="threshold")
    assert group_beyond(config, [72], 2) is None
    assert "keeps 50 tokens" in group_beyond(config, [50], 2)
    assert group_beyond(config, [], 2) is None
    config.update(attention_pattern=["full", "shifted_groups"], dense_layers=[1])
    assert group_beyond(config, [50], 2) is None


PROFILED = AutoConfig.for_model(
    "llama", hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.parametrize("name", ["lemo-sparse-groups-rows", "lemo-sparse-blocks"])
def test_a_benched_step_agrees_with_its_estimate_and_its_counts_on_fake_tensors(name):
    (chosen,) = choose_methods(name)
    settings = chosen.settings(512, "float32")
    assert runs_flex_attention(settings, 3) == ("blocks" in name)
    row = measure_step(PROFILED, chosen, settings, torch.device("cpu"), steps=1, counts=True)
    estimate = Estimator(PROFILED, on_gpu=False).estimate(settings)
    assert row["flops"] == sum(estimate.flops.values())
    assert row["live_peak_bytes"] == pytest.approx(estimate.live_bytes, rel=0.02)
    fake = saved_on_fake_tensors(PROFILED, settings)
    assert {part: row[part] for part in fake} == fake
    # On a GPU the counter sees nothing of compiled attention: the estimate's number is the row's then.
    plain = Estimator(PROFILED, on_gpu=False).estimate(choose_methods("lemo-sparse")[0].settings(512, "float32"))
    assert sum(estimate.flops.values()) != sum(plain.flops.values())


def test_an_estimate_of_few_layers_keeps_each_ones_pattern():
    lemo = LemoConfig(
        attention_forward="sparse",
        selection="ratio",
        keep_ratio=[0.5, 1.0, 0.5],
        dense_layers=[0],
        attention_pattern="block_sparse",
    )
    settings = StepSettings(512, lemo=lemo)
    assert settings.name == "LeMo sparse 0.666667, block sparse"
    assert len(set(layer_kinds(PROFILED, settings))) == 3
    built = build_on_meta(settings, [1, 2]).config.lemo
    assert [built.pattern_of(layer, 2) for layer in range(2)] == ["block_sparse", "block_sparse"]
    assert [built.is_dense(layer, 2) for layer in range(2)] == [True, False]
    assert build_on_meta(settings, [0]).config.lemo.pattern_of(0, 1) == "full"


def build_on_meta(settings, layers):
    with torch.device("meta"):
        return build_model(PROFILED, settings, layers)


def test_runs_say_which_pattern_they_trained_in():
    def rows(**fields):
        return dict(selection_rows(LemoConfig(attention_forward="sparse", **fields)))

    assert "Attention pattern" not in rows()
    assert (
        rows(attention_pattern="shifted_groups")["Attention pattern"] == "shifted groups of a quarter of a document's kept tokens"
    )
    blocks = rows(attention_pattern="block_sparse", pattern_share=0.3, dense_layers=[0])["Attention pattern"]
    assert blocks == "the 0.3 of the pairs of kept blocks that score highest in every layer but the dense ones"
    both = rows(attention_pattern=["full", "block_sparse", "shifted_groups"], group_size=512)["Attention pattern"]
    assert both == "shifted groups of 512 kept tokens and the 0.25 of the pairs of kept blocks that score highest, by layer"


def test_a_run_fits_predictors_for_its_pattern_alone_and_its_tail_attends_to_all(tmp_path):
    """The uniform draw reads no predictors, the pattern does."""
    trainer = tiny_trainer(
        tmp_path,
        {"selection": "sampled", "attention_forward": "sparse", "attention_pattern": "block_sparse"},
        dense_tail_share=0.5,
    )
    seen = []
    first = sparse_backbone(trainer.model).layers[0]
    first.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("sparse_batch")), with_kwargs=True)
    trainer.train()
    assert any("recall" in entry for entry in trainer.state.log_history), "the predictor phase ran"
    steps = [batch for batch in seen if batch is not None]  # the phase's own forwards are the stock model's
    found = {(batch.selections[0].kept_share == 1, sorted(batch.patterns) == [0, 1], bool(batch.patterns)) for batch in steps}
    assert found == {(False, True, True), (True, False, False)}


def test_a_run_is_refused_at_its_start_where_no_document_fills_a_group(tmp_path):
    lemo = {"selection": "sampled", "attention_forward": "sparse", "attention_pattern": "shifted_groups", "group_size": 90}
    with pytest.raises(
        LemoConfigError, match="of 24 looked at a layer keeps 48 tokens at most, of one with 96; got group_size=90; set"
    ):
        tiny_trainer(tmp_path, lemo).train()


def test_committed_counts_are_the_ones_that_the_formulas_give():
    """Llama-3-8B at 64K: P and A of a layer in multiply-adds a token, the first layer dense, every layer run again in backward."""
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "pattern_counts_llama3_8b--any.json"
    found = {row["method"].partition("@")[0]: row["flops"] for row in json.loads(path.read_text())["rows"]}
    hidden, tokens, kept = 4096, 65536, 0.5
    attention, mlp, scores = 2.5 * hidden**2, 10.5 * hidden**2, hidden * (tokens + 1)
    head = 2 * hidden * 128256

    def step(per_layer):
        return 2 * tokens * (per_layer + head)

    # Of dropped tokens that see 128: their projections and, by blocks of 64, 192 keys, forward only.
    local = (1 - kept) * (attention + 2 * hidden * (64 + 128))

    def lemo(share, nearby=0.0):
        among = share * kept**2 * scores
        sparse = mlp + kept * attention + among + 2 * kept * (attention + mlp) + 3.5 * among + nearby
        return step(31 * sparse + 3 * (attention + mlp) + 4.5 * scores)

    # Stock checkpointing does not run the last matrix of a layer again: nothing saves its result.
    stock = step(32 * (3 * (attention + mlp) - mlp / 3 + 4.5 * scores))
    pairs = sum(pair_counts(512, 0.25)) * 64**2 / (32768 * 32769 / 2)
    groups = (4 * (1 / 4) ** 2 + 3 * (1 / 4) ** 2 + 2 * (1 / 8) ** 2) / 2
    for name, wanted in {
        "checkpointing": stock,
        "lemo-sparse-rows": lemo(1.0),
        "lemo-sparse-groups-rows": lemo(groups),
        "lemo-sparse-blocks-rows": lemo(pairs),
        "lemo-sparse-nearby-rows": lemo(1.0, local),
        "lemo-sparse-nearby-groups-rows": lemo(groups, local),
        "lemo-sparse-nearby-blocks-rows": lemo(pairs, local),
    }.items():
        assert found[name] == pytest.approx(wanted, rel=2e-3), name  # adapters, and predictors where there are any
