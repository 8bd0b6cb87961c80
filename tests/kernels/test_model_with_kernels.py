"""A tiny model that trains with kernels is the one that trains with the reference."""

import copy

import pytest
import torch
from references.kernel_inputs import DEVICE, error_ratio, random
from references.tiny_models import (
    batches_of,
    chosen_blocks,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    with_varied_vectors,
)

from lemo_hf.models import row_movement
from lemo_hf.models.documents import find_documents
from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.models.sparse_decoder import SparseBatch, sparse_backbone


def tiny(architecture="llama", lora=None, layers=1, **lemo):
    stock = with_varied_vectors(stock_model(architecture=architecture, num_hidden_layers=layers))
    return lemo_model(stock, lora or {"targets": "attention"}, keep_ratio=0.6, **lemo).to(DEVICE)


def documents(layout="left", lengths=(37, 1, 20)):
    return place([random_tokens(length, seed) for seed, length in enumerate(lengths)], layout, extra=2).batch


def with_leaf(model, batch):
    """The batch by its embeddings, which take a gradient: that of the residual stream below the first layer."""
    batch = {name: part.to(model.device) if torch.is_tensor(part) else part for name, part in batch.items()}
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    return {**batch, "inputs_embeds": embedded}


def both(model, batch):
    """Loss, gradients and chosen blocks with kernels, and with the reference, which has all its operators on the CPU only."""
    results = []
    for mode, device in (("kernels", DEVICE), ("reference", torch.device("cpu"))):
        here = model if model.device == device else copy.deepcopy(model).to(device)
        inputs = with_leaf(here, batch)
        with kernel_mode(mode), batches_of(here) as batches:
            loss, gradients = loss_and_gradients(here, inputs)
        gradients["stream"] = inputs["inputs_embeds"].grad
        results.append((loss.cpu(), {name: grad.cpu() for name, grad in gradients.items()}, chosen_blocks(batches[0])))
    return results


def assert_alike(results, allowed=2e-5):
    (loss, gradients, blocks), (wanted_loss, wanted, wanted_blocks) = results
    assert blocks == wanted_blocks
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    assert len(wanted) > 4
    for name, gradient in gradients.items():
        assert wanted[name].abs().max() > 0, name
        assert error_ratio(gradient, wanted[name]) <= allowed, name


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        *((architecture, form) for architecture in ("llama", "opt") for form in ("sparse", "exact")),
        ("llama", "kept_keys"),
        pytest.param("opt", "kept_keys", marks=pytest.mark.slow),
    ],
)
def test_loss_gradients_and_choice_agree(architecture, form, checkpoint):
    model = tiny(architecture, {"targets": "all-linear"}, attention_forward=form, checkpoint=checkpoint, selection="ratio")
    assert_alike(both(model, documents()))


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
def test_dropped_tokens_that_see_those_before_them_agree(checkpoint):
    settings = {"attention_forward": "sparse", "nearby_tokens": 7, "checkpoint": checkpoint, "selection": "ratio"}
    assert_alike(both(tiny(**settings), documents("packed_seq_idx")))


@pytest.mark.parametrize("layout", ["right", "packed_seq_idx"])
def test_other_layouts_agree(layout):
    assert_alike(both(tiny(selection="ratio"), documents(layout)))


def test_a_model_whose_norms_train_agrees():
    stock = with_varied_vectors(stock_model(num_hidden_layers=1))
    assert_alike(both(lemo_model(stock, selection="ratio", keep_ratio=0.6).to(DEVICE), documents()))


def test_a_patched_norm_is_called_and_its_activation_too():
    model = tiny(selection="ratio")
    layer = sparse_backbone(model).layers[0]
    calls = []
    layer.input_layernorm.register_forward_hook(lambda module, args, output: calls.append("norm") or 0.5 * output)
    layer.mlp.act_fn.register_forward_hook(lambda module, args, output: calls.append("act") or 2 * output)
    assert_alike(both(model, documents()))
    assert calls.count("norm") == 2 * 3, "kept rows, rest rows and prediction, in either mode"
    assert calls.count("act") >= 2 * 2


def kernels_that_run(model, batch, monkeypatch):
    seen = []
    real = row_movement.kernel

    def watched(name, *args):
        found = real(name, *args)
        if found is not None:
            seen.append(name)
        return found

    monkeypatch.setattr(row_movement, "kernel", watched)
    with kernel_mode("kernels"):
        loss_and_gradients(model, with_leaf(model, batch))
    return set(seen)


def test_every_kernel_has_its_place(monkeypatch):
    moved = {"take_rows", "row_slots", "gather_norm", "add_norm", "rest_norm", "merge_rows", "output_determines_input"}
    model = tiny(selection="ratio", checkpoint="kept_rows")
    seen = kernels_that_run(model, documents(), monkeypatch)
    assert seen == moved | {"replace_rows", "lay_out_rows", "block_features"}


def saved_bytes(model, batch, mode):
    seen = {}

    def note(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = model.to(DEVICE if mode == "kernels" else "cpu")
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    inputs = with_leaf(model, batch)
    with kernel_mode(mode):
        model(**inputs)  # tries its kernels
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(**inputs)
    return sum(nbytes for pointer, nbytes in seen.items() if pointer not in weights)


def test_norms_whose_result_is_saved_anyway_save_nothing_more():
    stock = with_varied_vectors(stock_model(num_hidden_layers=1))
    batch, rows = documents("right", (16, 16)), 2 * 16 * 32 * 4
    sizes = {}
    for zeros in (False, True):
        for name, weight in stock.named_parameters():
            if "layernorm" in name:
                weight.data.abs_().clamp_min_(0.1)
                weight.data[0] = 0.0 if zeros else 1.0
        model = lemo_model(stock, {"targets": "all-linear"}, keep_ratio=1.0, selection="ratio").to(DEVICE)
        sizes[zeros] = [saved_bytes(model, batch, mode) for mode in ("reference", "kernels")]
    # Both norms' inputs: adapters read both results. A weight of zero brings the rows back.
    assert sizes[False][0] - sizes[False][1] >= 2 * rows
    assert sizes[True][1] - sizes[False][1] == 2 * rows


def test_weights_that_change_are_asked_about_again():
    model = tiny(selection="ratio")
    norm = sparse_backbone(model).layers[0].input_layernorm
    with kernel_mode("kernels"):
        norm.weight.data.fill_(1.0)
        assert row_movement._output_determines_input(norm, torch.float32)
        assert not row_movement._output_determines_input(norm, torch.float16), "the result would be wider than the rows"
        with torch.no_grad():
            norm.weight[3] = 0.0
        assert not row_movement._output_determines_input(norm, torch.float32)
        norm.weight = torch.nn.Parameter(torch.ones(32, device=DEVICE), requires_grad=False)
        assert row_movement._output_determines_input(norm, torch.float32)
        norm.weight.requires_grad_()
        assert not row_movement._output_determines_input(norm, torch.float32)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize(
    "settings",
    [
        {"attention_forward": "exact"},
        {"attention_forward": "kept_keys", "nearby_tokens": 7},
        pytest.param({"attention_forward": "sparse", "nearby_tokens": 0}, marks=pytest.mark.slow),
        {"attention_forward": "sparse", "nearby_tokens": 7},
    ],
    ids=["exact", "kept_keys", "sparse", "sparse_nearby"],
)
def test_a_layer_with_kernels_compiles_without_a_graph_break(settings, checkpoint):
    backbone = sparse_backbone(tiny(selection="ratio", checkpoint=checkpoint, **settings))
    layer, tokens = backbone.layers[0], random_tokens(20, 1)[None].to(DEVICE)
    documents_here = find_documents(1, 20, 8, DEVICE, input_ids=tokens)
    hidden = random(1, 20, 32)
    rotary = backbone.rotary_emb(hidden, torch.arange(20, device=DEVICE)[None])
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    _ = SparseBatch(documents_here, backbone.config.lemo, 1, 3)  # as the backbone does before its first layer

    def run(hidden):
        return layer.sparse_forward(hidden, rotary, SparseBatch(documents_here, backbone.config.lemo, 1, 3))

    torch._dynamo.reset()
    results = []
    with kernel_mode("kernels"):
        for call in (run, torch.compile(run, backend="eager", fullgraph=True)):
            leaf = hidden.clone().requires_grad_()
            output = call(leaf)
            results.append([output, *torch.autograd.grad(output.square().sum(), [leaf, *weights])])
    assert len(weights) == 8, "the adapters train"
    for mine, theirs in zip(*results, strict=True):
        assert error_ratio(mine, theirs) < 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
def test_fifty_steps_with_kernels_and_with_the_reference_end_alike(form):
    batches = [documents("right", (33, 17)) for _ in range(2)]
    for seed, batch in enumerate(batches):
        batch["input_ids"] = (batch["input_ids"] + seed) % 90
    runs = []
    for mode in ("kernels", "reference"):
        # sampled: other blocks at each step, the same ones in both runs
        model = tiny(attention_forward=form, layers=2).to(DEVICE if mode == "kernels" else "cpu")
        optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
        losses = []
        with kernel_mode(mode):
            for step in range(50):
                loss, _ = loss_and_gradients(model, with_leaf(model, batches[step % 2]))
                losses.append(loss.cpu())
                optimiser.step()
        runs.append((torch.stack(losses), [weight.detach().cpu() for weight in model.parameters() if weight.requires_grad]))
    (losses, weights), (wanted_losses, wanted_weights) = runs
    assert wanted_losses[-2:].mean() < 0.8 * wanted_losses[:2].mean(), "it must learn"
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-4, atol=0)
    assert (losses - wanted_losses).mean().abs() < 1e-5, "no drift to one side"
    for got, wanted in zip(weights, wanted_weights, strict=True):
        assert error_ratio(got, wanted) < 1e-3


def test_adapters_in_16_bits_on_16_bit_weights():
    stock = with_varied_vectors(stock_model(num_hidden_layers=1)).half()
    model = lemo_model(stock, {"targets": "all-linear"}, selection="ratio", keep_ratio=0.6).half().to(DEVICE)
    assert_alike_in_16_bits(both(model, documents()))


def assert_alike_in_16_bits(results):
    (loss, gradients, _), (wanted_loss, wanted, _) = results
    assert abs(loss - wanted_loss) < 2e-2 * abs(wanted_loss)
    for name, gradient in gradients.items():
        assert error_ratio(gradient, wanted[name]) <= 0.03, name
