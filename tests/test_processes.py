"""Runs on two processes (gloo, CPU), by DDP and FSDP2: one start of two processes does everything, the tests read what came of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from process_runs import (
    LIMIT,
    PHASES,
    SAMPLED,
    SAVING,
    THRESHOLD,
    Stopped,
    UnevenText,
    make_trainer,
    outcome,
    padded,
    stop_in_phase,
)
from safetensors.torch import load_file
from training_runs import BLOCK, SEQ_LEN, RandomText
from transformers import AutoModelForCausalLM

from lemo_hf.hub.lemo_files import read_tensors
from lemo_hf.training.lemo_run import PROGRESS_FILE

RUNS = Path(__file__).with_name("process_runs.py")


def environment(rank: int, port: int) -> dict[str, str]:
    """What a launcher sets for one of two processes."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of both processes, of runs of this one alone, and the folder of all."""
    out = tmp_path_factory.mktemp("processes")
    found: dict[str, Any] = {"folder": out}

    def alone(name: str, lemo: dict[str, Any], folder: str | None = None, resume: Any = None, **changes: Any) -> Any:
        trainer = make_trainer(out / (folder or name), lemo, **changes)
        trainer.train(resume_from_checkpoint=resume)
        found[name] = outcome(trainer)
        return trainer

    trainer = alone("single", SAMPLED, per_device_train_batch_size=4, eval_dataset=RandomText(4), **SAVING)
    found["single"]["eval_loss"] = trainer.evaluate()["eval_loss"]
    stopped = make_trainer(out / "stopped_by_one", THRESHOLD, per_device_train_batch_size=4, **PHASES, max_steps=2)
    stop_in_phase(stopped, 2)
    with pytest.raises(Stopped):
        stopped.train()

    port = free_port()
    logs = [out / f"rank{rank}.log" for rank in (0, 1)]
    with logs[0].open("w") as first, logs[1].open("w") as second:
        processes = [
            subprocess.Popen(
                [sys.executable, str(RUNS), str(out)], env=environment(rank, port), stdout=log, stderr=subprocess.STDOUT
            )
            for rank, log in enumerate((first, second))
        ]
        try:
            # While they work.
            alone("accumulated", SAMPLED, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=4)
            codes = [process.wait(timeout=LIMIT) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if codes != [0, 0]:
        pytest.fail("\n".join(f"rank {rank}: {log.read_text()[-3000:]}" for rank, log in enumerate(logs)))
    found["ranks"] = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    found["logs"] = [log.read_text() for log in logs]
    resumed = str(out / "fsdp" / "checkpoint-2")
    alone("single_from_fsdp", SAMPLED, folder="alone_again", resume=resumed, per_device_train_batch_size=4, **SAVING)
    alone("resumed_by_one", THRESHOLD, folder="stopped_by_two", resume=True, per_device_train_batch_size=4, **PHASES, max_steps=2)
    return found


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter in a folder."""
    return load_file(folder / "adapter_model.safetensors")


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal shapes, and values equal up to float32 rounding of gradients that Adam divides by their size."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_all_processes_find_the_same(runs: dict[str, Any]) -> None:
    first, second = runs["ranks"]
    compared = [name for name, value in first.items() if isinstance(value, dict) and "curve" in value]
    assert len(compared) > 12
    for name in compared:
        assert first[name] == second[name], name


def test_batch_of_4_is_4_accumulated_is_2_processes_by_2_is_fsdp2(runs: dict[str, Any]) -> None:
    ddp, fsdp = runs["ranks"][0]["ddp"], runs["ranks"][0]["fsdp"]
    assert (ddp["engine"], fsdp["engine"]) == ("DistributedDataParallel", "FSDPPeftModelForCausalLM")
    assert fsdp["curve"] == ddp["curve"]
    assert len(ddp["curve"]) == 4
    assert ddp["curve"] == pytest.approx(runs["single"]["curve"], rel=1e-6)
    assert runs["accumulated"]["curve"] == pytest.approx(runs["single"]["curve"], rel=1e-6)
    assert fsdp["eval_loss"] == pytest.approx(runs["single"]["eval_loss"], rel=1e-6)
    for name in ("ddp_kept_rows", "fsdp_kept_rows", "fsdp_checkpointing"):
        assert runs["ranks"][0][name]["curve"] == pytest.approx(ddp["curve"][:2], rel=1e-6)
        assert runs["ranks"][0][name]["saved_bytes"][0] < 0.5 * ddp["saved_bytes"][0]


def test_weights_gathered_for_a_layer_are_not_saved_bytes(runs: dict[str, Any]) -> None:
    assert runs["ranks"][0]["fsdp"]["saved_bytes"] == runs["ranks"][0]["ddp"]["saved_bytes"]
    # A mean over processes, each with half of the samples.
    assert runs["ranks"][0]["ddp"]["saved_bytes"][0] == pytest.approx(runs["single"]["saved_bytes"][0] / 2, rel=1e-3)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_offload_leaves_every_loss_as_it_is(runs: dict[str, Any], engine: str) -> None:
    offloaded, plain = (runs["ranks"][0][f"{engine}_{kind}"] for kind in ("offload", "kept_rows"))
    assert offloaded["curve"] == plain["curve"]
    # All that the layers save: weights that FSDP2 gathers for a layer are none of it.
    assert len(offloaded["offloaded_bytes"]) == 2
    assert all(0 < moved <= whole for moved, whole in zip(offloaded["offloaded_bytes"], plain["saved_bytes"], strict=True))
    assert [moved + left for moved, left in zip(offloaded["offloaded_bytes"], offloaded["saved_bytes"], strict=True)] == plain[
        "saved_bytes"
    ]


def test_adapter_of_sharded_run_is_whole(runs: dict[str, Any]) -> None:
    folder = runs["folder"]
    for step in (2, 4):
        sharded, replicated, alone = (adapter(folder / name / f"checkpoint-{step}") for name in ("fsdp", "ddp", "single"))
        assert sharded["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 32)
        assert_close(sharded, replicated)
        assert_close(sharded, alone)
    assert_close(adapter(folder / "fsdp_final"), adapter(folder / "fsdp" / "checkpoint-4"))


def test_optimizer_of_sharded_run_is_that_of_one_process(runs: dict[str, Any]) -> None:
    states = [
        torch.load(runs["folder"] / name / "checkpoint-2" / "optimizer.pt", weights_only=True) for name in ("fsdp", "single")
    ]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys() != set()
    for number, values in states[1]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(states[0]["state"][number][name], value, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["fsdp_resumed", "ddp_from_fsdp", "fsdp_from_single", "single_from_fsdp"])
def test_resumed_on_another_number_of_processes(runs: dict[str, Any], name: str) -> None:
    folders = {
        "fsdp_resumed": "fsdp_again",
        "ddp_from_fsdp": "ddp_again",
        "fsdp_from_single": "third",
        "single_from_fsdp": "alone_again",
    }
    found = runs[name] if name in runs else runs["ranks"][0][name]
    assert found["curve"] == pytest.approx(runs["single"]["curve"], rel=1e-6)
    assert_close(adapter(runs["folder"] / folders[name] / "checkpoint-4"), adapter(runs["folder"] / "single" / "checkpoint-4"))


def test_mixed_precision_leaves_predictors_and_loss_in_float32(runs: dict[str, Any]) -> None:
    ddp, fsdp = runs["ranks"][0]["bf16_ddp"], runs["ranks"][0]["bf16_fsdp"]
    assert ddp["types"] == fsdp["types"] == ["torch.float32"]
    # The forwards round alike; a loss that is rounded itself would be off by 3e-3.
    assert fsdp["curve"] == pytest.approx(ddp["curve"], rel=1e-4)
    assert [round(loss * 128) / 128 for loss in fsdp["curve"]] != fsdp["curve"]


def test_phases_are_shared_and_end_alike(runs: dict[str, Any]) -> None:
    ddp, fsdp = runs["ranks"][0]["phases_ddp"], runs["ranks"][0]["phases_fsdp"]
    assert fsdp == {**ddp, "engine": "FSDPPeftModelForCausalLM"}
    assert ddp["refits"] == 2
    assert len(ddp["recall"]) == 3
    assert runs["ranks"][0]["turns"] == [[0, 2, True], [2, 2, True], [4, 1, True]]
    assert runs["ranks"][1]["turns"] == [[1, 2, True], [3, 2, True], [4, 1, False]]


def test_predictors_are_fitted_on_the_documents_of_all_processes(runs: dict[str, Any], tmp_path: Path) -> None:
    two = make_trainer(tmp_path / "a", THRESHOLD, **{**PHASES, "prune_documents": 0}, max_steps=1)
    stop_in_phase(two, 4)
    with pytest.raises(Stopped):
        two.train()
    alone, _ = read_tensors(tmp_path / "a" / PROGRESS_FILE)
    shared, metadata = read_tensors(runs["folder"] / "unpruned" / PROGRESS_FILE)
    assert json.loads(metadata["state"])["progress"] == {"done": 4}
    # 4 documents in 2 rounds of 2 steps: what was read is the same, the steps are half as many.
    assert (alone["phase.taken"].item(), shared["phase.taken"].item()) == (8, 4)
    torch.testing.assert_close(shared["phase.positions.counts"], alone["phase.positions.counts"], rtol=0, atol=0)
    torch.testing.assert_close(shared["phase.positions.sums"], alone["phase.positions.sums"])
    assert shared["phase.fit.0.running"][0] == alone["phase.fit.0.running"][0] == 4 * SEQ_LEN
    assert shared["phase.positions.counts"][0].sum() == 4 * SEQ_LEN // BLOCK


def test_a_round_of_unlike_documents_takes_their_mean_gradient(runs: dict[str, Any]) -> None:
    first, second = (rank["gradients"] for rank in runs["ranks"])
    mean = [(a + b) / 2 for a, b in zip(first["own"], second["own"], strict=True)]
    assert first["own"] != second["own"]
    for rank in (first, second):
        assert rank["shared"] == pytest.approx(mean, rel=1e-6)


def test_stopped_phase_goes_on_with_another_number_of_processes(runs: dict[str, Any]) -> None:
    assert [rank["stopped"] for rank in runs["ranks"]] == [True, True]
    for found in (runs["resumed_by_one"], runs["ranks"][0]["resumed_by_two"]):
        assert len(found["curve"]) == 2
        assert len(found["thresholds"]) == 2


def test_thresholds_of_two_processes_are_those_of_one(runs: dict[str, Any]) -> None:
    assert runs["ranks"][0]["thresholds"] == runs["ranks"][1]["thresholds"]
    assert runs["ranks"][0]["thresholds"]["two"] == runs["ranks"][0]["thresholds"]["one"]


def test_processes_with_unequal_batches_do_not_wait_for_each_other(runs: dict[str, Any], tmp_path: Path) -> None:
    ddp, fsdp = runs["ranks"][0]["uneven_ddp"], runs["ranks"][0]["uneven_fsdp"]
    assert fsdp == {**ddp, "engine": "FSDPPeftModelForCausalLM"}
    assert len(ddp["curve"]) == 4
    # The same samples, padded to each other in one process.
    uneven = {"data": UnevenText(), "data_collator": padded, "train_sampling_strategy": "sequential", "max_steps": 4}
    alone = make_trainer(tmp_path, SAMPLED, **uneven)
    alone.train()
    assert runs["ranks"][0]["uneven_sampled"]["curve"] == pytest.approx(outcome(alone)["curve"], rel=1e-5)


def test_whole_model_is_trained_and_saved_as_by_one_process(runs: dict[str, Any]) -> None:
    folder = runs["folder"]
    assert runs["ranks"][0]["whole_fsdp"]["curve"] == runs["ranks"][0]["whole_ddp"]["curve"]
    saved, wanted = (load_file(folder / name / "model.safetensors") for name in ("whole_fsdp_final", "whole_ddp_final"))
    assert_close(saved, wanted)
    names = [sorted(path.name for path in (folder / name).iterdir()) for name in ("whole_fsdp_final", "whole_ddp_final")]
    assert names[0] == names[1]
    assert AutoModelForCausalLM.from_pretrained(folder / "whole_fsdp_final").config.model_type == "lemo_llama"


def test_best_model_is_taken_back(runs: dict[str, Any]) -> None:
    best = Path(runs["ranks"][0]["best"]["checkpoint"])
    assert best.name == "checkpoint-2"
    assert_close(adapter(runs["folder"] / "best_final"), adapter(best))


def test_callbacks_train_in_a_stock_trainer_alike(runs: dict[str, Any]) -> None:
    assert runs["ranks"][0]["stock"]["curve"] == runs["ranks"][0]["ddp"]["curve"][:2]


def test_a_stock_trainer_that_would_save_shards_is_refused(runs: dict[str, Any]) -> None:
    for rank in runs["ranks"]:
        assert rank["stock_fsdp"].startswith("LemoError: a stock trainer under FSDP2 saves shards")
        assert "2 processes; use LemoTrainer or LemoSFTTrainer" in rank["stock_fsdp"]
        assert "\n" not in rank["stock_fsdp"]


def test_a_signal_to_one_process_in_calibration_stops_all_after_the_same_document(runs: dict[str, Any]) -> None:
    assert [rank["signal"] for rank in runs["ranks"]] == [[143, 3], [143, 3]]


def test_parts_of_a_stream_of_unequal_length_do_not_wait_for_each_other(runs: dict[str, Any]) -> None:
    first, second = (rank["short_stream"] for rank in runs["ranks"])
    assert (first["engine"], len(first["curve"]), len(first["recall"])) == ("FSDPPeftModelForCausalLM", 1, 2)
    # One of the 4 that the shorter part has is left to fit on.
    assert (first["probes"], second["probes"]) == (3, 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lemo", "lemo.keep_ratio; 0.5 on rank 0, 0.4 on rank 1"),
        ("seed", "seed; 0 on rank 0, 1 on rank 1"),
        ("argument", "learning_rate; 0.1 on rank 0, 1.1 on rank 1"),
        ("model", "model; 'PeftModelForCausalLM' on rank 0, 'LemoLlamaForCausalLM' on rank 1"),
        ("data", "samples of the training set; 24 on rank 0, 23 on rank 1"),
    ],
)
def test_unlike_processes_are_refused_on_all_of_them(runs: dict[str, Any], kind: str, message: str) -> None:
    for rank in runs["ranks"]:
        assert rank["unlike"][kind].startswith(f"LemoError: processes have different {message}; start all")
        assert "\n" not in rank["unlike"][kind]


def test_predictors_that_differ_are_an_error_on_all_processes(runs: dict[str, Any]) -> None:
    for rank in runs["ranks"]:
        assert rank["unlike"]["predictors"].startswith("LemoError: predictors differ among processes; b on rank 1")


def test_exchanges(runs: dict[str, Any]) -> None:
    for rank in runs["ranks"]:
        assert rank["all"] == [True, False]
        assert rank["means"][:2] == [0.5, 3.0]
        assert rank["means"][2] != rank["means"][2]


def test_rank_0_alone_speaks_and_writes(runs: dict[str, Any]) -> None:
    loud, quiet = runs["logs"]
    assert loud.count("of the run's compute goes into the phases") > 10
    assert "{'loss'" in loud
    for line in ("of the run's compute", "{'loss'", "doc/s"):
        assert line not in quiet
    assert [rank["log level"] for rank in runs["ranks"]] == [30, 40]
    names = {path.name for path in (runs["folder"] / "phases_fsdp").iterdir()}
    assert names == {"lemo_block_scores.safetensors", "lemo_log.jsonl"}
    lines = (runs["folder"] / "phases_fsdp" / "lemo_log.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in lines) == 2


@pytest.mark.slow
def test_a_process_that_dies_stops_all_and_one_goes_on(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(RUNS), str(tmp_path), "die"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    alone = {"per_device_train_batch_size": 4, **SAVING}
    straight = make_trainer(tmp_path / "straight", SAMPLED, **alone)
    straight.train()
    resumed = make_trainer(tmp_path / "died", SAMPLED, **alone)
    resumed.train(resume_from_checkpoint=True)
    assert outcome(resumed)["curve"] == pytest.approx(outcome(straight)["curve"], rel=1e-6)
    assert len(outcome(resumed)["curve"]) == 4


@pytest.mark.slow
def test_ends_of_a_model_tied_adapted_or_trained(tmp_path: Path) -> None:
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, str(RUNS), str(tmp_path), "variants"], env=environment(rank, port)) for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=LIMIT) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    curves, others = (json.loads((tmp_path / f"variants{rank}.json").read_text()) for rank in (0, 1))
    assert curves == others
    names = [name.removesuffix("_ddp") for name in curves if name.endswith("_ddp")]
    assert len(names) == 5
    for name in names:
        assert curves[f"{name}_fsdp"] == pytest.approx(curves[f"{name}_ddp"], rel=1e-6)
        (replicated,) = (tmp_path / f"{name}_ddp" / "final").glob("*model.safetensors")
        assert_close(load_file(tmp_path / f"{name}_fsdp" / "final" / replicated.name), load_file(replicated))
