"""What several seeds of two arms say together: mean, spread, interval, and whether it is a tie.

Perplexities are compared by the windows that both were measured on. With several seeds a window's loss is the mean over them, and the
interval is that of the windows (`lemo_hf.evaluation.perplexity.paired_difference`); the seeds' own differences give the spread, their standard
deviation. A difference counts only where the interval leaves out zero and the mean is larger than the spread; everything else
is a tie, and a single seed, whose spread nobody knows, is marked as such.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemo_hf.errors import LemoError
from lemo_hf.evaluation.perplexity import Perplexity, paired_difference, student_t_quantile

CONFIDENCE = 0.95
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """How much an arm differs from its reference.

    Args:
        mean: Percent of perplexity, or points of accuracy in [-100, 100].
        low, high: Its interval, by windows or questions.
        spread: Standard deviation over seeds; `None` of one seed.
        by_seed: Each seed's difference.
    """

    mean: float
    low: float
    high: float
    spread: float | None
    by_seed: tuple[float, ...]

    @property
    def is_tie(self) -> bool:
        """Whether chance may have made it."""
        return self.low <= 0 <= self.high or abs(self.mean) <= (self.spread or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, the verdict included."""
        return {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "spread": self.spread,
            "by_seed": list(self.by_seed),
            "is_tie": self.is_tie,
        }


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of several seeds' values."""
    return statistics.stdev(values) if len(values) > 1 else None


def mean_perplexity(several: Sequence[Perplexity]) -> Perplexity:
    """Of the seeds' mean losses by window.

    Raises:
        LemoError: If they were measured on different windows.
    """
    if len({each.token_counts for each in several}) != 1:
        raise LemoError(f"seeds were measured on different text; {len(several)} runs; measure all with one setting")
    sums = zip(*(each.nll_sums for each in several), strict=True)
    return Perplexity(tuple(math.fsum(values) / len(several) for values in sums), several[0].token_counts)


def perplexity_difference(
    reference: Mapping[int, Run], runs: Mapping[int, Run], perplexity_of: Callable[[Run], Perplexity]
) -> Difference | None:
    """Relative difference in perplexity over the seeds that both have, percent; `None` without any.

    Args:
        reference, runs: By seed what was measured at one point.
        perplexity_of: Which perplexity of it.
    """
    seeds = sorted(reference.keys() & runs.keys())
    if not seeds:
        return None
    theirs = [perplexity_of(reference[seed]) for seed in seeds]
    ours = [perplexity_of(runs[seed]) for seed in seeds]
    by_seed = [100 * math.expm1(mine.loss - base.loss) for base, mine in zip(theirs, ours, strict=True)]
    found = paired_difference(mean_perplexity(theirs), mean_perplexity(ours), CONFIDENCE)
    return Difference(found.percent, found.low, found.high, spread(by_seed), tuple(by_seed))


def answer_difference(reference: Mapping[int, Run], runs: Mapping[int, Run], of: str) -> Difference | None:
    """Mean difference over the same questions of the seeds that both have; `None` without any.

    Args:
        reference, runs: By seed what was measured at one point.
        of: `"right"` (points of accuracy, 100 being all questions) or `"loss"` (nats a token of the answers).
    """
    seeds = sorted(reference.keys() & runs.keys())
    pairs = {
        seed: list(zip(reference[seed].get("retrieval", ()), runs[seed].get("retrieval", ()), strict=True)) for seed in seeds
    }
    factor = 100 if of == "right" else 1
    differences = [[factor * (float(mine[of]) - float(base[of])) for base, mine in pairs[seed]] for seed in seeds]
    together = [value for values in differences for value in values]
    if len(together) < 2:
        return None
    mean = math.fsum(together) / len(together)
    quantile = student_t_quantile((1 + CONFIDENCE) / 2, len(together) - 1)
    reach = quantile * statistics.stdev(together) / math.sqrt(len(together))
    by_seed = [math.fsum(values) / len(values) for values in differences]
    return Difference(mean, mean - reach, mean + reach, spread(by_seed), tuple(by_seed))
