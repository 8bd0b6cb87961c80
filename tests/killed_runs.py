"""Tiny runs in processes of their own, killed at set moments: forked from one server that has imported everything.

A run counts its *events*: before and after each rename, with each file half written, between forward, backward and optimizer
step, inside probes, evaluation and rotation. `kill -9` comes at the event that the test names, so a failure can be repeated.
"""

import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from training_runs import RandomText, tiny_arguments, tiny_lemo_model
from transformers import TrainerState

from lemo_hf import LemoTrainer
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training import callbacks
from lemo_hf.training.phases import predictor_training, recall_probe, threshold_search
from lemo_hf.training.trainer import holds_run

LEMO = {"selection": "threshold", "attention_forward": "sparse"}
# Every kind of work in six steps: phases with pruning, probes that refit, evaluation, a dense tail, rotation down to one checkpoint.
CHANGES = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "dense_tail_share": 0.34,
    "probe_steps": 3,
    "recall_drop": -1.0,
    "refit_documents": 1,
    "refit_limit": 2,
    "prune_documents": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "predictor_documents": 3,
    "calibrate_rounds": 2,
    "logging_steps": 3,
}


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and when.

    Args:
        at: Number of an event, from 0, or a part of its name.
        skip: How many such events pass before it.
        action: Called at the event; `kill -9` if not given.
    """

    at: int | str
    skip: int = 0
    action: Callable[[], None] | None = None


def send_to_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def send_to_group(number: int) -> None:
    """To the run and to the workers of its data loaders, from outside, as a scheduler or a terminal does it."""
    subprocess.run(["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)


def limit_files(size: int) -> None:
    """No file may grow beyond `size` bytes from here on, as on a disk that is full; what is printed goes nowhere then."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Events:
    """Counts what a run comes past, and lets a fault happen at its event."""

    def __init__(self, fault: Fault | None) -> None:
        self.names: list[str] = []
        self.fault = fault
        self._passed = 0

    def reach(self, name: str) -> None:
        self.names.append(name)
        fault = self.fault
        if fault is None or not (fault.at in name if isinstance(fault.at, str) else fault.at == len(self.names) - 1):
            return
        self._passed += 1
        if self._passed == fault.skip + 1:
            (fault.action or partial(send_to_itself, signal.SIGKILL))()

    def before(self, owner: Any, name: str, event: str) -> None:
        """An event before each call of a method."""
        untouched = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.reach(event)
            return untouched(*args, **kwargs)

        setattr(owner, name, called)

    def writing(self, owner: Any, name: str, path_of: Callable[..., Any]) -> None:
        """An event with a file half written, and one when it is whole."""
        untouched = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            path = Path(path_of(*args, **kwargs))
            result = untouched(*args, **kwargs)
            whole, shown = path.read_bytes(), re.sub(r"^\.(.+)\.[^.]+\.partial$", r"\1", path.name)
            path.write_bytes(whole[: len(whole) // 2])
            self.reach(f"half of {shown}")
            path.write_bytes(whole)
            self.reach(f"all of {shown}")
            return result

        setattr(owner, name, called)

    def install(self) -> None:
        """Puts the events into this process."""
        self.before(predictor_training.PredictorTraining, "fit", "predictor document")
        self.before(threshold_search.ThresholdSearch, "loss", "calibrate forward")
        self.before(recall_probe, "measure_recall", "probe")
        self.before(recall_probe.RecallProbe, "_refit", "refit")
        self.before(LemoTrainer, "compute_loss", "step forward")
        self.before(LemoTrainer, "prediction_step", "evaluating")
        self.before(callbacks.SparsePhase, "on_pre_optimizer_step", "step backward")
        self.before(callbacks.SparsePhase, "on_optimizer_step", "optimizer step")
        self.before(callbacks.SparsePhase, "on_train_end", "train end")
        self.writing(safetensors.torch, "serialize_file", lambda tensors, path, *_, **__: path)
        self.writing(torch, "save", lambda value, path, *_, **__: path)
        self.writing(TrainerState, "save_to_json", lambda state, path: path)
        replace, rmtree = os.replace, shutil.rmtree

        def replaced(source: Any, target: Any) -> None:
            self.reach(f"before {Path(target).name}")
            replace(source, target)
            self.reach(f"after {Path(target).name}")

        def removed(folder: Any, *args: Any, **kwargs: Any) -> None:
            if not Path(folder).is_dir():
                return
            files = sorted(Path(folder).iterdir())
            for file in files[: len(files) // 2]:
                file.unlink()
            self.reach(f"half of removing {Path(folder).name}")
            rmtree(folder, *args, **kwargs)
            self.reach(f"all of removing {Path(folder).name}")

        os.replace, shutil.rmtree = replaced, removed


def killable_trainer(folder: Path, **changes: Any) -> LemoTrainer:
    """The trainer of these runs; its adapter has dropout, so random states count."""
    model = tiny_lemo_model(lora=False, **LEMO)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
    data = {"train_dataset": RandomText(seq_len=48), "eval_dataset": RandomText(samples=2, seq_len=48)}
    return LemoTrainer(model=model, args=tiny_arguments(folder, **{**CHANGES, **changes}), **data)


def digest(trainer: Any) -> str:
    """Of every bit that training changes: weights, predictors, thresholds, optimizer."""
    found = hashlib.sha256()
    for name, weight in sorted(trainer.model.named_parameters()):
        found.update(name.encode() + weight.detach().numpy().tobytes())
    for state in trainer.optimizer.state_dict()["state"].values():
        for name, value in sorted(state.items()):
            found.update(name.encode() + torch.as_tensor(value).numpy().tobytes())
    found.update(json.dumps(sparse_backbone(trainer.model).config.lemo.to_dict()).encode())
    return found.hexdigest()


def run_to_its_end(folder: str, fault: Fault | None, changes: dict[str, Any]) -> None:
    """One attempt: from the start, or from what earlier ones left; leaves a JSON file beside `folder` when it ends."""
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    events = Events(fault)
    events.install()
    try:
        trainer = killable_trainer(Path(folder), **changes)
        trainer.train(resume_from_checkpoint=holds_run(folder) or None)
        events.reach("trained")
        trainer.save_model(f"{folder}/final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.dup2(log, 1)
        os.dup2(log, 2)
    result = {"digest": digest(trainer), "events": events.names, "step": trainer.state.global_step}
    Path(f"{folder}.json").write_text(json.dumps(result))


@contextmanager
def run_server():
    """The server that runs are forked from; it is started with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "matplotlib.pyplot"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (str(Path(__file__).parent), before) if path)
    try:
        context.Process(target=_nothing).start()
        yield context
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
        from multiprocessing import forkserver

        forkserver._forkserver._stop()


def _nothing() -> None:
    assert "torch" in sys.modules


class Killer:
    """Starts attempts at a run in `folder` and says how they ended.

    Args:
        context: Of `run_server`.
        folder: The run's output folder.
    """

    def __init__(self, context: Any, folder: Path) -> None:
        self.context = context
        self.folder = folder

    def start(self, fault: Fault | None = None, **changes: Any) -> Any:
        process = self.context.Process(target=run_to_its_end, args=(str(self.folder), fault, changes))
        process.start()
        return process

    def attempt(self, fault: Fault | None = None, **changes: Any) -> int:
        """Runs an attempt to its end, or its death, and returns the exit code; of a signal it is negative."""
        process = self.start(fault, **changes)
        process.join()
        return process.exitcode

    @property
    def log(self) -> str:
        return Path(f"{self.folder}.log").read_text()

    def result(self) -> dict[str, Any]:
        path = Path(f"{self.folder}.json")
        assert path.is_file(), self.log[-4000:]
        return json.loads(path.read_text())
