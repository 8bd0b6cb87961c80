"""The in-place cross-entropy against PyTorch's, and within the segmented loss of lemo_hf/models."""

import pytest
import torch
import torch.nn.functional as F
from lemo_kernels.host import KernelInputError
from lemo_kernels.segmented_loss import cross_entropy_in_place, cross_entropy_in_place_operator
from peft import LoraConfig, get_peft_model
from references.kernel_inputs import DEVICE, DTYPES, assert_close, far_rows, random
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lemo_hf.models import segmented_loss as reference
from lemo_hf.models.kernel_switch import kernel_mode

# One rounding of the gradient to its dtype; the largest entry is near 1.
LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def logits_and_labels(rows, vocabulary, dtype=torch.float32, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = random(rows, vocabulary, dtype=dtype, seed=seed, scale=spread)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator).to(DEVICE)
    labels[1::3] = -100
    return logits, labels


def by_torch(logits, labels, softcap=None):
    wide = logits.double().requires_grad_()
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    losses = F.cross_entropy(capped, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 63), (65, 65), (7, 2000), (3, 40000)])
def test_losses_and_gradients_equal_torch(rows, vocabulary, softcap, dtype):
    logits, labels = logits_and_labels(rows, vocabulary, dtype)
    wanted, wanted_grad = by_torch(logits, labels, softcap)
    losses = cross_entropy_in_place(logits, labels, softcap)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-6, atol=2e-6)
    assert torch.isfinite(logits).all()
    assert (logits.double() - wanted_grad).abs().max() <= LIMITS[dtype]


def test_large_logits_and_masked_ones():
    logits = torch.full((3, 20000), -torch.inf, device=DEVICE)
    logits[0, 19999] = 3e4  # behind a first strip of nothing but minus infinity
    logits[1, 5], logits[1, 17000] = 80.0, 90.0
    logits[2] = 1e4
    labels = torch.tensor([19999, 5, 77], device=DEVICE)
    wanted, wanted_grad = by_torch(logits, labels)
    losses = cross_entropy_in_place(logits, labels)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(logits.double(), wanted_grad, rtol=1e-5, atol=1e-6)


def test_no_row_has_no_loss_and_an_ignored_row_no_gradient():
    assert cross_entropy_in_place(torch.zeros(0, 9, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)).shape == (
        0,
    )
    logits, labels = logits_and_labels(4, 50)
    labels[:] = -100
    assert torch.equal(cross_entropy_in_place(logits, labels), torch.zeros(4, device=DEVICE))
    assert torch.equal(logits, torch.zeros(4, 50, device=DEVICE))


def test_rows_with_a_stride_are_written_where_they_lie():
    wide = torch.full((6, 100), 7.0, device=DEVICE)
    logits, labels = logits_and_labels(6, 40)
    wide[:, 30:70] = logits
    _, wanted = by_torch(logits, labels)
    cross_entropy_in_place(wide[:, 30:70], labels)
    torch.testing.assert_close(wide[:, 30:70], wanted.float(), rtol=1e-5, atol=1e-6)
    wide[:, 30:70] = 7.0
    assert torch.equal(wide, torch.full((6, 100), 7.0, device=DEVICE)), "nothing else was touched"


def test_offsets_beyond_32_bits():
    (logits,), labels = far_rows(40), torch.arange(5, device=DEVICE)
    near = logits.clone()
    assert torch.equal(cross_entropy_in_place(logits, labels), cross_entropy_in_place(near, labels))
    assert torch.equal(logits, near)


def test_the_same_bits_twice():
    first, labels = logits_and_labels(20, 3000, torch.float16)
    second = first.clone()
    assert torch.equal(cross_entropy_in_place(first, labels), cross_entropy_in_place(second, labels))
    assert torch.equal(first, second)


def test_autograd_knows_that_the_logits_changed():
    weight = random(8, 30).requires_grad_()
    labels = torch.arange(5, device=DEVICE)
    plain = random(5, 8) @ weight
    cross_entropy_in_place(plain.detach(), labels)
    plain.backward(plain.detach())  # a product does not read its own result
    saved = (random(5, 8) @ weight).tanh()
    cross_entropy_in_place(saved.detach(), labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward(saved.detach())


def test_the_operator_is_registered_as_torch_expects():
    logits, labels = logits_and_labels(5, 40)
    torch.library.opcheck(cross_entropy_in_place_operator, (logits, labels, 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"\(2, 3, 4\)"),
        ({"logits": torch.zeros(4, 9, dtype=torch.float64)}, "float64"),
        ({"logits": torch.zeros(9, 4).T}, r"strides \(1, 4\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"\(3,\)"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "int32"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "meta"),
        ({"targets": torch.tensor([0, 8, 9, -100])}, r"got \[9\]"),
        ({"targets": torch.tensor([0, 8, -1, -100])}, r"got \[-1\]"),
        ({"softcap": 0.0}, "softcap"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_on_the_host(change, message):
    with pytest.raises(KernelInputError, match=message):
        cross_entropy_in_place(**{"logits": torch.zeros(4, 9), "targets": torch.zeros(4, dtype=torch.int64), **change})


class LargestMatrix(TorchDispatchMode):
    """The most bytes that one tensor of `vocabulary` columns had, by dtype."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == self.vocabulary:
                self.bytes[result.dtype] = max(self.bytes.get(result.dtype, 0), result.nbytes)
        return results


def heads_to_train(kind, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        head = nn.Linear(16, 150, bias=kind == "bias")
        if kind == "adapter":
            wrapped = get_peft_model(nn.Sequential(head), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
            head = wrapped.base_model.model[0]
    if kind == "frozen":
        head.requires_grad_(False)
    return head.to(DEVICE, dtype)


def loss_and_gradients(mode, head, hidden, labels, num_items, softcap=None):
    hidden = hidden.clone().requires_grad_()
    with kernel_mode(mode):
        loss = reference.segmented_causal_lm_loss(hidden, labels, head, 16, num_items, softcap=softcap)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, [hidden, *weights])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("num_items", [None, 77])
@pytest.mark.parametrize("kind", ["frozen", "trained", "bias", "adapter"])
def test_the_segmented_loss_is_the_reference_for_every_head(kind, num_items, softcap, dtype):
    head = heads_to_train(kind, dtype)
    hidden = random(2, 63, 16, dtype=dtype)
    labels = torch.randint(0, 150, (2, 63), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels[0, 5:30] = -100
    with LargestMatrix(150) as largest:
        got = loss_and_gradients("kernels", head, hidden, labels, num_items, softcap)
    wanted = loss_and_gradients("reference", head, hidden, labels, num_items, softcap)
    if softcap is not None:
        assert wanted[0] < loss_and_gradients("reference", head, hidden, labels, num_items)[0], "the cap changes something"
    assert len(got) == {"frozen": 2, "trained": 3, "bias": 4, "adapter": 4}[kind]
    torch.testing.assert_close(got[0], wanted[0], rtol=2e-6, atol=0)
    for mine, theirs in zip(got[1:], wanted[1:], strict=True):
        assert_close(mine, theirs, dtype)
    # A segment of 16 tokens at a time, and no wider copy of its logits.
    assert largest.bytes == {dtype: 16 * 150 * hidden.element_size()}


def test_no_label_gives_no_gradient_and_every_label_ignored_no_launch():
    head = heads_to_train("trained", torch.float32)
    labels = torch.full((1, 9), -100, device=DEVICE)
    loss, *grads = loss_and_gradients("kernels", head, random(1, 9, 16), labels, None)
    assert loss.isnan()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
