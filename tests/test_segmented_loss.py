import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from lemo_hf.models.segmented_loss import segmented_causal_lm_loss, shift_labels

HIDDEN, VOCABULARY = 16, 40


def head_of(kind, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(HIDDEN, VOCABULARY, bias=kind == "biased").to(dtype)
        if kind == "frozen":
            return head.requires_grad_(False)
        if kind == "lora":
            holder = nn.ModuleDict({"lm_head": head})
            adapter = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
            return get_peft_model(holder, adapter).base_model.model["lm_head"]
    return head


def batch_of(rows, tokens, dtype=torch.float32, ignored=0.3):
    generator = torch.Generator().manual_seed(rows * 100 + tokens)
    hidden = torch.randn(rows, tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    return hidden, labels.masked_fill(torch.rand(rows, tokens, generator=generator) < ignored, -100)


def with_gradients(loss, hidden, head):
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    return loss, torch.autograd.grad(loss, [hidden, *weights])


def both(hidden, labels, head, segment_size, **extra):
    stock = ForCausalLMLoss(head(hidden), labels, VOCABULARY, **extra)
    mine = segmented_causal_lm_loss(hidden, labels, head, segment_size, extra.get("num_items_in_batch"))
    return with_gradients(mine, hidden, head), with_gradients(stock, hidden, head)


def assert_equal(mine, stock, tolerance=1e-6):
    torch.testing.assert_close(mine[0], stock[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    for got, wanted in zip(mine[1], stock[1], strict=True):
        assert got.dtype == wanted.dtype
        scale = max(wanted.float().abs().nan_to_num().max().item(), 1e-12)
        torch.testing.assert_close(got.float() / scale, wanted.float() / scale, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("kind", ["frozen", "trained", "biased", "lora"])
@pytest.mark.parametrize("segment_size", [1, 7, 16, 1000])
def test_value_and_every_gradient_are_those_of_transformers(kind, segment_size):
    hidden, labels = batch_of(3, 11)
    assert_equal(*both(hidden, labels, head_of(kind), segment_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("items", [None, 23])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kind", ["frozen", "trained", "biased", "lora"])
def test_heads_softcap_ignored_labels_and_items_together_are_their_formula(kind, softcap, items, dtype):
    """Against the formula over all logits at once, in float64; the head's own logits exceed the cap."""
    head = head_of(kind, dtype)
    hidden, labels = batch_of(3, 13, dtype)
    loss = segmented_causal_lm_loss(hidden, labels, head, 5, items, softcap=softcap)
    got = with_gradients(loss, hidden, head)
    wide, rows = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    logits, targets = wide(rows)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert (targets == -100).any()
    if softcap is not None:
        assert logits.abs().max() > softcap
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(logits, targets, reduction="sum")
    wanted = with_gradients(total / ((targets != -100).sum() if items is None else items), rows, wide)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=tolerance, atol=0)
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    assert len(trained) == {"frozen": 0, "trained": 1, "biased": 2, "lora": 2}[kind]
    for mine, theirs, weight in zip(got[1], wanted[1], [hidden, *trained], strict=True):
        assert mine.dtype == weight.dtype
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("items", [57, torch.tensor(57), torch.tensor(57.0)])
@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_num_items_in_batch(items, kind):
    hidden, labels = batch_of(2, 9)
    assert_equal(*both(hidden, labels, head_of(kind), 4, num_items_in_batch=items))


@pytest.mark.parametrize("items", [None, 12, torch.tensor(12)])
@pytest.mark.parametrize("kind", ["frozen", "trained", "lora"])
def test_all_labels_ignored(items, kind):
    hidden, labels = batch_of(2, 5, ignored=2.0)
    extra = {} if items is None else {"num_items_in_batch": items}
    mine, stock = both(hidden, labels, head_of(kind), 4, **extra)
    assert_equal(mine, stock)
    assert stock[0].isnan() if items is None else stock[0] == 0


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (4, 1), (1, 2), (1, 65)])
def test_short_and_ragged_batches(rows, tokens):
    hidden, labels = batch_of(rows, tokens, ignored=0.0)
    assert_equal(*both(hidden, labels, head_of("trained"), 64))


@pytest.mark.parametrize("kind", ["frozen", "trained", "lora"])
def test_bf16(kind):
    hidden, labels = batch_of(2, 33, dtype=torch.bfloat16)
    mine, stock = both(hidden, labels, head_of(kind, torch.bfloat16), 8)
    assert mine[0].dtype == torch.float32
    assert_equal(mine, stock, tolerance=1e-2)


def test_a_trained_bf16_head_sums_its_gradient_in_float32():
    """As close to the float32 truth as one big bf16 product, however many segments there are."""
    hidden, labels = batch_of(1, 600, dtype=torch.bfloat16, ignored=0.0)
    head = head_of("trained", torch.bfloat16)
    (_, (_, many)), (_, (_, one)) = both(hidden, labels, head, 4)
    wide = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    wide.weight.data.copy_(head.weight)
    leaf = hidden.detach().float().requires_grad_()
    _, (_, truth) = with_gradients(ForCausalLMLoss(wide(leaf), labels, VOCABULARY), leaf, wide)
    error = (many.float() - truth).norm() / truth.norm()
    assert error < max(1.5 * (one.float() - truth).norm() / truth.norm(), 5e-3)


def test_float64_passes_gradcheck():
    hidden, labels = batch_of(1, 6)
    head = head_of("trained").double()

    def loss(rows, weight):
        return segmented_causal_lm_loss(rows, labels, head, 4, 3)

    assert torch.autograd.gradcheck(loss, (hidden.detach().double().requires_grad_(), head.weight))


def test_labels_already_shifted():
    hidden, labels = batch_of(2, 9)
    head = head_of("trained")
    shifted = shift_labels(labels)
    mine = segmented_causal_lm_loss(hidden, None, head, 4, next_labels=shifted)
    stock = ForCausalLMLoss(head(hidden), None, VOCABULARY, shift_labels=shifted)
    assert_equal(with_gradients(mine, hidden, head), with_gradients(stock, hidden, head))


def test_no_labels_at_all_is_an_error():
    with pytest.raises(ValueError, match="needs labels; got neither"):
        segmented_causal_lm_loss(torch.zeros(1, 2, HIDDEN), None, head_of("frozen"), 4)


def test_a_hidden_state_without_gradient_still_trains_the_head():
    hidden, labels = batch_of(2, 9)
    head = head_of("trained")
    segmented_causal_lm_loss(hidden.detach(), labels, head, 4).backward()
    _, (_, wanted) = with_gradients(ForCausalLMLoss(head(hidden), labels, VOCABULARY), hidden, head)
    torch.testing.assert_close(head.weight.grad, wanted)


def test_backward_twice_and_a_scaled_loss():
    hidden, labels = batch_of(2, 9)
    head = head_of("trained")
    loss = segmented_causal_lm_loss(hidden, labels, head, 4)
    first = torch.autograd.grad(loss * 3, (hidden, head.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, head.weight))
    for tripled, plain in zip(first, second, strict=True):
        torch.testing.assert_close(tripled, 3 * plain)


def test_evaluation_without_autograd():
    hidden, labels = batch_of(2, 9)
    head = head_of("trained")
    with torch.no_grad():
        loss = segmented_causal_lm_loss(hidden, labels, head, 4)
    torch.testing.assert_close(loss, ForCausalLMLoss(head(hidden), labels, VOCABULARY).detach())


def test_only_one_segment_of_logits_exists_at_a_time():
    hidden, labels = batch_of(2, 33, ignored=0.0)
    seen = []

    class Head(nn.Linear):
        def forward(self, rows):
            seen.append(rows.shape[0])
            return super().forward(rows)

    segmented_causal_lm_loss(hidden, labels, Head(HIDDEN, VOCABULARY, bias=False), 10)
    assert max(seen) == 10
    assert sum(seen) == 64  # the last token of each row has no label and needs no logits


def test_under_autocast():
    hidden, labels = batch_of(2, 33)
    for kind in ("trained", "lora"):
        head = head_of(kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine = segmented_causal_lm_loss(hidden, labels, head, 8)
            stock = ForCausalLMLoss(head(hidden), labels, VOCABULARY)
        assert_equal(with_gradients(mine, hidden, head), with_gradients(stock, hidden, head), tolerance=2e-2)


@pytest.mark.parametrize("softcap", [0.0, -3.0, float("nan")])
def test_a_softcap_that_bounds_nothing_is_refused(softcap):
    rows, labels = torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="softcap bounds the logits and must be above 0"):
        segmented_causal_lm_loss(rows, labels, torch.nn.Linear(8, 5), 2, softcap=softcap)
