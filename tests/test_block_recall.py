import math

import pytest
import torch
from training_runs import BLOCK, RandomText, tiny_lemo_model

from lemo_hf.evaluation.block_recall import PositionProfile, document_recall, measure_recall
from lemo_hf.evaluation.layer_scores import visit_layers
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_informativeness import block_informativeness, block_scores


def test_recall_counts_free_blocks_only():
    # 8 blocks at 0.5: 4 kept, first and last among them, so 2 of the 6 free ones.
    true = torch.tensor([0.0, 5.0, 4.0, 1.0, 1.0, 1.0, 1.0, 9.0])
    hit = torch.tensor([9.0, 1.0, 8.0, 2.0, 0.0, 0.0, 0.0, 9.0])  # finds block 2, takes 3 for 1
    recall, chance = document_recall(true, hit, 0.5)
    assert recall == 0.5
    assert chance == pytest.approx(2 / 6)
    assert document_recall(true, true, 0.5)[0] == 1.0
    assert document_recall(true, -true, 0.5)[0] == 0.0


@pytest.mark.parametrize(("blocks", "ratio"), [(1, 0.5), (2, 0.5), (4, 0.5), (8, 1.0), (8, 0.1)])
def test_no_freedom_is_no_recall(blocks, ratio):
    scores = torch.arange(float(blocks))
    assert all(math.isnan(value) for value in document_recall(scores, scores, ratio))


def test_ties_resolve_to_the_earlier_block():
    tied = torch.zeros(8)
    assert document_recall(tied, torch.tensor([0.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]), 0.5)[0] == 1.0


def test_position_profile_is_the_mean_at_each_place():
    profile = PositionProfile(2, places=4)
    profile.add(1, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    profile.add(1, torch.tensor([3.0, 3.0, 2.0, 2.0, 3.0, 3.0, 8.0, 8.0]))
    assert profile.predict(1, 4).tolist() == [7 / 3, 2.0, 3.0, 20 / 3]
    assert profile.predict(1, 8)[:2].tolist() == [7 / 3, 7 / 3]
    assert profile.predict(0, 4).tolist() == [0.0] * 4


def test_visited_scores_are_those_of_the_stock_projections():
    model = tiny_lemo_model(lora=False)
    backbone = sparse_backbone(model)
    sample = RandomText()[0]["input_ids"][None]
    found = []
    visit_layers(backbone, {"input_ids": sample, "labels": sample}, found.append)
    with torch.no_grad():
        states = backbone(input_ids=sample, output_hidden_states=True).hidden_states
        rotary = tuple(part[0] for part in backbone.rotary_emb(states[0], torch.arange(sample.shape[1])[None]))
        for index, layer in enumerate(backbone.layers):
            hidden = layer.input_layernorm(states[index])[0]
            query, key, _ = layer.project_heads(hidden, rotary)
            wanted = block_scores(query, key, BLOCK, layer.attention_scale)
            torch.testing.assert_close(found[index].hidden, hidden)
            torch.testing.assert_close(found[index].scores[0], wanted)
            torch.testing.assert_close(found[index].informativeness()[0], block_informativeness(wanted))
    assert [item.layer for item in found] == [0, 1]


def test_packed_documents_are_scored_apart():
    model = tiny_lemo_model(lora=False)
    backbone = sparse_backbone(model)
    tokens = RandomText()[0]["input_ids"]
    parts = tokens.split([40, 56])
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    packed, alone = [], []
    visit_layers(
        backbone, {"input_ids": tokens[None], "position_ids": positions[None]}, lambda f: packed.append(f.informativeness())
    )
    for part in parts:
        visit_layers(backbone, {"input_ids": part[None]}, lambda f: alone.append(f.informativeness()[0]))
    for layer in (0, 1):
        for document in (0, 1):
            torch.testing.assert_close(packed[layer][document], alone[2 * document + layer], rtol=1e-4, atol=1e-5)


def test_measuring_changes_nothing():
    model = tiny_lemo_model().train()
    backbone = sparse_backbone(model)
    modes = [module.training for module in model.modules()]
    state, shares, draw = torch.get_rng_state(), backbone.lemo_kept_shares, backbone.lemo_draw
    report = measure_recall(backbone, [{"input_ids": RandomText()[0]["input_ids"][None]}])
    assert len(report.layers) == 2
    assert 0 <= report.mean <= 1
    assert report.chance == pytest.approx(4 / 10)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.lemo_kept_shares == shares
    assert backbone.lemo_draw == draw
    assert not any(layer._forward_pre_hooks for layer in backbone.layers)
