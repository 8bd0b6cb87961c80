"""What choosing blocks asks of the host: nothing where counts are fixed, one number per document with thresholds."""

from collections import Counter

import pytest
import torch
from references.tiny_models import lemo_model, random_tokens, stock_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lemo_hf.models.documents import Documents, find_documents
from lemo_hf.models.lemo_config import LemoConfig
from lemo_hf.models.sparse_decoder import SparseBatch, sparse_backbone
from lemo_hf.models.token_elimination import choose_blocks

# Functions that wait for the device, whatever they are called by; operators that size their result by values do as well.
READING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique", "_unique2", "repeat_interleave", "_local_scalar_dense", "equal"}


class HostReads(TorchFunctionMode):
    """Counts calls from Python that read a tensor's values, or copy a Python number to the device (which waits as well)."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READING:
            self.seen[name] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("tensor", "as_tensor") and result.device.type != "cpu":
            self.seen["a number copied to the device"] += 1
        return result


class DeviceWaits(TorchDispatchMode):
    """Counts operators that wait for the device: copies between devices, and results sized by values."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        tensors = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, torch.Tensor)]
        if name in ("_to_copy", "copy_") and any(tensor.device != result.device for tensor in tensors):
            self.seen["copy between devices"] += 1
        if name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1]):
            self.seen["index by marks"] += 1
        if name in SIZED_BY_VALUES:
            self.seen[name] += 1
        return result


def documents_on(device, lengths=(100, 37, 8)):
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    keys = torch.zeros(len(lengths), dtype=torch.int64, device=device)
    return Documents(starts, list(lengths), keys, 8, sum(lengths), torch.device(device))


def scores_on(device, documents):
    return [torch.zeros(blocks, device=device) for blocks in documents.block_counts]


@pytest.mark.parametrize("selection", ["ratio", "sampled"])
def test_choosing_a_fixed_count_neither_waits_for_the_device_nor_copies_to_it(selection):
    """On the meta device reading a value fails, and a number that comes from the host is a copy between devices."""
    config = LemoConfig(selection=selection, keep_ratio=0.4, block_size=8, sampling_temperature=1.0)
    documents = documents_on("meta")
    _ = documents.rows, documents.block_of_row  # laid out once a batch
    with HostReads() as reads, DeviceWaits() as waits:
        chosen = choose_blocks(scores_on("meta", documents), documents, config, 1, 5)
    assert chosen.kept_rows.shape == (sum(chosen.kept_lengths),)
    assert chosen.rest_rows.shape == (145 - sum(chosen.kept_lengths),)
    assert not reads.seen
    assert not waits.seen


def test_thresholds_read_the_counts_once_a_layer():
    config = LemoConfig(selection="threshold", thresholds=[0.5], block_size=8)
    documents = documents_on("cpu")
    _ = documents.rows, documents.block_of_row
    scores = [torch.rand(blocks) for blocks in documents.block_counts]
    with HostReads() as reads, DeviceWaits() as waits:
        choose_blocks(scores, documents, config, 0, 0)
    assert reads.seen == {"tolist": 1}
    assert not waits.seen


def test_what_waits_is_counted():
    numbers = torch.arange(4)
    with HostReads() as reads, DeviceWaits() as waits:
        numbers[numbers > 1].tolist()
        numbers.nonzero()
        numbers.to("meta")
        bool(numbers[0] > 1)
        torch.as_tensor(3, device="meta")
    assert reads.seen == {"tolist": 1, "__bool__": 1, "a number copied to the device": 1}
    assert waits.seen["copy between devices"] == waits.seen["nonzero"] == waits.seen["index by marks"] == 1


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo instantiates an autograd.Function while it traces; torch warns of that, to itself.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["sparse", "exact"])
@pytest.mark.parametrize("selection", ["ratio", "sampled"])
def test_a_layer_compiles_without_a_graph_break(form, selection, fresh_dynamo):
    """Prediction, selection, movement, attention and MLP in one graph, with the gradients of the uncompiled layer."""
    stock = stock_model(num_hidden_layers=1)
    backbone = sparse_backbone(lemo_model(stock, {}, selection=selection, keep_ratio=0.4, attention_forward=form))
    layer, tokens = backbone.layers[0], random_tokens(50, 1)[None]
    documents = find_documents(1, 50, 8, torch.device("cpu"), input_ids=tokens)
    hidden = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(3))
    rotary = backbone.rotary_emb(hidden, torch.arange(50)[None])
    _ = SparseBatch(documents, backbone.config.lemo, 1, 3)  # as the backbone does before its first layer

    def run(hidden):
        return layer.sparse_forward(hidden, rotary, SparseBatch(documents, backbone.config.lemo, 1, 3))

    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    results = []
    for call in (run, torch.compile(run, backend="eager", fullgraph=True)):
        leaf = hidden.clone().requires_grad_()
        output = call(leaf)
        results.append([output, *torch.autograd.grad(output.square().sum(), [leaf, *weights])])
    assert len(results[0]) > 10, "the adapters train"
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
