"""A run beside its baseline: losses paired at equal steps and at equal time."""

from dataclasses import dataclass

from ...errors import LemoError
from .data import RunData

# Losses scatter, so means are compared: over this last share of what both runs have.
_WINDOW = 0.25


@dataclass(frozen=True)
class Pairing:
    """Mean training losses of two runs where they had the same of something.

    Args:
        equal: "steps" or "time".
        begin, end: Where the means were taken: steps, or seconds of training.
        loss, baseline: The means.
        steps, baseline_steps: The last steps within.
    """

    equal: str
    begin: float
    end: float
    loss: float
    baseline: float
    steps: int
    baseline_steps: int

    @property
    def difference(self) -> float:
        """How much higher the run's loss is, nats per token."""
        return self.loss - self.baseline


def pair(run: RunData, baseline: RunData) -> list[Pairing]:
    """The run's and the baseline's losses at equal steps and at equal time, as far as both logged them."""
    own, other = run.points("loss"), baseline.points("loss")
    at_steps = {step: loss for step, _, loss in other}
    common = [(step, loss, at_steps[step]) for step, _, loss in own if step in at_steps]
    found = []
    if common:
        last = common[-max(1, round(len(common) * _WINDOW)) :]
        begin, end = last[0][0], last[-1][0]
        own_mean, other_mean = (_mean([losses[place] for losses in last]) for place in (1, 2))
        found.append(Pairing("steps", begin, end, own_mean, other_mean, int(end), int(end)))
    times = [[(seconds, loss, step) for step, seconds, loss in points if seconds is not None] for points in (own, other)]
    if all(times):
        end = min(points[-1][0] for points in times)
        begin = (1 - _WINDOW) * end
        within = [[(loss, step) for seconds, loss, step in points if begin <= seconds <= end] for points in times]
        if all(within):
            own_mean, other_mean = (_mean([loss for loss, _ in points]) for points in within)
            own_step, other_step = (int(points[-1][1]) for points in within)
            found.append(Pairing("time", begin, end, own_mean, other_mean, own_step, other_step))
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def require_comparable(run: RunData, baseline: RunData) -> list[str]:
    """Notes on what the two runs do not share, or what is not known of their likeness: one sentence each.

    Raises:
        LemoError: If they trained another base model, or samples of another length.
    """
    if run.results is None or baseline.results is None:
        unknown = " and ".join(repr(each.name) for each in (run, baseline) if each.results is None)
        return [f"Base model and sequence length of {unknown} are not recorded: make sure yourself that both runs had the same."]
    for what, fix in (("base_model", "another base model"), ("seq_len", "samples of another length")):
        own, other = getattr(run.results, what), getattr(baseline.results, what)
        if own != other:
            raise LemoError(f"baseline trained {fix}; {own!r} in the run, {other!r} in the baseline; give one that is comparable")
    pairs = [
        (what, getattr(run.results, name), getattr(baseline.results, name), spoilt)
        for name, what, spoilt in (
            ("data", "text", "losses"),
            ("adapter", "adapter", "losses, memory and time"),
            ("precision", "float types", "memory and time"),
        )
    ]
    for name, spoilt in (
        ("per_device_train_batch_size", "memory and losses at equal steps"),
        ("gradient_accumulation_steps", "losses at equal steps"),
        ("learning_rate", "losses"),
    ):
        pairs.append((name, run.arguments.get(name), baseline.arguments.get(name), spoilt))
    notes = [
        f"The baseline differs in {what} ({other}, this run {own}): {spoilt} differ by that too."
        for what, own, other, spoilt in pairs
        if own and other and own != other
    ]
    about = [run.results.provenance, baseline.results.provenance]
    machines = [each["machine"] for each in about if isinstance(each, dict) and each.get("machine")]
    if len(machines) == 2 and machines[0] != machines[1]:
        notes.append(
            "The baseline ran on another machine (table at the end): times, and losses at equal time, differ by that too."
        )
    return notes
