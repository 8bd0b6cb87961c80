"""Table 3 and Figures 4, 7, 16 and 17 of the paper from our models: counted as defined, drawn from the committed JSON alone."""

import json
import math

import paper_figures
import pytest
import sparsity_figures
import sparsity_measures
import torch
from matplotlib.text import Text
from paper_data import RESULTS, read_results
from paper_figures import SPARSITY, page
from sparsity_measures import CRITERION, READINGS, best, blocks_without, blocks_without_by_chance, measure_window, overlap
from sparsity_page import row_at
from sparsity_plots import square
from training_runs import BLOCK, tiny_lemo_model

from lemo_hf.errors import LemoError
from lemo_hf.evaluation.layer_scores import visit_layers
from lemo_hf.models.sparse_decoder import sparse_backbone

TOKENS = 160


def layer_heads(backbone, ids):
    """Queries and keys of every layer, keys repeated, `(tokens, heads, head_dim)`."""
    rotary = [part[0] for part in backbone.rotary_emb(torch.zeros(1, len(ids), 1), torch.arange(len(ids))[None])]
    found = []

    def visit(layer):
        query, key, _ = layer.module.project_heads(layer.hidden, rotary)
        found.append((query, key.repeat_interleave(query.shape[1] // key.shape[1], 1), layer.module.attention_scale))

    visit_layers(backbone, {"input_ids": ids[None]}, visit)
    return found


@pytest.mark.parametrize("read_all", [True, False])
def test_readings_are_what_they_are_called(monkeypatch, read_all):
    monkeypatch.setattr(sparsity_measures, "STRIP", 16)
    monkeypatch.setattr(sparsity_measures, "QUERY_STRIDE", 1)
    monkeypatch.setattr(sparsity_measures, "KEYS", 24)
    monkeypatch.setattr(sparsity_measures, "ALL_QUERIES", TOKENS if read_all else TOKENS // 2)
    backbone = sparse_backbone(tiny_lemo_model(lora=False))
    ids = torch.randint(3, 128, (TOKENS,), generator=torch.Generator().manual_seed(1))
    layers = measure_window(backbone, ids, with_predictors=True)
    # Of the second half of every pair of strips alone, where not all are read.
    read = torch.ones(TOKENS, dtype=torch.bool) if read_all else torch.arange(TOKENS) // 16 % 2 == 1
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for layer, (query, key, scale) in zip(layers, layer_heads(backbone, ids), strict=True):
        logits = torch.einsum("ihd,jhd->hij", query, key) * scale
        scores = logits.relu().mean(0).tril()
        assert layer.below["token_scores"] == pytest.approx(
            (scores < CRITERION * scores.max())[causal & read[:, None]].float().mean().item(), abs=1e-6
        )
        probabilities = logits.masked_fill(~causal, -math.inf).softmax(-1)
        under = (probabilities < CRITERION * probabilities.amax(-1, keepdim=True))[:, causal]
        assert layer.below["probabilities"] == pytest.approx(under.float().mean().item(), abs=1e-4)
        others = scores.tril(-1)
        times = 1 if read_all else 2
        by_token = (times * others[read].sum(0) + others.sum(1))[read] / (TOKENS - 1)
        torch.testing.assert_close(layer.token_informativeness, by_token)
        if read_all:
            torch.testing.assert_close(layer.token_peak, torch.maximum(others.amax(0), others.amax(1)))
        blocks = TOKENS // BLOCK
        by_block = scores.view(blocks, BLOCK, blocks, BLOCK).amax((1, 3))
        torch.testing.assert_close(layer.scores, by_block)
        pairs = torch.ones(blocks, blocks, dtype=torch.bool).tril()
        assert layer.below["block_scores"] == pytest.approx((by_block < CRITERION * by_block.max())[pairs].float().mean().item())
        assert 0 < layer.below["block_scores"] < 1
        predicted = layer.predicted_scores.tril(-1)
        torch.testing.assert_close(layer.predicted_informativeness, (predicted.sum(0) + predicted.sum(1)) / (blocks - 1))


def test_blocks_without_important_tokens_by_hand():
    important = torch.tensor([1, 0, 0, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    assert blocks_without(important, 3) == 0
    assert blocks_without(important, 2) == pytest.approx(2 / 5)
    assert blocks_without(important, 4) == pytest.approx(1 / 3), "the last block has one token"
    # Of 4 tokens 2, of which a block of 2 holds none: one choice of six.
    assert blocks_without_by_chance(4, 2, 2) == pytest.approx(1 / 6)
    assert blocks_without_by_chance(4, 3, 2) == 0
    draws = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(seed)) < 6 for seed in range(300)])
    drawn = sum(blocks_without(each, 10) for each in draws) / len(draws)
    assert drawn == pytest.approx(blocks_without_by_chance(60, 6, 10), abs=0.02)


def test_overlap_is_one_with_itself_and_none_with_the_opposite():
    values = torch.arange(66.0)
    assert overlap(values, values) == 1
    assert overlap(values, -values) == 0
    assert best(torch.tensor([1.0, 2.0, 2.0]), 1).tolist() == [False, True, False]


def test_windows_are_spread_over_a_document():
    tokens = torch.arange(16)
    assert [window.tolist() for window in sparsity_figures.windows_of(tokens, 4)] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert len(sparsity_figures.windows_of(tokens, 16)) == 1
    by_document = [[[0.0, 0.2], [0.2, 0.4]], [[0.6, 0.8], [0.8, 1.0]]]
    found = sparsity_figures.averaged(by_document)
    assert found["mean"] == pytest.approx(0.5)
    assert found["spread"] == pytest.approx(math.sqrt(2 * 0.3**2))
    assert found["by_layer"] == pytest.approx([0.4, 0.6])


def test_a_context_is_extended_only_beyond_the_models_own():
    assert sparsity_figures.extended(sparsity_figures.BASE, 1024) == {}
    rope = sparsity_figures.extended(sparsity_figures.BASE, 8192)["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 8, 1024)


def test_the_file_is_json_with_its_numbers():
    result = {"a": [1.5, 2.5], "b": {"c": [[1, 2], [3]], "d": ["x", "y"]}, "e": [], "f": [{"g": [0.25]}]}
    written = sparsity_figures.compact(result)
    assert json.loads(written) == result
    assert "[1.5, 2.5]" in written
    assert square([1.0, 2.0, 3.0]).tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "elsewhere"], "no such model"),
        (["--model", "mine=elsewhere"], "no such model"),
        (["--documents", "2"], "too few documents"),
        (["--lengths", "1024"], "length of maps and predictors is missing"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, tmp_path):
    with pytest.raises(LemoError, match=message):
        sparsity_figures.main([*arguments, "--output", str(tmp_path / "x.json")])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def committed():
    return read_results()


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def test_the_pictures_are_readable_and_hold_the_papers_numbers(committed):
    figures = {shown.number: shown.draw(committed) for shown in SPARSITY}
    for number, figure in figures.items():
        assert min(text.get_fontsize() for text in texts(figure)) >= 8, number
        assert figure.get_figwidth() <= 7.3, number
    by_length = figures[3].axes[0]
    lines = {line.get_label(): line for line in by_length.lines if not str(line.get_label()).startswith("_")}
    paper = committed.paper["paper"]["table3_sparsity_ratio"]
    assert list(lines["paper: Llama-2-7B"].get_ydata()) == paper["llama2"]
    assert list(lines["paper: Llama-3-8B"].get_xdata()) == paper["seq_len"]
    series = [container.lines[0] for container in by_length.containers] + list(lines.values())
    assert len({(line.get_marker(), line.get_linestyle()) for line in series}) == len(READINGS) + 2, "told apart without colour"
    recall = next(line for line in figures[17].axes[0].lines if line.get_label() == "paper: 95.1%")
    assert set(recall.get_ydata()) == {committed.paper["paper"]["predictor_recall"]}
    assert len({line.get_marker() for line in figures[7].axes[0].lines}) == len(figures[7].axes[0].lines)


def test_what_the_page_says_of_our_models_is_so(committed):
    for name, model in committed.sparsity["models"].items():
        assert model["commit"], name
        for row in model["sparsity"]:
            for reading in READINGS:
                assert row[reading]["spread"] is not None, (name, reading)
        at_4k, longest = row_at(model, 4096), model["sparsity"][-1]
        # "attention is sparse by token pairs", "summed over a token's partners it is nearly even"
        assert min(longest["probabilities"]["mean"], longest["token_scores"]["mean"]) > 0.9, name
        assert max(at_4k["tokens"]["mean"], at_4k["blocks"]["mean"]) < 0.1, name
        assert at_4k["relative_spread"]["mean"] < 0.15, name
        # "holds in part": above chance between inputs and between layers, and not the same.
        assert all(0.48 < value < 0.95 for value in model["agreement"]["between_documents"]), name
        found = model["unimportant_blocks"]
        assert found["by_share"]["0.05"]["mean"] > found["by_chance"]["0.05"] + 0.05, "important tokens lie together"
        if "prediction" in model:
            assert model["prediction"]["recall"]["mean"] < committed.paper["paper"]["predictor_recall"], "ours miss it"
            assert model["prediction"]["recall"]["mean"] > model["prediction"]["recall_of_positions"]["mean"] + 0.05


def test_without_measurements_the_page_says_what_would_make_them(committed, tmp_path):
    for name in ("paper_estimates--any.json",):
        (tmp_path / name).write_text((RESULTS / name).read_text())
    bare = read_results(tmp_path)
    assert [shown.draw(bare) for shown in SPARSITY] == [None] * len(SPARSITY)
    unmeasured = page(bare, [12, 14, 15, 19]).partition("## Unmeasured")[2]
    for named in ("Table 3", "Figure 4", "Figure 7", "Figure 16", "Figure 17"):
        assert f"- {named}," in unmeasured
    assert "python benchmarks/sparsity_figures.py" in unmeasured
    # A model without predictors has no part in the last two.
    (name, model), *_ = committed.sparsity["models"].items()
    bare.sparsity = committed.sparsity | {"models": {name: {key: value for key, value in model.items() if key != "prediction"}}}
    assert [shown.number for shown in SPARSITY if shown.draw(bare) is not None] == [3, 4, 7]
    assert paper_figures.PAGE.read_text().count("images/paper/sparsity_by_length.png") == 1
