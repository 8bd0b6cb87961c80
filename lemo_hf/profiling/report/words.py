"""What a run's report says in words: the summary, what to look at, the table of key figures, the settings. All of it plain text."""

from collections.abc import Sequence

from ...hub.card_tables import decimals, duration, forward_words, pattern_words, selection_rows
from ...hub.model_card import RunResults
from ...models.lemo_config import LemoConfig
from .comparison import Pairing, pair
from .data import TRAINING_PARTS, RunData

# Above the share that a choice at random finds; predictors that work are 0.2 and more above it.
_LOW_RECALL = 0.1
_LARGE_PHASES = 0.05
NOT_MEASURED = "not measured"
UNNAMED = "unnamed"  # what a run calls a base model that came from nowhere

Row = tuple[str, list[str]]


def amount(count: float) -> str:
    """Bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= 2 * unit:
            return f"{count / unit:.{0 if count >= 100 * unit else 1}f} {name}"
    return f"{count / 1024:.0f} KiB"


def final_loss(run: RunData) -> tuple[float, int] | None:
    """Mean of the last tenth of the logged training losses, and of how many; `None` if none was logged."""
    losses = [loss for _, _, loss in run.points("loss")]
    last = losses[-max(1, len(losses) // 10) :]
    return (sum(last) / len(last), len(last)) if last else None


def saved_bytes(run: RunData) -> float | None:
    """What a forward pass saved for backward, bytes, mean over what was measured."""
    measured = run.results.saved_bytes if run.results is not None else None
    return measured or run.mean("saved_bytes")


def summary(run: RunData, baseline: RunData | None) -> list[str]:
    """The run in a few sentences."""
    results, lemo = run.results, run.lemo
    steps = f"{run.steps} of {run.max_steps} steps" if run.max_steps else f"{run.steps} steps"
    if run.finished and run.max_steps and run.steps < run.max_steps:
        steps = f"{run.steps} steps, ended on purpose before the {run.max_steps} that were allowed,"
    model = f" {results.base_model}" if results is not None and results.base_model != UNNAMED else " a model"
    length = f" on samples of {results.seq_len} tokens" if results is not None and results.seq_len else ""
    seconds = sum(run.seconds().values()) or run.training_seconds
    time = f" in {duration(seconds)}" if seconds else ""
    sentences = [f"Trained{model}{length}: {steps}{time}."]
    if not run.finished:
        sentences[0] = f"Trained{model}{length} and stopped, or is still running: {steps}{time} so far. What is there is shown."
    if lemo is not None:
        kept = run.mean("kept_share")
        share = f"{kept:.0%} of the tokens" if kept is not None else "the chosen tokens"
        pattern = pattern_words(lemo)
        among = f", in a pattern: {pattern}" if pattern else ""
        sentences.append(f"LeMo kept {share} in the mean layer ({lemo.selection} selection); {forward_words(lemo)}{among}.")
    elif results is not None:
        sentences.append("Every layer computed on every token: a dense run.")
    own, other = saved_bytes(run), saved_bytes(baseline) if baseline is not None else None
    if own is not None:
        beside = f", {own / other:.2f} of the baseline's {amount(other)}" if other else ""
        sentences.append(f"A forward pass saved {amount(own)} for backward{beside}.")
    moved, could = run.last("offloaded_bytes"), run.last("offload/saved_bytes")
    if moved is not None and could:
        overlap = run.last("offload/overlap") or 0.0
        sentences.append(
            f"Of {amount(could)} that its layers saved {amount(moved)} waited in host memory; {overlap:.0%} of the transfers' time was "
            "hidden behind computation."
        )
    loss = final_loss(run)
    if loss is not None:
        sentences.append(f"The training loss ended at {loss[0]:.3f} nats per token (mean of the last {loss[1]} logged).")
    comparisons = results.stock.comparisons if results is not None and results.stock is not None else []
    for each in comparisons:
        sentences.append(
            f"Dense perplexity on held-out text at equal {each.equal} ({each.steps} steps, stock {each.stock_steps}): "
            f"{each.perplexity:.3f}, stock LoRA's {each.stock_perplexity:.3f} ({each.percent:+.2f} %, 95 % interval {each.low:+.2f} to "
            f"{each.high:+.2f})."
        )
    if baseline is not None and not comparisons:
        sentences += pairs_in_words(run, baseline)
    return sentences


def pairs_in_words(run: RunData, baseline: RunData) -> list[str]:
    """The run's losses beside the baseline's, one sentence each."""
    found = [pairing_in_words(each) for each in pair(run, baseline)]
    if found and run.lemo is not None and run.lemo.attention_forward != "exact" and baseline.lemo is None:
        found.append(
            "This run's is the loss of a forward that leaves tokens out, which no model is served with: to compare, evaluate both densely (lemo eval)."
        )
    return found


def pairing_in_words(each: Pairing) -> str:
    """One comparison with the baseline as a sentence."""
    if each.equal == "steps":
        where = f"At equal steps ({each.begin:.0f} to {each.end:.0f})"
    else:
        where = f"At equal time (up to {duration(each.end)}: {each.steps} steps against {each.baseline_steps})"
    return f"{where} its loss was {each.loss:.3f}, the baseline's {each.baseline:.3f} ({each.difference:+.3f})."


def warnings(run: RunData) -> list[str]:
    """What a reader should look at, one sentence each."""
    found, lemo = [], run.lemo
    if not run.finished:
        end = f" of {run.max_steps}" if run.max_steps else ""
        found.append(f"Unfinished: the log ends at step {run.steps}{end}. Figures are of the part that ran.")
    if not run.points("loss"):
        found.append("No training loss was logged.")
    elif len(run.entries("loss")) < sum("loss" in entry for entry in run.history):
        found.append("Some logged losses are not finite; they are left out.")
    if lemo is not None:
        found += _kept_warnings(run, lemo) + _recall_warnings(run, lemo)
    parts = run.seconds()
    whole = sum(seconds for part, seconds in parts.items() if part in TRAINING_PARTS)
    before = parts.get("predictor", 0) + parts.get("calibrate", 0)
    if run.finished and whole and before > _LARGE_PHASES * whole:
        found.append(f"The phases before the first step took {before / whole:.0%} of the training time; longer runs dilute it.")
    return found


def _kept_warnings(run: RunData, lemo: LemoConfig) -> list[str]:
    layers = run.mean_by_layer("kept_share")
    total = len(layers)
    chosen = {layer: share for layer, share in layers.items() if not lemo.is_dense(layer, total)}
    if not chosen:
        return []
    kept, wanted = sum(chosen.values()) / len(chosen), [lemo.ratio_of(layer) for layer in chosen]
    if kept >= 0.999:
        return ["Kept share is 1.0: no token was left out, so nothing was saved. Lower block_size, or use longer samples."]
    if kept > sum(wanted) / len(wanted) + 0.1:
        return [f"Kept share is {kept:.2f} where keep_ratio asks for {sum(wanted) / len(wanted):.2f}: documents have few blocks."]
    return []


def _recall_warnings(run: RunData, lemo: LemoConfig) -> list[str]:
    recall = run.last("recall")
    if recall is None:
        return ["The selection reads predictors whose recall was not measured."] if lemo.needs_predictors else []
    found, first = [], run.entries("recall")[0]["recall"]
    chance, positions = run.last("recall_of_chance"), run.last("recall_of_positions")
    if chance is not None and recall < chance + _LOW_RECALL:
        found.append(f"Recall is {recall:.2f}, hardly above chance ({chance:.2f}): fit the predictors on more documents.")
    elif positions is not None and recall < positions:
        found.append(f"Recall is {recall:.2f}, below a predictor that knows positions only ({positions:.2f}).")
    drop = _number(run.arguments.get("recall_drop"))
    if drop is not None and 0 <= drop < first - recall:
        found.append(f"Recall fell from {first:.2f} to {recall:.2f}, by more than recall_drop={drop:g}.")
    return found


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def key_figures(runs: Sequence[RunData]) -> list[Row]:
    """The table: a row of one cell for each run; rows that no run has a value for are left out, dense perplexity never."""
    rows: list[Row] = []

    def add(label: str, cells: list[str | None], always: bool = False) -> None:
        if always or any(cells):
            rows.append((label, [cell or NOT_MEASURED for cell in cells]))

    losses = [final_loss(run) for run in runs]
    add("steps", [f"{run.steps}" for run in runs])
    add("training loss at the end (nats per token)", [f"{loss[0]:.3f}" if loss else None for loss in losses])
    add("loss on held-out text, last (nats per token)", [_three(run.last("eval_loss")) for run in runs])
    perplexities = [run.results.perplexity_after if run.results is not None else None for run in runs]
    add("dense perplexity after training", [_three(found.value) if found else None for found in perplexities], always=True)
    kept = [run.mean("kept_share") if run.lemo is not None else 1.0 if run.results is not None else None for run in runs]
    add("tokens kept, mean over layers", [f"{share:.0%}" if share is not None else None for share in kept])
    add("saved for backward, one forward", [_in_words(saved_bytes(run)) for run in runs])
    add("of it moved to host memory", [_in_words(run.last("offloaded_bytes")) for run in runs])
    overlaps = [run.last("offload/overlap") for run in runs]
    add("transfers hidden behind computation", [f"{overlap:.0%}" if overlap is not None else None for overlap in overlaps])
    stalls = [run.last("offload/stall_seconds") for run in runs]
    add("waiting for transfers, a forward and backward", [f"{stall:.3f} s" if stall is not None else None for stall in stalls])
    add("host memory of the offload, at most", [_in_words(run.last("offload/host_peak_bytes")) for run in runs])
    kinds = {"cuda": "peak GPU memory", "cpu": "peak memory of the process, libraries included"}
    for device in sorted({run.device for run in runs} & set(kinds)):
        peaks = [run.last("memory/peak_bytes") if run.device == device else None for run in runs]
        add(kinds[device], [_in_words(peak) for peak in peaks])
    steps = [run.seconds().get("training") for run in runs]
    add("time a step", [f"{spent / run.steps:.2f} s" if spent and run.steps else None for spent, run in zip(steps, runs)])
    times = [run.training_seconds for run in runs]
    add("time of training, phases included", [duration(seconds) if seconds is not None else None for seconds in times])
    add("recall of predictors, last (chance)", [_recall_in_words(run) for run in runs])
    return rows


def _three(value: float | None) -> str | None:
    return decimals(value) or None


def _in_words(count: float | None) -> str | None:
    return amount(count) if count is not None else None


def _recall_in_words(run: RunData) -> str | None:
    recall, chance = run.last("recall"), run.last("recall_of_chance")
    return None if recall is None else f"{recall:.3f} ({chance:.3f})" if chance is not None else f"{recall:.3f}"


def settings(runs: Sequence[RunData]) -> list[Row]:
    """What the runs were made with: a row of one cell for each run."""
    return _side_by_side([_settings(run) for run in runs])


def _settings(run: RunData) -> dict[str, str]:
    rows = [("Run", run.name)]
    if run.results is not None:
        rows += _result_rows(run.results)
    rows += [(name, value) for name, value in run.arguments.items() if value != "None"]
    return {label: str(value) for label, value in rows}


def _side_by_side(columns: Sequence[dict[str, str]]) -> list[Row]:
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [column.get(label, "") for column in columns]) for label in labels]


def _result_rows(results: RunResults) -> list[tuple[str, str]]:
    rows = [("Base model", results.base_model), ("Text", results.data), ("Adapter", results.adapter or "none")]
    rows += [("Context", f"{results.seq_len} tokens")] if results.seq_len else []
    rows += [("Precision", results.precision)] if results.precision else []
    return rows + selection_rows(LemoConfig.from_dict(results.lemo))


def machine(runs: Sequence[RunData]) -> list[Row]:
    """Versions, commit and machine: a row of one cell for each run."""
    return _side_by_side([_machine(run) for run in runs])


def _machine(run: RunData) -> dict[str, str]:
    about = run.results.provenance if run.results is not None else None
    if not isinstance(about, dict):
        return {}
    rows = [("commit", about.get("commit"))]
    for part in ("versions", "machine"):
        found = about.get(part)
        rows += list(found.items()) if isinstance(found, dict) else []
    return {str(label): str(value) for label, value in rows if value is not None}
