"""What a run's folder says of it, read for `lemo report`: log, settings, block scores; nothing in it is trusted to be well formed."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import LemoError
from ...hub.lemo_files import CONFIG_FILE, read_json, read_tensors
from ...hub.model_card import RESULTS_FILE, RunResults
from ...models.lemo_config import LemoConfig
from ...training.phases.block_score_maps import MAP_CELLS, MAP_LAYERS, MAPS_FILE
from ...training.run_record import LOG_FILE, LOG_VERSION

STATE_FILE = "trainer_state.json"
# What a run spends its time on, in the order of the report; evaluation, saving and other are no part of equal time.
TRAINING_PARTS = ("predictor", "calibrate", "probes", "training")
TIME_PARTS = (*TRAINING_PARTS, "evaluation", "saving", "other")
_LARGEST_LOG = 2**30  # bytes
_MOST_LAYERS = 4096
_RUN_FILES = (CONFIG_FILE, RESULTS_FILE, "adapter_config.json", "lemo_phases.safetensors")

Entry = dict[str, float]


@dataclass
class BlockScores:
    """True and predicted block scores of one document, from a run's last probe.

    Args:
        layers: Layer numbers.
        true, predicted: S by layer, `(cells, cells)`.
        step: When they were measured.
        blocks: Blocks of the document; with more than cells, a cell is the mean of several.
        block_size: Tokens of a block.
    """

    layers: list[int]
    true: list[Tensor]
    predicted: list[Tensor]
    step: int
    blocks: int
    block_size: int


@dataclass
class RunData:
    """A run as the report shows it.

    Args:
        name: How a person calls it; any text.
        label: How figures call it; text of ours.
        history: The log: entries of numbers, each with `step`.
        results: What the run says of itself; `None` if it says nothing (a stock Trainer's).
        max_steps: Steps it was to make, if known.
        finished: Whether it came to its end.
        arguments: Training arguments by name.
        device: "cuda", "cpu", ...; empty if not known.
        maps: Block scores of its last probe.
        memory_note: Why no memory is shown, where there is a reason.
    """

    name: str
    label: str
    history: list[Entry]
    results: RunResults | None = None
    max_steps: int | None = None
    finished: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    maps: BlockScores | None = None
    memory_note: str = ""

    @property
    def steps(self) -> int:
        """The last step that the log knows."""
        return max((int(entry["step"]) for entry in self.history), default=0)

    @property
    def lemo(self) -> LemoConfig | None:
        """The settings; `None` if the run did not leave tokens out."""
        block = LemoConfig.from_dict(self.results.lemo) if self.results is not None else None
        return block if block is not None and block.enabled else None

    def entries(self, name: str) -> list[Entry]:
        """The entries that have a metric, with a finite value."""
        return [entry for entry in self.history if name in entry and math.isfinite(entry[name])]

    def points(self, name: str) -> list[tuple[float, float | None, float]]:
        """A metric as step, seconds of training so far (`None` if not known), and value."""
        return [(entry["step"], self._training_seconds(entry), entry[name]) for entry in self.entries(name)]

    def _training_seconds(self, entry: Entry) -> float | None:
        # Held-out losses are logged beside the step's own entry.
        timed = self._timed.get(entry["step"])
        if timed is not None:
            return sum(timed.get(f"seconds/{part}", 0.0) for part in TRAINING_PARTS)
        # A stock Trainer's log holds the time of the whole alone.
        whole = next((each["train_runtime"] for each in reversed(self.history) if "train_runtime" in each), None)
        return whole * entry["step"] / self.steps if whole is not None and self.steps else None

    @cached_property
    def _timed(self) -> dict[float, Entry]:
        return {entry["step"]: entry for entry in reversed(self.history) if "seconds/training" in entry}

    def seconds(self) -> dict[str, float]:
        """Seconds by part over the whole run; empty if not known."""
        last: Entry = next((entry for entry in reversed(self.history) if "seconds/training" in entry), {})
        return {part: last[f"seconds/{part}"] for part in TIME_PARTS if last.get(f"seconds/{part}", 0) > 0}

    @property
    def training_seconds(self) -> float | None:
        """Seconds of steps, phases and probes; of everything where the log does not tell them apart."""
        if parts := self.seconds():
            return sum(seconds for part, seconds in parts.items() if part in TRAINING_PARTS)
        return next((entry["train_runtime"] for entry in reversed(self.history) if "train_runtime" in entry), None)

    def layers_of(self, name: str) -> list[int]:
        """The layers that a metric was logged of, as `<name>/layer_<i>`.

        Raises:
            LemoError: If they are more than any model has.
        """
        pattern = re.compile(rf"{name}/layer_([0-9]{{1,6}})")
        names = {key for entry in self.history for key in entry if "/layer_" in key}
        found = sorted({int(match.group(1)) for key in names if (match := pattern.fullmatch(key))})
        if len(found) > _MOST_LAYERS:
            raise LemoError(f"log of the run names {len(found)} layers; {self.name!r}; copy it from its run again")
        return found

    def by_layer(self, name: str) -> tuple[list[int], list[Entry]]:
        """Layers, and the entries that have the metric of at least one of them."""
        layers = self.layers_of(name)
        return layers, [entry for entry in self.history if any(f"{name}/layer_{layer}" in entry for layer in layers)]

    def mean_by_layer(self, name: str) -> dict[int, float]:
        """Each layer's mean of a metric over the log."""
        layers, entries = self.by_layer(name)
        found = {}
        for layer in layers:
            values = [entry[key] for entry in entries if (key := f"{name}/layer_{layer}") in entry and math.isfinite(entry[key])]
            if values:
                found[layer] = sum(values) / len(values)
        return found

    def mean(self, name: str) -> float | None:
        """A metric's mean over the log."""
        values = [entry[name] for entry in self.entries(name)]
        return sum(values) / len(values) if values else None

    def last(self, name: str) -> float | None:
        """A metric's last value."""
        return self.entries(name)[-1][name] if self.entries(name) else None


def read_run(folder: str | Path, label: str) -> RunData:
    """Reads a run's output folder, or a checkpoint in it, finished or not, of a LeMo run or of a stock Trainer.

    Args:
        folder: The folder.
        label: How figures call the run.

    Raises:
        LemoError: If it is no run's folder, holds no log, or holds a damaged one.
    """
    path = Path(folder)
    if not path.is_dir():
        raise LemoError(f"folder does not exist; {str(folder)!r}; give the output folder of a run")
    name = path.resolve().name
    if (path / LOG_FILE).is_file():
        about, lines = _read_log(path / LOG_FILE)
        run = RunData(name, label, _entries(lines), _results(about.get("run"), path / LOG_FILE))
        run.max_steps = about["max_steps"] if _is_count(about.get("max_steps")) else None
        given = about.get("arguments")
        run.arguments = {key: str(value) for key, value in given.items()} if isinstance(given, dict) else {}
        run.device = str(about.get("device", ""))
    elif (state_path := _newest_state(path)) is not None:
        state = read_json(state_path)
        history = state.get("log_history")
        run = RunData(name, label, _entries(history if isinstance(history, list) else []))
        run.max_steps = state["max_steps"] if _is_count(state.get("max_steps")) else None
    elif any((path / each).exists() for each in _RUN_FILES):
        raise LemoError(
            f"run has left no log; {str(folder)!r} has neither {LOG_FILE} nor a checkpoint; give one that logged at least once"
        )
    else:
        raise LemoError(f"not the output folder of a run; {str(folder)!r}; give one that LemoTrainer or lemo train wrote")
    if not run.history:
        raise LemoError(f"run has logged nothing yet; {str(folder)!r}; wait for its first log, or lower logging_steps")
    run.finished = any("train_runtime" in entry for entry in run.history) or run.steps >= (run.max_steps or math.inf)
    if (path / RESULTS_FILE).is_file() and (run.finished or run.results is None):
        run.results = RunResults.read(path / RESULTS_FILE)
        # Refuses here, in a line, what no figure could be made of.
        LemoConfig.from_dict(run.results.lemo)
    # Without a probe in the log they are an earlier run's in the same folder.
    if (path / MAPS_FILE).is_file() and run.entries("recall"):
        run.maps = _read_maps(path / MAPS_FILE)
    return run


def _read_log(path: Path) -> tuple[dict[str, Any], list[Any]]:
    if path.stat().st_size > _LARGEST_LOG:
        raise LemoError(f"log of the run is too large; {str(path)!r}, {path.stat().st_size} bytes; copy it from its run again")
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines: list[Any] = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            # A run that was killed may have been writing its last line.
            if number < len(texts) or number == 1:
                raise LemoError(f"log of the run is damaged; {str(path)!r}, line {number}; copy it from its run again") from None
    about = lines[0] if lines else None
    if not isinstance(about, dict) or not _is_count(about.get("log_version")):
        raise LemoError(f"log does not say what run it is of; {str(path)!r}; copy it from its run again")
    if about["log_version"] > LOG_VERSION:
        raise LemoError(
            f"log has version {about['log_version']}, this lemo_hf reads {LOG_VERSION}; {str(path)!r}; upgrade lemo_hf"
        )
    return about, lines[1:]


def _newest_state(path: Path) -> Path | None:
    if (path / STATE_FILE).is_file():
        return path / STATE_FILE
    numbered = [(int(match.group(1)), each) for each in path.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", each.name))]
    states = [each / STATE_FILE for _, each in sorted(numbered, reverse=True) if (each / STATE_FILE).is_file()]
    return states[0] if states else None


def _entries(lines: Iterable[Any]) -> list[Entry]:
    """The log's entries with what is a number in them; those without a step are left out."""
    entries = []
    for line in lines:
        if isinstance(line, dict) and _is_count(line.get("step")):
            entries.append({str(key): float(value) for key, value in line.items() if _is_number(value)})
    return entries


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)


def _results(values: Any, path: Path) -> RunResults:
    try:
        results = RunResults(**values)
        LemoConfig.from_dict(results.lemo)
        return results
    except (TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise LemoError(f"log does not say what run it is of ({reason}); {str(path)!r}; copy it from its run again") from error


def _read_maps(path: Path) -> BlockScores:
    tensors, about = read_tensors(path)
    damaged = LemoError(f"block scores of the run are damaged; {str(path)!r}; delete the file to report without them")
    numbers = [int(about[name]) for name in ("step", "blocks", "block_size") if re.fullmatch("[0-9]{1,15}", about.get(name, ""))]
    layers = sorted(int(name[5:]) for name in tensors if re.fullmatch(r"true\.[0-9]{1,6}", name))
    if len(numbers) < 3 or not 0 < len(layers) <= MAP_LAYERS:
        raise damaged
    maps: dict[str, list[Tensor]] = {"true": [], "predicted": []}
    for kind, found in maps.items():
        for layer in layers:
            scores = tensors.get(f"{kind}.{layer}")
            if scores is None or scores.dim() != 2 or not 0 < scores.shape[0] == scores.shape[1] <= MAP_CELLS:
                raise damaged
            found.append(scores)
    return BlockScores(layers, maps["true"], maps["predicted"], *numbers)
