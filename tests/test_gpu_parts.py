"""Parts of the suite for a GPU that have files of their own: rows, offsets, waits, movement, the memory checker."""

import json
import warnings
from pathlib import Path

import gpu_memory_check
import gpu_movement
import gpu_rows
import gpu_suite
import gpu_waits
import pytest
import torch
from agreement import PartFailure
from gpu_checks import Scale

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small sizes need the interpreter, which a GPU switches off")


def test_rows_offsets_waits_movement_and_the_memory_checker_have_parts_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_memory_check, "find_tool", lambda: None)
    names = "movement", "rows", "offsets", "waits", "memory"
    assert gpu_suite.main(["--tiny", "--out", str(tmp_path), *(word for name in names for word in ("--part", name))]) == 0
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(results) == {"movement_64", "rows", "offsets", "waits", "memory_check"}
    (moved,) = results["movement_64"]["rows"]
    assert 0 < moved["share"] < 1
    assert min(moved["share_by_phase"].values()) > 0
    assert moved["met"] is None
    errors = {(row["kernel"], *row["options"]): row["errors"] for row in results["rows"]["rows"]}
    assert {name for name, *_ in errors} == {"gated", "gather_norm", "add_norm", "rest_norm", "block_features"}
    assert errors["gather_norm", True, False].keys() == {"rows", "normed", "dstream", "dweight", "dbias"}
    assert max(error for part in errors.values() for error in part.values()) < 1e-5
    assert {row["kernel"] for row in results["offsets"]["rows"]} == set(gpu_rows.OFFSETS)
    forms = {(row["form"], row["selection"]) for row in results["waits"]["rows"]}
    assert len(forms) == 9
    assert "compute-sanitizer is not on this machine" in results["memory_check"]["skipped"]
    assert "memory check skipped" in capsys.readouterr().out


def test_a_wrong_row_or_too_little_memory_is_said_and_the_rest_is_kept(monkeypatch):
    ones = torch.ones(2)
    monkeypatch.setattr(gpu_rows, "OFFSETS", {"wrong": lambda scale: [("product", 1.5 * ones, ones)], "right": lambda scale: []})
    with pytest.raises(PartFailure, match="'wrong'") as failed:
        gpu_rows.run_offsets(Scale(True))
    assert [row["right"] for row in failed.value.found["rows"]] == [False, True]
    monkeypatch.setattr(gpu_rows, "free_bytes", lambda device: 2**30)
    rows = gpu_rows.run_offsets(Scale(True))["rows"]
    assert [row["skipped"] for row in rows] == ["it needs 60 GiB; 1 GiB are free"] * 2


def test_movement_is_held_against_its_goal():
    phases = {"select, predict": 0.01, "movement": 0.02, "norm": 5.0}
    row = {"method": "lemo-sparse@0.5", "tokens": 8192} | gpu_movement.share_of_step(phases, 2.0, 0.03)
    assert row["met"]
    assert gpu_movement.in_words(row).endswith(
        "1.50% of a step (select, predict 0.50%, movement 1.00%), an upper bound: met, wanted at most 3%"
    )
    assert gpu_movement.share_of_step(phases, 2.0, 0.01)["met"] is False


def test_waits_are_counted_and_a_layer_that_waits_fails_its_part(monkeypatch):
    """As CUDA would report them: a warning each, or an error at the first."""
    mode = []

    def waits(count):
        def run():
            for _ in range(count if mode[-1] != "default" else 0):
                if mode[-1] == "error":
                    raise RuntimeError("called a synchronizing CUDA operation")
                warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

        return run

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cuda = torch.device("cuda")
    assert gpu_waits.waits_of(waits(0), cuda, "error") == {"waits": 0, "where": []}
    assert gpu_waits.waits_of(waits(2), cuda, "warn")["waits"] == 2
    found = gpu_waits.waits_of(waits(1), cuda, "error")
    assert found["waits"] == 1
    assert "in run" in found["where"][0]
    assert mode[-1] == "default"

    def fails():
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        gpu_waits.waits_of(fails, cuda, "warn")
    monkeypatch.setattr(gpu_waits, "layer_run", lambda *_: lambda: None)
    monkeypatch.setattr(gpu_waits, "waits_of", lambda *_: {"waits": 1, "where": ["here"]})
    with pytest.raises(PartFailure, match="waits for the device more often than it may") as failed:
        gpu_waits.run_waits(Scale(True))
    assert len(failed.value.found["rows"]) == 18


@pytest.mark.parametrize(
    ("code", "message"), [(0, None), (99, "the memory checker has found something"), (1, "a test fails under the memory checker")]
)
def test_the_memory_checker_runs_tests_of_every_kernel(tmp_path, monkeypatch, code, message):
    tool = tmp_path / gpu_memory_check.TOOL
    tool.write_text(f"#!/bin/sh\necho '5 passed'\necho '========= ERROR SUMMARY: 0 errors'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    asked = []

    def run(command, timeout):
        asked.extend(command)
        return gpu_suite.run_here(command, timeout)

    tests = gpu_suite.ROOT / "tests" / "kernels"
    if message:
        with pytest.raises(PartFailure, match=message):
            gpu_memory_check.run_memory_check(tests, run, tiny=False)
        return
    found = gpu_memory_check.run_memory_check(tests, run, tiny=False)
    assert (found["summary"], found["checker"]) == ("5 passed", "========= ERROR SUMMARY: 0 errors")
    paths = [Path(word) for word in asked if word.endswith(".py")]
    assert len(paths) == len(gpu_memory_check.FILES)
    assert all(path.exists() for path in paths)
