import pytest
import torch
import torch.nn.functional as F
from references.tiny_models import add_lora, lemo_model, random_tokens, stock_model
from torch import nn

from lemo_hf.models.configuration_lemo_llama import LemoLlamaConfig
from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError
from lemo_hf.models.modeling_lemo_llama import LemoLlamaModel
from lemo_hf.models.pattern_predictor import (
    PatternPredictor,
    predicted_block_scores,
    predicted_informativeness,
)
from lemo_hf.models.token_informativeness import block_informativeness
from lemo_hf.training.phases.predictor_training import parameter_share


def predictor(hidden_size=12, sizes=(5, 6, 7, 4), features=3):
    result = PatternPredictor(hidden_size, list(sizes), features)
    result.reset_parameters(torch.Generator().manual_seed(0))
    return result


def documents_of(lengths, block_size):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return find_documents(1, sum(lengths), block_size, torch.device("cpu"), cu_seq_lens=ends)


def test_features_are_their_formula_token_by_token():
    lengths, block_size = [9, 1, 8, 3], 4
    hidden = torch.randn(21, 12, generator=torch.Generator().manual_seed(1))
    model = predictor()
    got = model(hidden, documents_of(lengths, block_size))
    for network, features in zip((model.query, model.key), got, strict=True):
        w1, w2, w3 = (matrix.double() for matrix in network.matrices)
        wanted = []
        for document in hidden.double().split(lengths):
            for block in document.split(block_size):
                tokens = [(((token @ w1).clamp_min(0) @ w2).clamp_min(0)) @ w3 for token in block]
                together = torch.stack(tokens)
                wanted.append(torch.cat((together[:, :1].mean(0), together[:, 1:].max(0).values)))
        torch.testing.assert_close(features.double(), torch.stack(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 3, 17])
def test_informativeness_without_the_matrix_equals_that_of_the_matrix(blocks):
    generator = torch.Generator().manual_seed(blocks)
    query, key = (torch.randn(blocks, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    profile = F.pad(torch.randn(blocks - 1, generator=generator, dtype=torch.float64), (1, 0))
    formed = block_informativeness(predicted_block_scores(query, key, profile))
    torch.testing.assert_close(predicted_informativeness(query, key, profile), formed)


def test_profile_is_read_by_distance_at_any_length():
    distances = predictor().distance
    assert distances.by_distance(300).tolist() == [0.0] * 300
    distances[0].copy_(torch.arange(48.0))
    assert distances.by_distance(9).tolist() == [0.0, 0.0, 4.0, 6.0, 8.0, 9.0, 10.0, 11.0, 12.0]
    assert distances.by_distance(10_000)[-1] == 47
    assert distances.by_distance(1).tolist() == [0.0]


def test_profile_takes_on_values_by_distance():
    distances = predictor().distance
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    distances.fit(values)
    assert distances.by_distance(6)[1:].tolist() == values.tolist()
    assert distances.by_distance(500)[-1] == 1.0


def test_informativeness_is_per_document():
    lengths = [9, 1, 8, 3]
    hidden = torch.randn(21, 12, generator=torch.Generator().manual_seed(1))
    model = predictor()
    together = model.informativeness(hidden, documents_of(lengths, 4))
    for part, alone in zip(together, hidden.split(lengths), strict=True):
        torch.testing.assert_close(part, model.informativeness(alone, documents_of([len(alone)], 4))[0], rtol=1e-5, atol=1e-5)


def test_pruned_sizes_build_the_right_shapes():
    config = LemoConfig(predictor_sizes=[[5, 6, 7, 4], [1, 2, 3, 4]], predictor_rank=8, predictor_features=9)
    model = PatternPredictor.from_config(config, 12, 1)
    assert model.sizes == [1, 2, 3, 4]
    assert [tuple(matrix.shape) for matrix in model.parameters()] == [(12, 1), (1, 2), (2, 9), (12, 3), (3, 4), (4, 9), (48,)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"predictor_sizes": [[1, 2, 3]]}, "predictor_sizes must list four widths per layer"),
        ({"predictor_sizes": [[0, 2, 3, 4]]}, "predictor_sizes must list four widths per layer"),
        ({"predictor_sizes": [[1, 2, 3, 13]]}, "predictor_sizes of layer 0 must be four widths between 1 and hidden_size 12"),
        ({"predictor_rank": 13}, "predictor_rank is 13, the model's hidden_size is 12"),
        ({"predictor_features": 13}, "predictor_features is 13, the model's hidden_size is 12"),
    ],
)
def test_impossible_sizes_are_named(fields, says):
    fields = {"predictor_rank": 4, "predictor_features": 4, **fields}
    with pytest.raises(LemoConfigError, match=says):
        PatternPredictor.from_config(LemoConfig(**fields), 12, 0)


def test_reset_is_he_initialisation_and_repeats_with_a_generator():
    model = predictor(hidden_size=400, sizes=(300, 300, 300, 300), features=200)
    first = model.query.matrices[0]
    assert abs(first.std().item() - (2 / 400) ** 0.5) < 0.002
    again = predictor(hidden_size=400, sizes=(300, 300, 300, 300), features=200)
    assert torch.equal(first, again.query.matrices[0])
    assert not torch.equal(model.query.matrices[0], model.key.matrices[0])


def test_there_is_no_linear_for_adapters_to_wrap():
    assert not any(isinstance(module, nn.Linear) for module in predictor().modules())


def test_all_linear_lora_leaves_predictors_alone():
    model = add_lora(lemo_model(stock_model()), "all-linear")
    adapted = {name for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert len(adapted) == 2 * 7
    assert not any("lemo_predictor" in name for name in adapted)
    assert not any("lora" in name for name, _ in model.named_parameters() if "lemo_predictor" in name)


@pytest.mark.parametrize("lora", [None, {}])
def test_predictors_are_frozen_and_never_trained_by_the_loss(lora):
    model = lemo_model(stock_model(), lora, selection="ratio", checkpoint="kept_rows")
    tokens = random_tokens(40, 1)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    parameters = {name: weight for name, weight in model.named_parameters() if "lemo_predictor" in name}
    assert len(parameters) == 2 * 7
    assert all(not weight.requires_grad and weight.grad is None for weight in parameters.values())


@pytest.mark.parametrize(
    "cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.float64), lambda m: m.to("cpu", torch.bfloat16)]
)
def test_predictors_stay_float32_when_the_model_is_cast(cast):
    model = lemo_model(stock_model(), selection="ratio", keep_ratio=0.3)
    cast(model)
    for name, weight in model.named_parameters():
        assert (weight.dtype == torch.float32) == ("lemo_predictor" in name), name
    tokens = random_tokens(40, 1)[None]
    assert model(input_ids=tokens, labels=tokens).loss.isfinite()


def test_autocast_does_not_reach_the_predictor():
    model = predictor()
    hidden, documents = torch.randn(21, 12, generator=torch.Generator().manual_seed(1)), documents_of([21], 4)
    plain = model(hidden, documents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(hidden, documents)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_default_predictors_are_below_six_percent_of_a_small_models_layers():
    """At the shape of the embedded model; at 8B shapes tests/test_layer_arithmetic.py bounds them."""
    shape = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 416}
    with torch.device("meta"):
        model = LemoLlamaModel(LemoLlamaConfig(**shape, num_hidden_layers=2, vocab_size=64, lemo=LemoConfig()))
    assert 0.03 < parameter_share(model) <= 0.06
