"""`lemo bench`: methods, one measured step, turns of processes, tables that never show memory and speed alone."""

import itertools
import json
import logging
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lemo_hf import LemoConfig
from lemo_hf.cli import main
from lemo_hf.errors import LemoError
from lemo_hf.profiling import breakdown
from lemo_hf.profiling.bench import phases as step_phases
from lemo_hf.profiling.bench import run as bench_run
from lemo_hf.profiling.bench import step as bench_step
from lemo_hf.profiling.bench.counts import saved_on_fake_tensors
from lemo_hf.profiling.bench.methods import METHODS, choose_methods
from lemo_hf.profiling.bench.phases import PHASES, PhaseTimer
from lemo_hf.profiling.bench.run import BenchOptions, bench_config, run_bench
from lemo_hf.profiling.bench.step import bench_model, measure_step, summary
from lemo_hf.profiling.bench.table import bench_table, merged, phase_table, source_line, with_perplexity
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.estimate.step_model import forward_loss

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SMALL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 512}  # fmt: skip


@pytest.fixture
def small_model(tmp_path):
    """A config file of a tiny Llama."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def small_config():
    return AutoConfig.for_model(**SMALL)


def measured(name, seq_len=256, counts=True):
    """A method measured here on the tiny model."""
    (chosen,) = choose_methods(name)
    settings = chosen.settings(seq_len, "float32")
    return settings, measure_step(small_config(), chosen, settings, CPU, steps=2, counts=counts)


def test_names_shares_and_what_they_set():
    names = [chosen.name for chosen in choose_methods("stock, lemo-exact@0.3,random-ltd")]
    assert names == ["stock", "lemo-exact@0.3", "random-ltd@0.5"]
    stock, exact, dropped = (
        chosen.settings(512, "bfloat16") for chosen in choose_methods("stock,lemo-exact@0.3,random-ltd@0.25")
    )
    assert (stock.adapter_dtype, exact.adapter_dtype) == ("float32", "bfloat16")
    assert (exact.lemo.keep_ratio, exact.lemo.selection, exact.lemo.attention_forward) == (0.3, "sampled", "exact")
    assert (dropped.method, dropped.baseline.name, dropped.baseline.keep_ratio) == ("stock", "random-ltd", 0.25)
    (rows,) = choose_methods("lemo-sparse-rows@0.1")
    assert rows.settings(512, "float32").lemo == LemoConfig(
        attention_forward="sparse", selection="ratio", dense_layers=[0], keep_ratio=0.1, checkpoint="kept_rows"
    )
    assert [chosen.method.name for chosen in choose_methods("all")] == list(METHODS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("stok", "no such method; 'stok'; did you mean 'stock'"),
        ("lemo-exakt@0.3", "did you mean 'lemo-exact'"),
        ("zzz", "choose among stock, stock-bf16"),
        ("stock@0.5", "stock has no kept share"),
        ("lemo-exact@0", "a number in"),
        ("lemo-exact@half", "a number in"),
        ("stock,stock", "named twice"),
        (" , ", "no method is named"),
    ],
)
def test_bad_methods(names, message):
    with pytest.raises(LemoError, match=message):
        choose_methods(names)


def test_bad_models_numbers_and_devices(capsys):
    for name, hint in (
        ("Llama-3-8", "did you mean 'Llama-3-8B'"),
        ("OPT-67B", "did you mean 'OPT-6.7B'"),
        ("zzz", "choose one of Llama-3-8B"),
    ):
        with pytest.raises(LemoError, match=hint):
            bench_config(name)
    for change, message in (({"steps": 0}, "steps must be at least 1"), ({"device": "tpu"}, "choose cpu or cuda")):
        with pytest.raises(LemoError, match=message):
            BenchOptions("python-llama-4m", (64,), "stock", **change)
    for words, message in (
        (["--methods", "liger"], "liger cannot run here; Liger needs a CUDA device"),
        (["--methods", "lemo-exact-offload"], "offload needs a CUDA device"),
        (["--device", "cuda"], "no CUDA device is there"),
        (["--seq-len", "4K"], "not a list of lengths; '4K'"),
        (["--table", "no/such.json"], "file does not exist"),
        (["--perplexity", "pyproject.toml"], "file is not JSON"),
        (["--perplexity", "benchmarks/results/layer_arithmetic--any.json"], "no quickstart's result"),
        (["--model", "OPT-6.7B", "--methods", "liger", "--counts-only"], "Liger has no functions for OPT"),
    ):
        if torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as ended:
            main(["bench", *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_a_measured_step_agrees_with_its_estimate_and_its_counts_on_fake_tensors():
    for name in ("stock", "lemo-sparse-rows@0.25"):
        settings, row = measured(name)
        assert len(row["seconds"]) == 2
        assert row["losses"][0] > row["losses"][-1] > 0
        estimate = Estimator(small_config(), on_gpu=False).estimate(settings)
        assert row["flops"] == sum(estimate.flops.values())
        # In the estimate no gradient is summed up before the step ends.
        assert row["live_peak_bytes"] == pytest.approx(estimate.live_bytes, rel=0.02)
        fake = saved_on_fake_tensors(small_config(), settings)
        assert {part: row[part] for part in fake} == fake
        assert 0 < sum(row["saved_by_layer"]) <= row["saved_bytes"]
        assert set(row["phases"]) == set(PHASES)


def test_a_repeat_does_not_count_again_and_a_loss_that_is_no_number_is_refused(monkeypatch):
    _, row = measured("stock", counts=False)
    assert "saved_bytes" not in row
    real = forward_loss
    monkeypatch.setattr("lemo_hf.profiling.bench.step.forward_loss", lambda *given: real(*given) * torch.nan)
    with pytest.raises(LemoError, match="a loss is not a number"):
        measured("stock")


def phases_by_operators(name, monkeypatch):
    """A step's phases, an operator counting as one second."""
    ticks = itertools.count()
    monkeypatch.setattr(PhaseTimer, "_now", lambda timer: next(ticks))
    (chosen,) = choose_methods(name)
    settings = chosen.settings(128, "float32")
    if settings.lemo:
        settings = replace(settings, lemo=replace(settings.lemo, segment_size=64, predictor_features=8))
    model = bench_model(small_config(), settings, CPU)
    ids = torch.randint(0, 96, (1, 128))
    with PhaseTimer(model, CPU) as timer:
        forward_loss(model, ids, settings).backward()
        with timer.phase("optimizer"):
            torch.zeros(1).add_(1)
    return timer.seconds()


def test_every_operator_of_a_step_is_put_down_to_its_phase(monkeypatch):
    methods = "stock", "lemo-exact", "lemo-keys", "lemo-sparse"
    stock, exact, keys, sparse = (phases_by_operators(name, monkeypatch) for name in methods)
    assert stock["select, predict"] == stock["movement"] == 0
    # A uniform draw needs no predictor; both choose.
    assert 0 < exact["select, predict"] < sparse["select, predict"]
    assert min(phases["movement"] for phases in (exact, keys, sparse)) > 5
    for phases in (stock, exact, keys, sparse):
        assert phases["optimizer"] == 2
        assert min(phases[name] for name in ("attention", "mlp", "norm", "loss")) > 5
        # Little fits no phase: embeddings, positions and masks.
        assert phases["other"] < 0.25 * sum(phases[name] for name in PHASES if name != "between")
    # What a LeMo layer calls as functions keeps its phase in backward by the function that runs there, or its autograd node's name.
    monkeypatch.setattr(step_phases, "_PART_OF_NODE", ())
    assert exact["mlp"] > phases_by_operators("lemo-exact", monkeypatch)["mlp"]
    monkeypatch.setattr(breakdown, "_PART_OF_CODE", {})
    unnamed = phases_by_operators("lemo-exact", monkeypatch)
    for name in ("mlp", "attention"):
        assert exact[name] > unnamed[name]
    assert exact["movement"] < unnamed["movement"]


def test_seconds_of_the_phases_are_those_of_the_step():
    _, row = measured("stock", counts=False)
    spent = row["phases"]
    assert all(value >= 0 for value in spent.values())
    assert sum(spent.values()) > 0.3 * min(row["seconds"])


def fake_process(order):
    """In place of a process: what it was asked, and seconds that tell methods apart."""

    def run(options, chosen, seq_len, counts):
        order.append((seq_len, chosen.name, counts))
        if chosen.name == "checkpointing":
            return {"settings": {}, "out_of_memory": "too much", "peak_before_failure_bytes": 5}
        second = 2.0 if chosen.name == "stock" else 1.0
        settings = json.loads(json.dumps(chosen.settings(seq_len, "float32"), default=vars))
        result = {
            "settings": settings,
            "seconds": [second, second + len(order)],
            "phases": dict.fromkeys(PHASES, 1.0),
            "losses": [1.0],
        }
        return result | ({"saved_bytes": 100, "flops": 10, "live_peak_bytes": 1000} if counts else {})

    return run


@pytest.fixture
def shown_by(capsys):
    """What the command prints for its arguments."""

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *words])
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run


def test_methods_take_turns_and_rows_hold_every_repeat(small_model, tmp_path, monkeypatch, shown_by):
    order = []
    monkeypatch.setattr(bench_run, "_run_process", fake_process(order))
    out = tmp_path / "result.json"
    options = BenchOptions(small_model, (64, 128), "stock,checkpointing,lemo-exact", steps=2, repeats=2, device="cpu")
    document = run_bench(options, out, say=lambda line: None)
    assert [name for _, name, _ in order[:6]] == ["stock", "checkpointing", "lemo-exact@0.5"] * 2
    assert [counts for _, _, counts in order] == [True] * 6 + [False] * 4, "counted once; out of memory is not tried again"
    assert json.loads(out.read_text()) == json.loads(json.dumps(document))
    assert {"commit", "versions", "machine", "config", "date"} <= document.keys()
    row = document["rows"][0]
    assert len(row["repeats"]) == 2
    assert row["summary"]["median_seconds"] == pytest.approx(2.5)
    assert (row["summary"]["fastest_seconds"], row["summary"]["slowest_seconds"]) == (2.0, 9.0)
    table = bench_table(document["rows"])
    assert table.count("| not measured |") == 6, "in every row, out of memory or not"
    assert table.count("Not measured: no training run of exactly this configuration.") == 2, "and below every table in words"
    assert "out of memory" in table
    assert "2.5 [2, 9] (1.00x)" in table
    assert "tokens; in parentheses against stock LoRA" in table
    assert "--steps 2 --repeats 2" in source_line(document)
    assert phase_table(document["rows"]).count("\n") == 5
    assert shown_by("--table", str(out)).startswith(table)


def test_what_is_left_of_a_run_is_done_in_turns_later(small_model, tmp_path, monkeypatch):
    """Time that runs out, a kill and a method that failed lose nothing that was measured."""
    order, out = [], tmp_path / "result.json"
    real = fake_process(order)
    fails = iter([False, False, False, True])

    def run(*asked):
        return {"failed": "no such luck"} if next(fails, False) else real(*asked)

    monkeypatch.setattr(bench_run, "_run_process", run)
    options = BenchOptions(small_model, (64,), "stock,checkpointing,lemo-exact", steps=2, repeats=2, device="cpu")
    clock = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(bench_run.time, "monotonic", lambda: next(clock))
    quiet = lambda line: None  # noqa: E731
    document = run_bench(options, out, quiet, seconds=2.5)
    assert document["unfinished"]
    assert [name for _, name, _ in order] == ["stock", "checkpointing"]
    assert json.loads(out.read_text())["unfinished"]
    monkeypatch.setattr(bench_run.time, "monotonic", lambda: 0.0)
    document = run_bench(options, out, quiet)
    assert [name for _, name, _ in order[2:]] == ["lemo-exact@0.5", "lemo-exact@0.5"], "the second turn of stock failed"
    assert "failed" in document["rows"][0]
    document = run_bench(options, out, quiet)
    assert order[4:] == [(64, "stock", False)]
    assert [len(row["repeats"]) for row in document["rows"]] == [2, 0, 2]
    assert "unfinished" not in json.loads(out.read_text())
    run_bench(options, out, quiet)
    assert len(order) == 10, "what is finished is measured anew"
    out.write_text(json.dumps(json.loads(out.read_text()) | {"unfinished": True, "commit": "another"}))
    run_bench(options, out, quiet)
    assert len(order) == 15, "and so is what other code has measured"


def test_a_command_of_its_own_repeats_what_lemo_bench_alone_does_not(small_model):
    document = bench_run.heading(BenchOptions(small_model, (64,), "stock", device="cpu"))
    document |= {"versions": dict.fromkeys(document["versions"], "1")}
    assert "Repeat: `lemo bench --model " in source_line(document)
    assert source_line(document | {"repeat": "python some.py"}).endswith("Repeat: `python some.py`.")


def test_under_all_what_cannot_run_is_listed_with_its_reason(small_model, monkeypatch):
    monkeypatch.setattr(bench_run, "_run_process", fake_process([]))
    said = []
    document = run_bench(BenchOptions(small_model, (64,), "all", device="cpu", repeats=1), say=said.append)
    assert document["left_out"]["liger"] == "Liger needs a CUDA device"
    assert document["left_out"]["lemo-sparse-offload@0.5"] == "offload needs a CUDA device"
    assert len(document["left_out"]) + len(document["rows"]) == len(METHODS)
    assert any("liger: left out, Liger needs a CUDA device" in line for line in said)


@pytest.mark.slow
def test_a_real_process_measures(small_model, tmp_path):
    options = BenchOptions(small_model, (64,), "lemo-exact", steps=1, repeats=1, device="cpu")
    (row,) = run_bench(options, tmp_path / "real.json", say=lambda line: None)["rows"]
    assert row["summary"]["tokens_per_second"] > 0
    assert row["saved_bytes"] > 0
    assert row["settings"]["lemo"]["keep_ratio"] == 0.5
    assert row["repeats"][0]["warnings"] == []


def test_what_the_package_warns_of_is_told_beside_what_was_measured(small_model, tmp_path, monkeypatch):
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    job.write_text(json.dumps({"model": small_model, "method": "stock", "seq_len": 8, "batch_size": 1, "dtype": "float32",
                               "device": "cpu", "steps": 1, "counts": False, "threads": 1}))  # fmt: skip

    def step(*_):
        logging.getLogger("lemo_hf.models").warning("no such kernel")
        return {"seconds": [1.0], "phases": {}}

    monkeypatch.setattr(bench_step, "measure_step", step)
    monkeypatch.setattr(bench_run, "_run_process", lambda *_: json.loads(result.read_text()))
    bench_step.main(str(job), str(result))
    said = []
    options = BenchOptions(small_model, (8,), "stock", repeats=1, device="cpu")
    run_bench(options, say=said.append)
    assert said == ["1/1 8 stock: 1.00 s a step; warned: no such kernel"]


def test_steps_that_take_minutes_are_run_once(monkeypatch):
    (chosen,) = choose_methods("lemo-exact")
    settings = chosen.settings(64, "float32")
    steps = []
    real = forward_loss
    monkeypatch.setattr("lemo_hf.profiling.bench.step.forward_loss", lambda *given: steps.append(1) or real(*given))
    row = measure_step(small_config(), chosen, settings, CPU, steps=1, counts=False, cold=True)
    assert len(steps) == len(row["seconds"]) == 1
    assert phase_table([{"words": "", "seq_len": 64, "summary": summary([row], 64)}]) == ""


def test_results_of_versions_with_other_phases_stand_in_one_table():
    rows = [{"words": name, "seq_len": 64, "summary": {"phases": {"mlp": 1.0, name: 2.0}}} for name in ("norm", "movement")]
    *_, one, other = phase_table(rows).splitlines()
    assert (one, other) == ("| norm, 64 | 1.000 | 2.000 | - |", "| movement, 64 | 1.000 | - | 2.000 |")


def test_a_process_that_dies_is_a_failed_row(small_model, monkeypatch):
    options = BenchOptions(small_model, (64,), "lemo-exact", steps=1, repeats=2, device="cpu")
    died = subprocess.CompletedProcess([], 1, "", "Traceback ...\nValueError: no\nsuch luck")
    monkeypatch.setattr(bench_run.subprocess, "run", lambda *command, **how: died)
    said = []
    (row,) = run_bench(options, say=said.append)["rows"]
    assert row["failed"] == "exit code 1: Traceback ... ValueError: no such luck"
    assert len(said) == 1, "it is not tried again"
    assert "| failed |" in bench_table([row])


def test_ratios_are_between_adapters_of_one_float_type():
    def row(method, adapters, saved):
        return {"model": "m", "seq_len": 8, "method": method, "words": method, "adapters": adapters, "saved_bytes": saved * 2**20}

    rows = [row("stock", "float32", 8), row("lemo-exact@0.5", "bfloat16", 3)]
    alone = bench_table(rows)
    assert "against stock; rows with bfloat16 adapters against nothing, for want of" in alone
    assert "| 3 MiB |" in alone
    both = bench_table([*rows, row("stock-bf16", "bfloat16", 6)])
    assert "against stock; rows with bfloat16 adapters against stock-bf16" in both
    assert "| 3 MiB (0.50) |" in both
    assert "| 8 MiB (1.00) |" in both


def test_results_of_other_settings_are_not_mixed_unnoticed():
    document = {
        "kind": "lemo bench",
        "commit": "c",
        "machine": "any",
        "config": {"batch_size": 1, "dtype": "bfloat16"},
        "rows": [],
    }
    other = document | {"config": {"batch_size": 2, "dtype": "bfloat16"}}
    with pytest.raises(LemoError, match="another batch_size in one table; 1 and 2"):
        merged([document, other])
    assert merged([document, other], mixed=True) == merged([document, document]) == []


def test_counts_need_neither_weights_nor_a_gpu(small_model, shown_by):
    shown = shown_by("--model", small_model, "--seq-len", "256", "--methods", "stock-bf16,liger,lemo-exact-rows", "--counts-only")
    assert "machine: any" in shown
    assert shown.count("| not measured |") == 3
    stock, liger, rows = (line.split("|") for line in shown.splitlines() if "float" in line and line.startswith("| "))
    assert "(1.00)" in stock[3]
    saved = [float(row[4].partition("(")[2].partition(")")[0]) for row in (stock, liger, rows)]
    assert saved[0] > saved[1] > saved[2]
    assert "s a step" not in shown
    assert "No step was run" in shown


def quickstart_result():
    arms = {"stock": None, "exact": LemoConfig(keep_ratio=0.5).to_dict()}
    config = {"base": "python-llama-4m", "tokens": 4096, "batch": 1, "steps": 25, "arms": arms,
              "dtype": "float32 base and adapters, no autocast", "lora": "r=8 on q, k, v, o"}  # fmt: skip
    return {"commit": "abc", "config": config, "arms": {arm: {"perplexity": {"equal_steps": 17.5}} for arm in arms}}


def test_a_perplexity_belongs_to_its_own_configuration_only():
    def row(name, seq_len=4096, dtype="float32", model="python-llama-4m"):
        (chosen,) = choose_methods(name)
        settings = json.loads(json.dumps(chosen.settings(seq_len, dtype), default=vars))
        return {"model": model, "settings": settings}

    found = with_perplexity(row("lemo-exact"), quickstart_result(), "quickstart.json")
    assert found == {"dense": 17.5, "source": "quickstart.json, commit abc, arm exact, 25 steps"}
    assert with_perplexity(row("stock"), quickstart_result(), "")["source"].endswith("arm stock, 25 steps")
    others = [
        row("lemo-exact@0.3"),
        row("lemo-exact-rows"),
        row("lemo-sparse"),
        row("longlora"),
        row("checkpointing"),
        row("random-ltd"),
    ]
    others += [row("lemo-exact", 2048), row("lemo-exact", dtype="bfloat16"), row("lemo-exact", model="Llama-3-8B")]
    assert [with_perplexity(other, quickstart_result(), "") for other in others] == [None] * len(others)


def test_the_quickstarts_arm_of_kept_keys_is_a_method_with_its_perplexity():
    path = RESULTS / "quickstart--amd-epyc-2-cores.json"
    quickstart = json.loads(path.read_text())
    (chosen,) = choose_methods("lemo-keys")
    settings = json.loads(json.dumps(chosen.settings(4096, "float32"), default=vars))
    found = with_perplexity({"model": "python-llama-4m", "settings": settings}, quickstart, path.name)
    assert found["dense"] == quickstart["arms"]["kept_keys"]["perplexity"]["equal_steps"]


def test_an_estimated_peak_beside_measured_ones_says_so():
    def row(**peak):
        return {"model": "m", "seq_len": 8, "method": "stock", "words": "stock", "adapters": "float32", **peak}

    estimated, measured = row(estimated_bytes=2**20), row(summary={"peak_allocated_bytes": 2**21}, estimated_bytes=2**20)
    measured["summary"] |= dict.fromkeys(("median_seconds", "fastest_seconds", "slowest_seconds", "tokens_per_second"), 1.0)
    both = bench_table([measured, estimated])
    assert "| 2 MiB (1.00) |" in both
    assert "| 1 MiB est. (0.50) |" in both
    assert "est." not in bench_table([estimated]), "there the line below the table says it"


def test_results_of_several_commits_or_machines_are_not_mixed_unasked():
    def result(commit="abc", machine="one"):
        return {"kind": "lemo bench", "commit": commit, "machine": {"processor": machine}, "rows": [{"method": "stock"}]}

    assert len(merged([result(), result()])) == 2
    with pytest.raises(LemoError, match="results of different commits in one table; abc and def; measure anew, or add --mixed"):
        merged([result(), result("def")])
    with pytest.raises(LemoError, match="different machines"):
        merged([result(), result(machine="two")])
    assert [row["commit"] for row in merged([result(), result("def")], mixed=True)] == ["abc", "def"]
    with pytest.raises(LemoError, match="no result of lemo bench"):
        merged([{"rows": []}])


def test_medians_are_of_all_steps_of_all_repeats():
    repeats = [{"seconds": [1.0, 5.0], "phases": {"mlp": 1.0}}, {"seconds": [2.0, 3.0], "phases": {"mlp": 3.0}}]
    found = summary(repeats, 100)
    assert (found["median_seconds"], found["tokens_per_second"], found["phases"]["mlp"]) == (2.5, 40.0, 2.0)
