import math

import evaluate
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lemo_hf.errors import LemoError
from lemo_hf.evaluation import perplexity_metric
from lemo_hf.evaluation.perplexity import (
    Perplexity,
    dense_perplexity,
    paired_difference,
    sparse_perplexity,
    student_t_quantile,
)
from lemo_hf.evaluation.perplexity_metric import PerplexityMetric
from lemo_hf.models.configuration_lemo_llama import LemoLlamaConfig
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM


def samples(*lengths: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 128, (length,), generator=generator)} for length in lengths]


@torch.no_grad()
def brute_force(model, ids: torch.Tensor, first: int = 0) -> float:
    """Summed loss of the tokens after `first`, from whole logits."""
    log_p = model.eval()(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[place - 1, ids[place]]) for place in range(max(first, 1), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("segment_size", [7, 512])
def test_every_document_gets_its_own_loss_whatever_the_batch(tiny_llama, batch_size, segment_size):
    dataset = samples(40, 7, 64, 2, 33)
    found = dense_perplexity(tiny_llama, dataset, batch_size, segment_size)
    assert found.token_counts == (39, 6, 63, 1, 32)
    assert found.nll_sums == pytest.approx([brute_force(tiny_llama, sample["input_ids"]) for sample in dataset], rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(found.nll_sums) / 141))
    assert found.forward == "dense"


def test_labels_and_padding_are_left_out(tiny_llama):
    (sample,) = samples(32)
    ids = sample["input_ids"]
    sample["labels"] = torch.where(torch.arange(32) < 20, -100, ids)
    found = dense_perplexity(tiny_llama, [sample])
    assert found.token_counts == (12,)
    assert found.nll_sums[0] == pytest.approx(brute_force(tiny_llama, ids, first=20), rel=1e-5)
    for left, right in ((0, 9), (9, 0)):
        padded = {"input_ids": torch.nn.functional.pad(ids, (left, right), value=5)}
        padded["attention_mask"] = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        found = dense_perplexity(tiny_llama, [padded])
        assert found.token_counts == (31,)
        # rotary positions are relative: left padding shifts them all, which changes rounding only
        assert found.nll_sums[0] == pytest.approx(brute_force(tiny_llama, ids), rel=1e-5)


def test_packed_documents_are_told_apart(tiny_llama):
    parts = [sample["input_ids"] for sample in samples(24, 40)]
    packed = {"input_ids": torch.cat(parts), "position_ids": torch.cat([torch.arange(len(part)) for part in parts])}
    found = dense_perplexity(tiny_llama, [packed])
    assert found.token_counts == (23, 39)
    assert found.nll_sums == pytest.approx([brute_force(tiny_llama, part) for part in parts], rel=1e-5)


def test_adapters_count_and_training_mode_comes_back(tiny_llama):
    dataset = samples(48)
    before = dense_perplexity(tiny_llama, dataset)
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)).train()
    frozen = model.get_base_model().model.norm.eval()
    assert dense_perplexity(model, dataset) == before  # a fresh adapter adds zero, and dropout is off
    assert model.training
    assert not frozen.training
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert dense_perplexity(model, dataset).loss != before.loss


def test_sparse_is_another_number_under_another_name(tiny_llama, tiny_llama_config):
    lemo = LemoConfig(attention_forward="sparse", selection="ratio", keep_ratio=0.3, block_size=8)
    config = LemoLlamaConfig(**{**tiny_llama_config.to_dict(), "lemo": lemo.to_dict()})
    model = LemoLlamaForCausalLM(config)
    model.load_state_dict(tiny_llama.state_dict(), strict=False)
    dataset = samples(128)
    assert dense_perplexity(model, dataset) == dense_perplexity(tiny_llama, dataset)
    sparse = sparse_perplexity(model, dataset)
    assert sparse.forward == "sparse"
    assert sparse.loss != dense_perplexity(model, dataset).loss
    with pytest.raises(LemoConfigError):
        sparse_perplexity(tiny_llama, dataset)


def test_bad_input_is_one_line(tiny_llama):
    with pytest.raises(LemoError, match=r"no token to predict; 1 samples; give"):
        dense_perplexity(tiny_llama, samples(1))
    packed = [{**sample, "position_ids": torch.arange(len(sample["input_ids"]))} for sample in samples(4, 6)]
    with pytest.raises(LemoError, match=r"batch_size=2; set batch_size to 1"):
        dense_perplexity(tiny_llama, packed, batch_size=2)
    torch.nn.init.constant_(tiny_llama.model.norm.weight, math.nan)
    with pytest.raises(LemoError, match=r"loss is not finite; nan in document 0"):
        dense_perplexity(tiny_llama, samples(8))


def test_paired_difference_of_equal_changes_is_exact():
    reference = Perplexity((10.0, 40.0, 30.0), (5, 20, 15))
    other = Perplexity(tuple(nll + 0.01 * count for nll, count in zip(reference.nll_sums, (5, 20, 15))), (5, 20, 15))
    found = paired_difference(reference, other)
    assert (found.percent, found.low, found.high) == pytest.approx([100 * math.expm1(0.01)] * 3)
    assert paired_difference(other, reference).percent == pytest.approx(100 * math.expm1(-0.01))


def test_paired_interval_covers_as_often_as_it_says():
    """600 experiments with 12 documents of unequal length whose mean loss differs by 2 %."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(600):
        counts = torch.randint(50, 400, (12,), generator=generator)
        level = torch.randn(12, generator=generator).double() + 4  # documents differ far more than models do
        change = 0.02 + 0.05 * torch.randn(12, generator=generator).double()
        reference = Perplexity(tuple((level * counts).tolist()), tuple(counts.tolist()))
        other = Perplexity(tuple(((level + change) * counts).tolist()), tuple(counts.tolist()))
        found = paired_difference(reference, other)
        covered += found.low <= 100 * math.expm1(0.02) <= found.high
    assert 0.92 <= covered / 600 <= 0.98


def test_unpairable_measures_are_refused():
    one = Perplexity((1.0, 2.0), (3, 4))
    with pytest.raises(LemoError, match=r"different documents .*; 2 documents of 7 tokens and 2 of 8; measure"):
        paired_difference(one, Perplexity((1.0, 2.0), (4, 4)))
    with pytest.raises(LemoError, match="at least 2 documents; got 1"):
        paired_difference(Perplexity((1.0,), (3,)), Perplexity((1.0,), (3,)))


@pytest.mark.parametrize(
    ("degrees", "tabulated"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_student_t_quantiles_are_the_tabulated_ones(degrees, tabulated):
    assert student_t_quantile(0.975, degrees) == pytest.approx(tabulated, abs=5e-4)
    assert student_t_quantile(0.025, degrees) == pytest.approx(-tabulated, abs=5e-4)


def test_metric_adds_up_over_batches_and_labels_its_forward():
    metric = PerplexityMetric("sparse")
    metric.add_batch(predictions=[10.0, 6.0], references=[4, 2])
    metric.add(prediction=8.0, reference=6)
    assert metric.compute() == {"sparse_perplexity": pytest.approx(math.exp(2)), "sparse_loss": 2.0, "tokens": 12, "documents": 3}
    assert "dense_loss" in PerplexityMetric().compute(predictions=[1.0], references=[1])
    with pytest.raises(ValueError, match="'fast'; choose 'dense' or 'sparse'"):
        PerplexityMetric("fast")


def test_metric_loads_from_its_file_without_a_network():
    metric = evaluate.load(perplexity_metric.__file__, "dense")
    assert metric.compute(predictions=[2.0], references=[1])["dense_perplexity"] == pytest.approx(math.exp(2))
