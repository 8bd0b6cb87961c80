import html
import itertools
import json
import re
import shutil
import subprocess

import pytest
import torch
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import Trainer, TrainerCallback

from lemo_hf import LemoTrainer, cli, lemo_callbacks
from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import read_json, write_json, write_tensors
from lemo_hf.hub.model_card import RESULTS_FILE
from lemo_hf.profiling.process_memory import after_forward_metrics, memory_metrics
from lemo_hf.profiling.report.data import STATE_FILE, read_run
from lemo_hf.profiling.report.page import report_run
from lemo_hf.training.phases.block_score_maps import MAP_CELLS, MAPS_FILE, cells
from lemo_hf.training.run_record import LOG_FILE

SECTIONS = ("summary", "losses", "kept-share", "recall", "block-scores", "memory", "time", "saved-bytes", "settings", "machine")
STEPS = 8


class Killed(BaseException):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a finished run with everything in it, of a dense one, and of one that was killed before any checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    trainer = LemoTrainer(
        model=tiny_lemo_model(selection="threshold", attention_forward="sparse"),
        args=tiny_arguments(
            folder / "whole",
            max_steps=STEPS,
            probe_steps=2,
            recall_drop=-1,
            refit_limit=1,
            refit_documents=1,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=4,
        ),
        train_dataset=RandomText(),
        eval_dataset=RandomText(2),
    )
    trainer.train()
    trainer.save_model()
    dense = tiny_trainer(folder / "dense", {"enabled": False}, max_steps=STEPS)
    dense.train()
    cut = tiny_trainer(folder / "cut", {"selection": "ratio"}, max_steps=STEPS, probe_steps=2)
    cut.add_callback(KillAt(5))
    with pytest.raises(Killed):
        cut.train()
    return folder, trainer


@pytest.fixture(scope="module")
def page(runs):
    """The report of the finished run beside the dense one."""
    return report_run(runs[0] / "whole", runs[0] / "dense", runs[0] / "page.html").read_text()


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of one of the runs to spoil."""

    def copy(name, new_name="copy"):
        shutil.copytree(runs[0] / name, tmp_path / new_name)
        return tmp_path / new_name

    return copy


def lines_of(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def words(page):
    """The page's text, without styles and marks."""
    text = re.sub(r"<style>.*?</style>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


# What a run leaves.


def test_the_log_file_is_the_trainers_log(runs):
    folder, trainer = runs
    about, *entries = lines_of(folder / "whole")
    assert entries == trainer.state.log_history
    assert about["max_steps"] == STEPS
    assert about["run"]["seq_len"] == 96
    assert about["run"]["lemo"]["selection"] == "threshold"


def test_every_second_is_charged_once(runs):
    entries = runs[1].state.log_history
    last = entries[-1]
    parts = {name: value for name, value in last.items() if name.startswith("seconds/")}
    assert {"seconds/predictor", "seconds/calibrate", "seconds/probes", "seconds/training"} <= set(parts)
    assert {"seconds/evaluation", "seconds/saving"} <= set(parts)
    # The Trainer's own clock starts before the phases; between them lies what comes before the first callback.
    assert sum(parts.values()) == pytest.approx(last["train_runtime"], rel=0.05, abs=0.05)
    phase = next(logs for logs in entries if "predictor_seconds" in logs)
    assert parts["seconds/predictor"] >= phase["predictor_seconds"]
    steps = [logs for logs in entries if "loss" in logs]
    for name in parts:
        assert all(a.get(name, 0) <= b.get(name, 0) for a, b in itertools.pairwise(steps)), name


def test_memory_is_logged_with_phases_and_steps(runs):
    entries = runs[1].state.log_history
    peaks = [logs["memory/peak_bytes"] for logs in entries if "memory/peak_bytes" in logs]
    assert len(peaks) >= STEPS + 2
    assert peaks == sorted(peaks)
    forwards = [logs["memory/after_forward_bytes"] for logs in entries if "memory/after_forward_bytes" in logs]
    assert len(forwards) == STEPS
    assert all(2**20 < size <= peaks[-1] for size in forwards)


def test_memory_of_the_fullest_card_is_what_counts(monkeypatch):
    peaks, now = [5.0, 7.0], [3.0, 2.0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_allocated", now.__getitem__)
    assert memory_metrics(torch.device("cuda")) == {"memory/peak_bytes": 7.0}
    assert after_forward_metrics(torch.device("cuda")) == {"memory/after_forward_bytes": 3.0}
    assert memory_metrics(torch.device("meta")) == {}


def test_a_stock_trainer_with_our_callbacks_leaves_the_same_log(tmp_path):
    arguments = tiny_arguments(tmp_path, max_steps=2, probe_steps=1)
    model = tiny_lemo_model(selection="ratio")
    trainer = Trainer(model=model, args=arguments, train_dataset=RandomText(), callbacks=lemo_callbacks(arguments))
    trainer.train()
    assert lines_of(tmp_path)[1:] == trainer.state.log_history
    run = read_run(tmp_path, "run")
    assert run.finished
    assert run.layers_of("kept_share") == run.layers_of("recall") == run.maps.layers == [0, 1]
    assert run.seconds()["training"] > 0


def test_a_resumed_run_goes_on_with_its_log_and_its_seconds(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    cut = tiny_trainer(tmp_path, **settings)
    cut.add_callback(KillAt(3))
    with pytest.raises(Killed):
        cut.train()
    before = [logs for logs in lines_of(tmp_path)[1:] if "loss" in logs]
    assert [logs["step"] for logs in before] == [1, 2, 3]
    resumed = tiny_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    after = [logs for logs in lines_of(tmp_path)[1:] if "loss" in logs]
    assert [logs["step"] for logs in after] == [1, 2, 3, 4]
    assert after[:2] == before[:2]
    assert after[2]["seconds/training"] > before[1]["seconds/training"]
    assert after[2]["seconds/predictor"] >= before[1]["seconds/predictor"]


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / LOG_FILE).mkdir()
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert len(curve(trainer)) == 2
    assert sum("log of the run is not written" in record.message for record in caplog.records) == 1


def test_long_maps_are_means_of_their_causal_pairs():
    blocks = 2 * MAP_CELLS
    scores = torch.arange(blocks * blocks, dtype=torch.float32).view(blocks, blocks)
    assert torch.equal(cells(scores[:5, :5]), scores[:5, :5].tril())
    found = cells(scores)
    assert found.shape == (MAP_CELLS, MAP_CELLS)
    assert found[3, 1] == scores[6:8, 2:4].mean()
    assert found[3, 3] == torch.tensor([scores[6, 6], scores[7, 6], scores[7, 7]]).mean()
    assert not found.triu(1).any()


# The page.


def test_the_page_shows_a_run(runs, page):
    _, trainer = runs
    for section in SECTIONS:
        assert page.count(f'id="{section}"') == 1
    assert page.count("<svg") == 7
    text = words(page)
    for unit in (
        "loss (nats per token)",
        "memory (MiB)",
        "share of tokens kept",
        "seconds of training",
        "saved for backward (KiB)",
    ):
        assert unit in text, unit
    for axis in ("step", "layer", "key block", "query block", "seconds of the run", "recall of kept blocks (share)"):
        assert axis in text, axis
    shares = [logs["kept_share"] for logs in trainer.state.log_history if "kept_share" in logs]
    assert f"LeMo kept {sum(shares) / len(shares):.0%} of the tokens" in text
    assert f"ended at {curve(trainer)[-1]:.3f} nats" in text
    assert "8 of 8 steps" in text
    assert "At equal steps (7 to 8)" in text
    assert "threshold: those at least as informative" in text
    assert torch.__version__ in text
    assert "predictors fitted again" in text


def test_the_page_needs_nothing_else(page):
    assert "<script" not in page
    for name, target in re.findall(r"""(src|href)\s*=\s*["']([^"']*)["']""", page):
        assert target.startswith(("#", "data:")), (name, target)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)", page)
    assert "default-src 'none'" in page


def test_an_unfinished_run_is_shown_as_far_as_it_got(copied):
    folder = copied("cut")
    with (folder / LOG_FILE).open("a") as file:
        file.write('{"loss": 4.8, "st')
    assert report_run(folder) == folder / "report.html"
    text = words((folder / "report.html").read_text())
    assert "5 of 8 steps" in text
    assert "the log ends at step 5 of 8" in text
    assert len(read_run(folder, "run").points("loss")) == 5


def test_maps_of_an_earlier_run_in_the_folder_are_not_shown(runs, copied):
    folder = copied("dense")
    shutil.copy(runs[0] / "whole" / MAPS_FILE, folder)
    assert read_run(runs[0] / "whole", "run").maps is not None
    assert read_run(folder, "run").maps is None


def test_a_stock_trainers_run_is_shown(runs, tmp_path):
    state = {"max_steps": 4, "log_history": [{"step": step, "loss": 5.0 - step} for step in range(1, 5)]}
    state["log_history"].append({"step": 4, "train_runtime": 8.0})
    for steps, history in ((2, state["log_history"][:2]), (4, state["log_history"])):
        (tmp_path / "stock" / f"checkpoint-{steps}").mkdir(parents=True)
        write_json(tmp_path / "stock" / f"checkpoint-{steps}" / STATE_FILE, {**state, "log_history": history})
    run = read_run(tmp_path / "stock", "run")
    assert run.points("loss") == [(1, 2.0, 4.0), (2, 4.0, 3.0), (3, 6.0, 2.0), (4, 8.0, 1.0)]
    text = words(report_run(runs[0] / "dense", tmp_path / "stock", tmp_path / "page.html").read_text())
    assert "even pace is assumed" in text
    assert "of 'stock' are not recorded" in text
    assert not read_run(tmp_path / "stock" / "checkpoint-2", "run").finished


HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{"


def test_text_of_a_run_is_never_markup(copied):
    folder = copied("whole", "<script>alert(1)<b>")
    about, *entries = lines_of(folder)
    about["run"] |= {"base_model": HOSTILE, "data": HOSTILE, "adapter": HOSTILE, "precision": HOSTILE}
    about["run"]["provenance"] = {"commit": HOSTILE, "versions": {HOSTILE: HOSTILE}, "machine": {"gpu": HOSTILE}}
    about["arguments"] = {HOSTILE: HOSTILE}
    about["device"] = HOSTILE + "\ud800"
    about["arguments"]["seed"] = "\ud800"
    entries[2][HOSTILE] = 1.0
    entries[2]["loss"] = HOSTILE
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in [about, *entries]))
    (folder / RESULTS_FILE).unlink()
    page = report_run(folder).read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert HOSTILE in html.unescape(page)


def test_results_of_the_wrong_kind_are_refused_in_a_line(copied):
    folder = copied("whole")
    results = read_json(folder / RESULTS_FILE)
    for change in ({"saved_bytes": "many"}, {"lemo": []}, {"lemo": {"block_size": "<b>"}}, {"no_such_field": 1}):
        write_json(folder / RESULTS_FILE, results | change)
        with pytest.raises((LemoError, ValueError)) as refused:
            report_run(folder)
        assert "; " in str(refused.value)
        assert "\n" not in str(refused.value)


# Bad input.


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(["report", *map(str, arguments)])
        assert end.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lemo: ") or "Traceback" in line]
        assert len(lines) == 1
        assert lines[0].count("; ") >= 2
        return lines[0]

    return run


def test_bad_input_ends_in_a_line(refused, copied, runs, tmp_path):
    assert "folder does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "not the output folder of a run" in refused(tmp_path / "empty")
    folder = copied("whole")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    log = (folder / LOG_FILE).read_text()
    (folder / LOG_FILE).unlink()
    assert "run has left no log" in refused(folder)
    (folder / LOG_FILE).write_text(log.splitlines()[0] + "\n")
    assert "run has logged nothing yet" in refused(folder)
    (folder / LOG_FILE).write_text(log.replace("\n{", "\n{,", 2))
    assert "log of the run is damaged" in refused(folder)
    (folder / LOG_FILE).write_text('{"loss": 1}\n')
    assert "log does not say what run it is of" in refused(folder)
    (folder / LOG_FILE).write_text(log)
    assert "report cannot be written" in refused(runs[0] / "dense", "--out", folder / LOG_FILE / "page.html")
    (folder / MAPS_FILE).write_bytes(b"no tensors")
    assert "corrupt or truncated" in refused(folder)
    write_tensors(folder / MAPS_FILE, {"true.0": torch.zeros(3, 4)}, {"step": "1", "blocks": "3", "block_size": "8"})
    assert "block scores of the run are damaged" in refused(folder)


def test_a_baseline_of_another_kind_is_refused(refused, copied, runs):
    folder = copied("dense")
    about, *entries = lines_of(folder)
    for name, value, words_of_it in (("seq_len", 128, "samples of another length"), ("base_model", "gpt", "another base model")):
        changed = {**about, "run": {**about["run"], name: value}}
        (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in [changed, *entries]))
        assert words_of_it in refused(runs[0] / "whole", "--baseline", folder)


# In a browser.

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def browse(page, profile, *flags):
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_a_browser_shows_it_at_every_width_and_asks_for_nothing(page, tmp_path):
    # Within a page of ours that measures it: its own policy lets no script run.
    frame = '<iframe width="{}" height="900" srcdoc="{}"></iframe>'
    measure = """
    addEventListener("load", () => {
      const found = [...document.querySelectorAll("iframe")].map(frame => {
        const inner = frame.contentDocument, figures = [...inner.querySelectorAll("figure svg")];
        return {
          width: frame.clientWidth, needed: inner.documentElement.scrollWidth,
          sections: [...inner.querySelectorAll("section")].map(each => each.id),
          drawn: figures.filter(each => each.getBoundingClientRect().height > 60).length,
          captions: inner.querySelectorAll("figcaption").length,
          loaded: frame.contentWindow.performance.getEntriesByType("resource").map(each => each.name),
        };
      });
      document.body.replaceChildren(JSON.stringify(found));
    });"""
    frames = "".join(frame.format(width, html.escape(page)) for width in (340, 1100))
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}<script>{measure}</script>")
    text = browse(outer, tmp_path / "profile", "--dump-dom")
    found = json.loads(html.unescape(re.search(r"<body>(.*)</body>", text, re.S).group(1)))
    assert [each["width"] for each in found] == [340, 1100]
    for each in found:
        assert each["needed"] <= each["width"]
        assert each["sections"] == list(SECTIONS)
        assert each["drawn"] == each["captions"] == 7
        assert [name for name in each["loaded"] if not name.startswith("data:")] == []


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_it_prints(runs, page, tmp_path):
    browse(runs[0] / "page.html", tmp_path / "profile", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"
