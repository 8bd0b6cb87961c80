import pytest
import torch
from references.block_scores import brute_block_scores
from references.decoder_layer import heads_of
from references.one_layer import rotary_of
from references.tiny_models import ARCHITECTURES, lemo_model, place, random_tokens, stock_model, with_varied_vectors

from lemo_hf.evaluation.layer_scores import visit_layers
from lemo_hf.models.sparse_decoder import sparse_backbone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_true_scores_of_a_visited_layer_are_those_of_its_own_queries_and_keys(architecture):
    model = lemo_model(with_varied_vectors(stock_model(architecture=architecture)), block_size=4).double()
    batch = place([random_tokens(length, length) for length in (14, 23)], "left").batch
    visited = []
    visit_layers(sparse_backbone(model), batch, visited.append)
    assert len(visited) == 2
    for scores in visited:
        layer = scores.module
        rotary = rotary_of(sparse_backbone(model), torch.zeros(2, 23, 1, dtype=torch.float64))
        places = torch.cat((torch.arange(9, 23), torch.arange(23)))
        query, key, _ = (
            part.transpose(0, 1) for part in heads_of(layer.self_attn, scores.hidden, tuple(part[0, places] for part in rotary))
        )
        for q, k, found in zip(query.split([14, 23]), key.split([14, 23]), scores.scores, strict=True):
            wanted = brute_block_scores(q, k, 4, layer.self_attn.head_dim**-0.5, layer.attention_window)
            torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
