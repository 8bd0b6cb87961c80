"""The program that times kernels: what it compares, what it keeps of failures, which goals it knows."""

import json

import gpu_suite
import kernel_cases
import kernel_goals
import kernel_setting
import kernel_times
import pytest
import torch
from agreement import PartFailure
from gpu_checks import Scale

from lemo_hf.models import document_attention, kept_key_attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small sizes need the interpreter, which a GPU switches off")


def test_a_wrong_kernel_gets_no_time(tmp_path, monkeypatch):
    right, wrong = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.1])

    def off(setting):
        return kernel_setting.Case(lambda: [wrong], lambda: [right], bytes=8, compiles=False)

    monkeypatch.setitem(kernel_times.CASES, "rotary", off)
    path = tmp_path / "times.json"
    assert kernel_times.main(["--tiny", "--only", "rotary", "--out", str(path), "--plot", str(tmp_path / "times.png")]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert not row["right"]
    assert "seconds" not in row
    monkeypatch.setitem(
        kernel_times.CASES, "rotary", lambda setting: kernel_setting.Case(lambda: [right], lambda: [right], exact=True)
    )
    assert kernel_times.main(["--tiny", "--only", "rotary", "--out", str(path), "--plot", str(tmp_path / "times.png")]) == 0
    assert "seconds" in json.loads(path.read_text())["rows"][0]
    assert (tmp_path / "times.png").stat().st_size > 1000


@pytest.mark.parametrize("name", sorted(kernel_cases.CASES))
def test_every_case_agrees_with_a_formula_that_runs_on_any_device(name, monkeypatch):
    (setting,) = kernel_cases.settings_of(name, tiny=True)
    torch.manual_seed(0)
    case = kernel_cases.CASES[name](setting)
    for module in (document_attention, kept_key_attention):
        monkeypatch.setattr(module, "require_cpu", lambda query: pytest.fail("this reference is refused on a GPU"))
    error, right = kernel_times.error_of(case, setting.dtype)
    assert right, error


def test_a_formula_that_is_compiled_must_agree_too():
    right, wrong = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.1])
    case = kernel_setting.Case(lambda: [right], lambda: [right], formula=lambda: [wrong])
    assert not kernel_times.error_of(case, torch.float32)[1]


def tiny_case(**changes):
    right = torch.ones(4)
    return kernel_setting.Case(**{"ours": lambda: [right * 1], "naive": lambda: [right], "compiles": False} | changes)


def raising(error):
    def run(*_):
        raise error

    return run


def test_a_setting_that_fails_leaves_its_reason_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / "times.json"
    monkeypatch.setitem(kernel_times.CASES, "rotary", raising(RuntimeError("no such\nluck")))
    monkeypatch.setitem(kernel_times.CASES, "loss", lambda setting: tiny_case(missing={"liger": "not installed"}))
    fails = lambda setting: tiny_case(others={"theirs": raising(torch.OutOfMemoryError("too much"))})  # noqa: E731
    monkeypatch.setitem(kernel_times.CASES, "attention", fails)
    only = [word for name in ("rotary", "loss", "attention") for word in ("--only", name)]
    assert kernel_times.main(["--tiny", *only, "--out", str(path), "--plot", str(tmp_path / "times.png")]) == 1
    failed, loss, attention = json.loads(path.read_text())["rows"]
    assert (failed["right"], failed["failure"]) == (False, "RuntimeError: no such luck")
    assert loss["missing"] == {"liger": "not installed"}
    assert loss["peak_bytes"]["ours"] == 16
    assert attention["failures"] == {"theirs": "OutOfMemoryError: too much"}
    assert set(attention["seconds"]) == {"ours", "naive"}
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError: no such luck" in printed
    assert "liger is not here: not installed" in printed
    assert "theirs failed: OutOfMemoryError: too much" in printed


def test_every_row_is_on_file_before_the_next_is_measured(tmp_path, monkeypatch):
    path = tmp_path / "times.json"
    monkeypatch.setitem(kernel_times.CASES, "loss", lambda setting: tiny_case())
    for error in (KeyboardInterrupt(), torch.AcceleratorError("CUDA error: an illegal memory access was encountered")):
        monkeypatch.setitem(kernel_times.CASES, "rotary", raising(error))
        with pytest.raises(type(error)):
            kernel_times.main(["--tiny", "--only", "loss", "--only", "rotary", "--out", str(path)])
        rows = json.loads(path.read_text())["rows"]
        assert [row["kernel"] for row in rows if row["right"]] == ["loss"]
    assert "illegal memory access" in rows[1]["failure"]
    with pytest.raises(PartFailure, match="the device failed") as failed:
        gpu_suite.run_times(Scale(True), "rotary")
    assert failed.value.found["rows"][0]["failure"] == rows[1]["failure"]


def timed(kernel, keep=0.5, **changes):
    """A row as a GPU gives it; seconds by arm."""
    seconds = {label: {"median": value} for label, value in changes.pop("seconds", {}).items()}
    return {"kernel": kernel, "keep": keep, "seconds": seconds} | changes


def test_a_row_says_of_each_goal_whether_it_is_met():
    def judged(row):
        return [verdict["met"] for verdict in kernel_goals.verdicts(row)]

    assert judged(timed("gather_norm", share_of_bound=0.86)) == judged(timed("take_and_merge", share_of_bound=0.81)) == [True]
    assert judged(timed("rotary", share_of_bound=0.84)) == judged(timed("take_and_merge", share_of_bound=0.79)) == [False]
    assert judged(timed("scatter_add", share_of_bound=0.9, speed_up={"compiled": 2.4})) == [True, False]
    assert judged(timed("scatter_add", keep=0.7, share_of_bound=0.9, speed_up={"compiled": 1.0})) == [True]
    assert judged(timed("block_scores", seconds={"ours": 1.3, "whole flash forward": 2.0})) == [True]
    assert judged(timed("block_scores", seconds={"ours": 1.4, "whole flash forward": 2.0})) == [False]
    assert judged(timed("attention", seconds={"ours": 1.0})) == []
    # The faster and the smaller library may be two.
    loss = timed(
        "loss",
        seconds={"ours": 2.1, "liger": 2.0, "cut-cross-entropy": 3.0},
        peak_bytes={"ours": 120, "liger": 110, "cut-cross-entropy": 100},
    )
    time, memory = kernel_goals.verdicts(loss)
    assert (time["value"], time["met"]) == (1.05, True)
    assert (memory["value"], memory["met"]) == (1.2, False)
    assert kernel_goals.in_words(memory) == "MISSED memory over the best library's, wanted at most 1.1: 1.2"
    alone = kernel_goals.verdicts(timed("loss", seconds={"ours": 2.0}, missing={"liger": "no module"}))
    assert [verdict["met"] for verdict in alone] == [None, None]
    words = kernel_goals.in_words(alone[0])
    assert words == "NOT JUDGED time over the best library's, wanted at most 1.1: liger: no module"
