"""Extends a base model's context fourfold by LoRA, with the stock trainer and with LeMo's arms, and measures what comes out.

    python -m benchmarks.quality.extension --arms core --seeds 0 1 2 --base outputs/quality/base_small --out outputs/quality
    python -m benchmarks.quality.extension --arms core --seeds 0 1 2 --steps 120 --sizes full ...        (the long setting)

Every arm begins with the same adapter and sees the same rows in the same order as the others of its seed. One JSON per arm and seed
goes to `<out>/arms/`; what is there is not run again, and several processes with the same command share the work.

Equal steps and equal time come from one run. An arm's step takes `time_ratio` of stock's (`cost.py`, measured in turns in one process),
so in the time of stock's S steps it takes (S - phases) / time_ratio steps, its own phases counted in steps of stock. It is measured after S
steps and after those. The rate is constant after a warm-up: after S steps a longer run is then where a shorter one ends. Where that is not so
(`--schedule linear`, dense tails, shares that change), each point is the end of a run of its own.

`rows.py` says what the rows hold. Memory 2 GB at 4096 tokens of the small size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset
from transformers import AutoConfig, AutoTokenizer, PrinterCallback, Trainer, TrainerCallback, default_data_collator
from transformers.utils import logging as transformers_logging

from benchmarks.quality.arms import Arm, all_arms, chosen
from benchmarks.quality.choices import chosen_by
from benchmarks.quality.cost import measure_cost, seconds
from benchmarks.quality.measures import SIZES, Measures
from benchmarks.quality.rows import TEXTS, Rows
from benchmarks.quality.setting import SCHEDULES, Setting, arguments, device_here, identity, load, reads_predictors
from lemo_hf import LemoTrainer
from lemo_hf.errors import LemoError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.provenance import provenance

EQUAL_STEPS, EQUAL_TIME = "equal_steps", "equal_time"


class Texts(Protocol):
    """What `rows.Rows` gives."""

    def training(self, seed: int) -> Dataset:
        """Training rows of a seed, in their order."""

    def measures(self, seed: int) -> Measures:
        """What the models of a seed are measured by."""


def chosen_blocks(arm: Arm, model: Any) -> AbstractContextManager[Any]:
    """What an arm's training steps run within: its own way to choose blocks, where it has one."""
    if arm.choice is None:
        return nullcontext()
    return chosen_by(model, arm.choice)


class Points(TrainerCallback):
    """Measures the model after given steps, ends the run at the last of them, and moves the kept share along the arm's ramp.

    Args:
        arm: The arm.
        points: By name the step after which the model is measured; called with the seconds of the phases, before the first step.
        measure: What measures a model.
    """

    def __init__(self, arm: Arm, points: Callable[[float], dict[str, int]], measure: Measures) -> None:
        self.arm, self.points_of, self.measure = arm, points, measure
        self.everywhere = measure.sizes.everywhere
        self.points: dict[str, int] = {}
        self.phase_seconds = 0.0
        self.found: dict[str, dict[str, Any]] = {}

    def leaves_out(self, reached: list[str]) -> bool:
        """Whether text alone is measured there."""
        return not self.everywhere and (EQUAL_STEPS not in reached or self.arm.group not in ("core", "shares"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = seconds(device_here())

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.points:  # LeMo's phases run before the first step
            self.phase_seconds = seconds(device_here()) - self._began
            self.points = self.points_of(self.phase_seconds)
        if self.arm.ramp is not None:
            first, last = self.arm.ramp
            done = state.global_step / max(1, state.max_steps - 1)
            sparse_backbone(model).config.lemo.update(keep_ratio=first + (last - first) * done)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        reached = [name for name, step in self.points.items() if step == state.global_step]
        if reached:
            measured = self.measure(model, self.leaves_out(reached))
            self.found |= {name: {"steps": state.global_step, **measured} for name in reached}
        control.should_training_stop = state.global_step >= max(self.points.values())


def train(
    arm: Arm,
    setting: Setting,
    seed: int,
    texts: Texts,
    limit: int,
    points: Callable[[float], dict[str, int]],
) -> tuple[Points, list[float]]:
    """One run with the trainer that a user would take.

    Args:
        arm, setting, seed, texts: What to train, and on what.
        limit: The trainer's `max_steps`.
        points: As for `Points`.

    Returns:
        What was measured, and the training losses by step.
    """
    model = load(arm, setting, seed)
    measures = Points(arm, points, texts.measures(seed))
    with tempfile.TemporaryDirectory() as folder:
        trainer_class = Trainer if arm.is_stock else LemoTrainer
        settings: dict[str, Any] = {"args": arguments(arm, setting, seed, folder, limit), "train_dataset": texts.training(seed)}
        trainer = trainer_class(model=model, **settings, data_collator=default_data_collator, callbacks=[measures])
        trainer.remove_callback(PrinterCallback)  # one line an arm is enough
        with chosen_blocks(arm, model):
            trainer.train()
    return measures, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def mean_ratio(arm: Arm, ratio: float, ramp_end_ratio: float | None) -> float:
    """Time of an arm's mean step over stock's, from that of its first steps: dense steps at the end, or a ramp's other end, counted in."""
    if ramp_end_ratio is not None:
        ratio = (ratio + ramp_end_ratio) / 2
    return (1 - arm.tail) * ratio + arm.tail


def steps_at_equal_time(steps: int, ratio: float, phase_steps: float) -> int:
    """How many steps of `ratio` fit into `steps` of stock's, less the phases' (in stock's steps); at least one."""
    return max(1, math.floor((steps - phase_steps) / ratio + 1e-9))


def cost_of(arm: Arm, setting: Setting, texts: Texts, out: Path) -> dict[str, Any] | None:
    """The arm's cost beside stock's, measured once for all seeds; `None` where it would say nothing."""
    if not arm.has_cost:
        return None
    place = out / "costs" / f"{arm.name}--{setting.tokens}t.json"
    described = json.loads(json.dumps({"arm": arm.to_dict(), "base": identity(setting.base), "mixed": setting.mixed}))
    if place.is_file():
        found: dict[str, Any] = json.loads(place.read_text())
        if found["of"] == described:
            return found["cost"]
    batch = {name: column.to(device_here()) for name, column in default_data_collator([texts.training(0)[0]]).items()}
    stock = load(Arm("stock", "core", targets=arm.targets), setting, 0)

    def measured(changes: Mapping[str, Any]) -> dict[str, Any]:
        assert arm.lemo is not None
        model = load(replace(arm, lemo={**arm.lemo, **changes}), setting, 0)
        return measure_cost(stock, model, batch, setting.cost_rounds, setting.mixed)

    if arm.ramp is None:
        cost = measured({})
        end_ratio = None
    else:
        ends = [measured({"keep_ratio": share}) for share in arm.ramp]
        cost, end_ratio = ends[0], ends[1]["time_ratio"]
        for name in ("kept_share", "flops"):
            cost[name] = (ends[0][name] + ends[1][name]) / 2
        cost["saved_bytes"] = max(end["saved_bytes"] for end in ends)
    cost["mean_time_ratio"] = mean_ratio(arm, cost["time_ratio"], end_ratio)
    write(place, {"of": described, "cost": cost})
    return cost


def run_arm(arm: Arm, setting: Setting, seed: int, texts: Texts, out: Path) -> dict[str, Any]:
    """Trains an arm with one seed and measures it at both points.

    Returns:
        `points` by name (steps and everything measured), `cost`, `phase_steps` and the training losses by step.
    """
    if not arm.trains:
        return {
            "points": {EQUAL_STEPS: {"steps": 0, **texts.measures(seed)(load(arm, setting, seed))}},
            "cost": None,
            "losses": [],
        }
    cost = cost_of(arm, setting, texts, out)
    steps, phase_steps = setting.steps, 0.0

    def at_equal_time(phase_seconds: float) -> int:
        nonlocal phase_steps
        assert cost is not None
        phase_steps = phase_seconds / (cost["stock_seconds"] * setting.accumulation) if reads_predictors(arm) else 0.0
        return steps_at_equal_time(steps, cost["mean_time_ratio"], phase_steps)

    if not arm.has_equal_time:
        measured, losses = train(arm, setting, seed, texts, steps, lambda _: {EQUAL_STEPS: steps})
        found = measured.found
    elif setting.schedule == "constant" and not arm.depends_on_the_end:
        limit = max(steps, steps_at_equal_time(steps, cost["mean_time_ratio"], 0.0))
        both = lambda phase: {EQUAL_STEPS: steps, EQUAL_TIME: at_equal_time(phase)}  # noqa: E731
        measured, losses = train(arm, setting, seed, texts, limit, both)
        found = measured.found
    else:
        measured, losses = train(arm, setting, seed, texts, steps, lambda _: {EQUAL_STEPS: steps})
        limit = at_equal_time(measured.phase_seconds)
        again, losses = train(arm, setting, seed, texts, limit, lambda _: {EQUAL_TIME: limit})
        found = measured.found | again.found
    return {"points": found, "cost": cost, "phase_steps": phase_steps, "losses": losses}


def write(path: Path, document: Any) -> None:
    """Writes a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(document) + "\n")
    os.replace(partial, path)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may make `path`: not if it is there, or if another living process is at it."""
    claim = path.with_suffix(".claim")
    claim.parent.mkdir(parents=True, exist_ok=True)
    if claim.is_file() and not _lives(claim.read_text()):
        claim.unlink(missing_ok=True)
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    with os.fdopen(handle, "w") as file:
        file.write(str(os.getpid()))
    try:
        yield not path.is_file()
    finally:
        claim.unlink(missing_ok=True)


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except ValueError:
        return True  # it is about to write its number
    return True


def run_one(arm: Arm, setting: Setting, seed: int, texts: Callable[[], Texts], out: Path) -> str:
    """Makes the result of an arm and seed unless it is there or in the making; returns what it did in a word or two.

    Raises:
        LemoError: If what is there is of another base or other settings.
    """
    place = out / "arms" / setting.name / f"{arm.name}--seed{seed}.json"
    described = json.loads(json.dumps({"arm": arm.to_dict(), "setting": asdict(setting), "base": identity(setting.base)}))
    with claimed(place) as ours:
        if not ours:
            if not place.is_file():
                return "is being made"
            there = json.loads(place.read_text())
            if other := [name for name, value in described.items() if there[name] != value]:
                raise LemoError(f"result is of another {other[0]}; {str(place)!r}; remove it, or choose another --out")
            return "is there"
        began = time.perf_counter()
        found = run_arm(arm, setting, seed, texts(), out)
        about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), **described, "seed": seed}
        write(place, {**about, **found, "seconds": time.perf_counter() - began})
        return f"took {time.perf_counter() - began:.0f} s"


def main(given: list[str] | None = None) -> int:
    """Runs arms; 0: all are there, 3: some are left to do (time is up, or another process is at them), 2: bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="+", default=["core"], help="groups or arms of arms.py in order, with seeds of their own as in core:0,1,2"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of arms without their own (default: 0)")
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--out", type=Path, default=Path("outputs/quality"), help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens of a row (default: four times the base's context)")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="stock's steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=Setting.learning_rate, help="(default: %(default)s)")
    parser.add_argument("--schedule", choices=SCHEDULES, default=Setting.schedule, help="(default: %(default)s)")
    parser.add_argument("--sizes", choices=SIZES, default=Setting.sizes, help="how much is measured (default: %(default)s)")
    parser.add_argument("--text", choices=TEXTS, default=Setting.text, help="trained on and measured (default: %(default)s)")
    parser.add_argument("--accumulation", type=int, default=Setting.accumulation, help="rows of a step (default: %(default)s)")
    parser.add_argument("--predictors", help="folder with predictors to start from, for arms that read any")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no arm that would likely end later than this")
    args = parser.parse_args(given)
    began, longest, left = time.perf_counter(), 0.0, 0
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(args.base)
        same = {
            name: getattr(args, name)
            for name in ("steps", "learning_rate", "schedule", "sizes", "predictors", "text", "accumulation")
        }
        setting = Setting(base=args.base, tokens=args.tokens or 4 * config.max_position_embeddings, **same)
        listed = in_order(args.arms, args.seeds, all_arms(config.num_hidden_layers))
        texts = lazily(lambda: Rows(AutoTokenizer.from_pretrained(args.base), setting))
        for arm, seed in listed:
            started = time.perf_counter()
            if started - began + longest > args.seconds:
                left += 1
                continue
            done = run_one(arm, setting, seed, texts, args.out)
            longest = max(longest, time.perf_counter() - started)
            left += done == "is being made"
            print(f"{datetime.now(UTC):%H:%M:%S} {arm.name} seed {seed} {done}", flush=True)
    except LemoError as error:
        print(error, file=sys.stderr)
        return 2
    return 3 if left else 0


def in_order(names: list[str], seeds: list[int], arms: Mapping[str, Arm]) -> list[tuple[Arm, int]]:
    """Arms and seeds as asked for: name by name, and of a group seed by seed; each once.

    Raises:
        LemoError: If there is no such arm, or a seed is no number.
    """
    found: dict[tuple[str, int], tuple[Arm, int]] = {}
    for name in names:
        name, _, own = name.partition(":")
        try:
            numbers = [int(seed) for seed in own.split(",")] if own else seeds
        except ValueError as error:
            raise LemoError(f"seeds are whole numbers; {own!r} of {name}; write them as core:0,1,2") from error
        found |= {(arm.name, seed): (arm, seed) for seed in numbers for arm in chosen([name], arms)}
    return list(found.values())


def lazily(make: Callable[[], Texts]) -> Callable[[], Texts]:
    """Makes it when it is first asked for, and once."""
    made: list[Texts] = []

    def get() -> Texts:
        if not made:
            made.append(make())
        return made[0]

    return get


if __name__ == "__main__":
    raise SystemExit(main())
