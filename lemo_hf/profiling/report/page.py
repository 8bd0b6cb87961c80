"""`lemo report`: a run as one HTML page that needs nothing else, to read, to print and to send.

Whatever a run's files say is text to the page: the template escapes it, figures carry words of ours only, and the page's own policy
lets it load nothing and run nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ... import __version__
from ...errors import LemoError
from ...hub.lemo_files import atomic_path
from ...models.lemo_config import LemoConfigError
from . import figures
from .comparison import require_comparable
from .data import RunData, read_run
from .figures import Drawing
from .words import NOT_MEASURED, key_figures, machine, pairs_in_words, settings, summary, warnings

REPORT_FILE = "report.html"
_TEMPLATE = Path(__file__).parents[2] / "assets" / "run_report.html"


@dataclass
class _Section:
    id: str
    heading: str
    sentences: list[str] = field(default_factory=list)
    # Heading, figure, and what to say where there is none.
    parts: list[tuple[str, Drawing | None, str]] = field(default_factory=list)


def report_run(run: str | Path, baseline: str | Path | None = None, out: str | Path | None = None) -> Path:
    """Writes the report of a run's folder.

    Args:
        run: Output folder of a run, finished or not.
        baseline: Output folder of a run to compare with.
        out: The page; `report.html` in the run's folder if not given.

    Returns:
        The page's path.

    Raises:
        LemoError: If there is nothing to report, the two are not comparable, or the page cannot be written.
    """
    shown = read_run(run, "run")
    beside = read_run(baseline, "baseline") if baseline is not None else None
    notes = require_comparable(shown, beside) if beside is not None else []
    return write_report([shown], Path(out) if out is not None else Path(run) / REPORT_FILE, beside, shown.name, notes)


def write_report(
    runs: Sequence[RunData], path: Path, baseline: RunData | None = None, title: str = "", notes: Sequence[str] = ()
) -> Path:
    """Writes one page on runs beside one baseline.

    Args:
        runs: The runs; their labels differ.
        path: The page.
        baseline: What they are compared with.
        title: Heading of the page.
        notes: More for the reader to look at, one sentence each.

    Raises:
        LemoError: If a run's files hold what no page can be made of, or the page cannot be written.
    """
    try:
        page = render_report(runs, baseline, title, notes)
    except (LemoError, LemoConfigError):
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        names = ", ".join(repr(run.name) for run in runs)
        reason = " ".join(str(error).split())
        raise LemoError(f"run's files hold values of the wrong kind ({reason}); {names}; copy them from the run again") from error
    try:
        with atomic_path(path) as partial:
            partial.write_text(page, encoding="utf-8", errors="replace")  # a name may hold what is no character
    except OSError as error:
        raise LemoError(f"report cannot be written ({error.strerror}); {str(path)!r}; name another file with --out") from error
    return path


def render_report(runs: Sequence[RunData], baseline: RunData | None = None, title: str = "", notes: Sequence[str] = ()) -> str:
    """The page as text; see [`write_report`]."""
    everything = [*runs, *([baseline] if baseline is not None else [])]
    several = len(everything) > 1
    context: dict[str, Any] = {
        "title": title or "Training run",
        "under": _under(runs, baseline),
        "summaries": [
            {"heading": f"{run.label}: {run.name}" if len(runs) > 1 else "", "sentences": summary(run, baseline)} for run in runs
        ],
        "warnings": [*(f"{run.label}: {text}" if several else text for run in everything for text in warnings(run)), *notes],
        "columns": [run.label for run in everything],
        "key_figures": key_figures(everything),
        "not_measured": NOT_MEASURED,
        "sections": _sections(runs, everything, baseline),
        "tables": [
            ("settings", "Settings", settings(everything)),
            ("machine", "Versions and machine", machine(everything)),
        ],
        "made": f"Written by lemo_hf {__version__} on {datetime.now(UTC):%Y-%m-%d}.",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(context) + "\n"


def _under(runs: Sequence[RunData], baseline: RunData | None) -> str:
    beside = f", beside {baseline.name}" if baseline is not None else ""
    state = "" if all(run.finished for run in runs) else " It has not come to its end."
    return f"Report on {'a training run' if len(runs) == 1 else f'{len(runs)} training runs'}{beside}.{state}"


def _sections(runs: Sequence[RunData], everything: Sequence[RunData], baseline: RunData | None) -> list[_Section]:
    paired = []
    if baseline is not None:
        for run in runs:
            prefix = f"{run.label}: " if len(runs) > 1 else ""
            paired += [prefix + sentence for sentence in pairs_in_words(run, baseline)]
    if paired:
        paired.append(
            "Each figure is the mean over the last quarter of what both runs logged; single steps scatter more than they differ."
        )

    memory_note = next((run.memory_note for run in everything if run.memory_note), "")

    def each_run(draw: Callable[[RunData], Drawing | None], missing: str) -> list[tuple[str, Drawing | None, str]]:
        return [(run.label if len(runs) > 1 else "", draw(run), missing) for run in runs]

    def together(drawing: Drawing | None, missing: str) -> list[tuple[str, Drawing | None, str]]:
        return [("", drawing, missing)]

    return [
        _Section("losses", "Losses", paired, together(figures.losses(everything), "No loss was logged.")),
        _Section(
            "kept-share",
            "Tokens kept, by layer and step",
            parts=each_run(figures.kept_share, "Nothing to show: the run was dense, or logged no kept share."),
        ),
        _Section(
            "recall",
            "Recall of the pattern predictors",
            parts=each_run(
                figures.recall, "Nothing to show: this run fitted no predictors. A uniform draw of blocks needs none."
            ),
        ),
        _Section(
            "block-scores",
            "Block scores, true and predicted",
            parts=each_run(
                figures.block_scores, "Nothing to show: block scores are kept when predictors are probed, which this run did not."
            ),
        ),
        _Section(
            "memory",
            "Memory over time",
            parts=together(
                figures.memory(everything),
                memory_note or "No memory was logged: the run is older than these logs, or of a stock Trainer.",
            ),
        ),
        _Section(
            "time",
            "Time by phase",
            parts=together(
                figures.time_breakdown(everything), "The log does not tell phases apart: it is of a stock Trainer, or older."
            ),
        ),
        _Section(
            "saved-bytes",
            "Saved for backward, by layer",
            parts=together(
                figures.saved_by_layer(everything), "Nothing to show: saved bytes are measured where LeMo leaves tokens out."
            ),
        ),
    ]
