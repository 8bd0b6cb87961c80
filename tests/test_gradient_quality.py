"""The measures of benchmarks/gradient_quality.py, on gradients whose answer is known."""

import gradient_quality
import pytest
import torch
from references.tiny_models import batches_of, lemo_model, random_tokens, stock_model

from lemo_hf.models.sparse_decoder import sparse_backbone

NAME = "model.layers.0.self_attn.q_proj.lora_B.weight"


def gradients(noise, scale=1.0, samples=200, weights=400):
    """A constant gradient of 1 under Gaussian noise, by sample."""
    generator = torch.Generator().manual_seed(int(noise * 10))
    return [{NAME: scale * (1 + noise * torch.randn(weights, generator=generator))} for _ in range(samples)]


def test_progress_knows_noise_and_no_scale():
    """With noise of n times the gradient Adam's normaliser is sqrt(1 + n ** 2) of it."""
    task = {NAME: torch.ones(400)}
    dense = gradients(1.0)
    same = gradient_quality.quality(dense, dense, task)
    assert (same["progress"], same["spread"]) == (1, 0)
    assert same["cosine"] == pytest.approx(1)
    noisy = gradient_quality.quality(gradients(3.0, scale=0.1), dense, task)
    assert noisy["progress"] == pytest.approx((2 / 10) ** 0.5, rel=0.03)
    assert noisy["spread"] < 0.02
    assert noisy["cosine_task"] == pytest.approx(1 / 10**0.5, rel=0.05)
    opposite = gradient_quality.quality([{NAME: -each[NAME]} for each in dense], dense, task)
    assert opposite["progress"] == pytest.approx(-1)


def test_labels_of_drawn_blocks_are_those_that_kept_rows_predict():
    tokens = random_tokens(640, 1)
    labels = gradient_quality.labels_of_drawn_blocks(tokens, 3)
    predicts = labels[1:] != -100
    assert torch.equal(labels[1:][predicts], tokens[1:][predicts])
    by_block = torch.cat((predicts, torch.tensor([True]))).view(10, 64)
    assert torch.equal(by_block.all(1), by_block.any(1)), "whole blocks"
    assert by_block.all(1).sum() == 5
    assert by_block[0].all()
    assert by_block[-1].all()


def test_reweighting_scales_what_enters_at_drawn_rows():
    """Eight inner blocks of ten, three of them drawn: what enters attention there is scaled by 8/3, the ends are left alone."""
    stock = stock_model(num_hidden_layers=1)
    stock.model.layers[0].mlp.down_proj.weight.data.zero_()  # or the MLP's own weights come on top
    model = lemo_model(stock, {"targets": ["o_proj"]}, block_size=4, keep_ratio=0.5)
    tokens, entering = random_tokens(40, 1), []

    def note(module, args, output):
        if output.requires_grad:
            output.register_hook(entering.append)

    def run():
        sparse_backbone(model).lemo_draw = 0
        handle = sparse_backbone(model).layers[0].self_attn.o_proj.register_forward_hook(note)
        gradient_quality.gradient(model, tokens)
        handle.remove()

    run()
    with gradient_quality.branches_reweighted(model), batches_of(model) as batches:
        run()
    run()
    plain, weighted, again = entering
    (kept,) = batches[0].selections[0].kept_blocks.view(1, 10)
    weights = torch.where((torch.arange(10) % 9 == 0), 1.0, 8 / 3)[kept].repeat_interleave(4)
    assert kept.sum() == 5
    torch.testing.assert_close(weighted, plain * weights[:, None])
    assert torch.equal(plain, again), "no hook is left behind"


def test_kept_keys_alone_is_another_gradient_and_leaves_nothing_behind():
    model = lemo_model(stock_model(num_hidden_layers=1), {"targets": ["q_proj", "v_proj"]}, block_size=4, keep_ratio=0.5)
    tokens = random_tokens(40, 1)

    def run():
        sparse_backbone(model).lemo_draw = 0
        return gradient_quality.gradient(model, tokens)

    whole = run()
    with gradient_quality.kept_keys_alone():
        plain = run()
    again = run()
    differs = {name.split(".")[-4] for name in whole if not torch.allclose(whole[name], plain[name])}
    assert differs == {"q_proj"}
    assert all(torch.equal(whole[name], again[name]) for name in whole)
