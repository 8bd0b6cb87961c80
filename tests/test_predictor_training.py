import pytest
import torch
from training_runs import RandomText, tiny_lemo_model

from lemo_hf.errors import LemoError
from lemo_hf.evaluation.block_recall import measure_recall
from lemo_hf.evaluation.layer_scores import visit_layers
from lemo_hf.hub.lemo_files import PREDICTORS_FILE, load_predictors, predictor_tensors, record_predictor_sizes, save_lemo_files
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training.phases.predictor_training import PredictorTraining, parameter_share


class TokenRuns(RandomText):
    """Documents whose blocks differ: each block repeats one of 12 tokens."""

    def __init__(self, samples=24, seq_len=160):
        super().__init__(samples, seq_len)
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(3, 15, (samples, seq_len // 8), generator=generator).repeat_interleave(8, 1)


def batches(count, first=0):
    data = TokenRuns()
    return [{"input_ids": data.tokens[index][None]} for index in range(first, first + count)]


def backbone_of(**lemo):
    return sparse_backbone(tiny_lemo_model(lora=False, **lemo))


def fitted(backbone, documents=16, **changes):
    training = PredictorTraining(backbone, **{"documents": documents, "steps": 16, "learning_rate": 1e-2, **changes})
    for batch in batches(documents):
        training.fit(batch)
    return training


def test_training_beats_chance_and_positions_on_held_out_text():
    backbone = backbone_of()
    held_out = batches(6, first=18)
    untrained = measure_recall(backbone, held_out)
    training = fitted(backbone)
    report = measure_recall(backbone, held_out, training.positions)
    assert report.mean > untrained.mean
    assert report.mean > report.chance + 0.15
    assert report.mean > report.position_mean + 0.1


def test_the_start_is_near_the_scores():
    backbone = backbone_of()
    for layer in backbone.layers:
        layer.lemo_predictor.key.matrices[2].data *= 100
    training = PredictorTraining(backbone, documents=1, steps=1, learning_rate=1e-12)
    training.fit(batches(1)[0])
    found = []
    visit_layers(backbone, batches(1)[0], found.append)
    for layer, item in enumerate(found):
        true, predicted = item.informativeness()[0], item.predicted()[0]
        assert predicted.mean().item() == pytest.approx(true.mean().item(), rel=0.05)
        assert training._fits[layer].loss(item).item() < 10


def test_the_start_adds_almost_nothing_to_what_distance_explains():
    backbone = backbone_of()
    training = PredictorTraining(backbone, documents=1, steps=1, learning_rate=1e-12)
    training.fit(batches(1)[0])
    found = []
    visit_layers(backbone, batches(1)[0], found.append)
    for layer, item in enumerate(found):
        predictor, below = backbone.layers[layer].lemo_predictor, torch.ones(20, 20).tril(-1).bool()
        query, key = predictor(item.hidden, item.documents)
        products, scores = (query @ key.T)[below], item.scores[0][below]
        assert products.std() == pytest.approx(0.02 * scores.std().item(), rel=0.01)


def test_first_matrices_start_along_the_best_directions_of_queries_and_keys():
    """No 8 directions of the input explain more of the unrotated queries (keys) than those that 8 units start along."""
    backbone = backbone_of()
    found = []
    visit_layers(backbone, batches(1)[0], found.append)
    PredictorTraining(backbone, documents=1, steps=1, learning_rate=1e-12)._fits[0]._start(found[0])
    layer, hidden = backbone.layers[0], found[0].hidden
    for network, projection in (
        (layer.lemo_predictor.query, layer.self_attn.q_proj),
        (layer.lemo_predictor.key, layer.self_attn.k_proj),
    ):
        wanted, inputs = projection(hidden).detach(), hidden @ network.matrices[0]
        assert inputs.shape[1] == 8 < wanted.shape[1]
        missed = wanted - inputs @ torch.linalg.lstsq(inputs, wanted).solution
        best = torch.linalg.svdvals(wanted)[8:].square().sum()
        assert missed.square().sum().item() == pytest.approx(best.item(), rel=0.05)


def test_fitted_predictors_are_no_fresh_start():
    backbone = backbone_of()
    fitted(backbone, documents=4)
    # Far from the scores of the next document: a fresh start would pull both back.
    for layer in backbone.layers:
        layer.lemo_predictor.distance[0].fill_(7.0)
        layer.lemo_predictor.key.matrices[2].data *= 100
    before = {name: weight.clone() for name, weight in predictor_tensors(backbone).items()}
    training = PredictorTraining(backbone, documents=1, steps=1, learning_rate=1e-12, fresh=False)
    training.fit(batches(1, first=5)[0])
    for name, weight in predictor_tensors(backbone).items():
        torch.testing.assert_close(weight, before[name], msg=name)
    assert all(fit.running[1:].all() for fit in training._fits)


def test_the_distance_profile_learns_what_distance_does():
    backbone = backbone_of()
    assert not backbone.layers[0].lemo_predictor.distance[0].any()
    fitted(backbone, documents=2)
    assert backbone.layers[0].lemo_predictor.distance[0].any()


def test_only_predictors_change():
    backbone = backbone_of()
    before = {name: weight.clone() for name, weight in backbone.named_parameters()}
    fitted(backbone, documents=1)
    for name, weight in backbone.named_parameters():
        assert torch.equal(weight, before[name]) == ("lemo_predictor" not in name), name
        assert weight.grad is None
        assert not ("lemo_predictor" in name and weight.requires_grad)


def test_the_step_is_adam():
    backbone = backbone_of()
    predictor = backbone.layers[0].lemo_predictor
    training = PredictorTraining(backbone, documents=1, steps=3, learning_rate=0.01)
    found = []
    visit_layers(backbone, batches(1)[0], found.append)
    training._fits[0].observe(found[0])
    start = [weight.clone() for weight in predictor.parameters()]
    training.fit(batches(1)[0])
    got = [weight.clone() for weight in predictor.parameters()]
    for weight, value in zip(predictor.parameters(), start, strict=True):
        weight.data.copy_(value)
        weight.requires_grad_(True)
    reference = torch.optim.Adam(predictor.parameters(), betas=(0.9, 0.99))
    for step in (1, 2, 3):
        reference.param_groups[0]["lr"] = training._rate(step)
        reference.zero_grad()
        training._fits[0].loss(found[0]).backward()
        reference.step()
    for ours, theirs in zip(got, predictor.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


def test_inputs_of_one_layer_live_at_a_time(monkeypatch):
    import weakref

    backbone = backbone_of()
    alive = []
    untouched = PredictorTraining._rate

    def rate(self, number):
        alive.append(sum(reference() is not None for reference in seen))
        return untouched(self, number)

    seen = []
    import lemo_hf.training.phases.predictor_training as module

    def visit(backbone, batch, visit_one):
        def remember(found):
            seen.append(weakref.ref(found.hidden))
            visit_one(found)

        visit_layers(backbone, batch, remember)

    monkeypatch.setattr(module, "visit_layers", visit)
    monkeypatch.setattr(PredictorTraining, "_rate", rate)
    fitted(backbone, documents=1, steps=1)
    assert alive == [1, 1]


def test_pruning_removes_dead_units_and_keeps_the_predictions():
    backbone = backbone_of()
    predictor = backbone.layers[1].lemo_predictor
    training = PredictorTraining(backbone, documents=2, steps=1, learning_rate=1e-12, prune_documents=1)
    found = []
    visit_layers(backbone, batches(1)[0], found.append)
    training._fits[1]._start(found[1])
    training._fits[1].running[1:] = 1.0  # started
    # Two dead units: one never fires at all, the other reads nothing but it.
    predictor.query.matrices[0].data[:, 3] = 0
    predictor.key.matrices[1].data[:, 5] = 0
    before = found[1].predicted()[0]
    parameters = sum(weight.numel() for weight in predictor.parameters())
    training.fit(batches(1)[0])
    assert predictor.sizes[0] < 8
    assert predictor.sizes[3] < 8
    assert sum(weight.numel() for weight in predictor.parameters()) < parameters
    torch.testing.assert_close(found[1].predicted()[0], before, rtol=1e-4, atol=1e-5)
    assert backbone.config.lemo.predictor_sizes[1] == predictor.sizes
    training.fit(batches(1)[0])  # the moments fit the smaller matrices


def test_a_layer_keeps_one_unit_whatever_happens():
    backbone = backbone_of()
    predictor = backbone.layers[0].lemo_predictor
    predictor.query.matrices[0].data.zero_()
    PredictorTraining(backbone, 1, 1, 1e-12, prune_documents=1).fit(batches(1)[0])
    assert predictor.sizes[0] == 1


def test_documents_without_a_choice_are_passed_over():
    backbone = backbone_of()
    short = {"input_ids": TokenRuns().tokens[:1, :12]}
    before = predictor_tensors(backbone)["layers.0.key.matrices.0"].clone()
    training = PredictorTraining(backbone, documents=1, steps=2, learning_rate=0.1)
    assert all(value != value for value in training.fit(short))
    assert torch.equal(predictor_tensors(backbone)["layers.0.key.matrices.0"], before)


@pytest.mark.parametrize("pruned", [False, True])
def test_predictors_come_back(tmp_path, pruned):
    first, second = backbone_of(), backbone_of()
    fitted(first, documents=2, prune_documents=int(pruned), prune_share=0.6)
    record_predictor_sizes(first)
    save_lemo_files(first, tmp_path)
    load_predictors(second, tmp_path)
    for (name, ours), theirs in zip(predictor_tensors(second).items(), predictor_tensors(first).values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (second.layers[0].lemo_predictor.sizes != [8] * 4) == pruned
    assert parameter_share(second) == parameter_share(first)


def _truncate(folder):
    path = folder / PREDICTORS_FILE
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "model", "message"),
    [
        (lambda folder: (folder / PREDICTORS_FILE).unlink(), {}, "does not exist"),
        (lambda folder: (folder / "lemo_config.json").unlink(), {}, "does not exist"),
        (lambda folder: (folder / "lemo_config.json").write_text("{"), {}, "not JSON"),
        (_truncate, {}, "corrupt or truncated"),
        (lambda folder: None, {"block_size": 16}, "predictors do not fit the model: they pool blocks of 8"),
    ],
)
def test_damaged_or_foreign_files_are_one_line_and_change_nothing(tmp_path, damage, model, message):
    save_lemo_files(backbone_of(), tmp_path)
    damage(tmp_path)
    backbone = backbone_of(**model)
    before = {name: weight.clone() for name, weight in predictor_tensors(backbone).items()}
    with pytest.raises(LemoError, match=message) as error:
        load_predictors(backbone, tmp_path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in predictor_tensors(backbone).items())


def test_predictors_of_another_shape_do_not_fit(tmp_path):
    backbone = backbone_of()
    save_lemo_files(backbone, tmp_path)
    backbone.layers = backbone.layers[:1]
    with pytest.raises(LemoError, match="predictor_sizes lists 2 layers, the model has 1"):
        load_predictors(backbone, tmp_path)
    wider = backbone_of()
    wider.config.hidden_size = 64
    with pytest.raises(LemoError, match=r"do not fit the model: .* is \(32, 8\), the model needs \(64, 8\)"):
        load_predictors(wider, tmp_path)
