"""The programs for a GPU run: here with small sizes, in triton's interpreter."""

import json
import subprocess
from dataclasses import replace

import gpu_checks
import gpu_headline
import gpu_offload
import gpu_suite
import kernel_times
import lemo_kernels
import paper_estimates
import paper_times
import pytest
import torch
from gpu_checks import Scale
from gpu_suite import Part

from lemo_hf.models import kernel_switch
from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.bench.table import bench_table, merged, source_line

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small sizes need the interpreter, which a GPU switches off")


def test_every_kind_of_part_runs_and_is_not_run_again(tmp_path, monkeypatch):
    command = [
        "--tiny",
        "--out",
        str(tmp_path),
        *(word for part in ("runs", "att", "pattern", "train", "head", "times", "kept") for word in ("--part", part)),
    ]
    assert gpu_suite.main(command) == 0
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert all({"date", "commit", "versions", "machine", "seconds"} <= result.keys() for result in results.values())
    assert all(row["seconds"] > 0 for row in results["runs"]["rows"])
    assert [row["backend"] for row in results["attention_16"]["rows"]] == ["triton"] * 4
    assert all(all(row["same_bits_deterministic"]) for row in results["attention_16"]["rows"])
    assert {(row["width"], row["window"]) for row in results["kept_keys"]["rows"]} == {(3, None), (3, 17), (103, None), (103, 17)}
    assert max(error for row in results["kept_keys"]["rows"] if row["dtype"] == "torch.float32" for error in row["errors"]) < 1e-5
    patterns = results["patterns"]["rows"]
    assert {row["pattern"] for row in patterns} == {"shifted_groups", "block_sparse"}
    assert max(error for row in patterns if row["dtype"] == "torch.float32" for error in row["errors"]) < 1e-5
    trained = results["training_mistral"]["rows"]
    assert {row["form"] for row in trained} == {"exact", "kept_keys", "sparse"}
    assert all(row["gradient_error"] < 1e-4 for row in trained)
    stock, tuned, sparse = results["headline_256"]["rows"]
    assert [row["method"] for row in (stock, tuned, sparse)] == ["checkpointing", "tokentune@0.5", "lemo-sparse@0.5"]
    assert {"settings", "model", "summary", "perplexity"} <= stock.keys()
    assert stock["summary"]["tokens_per_second"] > 0
    assert 0 < sparse["saved_bytes"] < tuned["saved_bytes"]
    assert bench_table(results["headline_256"]["rows"]).count("not measured |") == 3
    assert source_line(results["headline_256"]).endswith(
        "Repeat: `python benchmarks/gpu_suite.py --out DIR --part headline_256`."
    )
    assert results["times_scatter_add"]["rows"][0]["share_of_bound"] > 0
    all_parts = gpu_suite.parts
    fails = lambda: pytest.fail("it was there")  # noqa: E731
    monkeypatch.setattr(gpu_suite, "parts", lambda scale: (replace(part, run=fails) for part in all_parts(scale)))
    assert gpu_suite.main(command) == 0


def test_a_short_lease_gets_what_matters_most_first():
    found = list(gpu_suite.parts(Scale(False)))
    names = [part.name for part in found]
    assert len(set(names)) == len(names)
    assert names[:3] == ["runs", "training_llama", "attention_128"]
    first = names[3 : names.index("times_gather_norm")]
    assert first == ["headline_8192_Llama-3-8B_first", "headline_65536_Llama-3-8B_first"]
    kinds = [name.split("_")[0] for name in names[3 + len(first) :]]
    order = ["times", "movement", "headline", "paper", "longest", "training", "attention", "rows", "offsets", "waits", "kept"]
    order += ["patterns", "tests", "memory", "offload", "quality"]
    assert list(dict.fromkeys(kinds)) == order
    assert max(part.seconds for part in found) <= 520, "a part, or a process of one that goes on, fits a call"
    assert "tests_compiles_for_gpu" not in names


def test_every_goal_and_figure_has_its_measurement():
    """By method and length; what a figure draws of the paper's models, PEFT's default adapters, stands in paper_*."""
    found = {(group.model, group.tokens): set() for group in gpu_headline.groups(tiny=False)}
    for group in gpu_headline.groups(tiny=False):
        found[group.model, group.tokens] |= {chosen.name for chosen in choose_methods(",".join(group.methods))}
        assert len(group.methods) > 2, "methods are compared within one run"
    ours = {"lemo-exact@0.5", "lemo-keys@0.5", "lemo-sparse@0.5"}
    assert found["Llama-3-8B", 8192] >= ours | {"stock", "stock-bf16", "liger", "lemo-artifact"}
    shares = {f"lemo-exact-rows@{share}" for share in ("0.5", "0.25", "0.1")}
    assert found["Llama-3-8B", 65536] >= shares | {"checkpointing", "liger-checkpointing", "lemo-sparse-rows@0.5"}
    assert found["Llama-3-8B", 131072] >= {"liger-checkpointing", "lemo-exact-rows@0.1", "lemo-keys-rows@0.5"}
    for model in ("Llama-3-8B", "Llama-2-7B", "Mistral-7B", "OPT-6.7B", "OPT-1.3B"):
        assert found[model, 4096] >= ours | {"stock-bf16"}, model
    drawn = {chosen.name for chosen in choose_methods(paper_estimates.METHODS)}
    for model, lengths in paper_estimates.SIZES.items():
        assert all(found[model, tokens] >= drawn for tokens in lengths), model
    long = {chosen.name for chosen in choose_methods(paper_times.LONG_METHODS)}
    assert all(found[size] >= long for size in paper_times.LONG)
    searched = {(name.split("_")[1], method) for name, method, _ in gpu_headline.longest_parts()}
    assert {(card, f"lemo-sparse-rows@{share}") for card in ("80GB", "141GB") for share in ("0.5", "0.3")} <= searched


def test_methods_that_take_turns_go_on_where_time_ran_out(tmp_path, monkeypatch):
    asked = []

    def run(path, seconds):
        asked.append((path.name, seconds))
        path.write_text("{}")
        return {"rows": [], "warned": ["slow"]} | ({"unfinished": True} if len(asked) == 1 else {})

    monkeypatch.setattr(gpu_suite, "parts", lambda scale: iter([Part("turns", 5, run, goes_on=True), Part("sure", 5, dict)]))
    command = ["--tiny", "--out", str(tmp_path), "--seconds", "100"]
    assert gpu_suite.main(command) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sure.json", "turns.unfinished.json"]
    assert gpu_suite.main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sure.json", "turns.json"]
    assert json.loads((tmp_path / "turns.json").read_text())["warnings"] == ["slow"]
    assert [name for name, _ in asked] == ["turns.unfinished.json"] * 2
    assert all(90 < seconds < 95 for _, seconds in asked)


def test_a_method_that_failed_is_run_again_alone(tmp_path, monkeypatch):
    results = {"rows": [{"method": "lemo-sparse@0.5", "failed": "no such luck", "repeats": []}]}
    monkeypatch.setattr(gpu_headline, "run_bench", lambda *_: results)
    (group,) = gpu_headline.groups(tiny=True)
    with pytest.raises(AssertionError, match=r"methods failed: .*no such luck"):
        gpu_headline.run_group(Scale(True), group, tmp_path / "there.json", 1)


def test_the_longest_sample_is_looked_for_from_the_estimated_one_down(monkeypatch):
    tried = []

    def step(config, chosen, settings, device, **how):
        tried.append((settings.seq_len, how["cold"]))
        fits = len(tried) == 2
        return {"seconds": [2.0], "phases": {}, "losses": [1.0]} if fits else {"out_of_memory": "too much"}

    monkeypatch.setattr(gpu_headline, "measure_step", step)
    monkeypatch.setattr(gpu_headline, "LENGTH_STEP", 16)
    found = gpu_headline.run_longest(Scale(True), "lemo-exact-rows", 80)
    assert tried == [(256, True), (240, True)]
    assert [row["seq_len"] for row in found["rows"]] == [256, 240]
    assert found["rows"][1]["summary"]["tokens_per_second"] == 120
    assert gpu_headline.run_longest(Scale(True), "liger", 80)["left_out"] == {"liger": "Liger needs a CUDA device"}


def test_offload_has_the_whole_config_of_a_result(monkeypatch):
    monkeypatch.setattr(gpu_offload, "measure_step", lambda *_, **__: {"out_of_memory": "too much"})
    found = gpu_suite.run_offload(Scale(True), "none", 64, 1)
    assert "out of memory" in bench_table(merged([found]))
    assert "--part offload_64_none`" in source_line(found)
    assert found["config"]["seq_lens"] == [64]


def test_a_kernel_that_fails_names_its_reason_and_the_others_run(monkeypatch):
    probed = []

    def probe(name, *_):
        probed.append(name)
        if name == "apply_rotary":
            raise RuntimeError("out of resource:\n shared memory")

    monkeypatch.setattr(lemo_kernels, "probe", probe)
    with pytest.raises(AssertionError, match=r"apply_rotary.*RuntimeError: out of resource: shared memory"):
        gpu_checks.run_kernels(Scale(True))
    assert probed == [name for name, _ in gpu_checks.KERNELS]
    assert {module for name, module in lemo_kernels._HOMES.items() if name in probed} == set(lemo_kernels._HOMES.values())


def test_what_the_package_warns_of_stands_in_each_part_s_file(tmp_path, monkeypatch):
    def falls_back():
        kernel_switch._say_once("take_rows", "no such luck")
        return {}

    monkeypatch.setattr(gpu_suite, "parts", lambda scale: iter([Part(name, 5, falls_back) for name in ("one", "two")]))
    assert gpu_suite.main(["--tiny", "--out", str(tmp_path)]) == 0
    for name in ("one", "two"):
        (line,) = json.loads((tmp_path / f"{name}.json").read_text())["warnings"]
        assert line == "The kernel take_rows cannot run, its PyTorch reference does: no such luck"


def test_a_part_that_fails_is_kept_apart_and_tried_again(tmp_path, monkeypatch):
    answers = [RuntimeError("no such luck"), {"rows": [1]}]

    def uncertain():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(gpu_suite, "parts", lambda scale: iter([Part("uncertain", 5, uncertain), Part("sure", 5, dict)]))
    assert gpu_suite.main(["--tiny", "--out", str(tmp_path)]) == 1
    assert "no such luck" in json.loads((tmp_path / "uncertain.failed.json").read_text())["failure"]
    assert (tmp_path / "sure.json").exists(), "the other parts run all the same"
    assert gpu_suite.main(["--tiny", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sure.json", "uncertain.json"]


def test_what_failed_or_was_killed_comes_last_the_next_time(tmp_path, monkeypatch):
    order = []

    def killed():
        order.append("killed")
        raise KeyboardInterrupt  # as good as a signal: nothing after the part is run

    def part(name):
        return Part(name, 5, lambda: order.append(name) or {})

    monkeypatch.setattr(gpu_suite, "parts", lambda scale: iter([Part("killed", 5, killed), part("second"), part("third")]))
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.main(["--tiny", "--out", str(tmp_path)])
    assert "did not come to an end" in json.loads((tmp_path / "killed.failed.json").read_text())["failure"]
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.main(["--tiny", "--out", str(tmp_path)])
    assert order == ["killed", "second", "third", "killed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.failed.json", "second.json", "third.json"]


def test_after_a_fault_of_the_device_the_other_parts_wait_for_a_process_that_works(tmp_path, monkeypatch):
    def fault(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_suite, "parts", lambda scale: iter([Part("faulty", 5, fault), Part("sure", 5, dict)]))
    with monkeypatch.context() as broken:
        broken.setattr(gpu_suite, "clock", fault)
        assert gpu_suite.main(["--tiny", "--out", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["faulty.failed.json"]
    assert gpu_suite.main(["--tiny", "--out", str(tmp_path)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faulty.failed.json", "sure.json"]


def test_parts_that_no_time_is_left_for_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "parts", lambda scale: iter([Part("long", 600, dict), Part("short", 5, dict)]))
    assert gpu_suite.main(["--tiny", "--out", str(tmp_path)]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["short.json"]


def test_a_gpu_is_asked_for(tmp_path, capsys):
    for program in (gpu_suite, kernel_times):
        with pytest.raises(SystemExit):
            program.main(["--out", str(tmp_path / "here")])
        assert "none is there; use --tiny" in capsys.readouterr().err


def test_the_quality_bench_is_asked_for_what_it_knows(tmp_path, monkeypatch):
    from benchmarks.quality import base, extension
    from benchmarks.quality.arms import all_arms

    monkeypatch.setattr(gpu_suite, "QUALITY", tmp_path)
    monkeypatch.setattr(
        base, "base_trainer", lambda size, out, total: pytest.fail(f"{size} {out}") if size != "large" else Trained()
    )
    monkeypatch.setattr(extension.AutoConfig, "from_pretrained", lambda folder: Config())
    asked = []

    class Trained:
        step = minutes = train_bytes = 0
        parameters, held_out = [], []

        class stream:
            rows_per_epoch = 0

        def run(self, minutes, at_checkpoint):
            asked.append(("base", minutes))

        def finished(self):
            return True

    class Config:
        max_position_embeddings, num_hidden_layers = 2048, 12

    def run_one(arm, setting, seed, texts, out):
        asked.append((arm.name, setting.tokens, seed))
        path = out / "arms" / setting.name / f"{arm.name}--seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        return "took 1 s"

    def run(command, **options):
        module = {"benchmarks.quality.base": base, "benchmarks.quality.extension": extension}[command[4]]
        return subprocess.CompletedProcess(command, module.main(command[5:]), "done", "")

    monkeypatch.setattr(extension, "run_one", run_one)
    monkeypatch.setattr(gpu_suite.subprocess, "run", run)
    found = {part.name: part.run() for part in gpu_suite.quality_parts()}
    assert asked[:4] == [("base", 6.5)] * 3 + [("stock", 8192, 0)]
    assert [name for name, _, seed in asked[3:] if seed == 2] == ["stock", "exact-0.5", "exact-0.3"]
    assert {name for name, *_ in asked[3:]} <= all_arms(12).keys()
    assert list(found["quality_stock_seed0"]["results"]) == ["stock--seed0.json"]
