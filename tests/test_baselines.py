"""Baselines of `lemo bench`: each computes what its paper defines, and trains."""

from dataclasses import replace

import pytest
import torch
from references.tiny_models import ARCHITECTURES, VOCABULARY, add_lora, stock_model, text, trainable_gradients
from torch import nn
from transformers import AutoConfig

from lemo_hf.errors import LemoError
from lemo_hf.models.token_elimination import kept_block_count
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.baselines import artifact_lemo, random_ltd
from lemo_hf.profiling.baselines.artifact_lemo import pruned_feed_forward, use_artifact_lemo
from lemo_hf.profiling.baselines.baseline import BASELINES, Baseline
from lemo_hf.profiling.baselines.longlora import use_longlora
from lemo_hf.profiling.baselines.random_ltd import draw_rows, use_random_ltd
from lemo_hf.profiling.baselines.stock_layers import decoder_layers
from lemo_hf.profiling.baselines.tokentune import use_tokentune
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.estimate.step_model import StepSettings, build_model, forward_loss, layer_kinds
from lemo_hf.profiling.estimate.step_trace import record_step

FAMILIES = ("llama", "opt", "qwen3")


def small(architecture="llama", layers=2):
    """A tiny stock model without windows, in training mode."""
    return stock_model(architecture=architecture, num_hidden_layers=layers).train()


def with_eager_mask(model, mask):
    """The model with attention by its definition under a mask by head, `(heads, seq_len, seq_len)`."""
    model.set_attn_implementation("eager")
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None]
    for layer in decoder_layers(model):
        stock = layer.forward
        layer.forward = lambda hidden, stock=stock, **rest: stock(hidden, **{**rest, "attention_mask": additive})
    return model


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("tokens", [64, 62, 5])
def test_longlora_is_dense_attention_under_the_mask_of_shifted_groups(architecture, tokens):
    ids = text(2, tokens)
    shifted, dense = small(architecture), small(architecture)
    use_longlora(shifted)
    group = max(2, -(-tokens // 4))
    place = torch.arange(tokens)
    plain = place // group
    # The second half's first group is half a group; what the shift would wrap around stays apart.
    moved = (place - group // 2).div(group, rounding_mode="floor")
    heads = dense.config.num_attention_heads
    same = torch.stack([(group_of[:, None] == group_of) for group_of in [plain] * (heads // 2) + [moved] * (heads // 2)])
    with_eager_mask(dense, same & (place[:, None] >= place))
    wanted = dense(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(shifted(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)
    whole = small(architecture)(input_ids=ids, use_cache=False).logits
    assert (whole - wanted).abs().max() > 1e-2, "the groups change something"


def test_longlora_refuses_what_its_groups_are_not_made_for():
    with pytest.raises(LemoError, match="1 key heads; use one with an even number"):
        use_longlora(stock_model(num_key_value_heads=1))
    with pytest.raises(LemoError, match="sliding window; the config has 11"):
        use_longlora(stock_model(architecture="mistral"))
    model = small()
    use_longlora(model)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(LemoError, match="without padding"):
        model(input_ids=text(1, 8), attention_mask=mask)


@pytest.mark.parametrize(("tokens", "block", "share"), [(64, 8, 0.5), (61, 8, 0.5), (10, 1, 0.3), (5, 64, 0.5), (64, 8, 1.0)])
def test_draws_have_the_share_they_are_asked_for(tokens, block, share):
    rows = draw_rows(tokens, share, block, torch.device("cpu"))
    assert torch.equal(rows, rows.unique())
    blocks = -(-tokens // block)
    assert len((rows // block).unique()) == kept_block_count(blocks, share)
    assert rows.max() < tokens
    # Whole blocks, a shorter last one among them.
    assert len(rows) == sum(min(block, tokens - place * block) for place in (rows // block).unique().tolist())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_random_ltd_drops_tokens_around_its_middle_layers_and_keeps_their_positions(architecture, monkeypatch):
    model, ids = small(architecture, layers=4), text(2, 40)
    use_random_ltd(model, [0, 1, 2, 3], 4, keep_ratio=0.5, block_size=2)
    torch.manual_seed(0)
    draws, passed = [], []
    monkeypatch.setattr(random_ltd, "draw_rows", lambda *given: draws.append(draw_rows(*given)) or draws[-1])
    hooks = [
        layer.register_forward_hook(lambda module, args, output: passed.append((args[0], output)))
        for layer in decoder_layers(model)
    ]
    model(input_ids=ids, use_cache=False)
    assert len(draws) == 2, "the first and the last layer see every token"
    assert not torch.equal(*draws), "each layer draws its own"
    for (before, after), kept in zip(passed[1:3], draws, strict=True):
        dropped = torch.ones(40, dtype=torch.bool).index_fill(0, kept, False)
        assert torch.equal(after[:, dropped], before[:, dropped])
        assert (after[:, kept] - before[:, kept]).abs().amax(-1).min() > 0
    for hook in hooks:
        hook.remove()
    # Kept tokens: the stock layer under a mask that hides the dropped ones.
    layer, (before, after), kept = decoder_layers(small(architecture, layers=4))[1], passed[1], draws[0]
    place = torch.arange(40)
    seen = (place[:, None] >= place) & torch.isin(place, kept)
    mask = torch.zeros(1, 1, 40, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    more = {"position_embeddings": rotary(before, place[None])} if rotary is not None else {}
    wanted = layer(before, attention_mask=mask, **more)
    torch.testing.assert_close(after[:, kept], wanted[:, kept], rtol=1e-4, atol=1e-4)


class _DetachedWhereNotSelected(nn.Module):
    """TokenTune by its definition: the dense model, every activation of a token that was not selected detached."""

    def __init__(self, model, selected):
        super().__init__()
        self.model = model

        def cut(module, args, output):
            marks = torch.zeros(output.shape[1], dtype=torch.bool).index_fill(0, selected, True)[None, :, None]
            return torch.where(marks, output, output.detach())

        for name, module in model.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj")) or name.rpartition(".")[2].isdigit():
                module.register_forward_hook(cut)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_tokentunes_gradient_is_the_dense_one_with_the_other_tokens_detached(architecture):
    ids = text(2, 40)
    tuned = small(architecture)
    use_tokentune(tuned, keep_ratio=0.3, block_size=1)
    tuned = add_lora(tuned, "attention")
    torch.manual_seed(3)
    loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.manual_seed(3)
    selected = draw_rows(40, 0.3, 1, torch.device("cpu"))
    dense = add_lora(small(architecture), "attention")
    labels = torch.full_like(ids, -100)
    after = selected[selected < 39] + 1
    labels[:, after] = ids[:, after]  # the losses of the selected tokens: those of their next ones
    wanted = _DetachedWhereNotSelected(dense, selected).model(input_ids=ids, labels=labels, use_cache=False).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    got, right = trainable_gradients(tuned), trainable_gradients(dense)
    assert got.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(got[name], right[name], rtol=1e-4, atol=1e-6, msg=name)
    labels[:, after] = ids[:, after]
    everything = add_lora(small(architecture), "attention")
    everything(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    plain = trainable_gradients(everything)
    assert any((plain[name] - right[name]).abs().max() > 1e-4 for name in right), "detaching changes something"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_artifacts_pruned_mlp_is_exact_forward_and_backward_where_its_channels_are_kept(architecture):
    layer = decoder_layers(small(architecture))[0].requires_grad_(False)
    rows = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    stock = (lambda x: layer.mlp(x)) if hasattr(layer, "mlp") else (lambda x: layer.fc2(layer.activation_fn(layer.fc1(x))))
    full, pruned, right = (rows.clone().requires_grad_() for _ in range(3))
    wanted = stock(full)
    torch.testing.assert_close(pruned_feed_forward(layer, pruned, 1.0), wanted)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    wanted.backward(upstream)
    pruned_feed_forward(layer, pruned, 1.0).backward(upstream)
    torch.testing.assert_close(pruned.grad, full.grad, rtol=1e-4, atol=1e-6)
    # A fifth: the gradient of an MLP that has these channels only.
    pruned.grad = None
    output = pruned_feed_forward(layer, pruned, 0.2)
    assert torch.equal(output, stock(rows))
    output.backward(upstream)
    first, second = (layer.mlp.gate_proj, layer.mlp.up_proj) if hasattr(layer, "mlp") else (layer.fc1, None)
    activated = (layer.mlp.act_fn if second else layer.activation_fn)(first(rows))
    size = activated.flatten(0, 1).norm(dim=0) + (second(rows).flatten(0, 1).norm(dim=0) if second else 0)
    chosen = torch.zeros(80).index_fill(0, size.topk(16).indices, 1.0)
    inner = (layer.mlp.act_fn if second else layer.activation_fn)(first(right))
    inner = (inner * second(right) if second else inner) * chosen
    (layer.mlp.down_proj if second else layer.fc2)(inner).backward(upstream)
    torch.testing.assert_close(pruned.grad, right.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_artifacts_attention_is_the_stock_one_under_a_mask_of_kept_blocks_for_kept_tokens(architecture, monkeypatch):
    ids = text(2, 60)
    model, dense = (small(architecture, layers=1).requires_grad_(False) for _ in range(2))
    torch.manual_seed(2)
    use_artifact_lemo(model, [31], 32, block_size=8)
    kept, real = [], artifact_lemo.choose_blocks
    monkeypatch.setattr(artifact_lemo, "choose_blocks", lambda *given: kept.append(real(*given)) or kept[-1])
    monkeypatch.setattr(artifact_lemo, "KEPT_CHANNELS", 1.0)
    monkeypatch.setattr(artifact_lemo, "LOSS_CHUNK", 33)
    got = model(input_ids=ids, labels=ids, use_cache=False).loss
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    selection, place = kept[0], torch.arange(60)
    assert selection.kept_lengths == [28, 28], "ceil(0.49 * 8) blocks, the last one of 4 tokens"
    marks = torch.zeros(120, dtype=torch.bool).index_fill(0, selection.kept_rows, True).view(2, 60)
    seen = (place[:, None] >= place) & marks[:, None, :]
    mask = torch.zeros(2, 1, 60, 60).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    layer = decoder_layers(dense)[0]
    stock, attention = layer.forward, layer.self_attn
    layer.forward = lambda hidden, **rest: stock(hidden, **{**rest, "attention_mask": mask})
    attention.register_forward_hook(lambda module, args, output: (output[0] * marks[..., None], None))
    torch.testing.assert_close(hidden, dense.model(input_ids=ids, use_cache=False).last_hidden_state, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got, dense(input_ids=ids, labels=ids, use_cache=False).loss)
    assert artifact_lemo.kept_blocks(0, 32) == 0.99
    assert artifact_lemo.kept_blocks(23, 24) == artifact_lemo.kept_blocks(31, 32) == 0.49
    with pytest.raises(LemoError, match="adapt attention only"):
        pruned_feed_forward(decoder_layers(add_lora(dense, "all-linear").base_model.model)[0], torch.zeros(1, 2, 32), 0.2)


@pytest.mark.parametrize("name", list(BASELINES))
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_baseline_trains_and_saves_less_than_stock(name, architecture):
    values = ARCHITECTURES[architecture][1]
    config = AutoConfig.for_model(
        architecture, **values, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4
    )
    settings = StepSettings(48, "stock", dtype="float32", baseline=Baseline(name, 0.5, 8))
    torch.manual_seed(0)
    model = build_model(config, settings, list(range(4)))
    ids = text(2, 48)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert all("lora_" in key for key, weight in model.named_parameters() if weight.requires_grad)
    optimizer, losses = torch.optim.AdamW(weights, lr=2e-2), []
    for _ in range(8):
        loss = forward_loss(model, ids, settings)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    with ActivationMemory(model) as memory:
        loss = forward_loss(model, ids, settings)
    stock = build_model(config, replace(settings, baseline=None), list(range(4)))
    with ActivationMemory(stock) as whole:
        dense = forward_loss(stock, ids, replace(settings, baseline=None))
    del loss, dense
    if name != "longlora":  # it saves arithmetic, not activations
        assert memory.saved.total < 0.85 * whole.saved.total


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baselines_estimate_is_what_a_real_step_takes(name):
    values = ARCHITECTURES["llama"][1]
    config = AutoConfig.for_model(
        "llama", **values, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4
    )
    settings = StepSettings(512, "stock", dtype="float32", baseline=Baseline(name))
    estimate = Estimator(config, on_gpu=False).estimate(settings)
    model = build_model(config, settings, list(range(4)))
    ids = torch.randint(0, VOCABULARY, (1, 512))
    peak = record_step(model, ids, settings).peak_bytes
    optimizer = 2 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    assert estimate.live_bytes == pytest.approx(peak + optimizer, rel=0.01)


def test_kinds_of_layers_and_bad_settings():
    config = AutoConfig.for_model("llama", num_hidden_layers=6, hidden_size=32)
    kinds = layer_kinds(config, StepSettings(64, "stock", baseline=Baseline("random-ltd")))
    assert len(set(kinds)) == 3, "the first, the middle ones, the last"
    for bad, message in (
        (lambda: Baseline("long-lora"), "did you mean 'longlora'"),
        (lambda: Baseline("tokentune", 0.0), "share in"),
        (lambda: Baseline("tokentune", block_size=0), "at least 1"),
        (lambda: StepSettings(64, "lemo", baseline=Baseline("longlora")), "use method stock"),
        (lambda: use_tokentune(stock_model(architecture="mistral"), 0.5, 1), "does not know sliding_window"),
        (lambda: use_artifact_lemo(stock_model(architecture="opt", dropout=0.1), [0, 1], 2, 8), "does not know dropout"),
    ):
        with pytest.raises(LemoError, match=message):
            bad()
