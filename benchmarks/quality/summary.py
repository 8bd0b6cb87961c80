"""Puts the arms' results together: one committed JSON, the tables of docs/quality.md and its plots.

A committed result with a `note` is of earlier code: the note says what that did otherwise, and its tables have a page of their own.

    python -m benchmarks.quality.summary --runs outputs/quality                   (writes all of them)
    python -m benchmarks.quality.summary --check                                  (whether the tables are those of the JSON)

`comparing.py` says when a difference is called a tie.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.quality.comparing import answer_difference, perplexity_difference, spread
from benchmarks.quality.extension import EQUAL_STEPS, EQUAL_TIME
from benchmarks.quality.measures import STRETCHES, far_context, repository_perplexity, retrieval_scores, text_perplexity
from benchmarks.quality.noise_scale import RESULT as NOISE_RESULT
from benchmarks.quality.plots import draw_plots
from benchmarks.quality.report import updated_page
from lemo_hf.errors import LemoError
from lemo_hf.evaluation.perplexity import paired_difference
from lemo_hf.profiling.provenance import provenance

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "quality.md"
EARLIER_PAGE = ROOT / "docs" / "experiments" / "kept_keys_alone.md"
IMAGES = ROOT / "docs" / "images" / "quality"

Runs = dict[str, dict[int, dict[str, Any]]]  # by arm and seed


def read_runs(folder: Path) -> dict[str, Runs]:
    """The arms' results by setting.

    Raises:
        LemoError: If there are none, or those of a setting are of several bases.
    """
    found: dict[str, Runs] = {}
    for path in sorted(folder.glob("arms/*/*--seed*.json")):
        run = json.loads(path.read_text())
        found.setdefault(path.parent.name, {}).setdefault(run["arm"]["name"], {})[run["seed"]] = run
    if not found:
        raise LemoError(f"no results; {str(folder / 'arms')!r}; run benchmarks.quality.extension first")
    for name, runs in found.items():
        bases = {run["base"] for seeds in runs.values() for run in seeds.values()}
        if len(bases) > 1:
            raise LemoError(f"results are of several bases; {len(bases)} in setting {name}; remove those of all but one")
    return found


def at_point(runs: Runs, arm: str, point: str) -> dict[int, dict[str, Any]]:
    """By seed what was measured of an arm at a point."""
    return {seed: run["points"][point] for seed, run in runs.get(arm, {}).items() if point in run["points"]}


def values(several: Sequence[float]) -> dict[str, Any]:
    """Mean, spread and the seeds' values."""
    return {"mean": statistics.fmean(several), "spread": spread(several), "by_seed": list(several)}


def point_summary(runs: Runs, arm: Mapping[str, Any], point: str) -> dict[str, Any] | None:
    """What the seeds of an arm show at a point, beside the stock arm at equal steps (whose time equal time is).

    Args:
        runs: All arms of the setting.
        arm: The arm, as its results describe it.
        point: The point.
    """
    here = at_point(runs, arm["name"], point)
    if not here:
        return None
    stock = at_point(runs, "stock" if len(arm["targets"]) == 4 else "stock-all-linear", EQUAL_STEPS)
    scores = [text_perplexity(measured) for measured in here.values()]
    found: dict[str, Any] = {
        "steps": statistics.fmean(measured["steps"] for measured in here.values()),
        "perplexity": values([score.perplexity for score in scores]),
        "by_stretch": [
            values([text_perplexity(measured, stretch).perplexity for measured in here.values()]) for stretch in range(STRETCHES)
        ],
        "far_context": [far_context(measured).__dict__ for measured in here.values()],
    }
    compared: dict[str, Any] = {"perplexity": perplexity_difference(stock, here, text_perplexity)}
    for stretch in range(STRETCHES):
        compared[f"stretch_{stretch}"] = perplexity_difference(stock, here, lambda m, part=stretch: text_perplexity(m, part))
    if all("retrieval" in measured for measured in (*here.values(), *stock.values())):
        asked = [question for measured in here.values() for question in measured["retrieval"]]
        found["retrieval"] = retrieval_scores(asked)
        compared["retrieval"] = answer_difference(stock, here, "right")
        compared["retrieval_loss"] = answer_difference(stock, here, "loss")
    if all("repositories" in measured for measured in (*here.values(), *stock.values())):
        found["repositories"] = values([repository_perplexity(measured).perplexity for measured in here.values()])
        gains = [paired_difference(repository_perplexity(m, cut=True), repository_perplexity(m)) for m in here.values()]
        found["repositories_far_context"] = [gain.__dict__ for gain in gains]
        compared["repositories"] = perplexity_difference(stock, here, repository_perplexity)
    found["versus_stock"] = {name: each.to_dict() for name, each in compared.items() if each is not None}
    if arm["plain"] is not None:
        difference = perplexity_difference(at_point(runs, arm["plain"], EQUAL_STEPS), here, text_perplexity)
        found["versus_plain"] = None if difference is None else difference.to_dict()
    return found


def setting_summary(runs: Runs) -> dict[str, Any]:
    """All arms of a setting."""
    first = next(iter(next(iter(runs.values())).values()))
    arms: dict[str, Any] = {}
    for name, seeds in runs.items():
        run = next(iter(seeds.values()))
        points = {point: point_summary(runs, run["arm"], point) for point in (EQUAL_STEPS, EQUAL_TIME)}
        arms[name] = {
            "arm": run["arm"],
            "seeds": sorted(seeds),
            "cost": run["cost"],
            "phase_steps": statistics.fmean(each.get("phase_steps", 0.0) for each in seeds.values()),
            "points": {point: found for point, found in points.items() if found is not None},
        }
    return {"setting": first["setting"], "base": first["base"], "arms": arms}


def machine_slug(machine: Mapping[str, Any]) -> str:
    """The machine as result files are called by it, such as `amd-epyc-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu") or f"{machine['processor']} {machine['cores']} cores").lower())


def summarise(folder: Path) -> dict[str, Any]:
    """The committed result of all that is in `folder`."""
    found = read_runs(folder)
    commits = sorted({run["commit"] for runs in found.values() for seeds in runs.values() for run in seeds.values()})
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "commits_of_runs": commits,
        "settings": {name: setting_summary(runs) for name, runs in found.items()},
    }


def main(given: list[str] | None = None) -> int:
    """Writes result, tables and plots; `--check` compares the tables with the committed results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/quality"), help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the tables (default: %(default)s)")
    parser.add_argument("--earlier", type=Path, default=EARLIER_PAGE, help="page of earlier results (default: %(default)s)")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the plots (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the page is current")
    args = parser.parse_args(given)
    try:
        if not args.check:
            result = summarise(args.runs)
            place = args.results / f"quality_extension--{machine_slug(result['machine'])}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{place}: {sum(len(setting['arms']) for setting in result['settings'].values())} arms")
        committed = [json.loads(path.read_text()) for path in sorted(args.results.glob("quality_extension--*.json"))]
        of_today = [result for result in committed if "note" not in result]
        noise = args.results / NOISE_RESULT.name
        measured = json.loads(noise.read_text()) if noise.is_file() else None
        pages = {args.page: updated_page(args.page.read_text(), of_today, measured)}
        if earlier := [result for result in committed if "note" in result]:
            pages[args.earlier] = updated_page(args.earlier.read_text(), earlier, needs_all=False)
        stale = [page.name for page, text in pages.items() if text != page.read_text()]
        if args.check:
            print(f"{', '.join(stale)}: stale; run benchmarks.quality.summary" if stale else "all current")
            return int(bool(stale))
        for page, text in pages.items():
            page.write_text(text)
        draw_plots(of_today, args.images)
    except LemoError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
