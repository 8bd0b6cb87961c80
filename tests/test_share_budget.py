import argparse
import inspect
import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_runs import KillAt, Killed, RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import AutoTokenizer

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig, LemoTrainer
from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import read_lemo_files
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.flops import FlopCounter
from lemo_hf.quickstart.comparison import BASE
from lemo_hf.training.phases.phase_cost import estimate_search_cost
from lemo_hf.training.phases.share_search import Budget, ShareSearch
from lemo_hf.training.phases.share_sensitivity import ShareSensitivity, mean_error
from lemo_hf.training.phases.share_solver import solve_shares
from lemo_hf.training.scale_out.processes import Processes
from lemo_hf.training.step_memory import step_settings

# Their informativeness decides, so that layers differ on random text too.
CHOOSING = {"selection": "ratio", "keep_ratio": 0.5}
EXACT, SPARSE = {"selection": "sampled"}, {"selection": "ratio", "attention_forward": "sparse"}
KEYS = {"selection": "ratio", "attention_forward": "kept_keys", "nearby_tokens": 7}

pytestmark = pytest.mark.usefixtures("traced_once")


# The sensitivities.


def naive(model, batch, shares, draw, **changes):
    """Gradients by layer, loss and FLOPs of a whole training step."""
    backbone = sparse_backbone(model)
    lemo = backbone.config.lemo
    before = {name: getattr(lemo, name) for name in ("keep_ratio", *changes)}
    lemo.update(keep_ratio=shares, **changes)
    backbone.lemo_draw = draw
    model.train()
    model.zero_grad()
    with FlopCounter(model) as counter:
        loss = model(**batch).loss
        loss.backward()
    lemo.update(**before)
    by_layer = [torch.cat([w.grad.flatten() for w in layer.parameters() if w.requires_grad]) for layer in backbone.layers]
    return by_layer, loss.item(), counter.flops.total


@pytest.mark.parametrize(
    "lemo",
    [
        EXACT,
        {**SPARSE, "score_source": "true"},
        SPARSE,
        KEYS,
        {**SPARSE, "score_source": "true", "attention_pattern": "block_sparse", "pattern_share": 0.5},
        {"draws": "by_layer", "checkpoint": "kept_rows", "mlp_keep_ratio": 0.5},
    ],
    ids=["exact", "sparse", "sparse by prediction", "kept keys", "sparse in a pattern", "by layer"],
)
def test_the_cached_prefix_gives_what_whole_steps_give_for_less(lemo):
    model = tiny_lemo_model(keep_ratio=0.5, **lemo)
    # What the first layer attends to decides what the second one chooses.
    sparse_backbone(model).layers[0].self_attn.o_proj.base_layer.weight.data *= 50
    batch = {name: value[None] for name, value in RandomText()[0].items()}
    probes = [[0.25, 0.75], [0.25, 1.0]]
    sensitivity = ShareSensitivity(model, sparse_backbone(model))
    before = model.base_model.config.lemo.to_dict()
    with FlopCounter(model) as counter:
        base, found, weight = sensitivity.measure(batch, [0.5, 0.5], probes, draw=3)
    assert model.base_model.config.lemo.to_dict() == before
    assert all(weight.grad is None for weight in model.parameters())
    dense, _, flops = naive(model, batch, [1.0, 1.0], 3, mlp_keep_ratio=None)

    def wanted(shares):
        nonlocal flops
        gradients, loss, spent = naive(model, batch, shares, 3)
        flops += spent
        return mean_error(gradients, dense) if sensitivity.is_exact else loss

    assert base == pytest.approx(wanted([0.5, 0.5]), rel=1e-5)
    for layer, share in itertools.product((0, 1), (0, 1)):
        shares = [0.5, 0.5]
        shares[layer] = probes[layer][share]
        assert found[layer][share] == pytest.approx(wanted(shares), rel=1e-5)
    assert len({base, *found[0], *found[1]}) == 5
    assert weight == (1.0 if sensitivity.is_exact else 95)
    assert counter.flops.total < 0.75 * flops
    # Whole lists of shares are measured by the same rule.
    assert sensitivity.damage(batch, [[0.5, 0.5], [0.25, 0.5]], 3)[0] == pytest.approx([base, found[0][0]], rel=1e-5)


def test_below_the_lowest_trained_layer_no_share_matters():
    model = tiny_lemo_model(**EXACT)
    for weight in sparse_backbone(model).layers[0].parameters():
        weight.requires_grad_(False)
    batch = {name: value[None] for name, value in RandomText()[0].items()}
    base, found, _ = ShareSensitivity(model, sparse_backbone(model)).measure(batch, [0.5, 0.5], [[0.25], [0.25]], 0)
    assert found[0] == [base]
    assert found[1][0] > base > 0


@pytest.mark.parametrize("lemo", [EXACT, SPARSE, KEYS], ids=["exact", "sparse", "kept keys"])
def test_the_estimate_is_what_is_counted(lemo):
    model = tiny_lemo_model(keep_ratio=0.5, **lemo)
    batch = {name: value[None] for name, value in RandomText()[0].items()}
    with FlopCounter(model) as dense, torch.no_grad():
        model.eval()(**batch)
    with FlopCounter(model) as counter:
        ShareSensitivity(model, sparse_backbone(model)).measure(batch, [0.5, 0.5], [[0.25, 0.75]] * 2, 0)
    estimated = estimate_search_cost(sparse_backbone(model).config.lemo, 2, 2).measured * dense.flops.total
    assert estimated == pytest.approx(counter.flops.total, rel=0.35)


def test_text_without_labels_weighs_nothing():
    model = tiny_lemo_model(**EXACT)
    batch = {"input_ids": torch.ones(1, 32, dtype=torch.long), "labels": torch.full((1, 32), -100)}
    sensitivity = ShareSensitivity(model, sparse_backbone(model))
    assert sensitivity.measure(batch, [0.5, 0.5], [[0.25], [0.25]], 0) == (0.0, [[0.0], [0.0]], 0.0)
    assert sensitivity.damage(batch, [[0.5, 0.5]], 0) == ([0.0], 0.0)


def test_an_unknown_end_of_the_model_is_refused(monkeypatch):
    model = tiny_lemo_model(**EXACT)
    backbone = sparse_backbone(model)
    batch = {name: value[None] for name, value in RandomText()[0].items()}
    forward = type(backbone).forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return SimpleNamespace(last_hidden_state=2 * output.last_hidden_state)

    monkeypatch.setattr(type(backbone), "forward", scaled)
    with pytest.raises(LemoError, match="does not know what this model does after its last layer"):
        ShareSensitivity(model, backbone).measure(batch, [0.5, 0.5], [[], []], 0)


def searched_on_the_base(first, windows=2, **lemo):
    """A search on the embedded base model, of the text of standard library modules."""
    config = LemoConfig(block_size=16, keep_ratio=0.5, **lemo)
    model = AutoLemoModelForCausalLM.from_pretrained(BASE, lemo=config, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    text = AutoTokenizer.from_pretrained(BASE)(inspect.getsource(argparse))["input_ids"]
    documents = [torch.tensor(text[start : start + 256])[None] for start in range(0, 256 * (first + windows), 256)][first:]
    run = SimpleNamespace(
        model=model,
        backbone=sparse_backbone(model),
        lemo=config,
        processes=SimpleNamespace(turn=lambda done, total: (done, 1, True), gather=lambda value: [value]),
        documents=SimpleNamespace(fitting=lambda place: {"input_ids": documents[place], "labels": documents[place]}),
    )
    run.lemo = run.backbone.config.lemo
    search = ShareSearch(run, 16)
    while search.done < windows:
        search.step(windows)
    return search


@pytest.mark.parametrize("lemo", [EXACT, {**SPARSE, "score_source": "true"}], ids=["exact", "sparse"])
def test_layers_differ_on_a_trained_model_and_other_text_says_the_same(lemo):
    searches = [searched_on_the_base(first, **lemo) for first in (0, 2)]
    found = []
    for search in searches:
        worth = search.worth()
        assert all(abs(value) > 1e-4 for value in worth)
        assert max(worth) > 2 * min(worth)
        shares = solve_shares(search.tried, search.damages(), search.tried, sum(search.start))
        assert sum(shares) == pytest.approx(3.0)
        assert max(shares) - min(shares) >= 0.25
        found.append(torch.tensor(shares))
    # With little text the sparse form is sure of its first layer only: without it nothing is left of the rest.
    assert found[0][0] == found[1][0] == (0.25 if lemo is EXACT else 0.75)
    if lemo is EXACT:
        assert torch.corrcoef(torch.stack(found))[0, 1] > 0.5
    assert torch.corrcoef(torch.tensor([search.worth() for search in searches]))[0, 1] > 0.8


class Pair(Processes):
    """One of two processes, in a thread each."""

    barrier, values = threading.Barrier(2, timeout=60), [None, None]

    def __init__(self, rank):
        super().__init__()
        self.count, self.rank = 2, rank

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


def test_two_processes_find_what_one_does():
    data = RandomText()
    batches = [{name: value[None] for name, value in data[index].items()} for index in range(6)]

    models = [tiny_lemo_model(**CHOOSING) for _ in range(3)]

    def searched(processes, model):
        backbone = sparse_backbone(model)
        documents = SimpleNamespace(fitting=lambda place: batches[place], profile=lambda: batches[3:])
        run = SimpleNamespace(model=model, backbone=backbone, lemo=backbone.config.lemo, processes=processes, documents=documents)
        search = ShareSearch(run, 12)
        while search.done < 3:  # an odd number: one of the two reads along
            search.step(3)
        return search.damages(), search.compare([0.25, 0.75], 3)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(searched, [Pair(0), Pair(1)], models[:2]))
    assert found[0] == found[1] == searched(Processes(), models[2])


# The phase.


def logged(trainer, name):
    return [logs[name] for logs in trainer.state.log_history if name in logs]


def test_the_phase_finds_shares_within_the_budget_and_trains_with_them(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, CHOOSING, share_search="kept_share", save_strategy="steps", save_steps=2, max_steps=4)
    with caplog.at_level(logging.INFO, logger="lemo_hf"):
        trainer.train()
    shares = trainer.lemo_run.lemo.keep_ratio
    assert isinstance(shares, list)
    assert shares[0] != shares[1]
    assert sum(round(share * 12) for share in shares) == 12, "as many blocks as two halves of 12"
    assert [logged(trainer, f"searched_share/layer_{layer}") for layer in (0, 1)] == [[share] for share in shares]
    assert logged(trainer, "share_damage_after") < logged(trainer, "share_damage_before")
    assert logged(trainer, "kept_share/layer_0") == pytest.approx([shares[0]] * 4)
    assert logged(trainer, "seconds/shares")[0] > 0
    assert "share search: 1 documents" in caplog.text
    assert read_lemo_files(tmp_path / "checkpoint-2")[0].keep_ratio == shares
    # A run that goes on from there keeps them, and does not search again.
    again = tiny_trainer(tmp_path, CHOOSING, share_search="kept_share", save_strategy="steps", save_steps=2, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.lemo_run.lemo.keep_ratio == shares
    assert len(logged(again, "share_documents")) == 1
    with pytest.raises(LemoError, match="started with share_search='kept_share', it is resumed with None"):
        tiny_trainer(tmp_path, CHOOSING, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_without_it_nothing_changes(tmp_path):
    trainer = tiny_trainer(tmp_path, CHOOSING, max_steps=1)
    trainer.train()
    assert trainer.lemo_run.lemo.keep_ratio == 0.5
    assert not logged(trainer, "share_documents")


def test_a_killed_search_goes_on_where_it_stood(tmp_path, monkeypatch):
    options = {"share_search": "kept_share", "max_steps": 2, "predictor_documents": 1}
    monkeypatch.setattr("lemo_hf.training.phases.share_search.affordable_documents", lambda *given: 3)
    whole = tiny_trainer(tmp_path / "whole", CHOOSING, **options)
    whole.train()
    read = []
    step = ShareSearch.step

    def step_or_die(search, documents):
        if len(read) == 2 and None not in read:
            read.append(None)
            raise Killed
        read.append(search.done)
        step(search, documents)

    monkeypatch.setattr(ShareSearch, "step", step_or_die)
    with pytest.raises(Killed):
        tiny_trainer(tmp_path / "cut", CHOOSING, **options).train()
    resumed = tiny_trainer(tmp_path / "cut", CHOOSING, **options)
    resumed.train(resume_from_checkpoint=True)
    assert read == [0, 1, None, 2]
    assert resumed.lemo_run.lemo.keep_ratio == whole.lemo_run.lemo.keep_ratio != 0.5
    assert curve(resumed) == curve(whole)


def test_a_run_killed_after_the_search_keeps_its_shares(tmp_path):
    lemo = {**CHOOSING, "selection": "threshold"}
    options = {"share_search": "kept_share", "max_steps": 2, "predictor_documents": 1}
    cut = tiny_trainer(tmp_path, lemo, **options)
    cut.add_callback(KillAt(0))
    with pytest.raises(Killed):
        cut.train()
    shares, thresholds = cut.lemo_run.lemo.keep_ratio, cut.lemo_run.lemo.thresholds
    assert isinstance(shares, list)
    # Calibration comes after the search, and keeps what it found.
    kept = [logged(cut, f"calibrated_share/layer_{layer}")[0] for layer in (0, 1)]
    assert kept == pytest.approx(shares, abs=1 / 12)
    again = tiny_trainer(tmp_path, lemo, **options)
    again.train(resume_from_checkpoint=True)
    assert (again.lemo_run.lemo.keep_ratio, again.lemo_run.lemo.thresholds) == (shares, thresholds)
    assert not logged(again, "share_documents")


def test_shares_that_are_no_better_elsewhere_are_not_taken(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ShareSearch, "compare", lambda search, found, documents: (1.0, 1.0))
    trainer = tiny_trainer(tmp_path, CHOOSING, share_search="kept_share", max_steps=1)
    with caplog.at_level(logging.INFO, logger="lemo_hf"):
        trainer.train()
    assert trainer.lemo_run.lemo.keep_ratio == 0.5
    assert "are not taken" in caplog.text


@pytest.mark.parametrize("unit", ["flops", "memory"])
def test_the_estimated_step_stays_within_the_budget(tmp_path, unit):
    trainer = tiny_trainer(tmp_path, EXACT, share_search=unit, max_steps=1)

    def worth(search):
        # One layer is worth more than the other, whatever the measurement says. In this model's step the memory is at its highest
        # as the second layer begins, so that blocks of the first one are the dear ones.
        return [[3.0, 1.0, 0.0], [1.0, 0.9, 0.8]][:: 1 if unit == "flops" else -1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShareSearch, "damages", worth)
        patch.setattr(ShareSearch, "compare", lambda search, found, documents: (1.0, 0.5))
        trainer.train()
    shares = trainer.lemo_run.lemo.keep_ratio
    more, less = (0, 1) if unit == "flops" else (1, 0)
    assert shares[more] > 0.5 > shares[less]
    settings = step_settings(trainer.lemo_run, trainer.args)
    estimator = Estimator(trainer.model.config, on_gpu=False)

    def needed(keep_ratio):
        estimate = estimator.estimate(replace(settings, lemo=replace(settings.lemo, keep_ratio=keep_ratio)))
        return estimate.total_bytes if unit == "memory" else sum(estimate.flops.values())

    assert needed(shares) <= needed([0.5, 0.5])
    if unit == "flops":  # one block more would be over it
        assert needed([shares[0], shares[1] + 1 / 12]) > needed([0.5, 0.5])


def test_what_is_more_than_the_sum_over_layers_is_taken_back():
    asked = []

    def needed(shares):
        return sum(shares) + (2.0 if sum(shares) > 6 else 0.0)  # a step in need, as where another moment is the highest

    def solve(amount):
        asked.append(amount)
        return [amount / 2, amount / 2]

    assert sum(Budget([], 8.0, needed, 7.0).keep(solve)) <= 7.0
    assert asked == [8.0, 5.0]
    assert Budget([], 8.0).keep(solve) == [4.0, 4.0]
    with pytest.raises(LemoError, match="no shares found within the memory"):
        Budget([], 8.0, lambda shares: 9.0, 7.0).keep(solve)


@pytest.mark.parametrize(
    ("lemo", "changes", "message"),
    [
        ({**EXACT, "block_size": 48}, {}, "documents are too short to find shares on; the longest of 3 has 2 blocks"),
        ({**EXACT, "keep_ratio": 0.1}, {}, "the budget is no more than the always-kept blocks need; keep_ratio=0.1 of 12 blocks"),
        ({"memory_budget": "40GiB"}, {}, "memory_budget is kept by share_search='memory' only; '40GiB'"),
    ],
)
def test_refusals(tmp_path, lemo, changes, message):
    with pytest.raises(LemoError, match=message):
        tiny_trainer(tmp_path, lemo, share_search="kept_share", max_steps=1, **changes).train()


def test_a_layer_that_keeps_everything_has_nothing_to_find(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, {**EXACT, "keep_ratio": 1.0}, share_search="kept_share", max_steps=1)
    with caplog.at_level(logging.INFO, logger="lemo_hf"):
        trainer.train()
    assert "share search skipped: no layer chooses blocks" in caplog.text


def test_an_unknown_unit_is_refused(tmp_path):
    with pytest.raises(LemoError, match="share_search must be 'kept_share', 'flops' or 'memory'; got 'bytes'"):
        tiny_arguments(tmp_path, share_search="bytes")


def test_a_step_that_cannot_be_estimated_is_refused(tmp_path):
    args = tiny_arguments(tmp_path, share_search="flops", max_steps=1)
    trainer = LemoTrainer(model=tiny_lemo_model(lora=False, **EXACT), args=args, train_dataset=RandomText())
    with pytest.raises(
        LemoError, match=r"share_search='flops' needs an estimate, .*all weights are trained; use share_search='kept_share'"
    ):
        trainer.train()
