"""What choosing blocks asks of the host: nothing where counts are fixed, one number per document with thresholds."""

import pytest
import torch
from references.device_costs import DeviceWaits, HostReads
from references.one_layer import rotary_of
from references.tiny_models import lemo_model, random_tokens, stock_model

from lemo_hf.models.documents import Documents, find_documents
from lemo_hf.models.lemo_config import LemoConfig
from lemo_hf.models.sparse_decoder import SparseBatch, sparse_backbone
from lemo_hf.models.token_elimination import choose_blocks


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


@pytest.mark.parametrize("mlp_keep_ratio", [None, 0.3, 1.0])
def test_thresholds_read_the_counts_once_a_layer(mlp_keep_ratio):
    config = LemoConfig(selection="threshold", thresholds=[0.5], block_size=8, mlp_keep_ratio=mlp_keep_ratio)
    documents = documents_on("cpu")
    _ = documents.rows, documents.block_of_row
    scores = [torch.rand(blocks) for blocks in documents.block_counts]
    with HostReads() as reads, DeviceWaits() as waits:
        chosen = choose_blocks(scores, documents, config, 0, 0)
    assert (chosen.mlp_kept is not None) == (mlp_keep_ratio == 0.3), "the MLP keeps fewer rows, or the same"
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


def layer_alone(architecture="llama", **lemo):
    """A layer, its run over one batch, and its input."""
    stock = stock_model(num_hidden_layers=1, architecture=architecture)
    backbone = sparse_backbone(lemo_model(stock, {}, keep_ratio=0.4, **lemo))
    layer, tokens = backbone.layers[0], random_tokens(50, 1)[None]
    documents = find_documents(1, 50, 8, torch.device("cpu"), input_ids=tokens)
    hidden = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(3))
    rotary = rotary_of(backbone, hidden)
    _ = SparseBatch(documents, backbone.config.lemo, 1, 3)  # as the backbone does before its first layer

    def run(hidden):
        return layer.sparse_forward(hidden, rotary, SparseBatch(documents, backbone.config.lemo, 1, 3))

    return layer, run, hidden


def run_once(layer, call, hidden):
    """Output, gradients, and the bytes that are saved for these beside the layer's weights."""
    leaf, seen = hidden.clone().requires_grad_(), {}

    def note(part):
        seen[part.untyped_storage().data_ptr()] = part
        return part

    with torch.autograd.graph.saved_tensors_hooks(note, lambda part: part):
        output = call(leaf)
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(output.square().sum(), [leaf, *trained])
    return [output, *gradients], sum(part.untyped_storage().nbytes() for place, part in seen.items() if place not in weights)


def run_compiled(layer, run, hidden, backend):
    """The layer in one graph: results must be those of the uncompiled layer. What it saves, and what that does, in bytes."""
    results, saved = run_once(layer, torch.compile(run, backend=backend, fullgraph=True), hidden)
    wanted, saved_uncompiled = run_once(layer, run, hidden)
    assert len(results) > 9, "the adapters train"
    for mine, theirs in zip(results, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    return saved, saved_uncompiled


# Dynamo instantiates an autograd.Function while it traces; torch warns of that, to itself.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
@pytest.mark.parametrize("selection", ["ratio", "sampled"])
def test_a_layer_compiles_without_a_graph_break(form, selection, fresh_dynamo):
    """Prediction, selection, movement, attention and MLP in one graph, with the gradients of the uncompiled layer."""
    run_compiled(*layer_alone(selection=selection, attention_forward=form), "eager")


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"attention_forward": "exact"}),
        pytest.param("llama", {"attention_forward": "kept_keys"}, marks=pytest.mark.slow),
        # Signed means; OPT has no rotary positions, and nothing asks the device about that.
        ("opt", {"attention_forward": "sparse", "nearby_tokens": 7, "block_reduction": "mean"}),
    ],
    ids=["exact", "kept_keys", "sparse"],
)
def test_kept_row_checkpointing_compiles_without_a_graph_break(architecture, settings, fresh_dynamo):
    """And the graph saves no more, but that of one layer alone it may save the whole input."""
    layer, run, hidden = layer_alone(architecture, selection="ratio", checkpoint="kept_rows", **settings)
    saved, saved_uncompiled = run_compiled(layer, run, hidden, "aot_eager")
    assert saved <= saved_uncompiled + hidden.nbytes
