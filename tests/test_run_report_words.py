"""What a report says of runs whose logs are made up."""

import pytest

from lemo_hf.hub.model_card import RunResults
from lemo_hf.models.lemo_config import LemoConfig
from lemo_hf.profiling.report.comparison import pair, require_comparable
from lemo_hf.profiling.report.data import RunData
from lemo_hf.profiling.report.figures import memory
from lemo_hf.profiling.report.page import render_report
from lemo_hf.profiling.report.plots import RecallSeries, draw_recall
from lemo_hf.profiling.report.words import amount, key_figures, pairs_in_words, summary, warnings


def synthetic(losses, seconds_a_step=1.0, label="run", lemo=None, **metrics):
    history = [
        {"step": step, "loss": loss, "seconds/training": seconds_a_step * step, "seconds/evaluation": 50.0, **metrics}
        for step, loss in enumerate(losses, 1)
    ]
    results = RunResults(base_model="m", data="text", seq_len=64, lemo=(lemo or LemoConfig()).to_dict(), provenance={})
    return RunData("mine", label, history, results, max_steps=len(losses))


def test_losses_are_paired_at_equal_steps_and_equal_time():
    # Twice as fast, 0.5 worse at every step, a fall of 0.1 a step.
    run = synthetic([10.5 - 0.1 * step for step in range(1, 21)])
    baseline = synthetic([10 - 0.1 * step for step in range(1, 17)], seconds_a_step=2.0, label="baseline")
    steps, time = pair(run, baseline)
    assert (steps.begin, steps.end) == (13, 16)
    assert steps.difference == pytest.approx(0.5)
    # 20 seconds: the run's steps 15 to 20 against the baseline's 8 to 10.
    assert (time.begin, time.end, time.steps, time.baseline_steps) == (15, 20, 20, 10)
    assert time.loss == pytest.approx(10.5 - 1.75)
    assert time.baseline == pytest.approx(10 - 0.9)
    assert require_comparable(run, baseline) == []


def test_what_the_two_runs_do_not_share_is_said():
    run, baseline = synthetic([3.0] * 4), synthetic([3.0] * 4, label="baseline")
    baseline.results.precision, run.results.precision = "float32 base", "bfloat16 base"
    run.arguments, baseline.arguments = {"per_device_train_batch_size": "1"}, {"per_device_train_batch_size": "4"}
    run.results.provenance, baseline.results.provenance = {"machine": {"threads": 2}}, {"machine": {"threads": 8}}
    notes = require_comparable(run, baseline)
    assert len(notes) == 3
    assert notes[0].startswith("The baseline differs in float types (float32 base, this run bfloat16 base)")
    assert "per_device_train_batch_size (4, this run 1): memory" in notes[1]
    assert "on another machine" in notes[2]
    assert all(note in render_report([run], baseline, "", notes).replace("&#39;", "'") for note in notes)


def test_the_memory_of_each_run_is_called_what_it_is():
    def logged(label, device):
        run = synthetic([3.0] * 4, label=label, **{"memory/peak_bytes": 2.0**31})
        run.device = device
        return run

    gpu, cpu = "Tensors on the GPU", "Resident memory of the process, with the interpreter and libraries in it"
    alike = memory([logged("run", "cuda"), logged("baseline", "cuda")]).caption
    assert alike.startswith(f"{gpu}. The stairs")
    mixed = memory([logged("run", "cpu"), logged("baseline", "cuda")]).caption
    assert mixed.startswith(f"{cpu} (run); {gpu} (baseline). They measure different things")
    assert memory([logged("run", "cpu"), synthetic([3.0], label="baseline")]).caption.startswith(f"{cpu}. The stairs")
    assert gpu not in memory([logged("run", "")]).caption


def test_loss_of_a_forward_that_leaves_tokens_out_is_not_passed_off_as_the_dense_one():
    baseline, words = synthetic([3.0] * 4, lemo=LemoConfig(enabled=False)), "loss of a forward that leaves tokens out"
    for form in ("sparse", "kept_keys"):
        run = synthetic([3.0] * 4, lemo=LemoConfig(attention_forward=form))
        assert any(words in text for text in pairs_in_words(run, baseline)), form
    assert not any(words in text for text in pairs_in_words(synthetic([3.0] * 4), baseline))


@pytest.mark.parametrize(
    ("lemo", "words"),
    [
        (LemoConfig(), "(sampled selection); dense forward pass."),
        (LemoConfig(attention_forward="kept_keys"), "; every token attends to the kept tokens and to the last 256."),
        (
            LemoConfig(attention_forward="sparse", nearby_tokens=7),
            "; kept tokens attend to kept tokens, dropped ones to the last 7 tokens.",
        ),
    ],
    ids=["exact", "kept keys", "sparse"],
)
def test_the_form_is_said_in_words(lemo, words):
    run = synthetic([3.0] * 4, lemo=lemo, kept_share=0.5)
    assert any(text.endswith(words) and "kept 50% of the tokens" in text for text in summary(run, None))


def by_layer(name, *values):
    return {name: sum(values) / len(values)} | {f"{name}/layer_{layer}": value for layer, value in enumerate(values)}


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (synthetic([3.0] * 4, **by_layer("kept_share", 0.5, 0.5)), ""),
        (synthetic([3.0] * 4, **by_layer("kept_share", 1.0, 1.0)), "no token was left out"),
        (synthetic([3.0] * 4, **by_layer("kept_share", 0.75, 0.75)), "keep_ratio asks for 0.50"),
        (synthetic([3.0] * 4, lemo=LemoConfig(dense_layers=[0]), **by_layer("kept_share", 1.0, 0.5)), ""),
        (synthetic([3.0] * 4, **by_layer("recall", 0.5), recall_of_chance=0.45), "hardly above chance"),
        (synthetic([3.0] * 4, **by_layer("recall", 0.7), recall_of_chance=0.5, recall_of_positions=0.8), "positions only"),
        (synthetic([3.0] * 4, **by_layer("recall", 0.9), recall_of_chance=0.5, recall_of_positions=0.8), ""),
        (synthetic([3.0] * 4, lemo=LemoConfig(selection="ratio")), "recall was not measured"),
        (synthetic([3.0] * 4, **{"seconds/predictor": 4.0}), "took 50% of the training time"),
        (synthetic([3.0, float("nan")]), "not finite"),
        (synthetic([]), "No training loss"),
    ],
)
def test_what_to_look_at_is_said(run, wanted):
    assert [wanted in text for text in warnings(run)] == ([True] if wanted else [])


def test_fallen_recall_is_said():
    run = synthetic([3.0] * 4, **by_layer("recall", 0.9))
    run.history[-1]["recall"] = 0.8
    run.arguments = {"recall_drop": "0.03"}
    assert any("fell from 0.90 to 0.80" in text for text in warnings(run))


def test_key_figures_stand_side_by_side():
    run, other = synthetic([3.0] * 4, saved_bytes=2.0**20), synthetic([2.0] * 4, 2.0, lemo=LemoConfig(enabled=False))
    rows = dict(key_figures([run, other]))
    assert rows["dense perplexity after training"] == ["not measured", "not measured"]
    assert rows["saved for backward, one forward"] == ["1024 KiB", "not measured"]
    assert rows["time a step"] == ["1.00 s", "2.00 s"]
    assert rows["time of training, phases included"] == ["4 s", "8 s"]
    assert rows["training loss at the end (nats per token)"] == ["3.000", "2.000"]
    other.results.saved_bytes = 2.0**21
    assert "0.50 of the baseline's 2.0 MiB" in " ".join(summary(run, other))
    assert [amount(size) for size in (512, 3 * 2**20, 300 * 2**20, 5.5 * 2**30)] == ["0 KiB", "3.0 MiB", "300 MiB", "5.5 GiB"]


def test_long_runs_of_many_layers_stay_small():
    run = synthetic([3.0] * 3000, **by_layer("kept_share", *[0.5] * 40), **by_layer("saved_bytes", *[1e6] * 40))
    page = render_report([run], None, "long")
    assert len(page) < 2**20
    assert "mean of" in page


def test_recall_that_no_layer_has_is_drawn_empty():
    draw_recall(RecallSeries([0, 5], [0, 1], [[float("nan")] * 2] * 2))
