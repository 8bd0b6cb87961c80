"""Where a run's time goes."""

import time
from typing import Any


class RunClock:
    """Seconds by what they went into: every moment is charged once, to what the caller says it was.

    They go through the Trainer's log as `seconds/<what>`, summed up from the start of the run, resumptions included.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def start(self, history: list[dict[str, Any]]) -> None:
        """Starts from what the log of a resumed run says was spent before; from 0 where it says nothing."""
        last: dict[str, Any] = next((logs for logs in reversed(history) if "seconds/training" in logs), {})
        self.seconds = {name.partition("/")[2]: value for name, value in last.items() if name.startswith("seconds/")}
        self._mark = time.perf_counter()

    def charge(self, what: str) -> None:
        """Charges the time since the last call to `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._mark
        self._mark = now

    def metrics(self) -> dict[str, float]:
        """The sums, for the log."""
        return {f"seconds/{what}": seconds for what, seconds in self.seconds.items()}
