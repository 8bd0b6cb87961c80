"""Predictors of signed means (`block_reduction="mean"`): features, start, pruning, files, and a model that trains with them."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from references.device_costs import HostReads, NewStorages
from references.tiny_models import lemo_model, random_tokens, stock_model
from training_runs import RandomText, tiny_lemo_model

from lemo_hf.errors import LemoError
from lemo_hf.evaluation.block_recall import measure_recall
from lemo_hf.evaluation.layer_scores import visit_layers
from lemo_hf.hub.lemo_files import (
    load_lemo_files,
    load_predictors,
    predictor_tensors,
    read_lemo_files,
    save_lemo_files,
    with_found,
)
from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError
from lemo_hf.models.pooled_predictor import PooledPredictor, block_rotary, pooled_rows
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_informativeness import block_informativeness
from lemo_hf.training.phases.pooled_layer_fit import informativeness_by_pair
from lemo_hf.training.phases.predictor_training import PredictorTraining

MEAN = {"block_reduction": "mean", "predictor_features": 16}


def documents_of(lengths, block_size):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return find_documents(1, sum(lengths), block_size, torch.device("cpu"), cu_seq_lens=ends)


def batches(count, seq_len=160):
    data = RandomText(count, seq_len)
    return [{"input_ids": data.tokens[index][None]} for index in range(count)]


def layers_of(backbone, batch):
    found = []
    visit_layers(backbone, batch, found.append)
    return found


def test_features_are_their_formula():
    lengths, size = [9, 1, 8], 4
    generator = torch.Generator().manual_seed(1)
    hidden, angles = torch.randn(18, 6, generator=generator), torch.randn(18, 3, generator=generator)
    tables = tuple(torch.cat((part, part), 1) for part in (angles.cos(), angles.sin()))
    documents = documents_of(lengths, size)
    model = PooledPredictor(6, 8)
    model.reset_parameters(generator)
    model.rotary[0].copy_(torch.tensor([2.0, -1.0, 0.0, 2.0]))
    got = model(hidden, documents, block_rotary(tables, documents))
    start = 0
    wanted = ([], [])
    for length in lengths:
        for first in range(start, start + length, size):
            rows = slice(first, min(first + size, start + length))
            turn = torch.polar(torch.ones(()), angles[rows]).mean(0)[[2, 0, 0, 2]]
            turn[1] = 1  # not turned
            for network, into in zip((model.query, model.key), wanted, strict=True):
                feature = hidden[rows].mean(0) @ network.matrices[0]
                turned = torch.complex(feature[:4], feature[4:]) * turn
                into.append(torch.cat((turned.real, turned.imag)))
        start += length
    for features, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(features, torch.stack(expected))


def test_pairs_that_turn_need_positions():
    model = PooledPredictor(6, 8)
    model.reset_parameters()
    documents = documents_of([8], 4)
    assert len(model.informativeness(torch.randn(8, 6), documents)[0]) == 2
    model.rotary[0][1] = 0
    with pytest.raises(LemoConfigError, match="turns 1 pairs of features by rotary positions; got none"):
        model(torch.randn(8, 6), documents)


def test_pairs_made_in_inference_mode_are_asked_about_each_time():
    with torch.inference_mode():  # such tensors do not say whether they have changed
        model = PooledPredictor(6, 8)
        model.reset_parameters()
    documents = documents_of([8], 4)
    assert len(model.informativeness(torch.randn(8, 6), documents)[0]) == 2
    with torch.inference_mode():
        model.rotary[0][1] = 0
    with pytest.raises(LemoConfigError, match="turns 1 pairs of features"):
        model(torch.randn(8, 6), documents)


def test_pairs_are_asked_about_once_until_they_change():
    """On a GPU every question waits for it."""
    model = PooledPredictor(6, 8)
    model.reset_parameters()
    hidden, documents = torch.randn(8, 6), documents_of([8], 4)
    for expected in (1, 0, 0):
        with HostReads() as reads:
            model(hidden, documents)
        assert sum(reads.seen.values()) == expected
    model.rotary[0][1] = 0
    with pytest.raises(LemoConfigError, match="turns 1 pairs"):
        model(hidden, documents)
    with pytest.raises(LemoConfigError, match="turns 1 pairs"):
        model(hidden, documents)


def test_pooling_copies_no_rows():
    rows, documents = torch.randn(43, 6, dtype=torch.float64).half(), documents_of([29, 3, 11], 4)
    with NewStorages() as made:
        pooled = pooled_rows(rows, documents)
    assert made.largest == pooled.nbytes == 12 * 6 * 4
    starts = [0, 4, 8, 12, 16, 20, 24, 28, 29, 32, 36, 40, 43]
    wanted = [rows[first:end].double().mean(0) for first, end in pairwise(starts)]
    torch.testing.assert_close(pooled.double(), torch.stack(wanted), rtol=1e-6, atol=1e-7)


def test_what_pairs_add_is_the_whole():
    query, key = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(informativeness_by_pair(query, key).sum(1), block_informativeness(query @ key.T))


def test_true_scores_are_the_means_and_choose_blocks():
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **MEAN))
    largest = layers_of(sparse_backbone(tiny_lemo_model(lora=False)), batches(1)[0])
    for found, other in zip(layers_of(backbone, batches(1)[0]), largest, strict=True):
        assert (found.scores[0] < other.scores[0] + 1e-6).all(), "a mean is no larger than the largest"
        assert (found.scores[0] < 0).any()


def test_the_start_is_the_layers_own_scores():
    """With room for all pairs, the first document's predictions are right but for where tokens stand within their blocks."""
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **(MEAN | {"predictor_features": 32})))
    training = PredictorTraining(backbone, documents=1, steps=1, learning_rate=1e-12)
    training.fit(batches(1)[0])
    report = measure_recall(backbone, batches(6), training.positions)
    assert report.mean > report.chance + 0.25
    assert report.mean > report.position_mean + 0.15


def test_the_start_is_exact_where_nothing_turns():
    """Positions that stand still leave nothing to approximate: every document's scores are products of the features."""
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **(MEAN | {"predictor_features": 32})))
    backbone.rotary_emb.inv_freq.zero_()
    training = PredictorTraining(backbone, documents=1, steps=1, learning_rate=1e-12)
    training.fit(batches(1)[0])
    for found in layers_of(backbone, batches(3)[2]):
        query, key = found.features()
        torch.testing.assert_close((query @ key.T).tril(-1), found.scores[0].tril(-1), rtol=1e-3, atol=1e-4)


def test_a_monotonous_first_document_hides_no_direction():
    """The start reads the projections, not what one text shows of them."""
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **(MEAN | {"predictor_features": 32})))
    tokens = torch.arange(3, 9).repeat(30)[None, :160]
    training = PredictorTraining(backbone, documents=1, steps=1, learning_rate=1e-12)
    training.fit({"input_ids": tokens})
    report = measure_recall(backbone, batches(6))
    assert report.mean > report.chance + 0.25


def test_fitting_lowers_the_loss_and_moves_no_rotation():
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **(MEAN | {"predictor_features": 6})))
    training = PredictorTraining(backbone, documents=24, steps=2, learning_rate=0.2)
    losses = [training.fit(batch) for batch in batches(12)]
    turned = [layer.lemo_predictor.rotary[0].clone() for layer in backbone.layers]
    losses += [training.fit(batch) for batch in batches(12)]
    for layer, before in zip(backbone.layers, turned, strict=True):
        assert torch.equal(layer.lemo_predictor.rotary[0], before)
    assert sum(map(sum, losses[-12:])) < 0.9 * sum(map(sum, losses[:12]))


def test_pruning_takes_the_pairs_that_matter_least_and_shrinks():
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **MEAN))
    training = PredictorTraining(backbone, documents=2, steps=1, learning_rate=1e-12)
    training.fit(batches(1)[0])
    fit, predictor = training._fits[0], backbone.layers[0].lemo_predictor
    predictor.query.matrices[0][:, [3, 3 + predictor.sizes[0] // 2]] = 0
    before = layers_of(backbone, batches(1)[0])[0]
    predicted, size = before.predicted()[0], predictor.sizes[0]
    fit._count_anew()
    fit.observe(before)
    removed = fit.prune(0.999)
    assert removed >= 2
    assert predictor.sizes == [size - removed]
    assert [tuple(weight.shape)[-1] for weight in fit.first[:2]] == [size - removed] * 2
    after = before.predicted()[0]
    assert (after - predicted)[1:-1].var() <= 0.001 * fit.running[2] * 1.01
    training.fit(batches(1)[0])  # the moments fit the smaller matrices


def test_pruning_leaves_one_pair():
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **MEAN))
    training = PredictorTraining(backbone, documents=1, steps=1, learning_rate=1e-12, prune_documents=1, prune_share=-1e6)
    training.fit(batches(1)[0])
    assert [layer.lemo_predictor.sizes for layer in backbone.layers] == [[2], [2]]
    assert backbone.config.lemo.predictor_sizes == [[2], [2]]


def test_files_hold_the_kind_and_the_other_kind_is_refused(tmp_path):
    first = sparse_backbone(tiny_lemo_model(lora=False, **MEAN))
    PredictorTraining(first, 1, 1, 1e-3, prune_documents=1, prune_share=0.9).fit(batches(1)[0])
    save_lemo_files(first, tmp_path)
    second = sparse_backbone(tiny_lemo_model(lora=False, **MEAN))
    load_predictors(second, tmp_path)
    for (name, ours), theirs in zip(predictor_tensors(second).items(), predictor_tensors(first).values(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(LemoError, match="they foretell block_reduction='mean', 'max' is asked for"):
        load_predictors(sparse_backbone(tiny_lemo_model(lora=False)), tmp_path)
    block, _ = read_lemo_files(tmp_path)
    with pytest.raises(LemoError, match="they foretell block_reduction='mean', 'max' is asked for"):
        with_found(LemoConfig(selection="ratio", block_size=8), block, "it")
    assert with_found(LemoConfig(), block, "it").predictor_sizes == block.predictor_sizes, "nothing reads them there"


@pytest.mark.parametrize(
    ("architecture", "value", "has"), [("llama", 1e6, 4), ("llama", 0.5, 4), ("llama", -7, 4), ("opt", 1, 0)]
)
def test_files_that_turn_by_no_frequency_are_refused(tmp_path, architecture, value, has):
    model = lemo_model(stock_model(architecture=architecture), {}, **MEAN)
    save_lemo_files(model, tmp_path)
    for load in (load_lemo_files, lambda model, folder: load_predictors(sparse_backbone(model), folder)):
        load(model, tmp_path)
    sparse_backbone(model).layers[1].lemo_predictor.rotary[0][3] = value
    save_lemo_files(model, tmp_path)
    for load in (load_lemo_files, lambda model, folder: load_predictors(sparse_backbone(model), folder)):
        with pytest.raises(LemoError, match=f"layers.1.rotary.0 names rotary frequencies that the model's {has} are not"):
            load(model, tmp_path)


def test_progress_can_be_saved_and_continued():
    backbones = [sparse_backbone(tiny_lemo_model(lora=False, **MEAN)) for _ in range(2)]
    whole, part = (PredictorTraining(backbone, 4, 2, 1e-2) for backbone in backbones)
    for batch in batches(4):
        whole.fit(batch)
    for batch in batches(2):
        part.fit(batch)
    resumed = PredictorTraining(backbones[1], 4, 2, 1e-2)
    resumed.restore({name: tensor.clone() for name, tensor in part.tensors().items()}, part.done)
    for batch in batches(4)[2:]:
        resumed.fit(batch)
    for ours, theirs in zip(*(predictor_tensors(backbone).values() for backbone in backbones), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("source", ["predicted", "true"])
def test_a_document_chooses_the_same_blocks_alone_and_padded(source):
    model = lemo_model(stock_model(), {}, selection="ratio", score_source=source, **MEAN)
    backbone = sparse_backbone(model)
    for layer in backbone.layers:
        layer.lemo_predictor.rotary[0].fill_(1)
    tokens = random_tokens(61, 1)
    alone = model(input_ids=tokens[None], labels=tokens[None]).loss
    padded = torch.cat((tokens.new_full((11,), 3), tokens))[None]
    mask = (torch.arange(72) >= 11)[None].long()
    labels = padded.masked_fill(torch.arange(72) <= 11, -100)
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask, labels=labels).loss, alone)
    assert max(backbone.lemo_kept_shares) < 0.9
    assert alone.requires_grad


def test_pooled_rows_are_means_of_ragged_blocks():
    rows = torch.arange(14.0)[:, None]
    documents = documents_of([6, 8], 4)
    assert pooled_rows(rows, documents)[:, 0].tolist() == [1.5, 4.5, 7.5, 11.5]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"predictor_features": 7}, "predictor_features come in pairs with block_reduction='mean'; got 7"),
        ({"predictor_sizes": [[8, 8, 8, 8]]}, "predictor_sizes must list one even width per layer"),
        ({"predictor_sizes": [[7]]}, "predictor_sizes must list one even width per layer"),
        ({"sampling_temperature": 1.0}, "drawing by informativeness needs numbers of at least 0"),
    ],
)
def test_settings_that_do_not_go_with_means(fields, says):
    with pytest.raises(LemoConfigError, match=says):
        LemoConfig(**{"block_reduction": "mean", **fields})
    with pytest.raises(LemoConfigError, match="block_reduction must be one of max, mean; got 'sum'"):
        LemoConfig(block_reduction="sum")


def test_recorded_layers_can_be_fitted_in_passes():
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **MEAN))
    recorded = [dataclasses.replace(found, hidden=found.hidden.bfloat16()) for found in layers_of(backbone, batches(1)[0])]
    assert all(value == value for value in PredictorTraining(backbone, 2, 1, 1e-3).fit_recorded(recorded))
