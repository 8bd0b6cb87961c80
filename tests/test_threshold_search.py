import logging

import pytest
import torch
from references.tiny_models import batches_of
from training_runs import RandomText, tiny_lemo_model, tiny_trainer

from lemo_hf.errors import LemoError
from lemo_hf.models.sparse_decoder import sparse_backbone, sparse_evaluation
from lemo_hf.training.phases.threshold_search import ThresholdSearch, kept_share

SPARSE = {"selection": "threshold", "attention_forward": "sparse"}
# Forms whose loss depends on what is dropped.
DROPPING = pytest.mark.parametrize(
    "form", [{}, {"attention_forward": "kept_keys", "nearby_tokens": 7}], ids=["sparse", "kept keys"]
)


def search_of(eta=0.5, documents=2, **lemo):
    model = tiny_lemo_model(**{**SPARSE, **lemo}).eval()
    data = RandomText()
    batches = [{name: value[None] for name, value in data[index].items()} for index in range(documents)]
    return ThresholdSearch(model, sparse_backbone(model), batches, eta=eta, epsilon=0.25)


def mean(values):
    return sum(values) / len(values)


def test_kept_share_counts_the_ends_as_kept():
    assert kept_share([torch.tensor([0.0, 2.0, 1.0, 0.0])], 1.5) == 3 / 4
    assert kept_share([torch.tensor([0.0, 2.0, 1.0, 0.0]), torch.zeros(2)], 9.0) == 4 / 6


@pytest.mark.parametrize("keep_ratio", [0.3, 0.5, [0.25, 0.75]])
def test_the_mean_share_is_the_budget_after_every_round(keep_ratio):
    search = search_of(keep_ratio=keep_ratio)
    search.begin()
    budget = mean(keep_ratio) if isinstance(keep_ratio, list) else keep_ratio
    for _ in range(3):
        # Never below the budget, above it by less than one block of one layer.
        assert 0 <= mean(search.kept_shares()) - budget < 1 / 24
        search.step()


def test_the_model_keeps_what_the_search_says():
    search = search_of(keep_ratio=0.4)
    search.begin()
    backbone = search.backbone
    assert backbone.config.lemo.thresholds == search.thresholds
    kept = total = 0
    with torch.no_grad(), sparse_evaluation(backbone):
        for batch in search.batches:
            with batches_of(backbone) as batches:
                backbone(input_ids=batch["input_ids"])
            marks = batches[0].selections[0].kept_blocks
            kept, total = kept + int(marks.sum()), total + marks.numel()
    assert kept / total == search.kept_shares()[0]


@DROPPING
def test_a_round_is_algorithm_1(form):
    search = search_of(eta=0.5, **form)
    assert search.differentiates
    search.begin()
    start, scale = list(search.offsets), [search._scale[layer][1] for layer in search.searched]
    lemo = search.backbone.config.lemo
    wanted = []
    for layer in (0, 1):
        losses = []
        for side in (1, -1):
            thresholds = search.thresholds
            thresholds[layer] += side * 0.25 * scale[layer]
            lemo.update(thresholds=thresholds)
            losses.append(search.loss(search.batches))
        wanted.append((losses[1] - losses[0]) / 0.5)
    search.step()
    assert search.gradients == pytest.approx(wanted)
    assert any(wanted)
    moves = [after - before for after, before in zip(search.offsets, start, strict=True)]
    # The common shift of the renormalisation drops out of the difference.
    largest = max(map(abs, wanted))
    assert moves[0] - moves[1] == pytest.approx(0.5 * (wanted[0] - wanted[1]) / largest)


@DROPPING
def test_loss_is_that_of_the_forward_that_drops(form):
    search = search_of(documents=1, keep_ratio=0.4, **form)
    search.begin()
    batch = search.batches[0]
    with torch.no_grad(), sparse_evaluation(search.backbone):
        wanted = search.model(**batch).loss.item()
    assert search.loss([batch]) == pytest.approx(wanted)
    dense = search.model(**batch).loss.item()
    assert search.loss([batch]) != pytest.approx(dense, rel=1e-6)


def test_cost_is_counted():
    search = search_of()
    search.begin()
    search.step()
    assert search.forward_passes == 2 + 2 * 2 * 2


def test_dense_layers_are_left_out():
    search = search_of(dense_layers=[0])
    search.begin()
    search.step()
    assert search.searched == [1]
    assert search.thresholds[0] == 0.0
    assert 0 <= search.kept_shares()[0] - 0.5 < 1 / 12


def test_the_exact_form_equalises_shares_and_says_so(caplog):
    search = search_of(attention_forward="exact")
    with caplog.at_level(logging.INFO, logger="lemo_hf"):
        search.begin()
    assert "the loss does not depend on the thresholds" in caplog.text
    before, passes = search.thresholds, search.forward_passes
    search.step()
    assert (search.thresholds, search.forward_passes) == (before, passes)
    assert all(0 <= share - 0.5 < 1 / 12 for share in search.kept_shares())


def test_restored_after_a_round_it_goes_on_alike():
    whole, cut = search_of(), search_of()
    whole.begin()
    cut.begin()
    whole.step()
    state = whole.state()
    whole.step()
    cut.restore(state)
    cut.step()
    assert cut.thresholds == whole.thresholds
    assert cut.round == whole.round == 2
    assert cut.forward_passes == whole.forward_passes


def test_shares_survive_new_predictors():
    search = search_of()
    search.begin()
    shares = search.kept_shares()
    for layer in search.backbone.layers:
        layer.lemo_predictor.query.matrices[2].data *= 3
    again = ThresholdSearch(search.model, search.backbone, search.batches, 0.5, 0.25)
    again.begin(keep_thresholds=True)
    assert again.kept_shares() != shares
    again.keep_shares(shares)
    assert again.kept_shares() == shares


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [([-1e6, -1e6], "thresholds keep every block of 2 documents"), ([1e6, 1e6], "thresholds keep no block of 2 documents but")],
)
def test_thresholds_that_choose_nothing_are_refused(tmp_path, thresholds, message):
    lemo = {"selection": "threshold", "attention_forward": "sparse", "thresholds": thresholds}
    with pytest.raises(LemoError, match=message):
        tiny_trainer(tmp_path, lemo, predictor_documents=0, max_steps=1).train()


def test_text_too_short_to_calibrate_on_is_refused(tmp_path):
    lemo = {"selection": "threshold", "attention_forward": "sparse", "block_size": 48}
    with pytest.raises(LemoError, match="calibration text is too short; the longest of 2 documents has 2 blocks"):
        tiny_trainer(tmp_path, lemo, predictor_documents=0, max_steps=1).train()


def test_a_list_of_shares_is_where_the_search_starts():
    search = search_of(keep_ratio=[0.25, 0.75])
    search.begin()
    first, second = search.kept_shares()
    assert second - first >= 0.4
