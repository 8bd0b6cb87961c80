"""The table of faults in docs/reliability.md, from what the tests of faults reported.

    pytest -m "slow or not slow" tests/test_kills.py tests/test_faults.py tests/test_out_of_memory.py \
        tests/test_sample_watch.py tests/test_full_disk.py --junitxml=faults.xml -o junit_family=xunit1
    python benchmarks/fault_results.py faults.xml

Several reports may be given, of one run of each test. Counts are those of passed tests; a test that failed stops the table.
"""

import argparse
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lemo_hf.hub.lemo_files import atomic_path, write_json
from lemo_hf.profiling.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "faults--cpu.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@dataclass(frozen=True)
class Row:
    """One line of the table: a fault, where it comes, the tests (beginnings of their names), and what happens."""

    fault: str
    where: str
    tests: tuple[str, ...]
    outcome: str


_SAME = "the same bits as a run that nobody killed"
ROWS = (
    Row("`kill -9`", "13 times in a row, once in every kind of work", ("test_killed_again_and_again",), _SAME),
    Row("`kill -9`", "ten times in a row in each of 9 phases", ("test_killed_ten_times_in_a_row_in_each_phase",), _SAME),
    Row("`kill -9`", "at every event of a run, files half written among them", ("test_killed_at_every_event",), _SAME),
    Row("`kill -9`", "ten times at random moments", ("test_killed_ten_times_at_any_moment",), _SAME),
    Row(
        *("SIGTERM, SIGINT, SIGUSR1", "in phases, steps, evaluation, saving, the last step"),
        ("test_a_signal_saves", "test_a_second_interrupt"),
        "saves, says where, leaves with 143, 130, 138; then the same bits",
    ),
    Row(
        *("files may not grow", "in phases, each file of a checkpoint, the final model"),
        ("test_a_full_disk_keeps",),
        "one line, last whole checkpoint stays, nothing half-written; then the same bits",
    ),
    Row(
        *("disk full", "file systems of 60 to 408 KiB"),
        ("test_every_size_of_disk",),
        "one line, last whole checkpoint stays, nothing half-written",
    ),
    Row(
        *("cut checkpoint", "every file missing, empty, halved, short, zeroed"),
        ("test_every_way_to_cut", "test_the_last_whole", "test_resuming_past_a_cut", "test_rotation_never"),
        "seen; the previous whole one is used and said, or the named one refused",
    ),
    Row(
        *("out of memory (simulated)", "forward, backward, recomputation, loss, optimizer, evaluation, phases"),
        ("test_memory_that_runs_out", "test_a_batch_size_is_still_found"),
        "one line: phase, part, layer, tokens, kept share, what to change",
    ),
    Row(
        *(
            "poisoned sample",
            "tokens or labels outside the vocabulary or of another type or shape, none at all, a mask with holes",
        ),
        ("test_a_poisoned_sample_is_named", "test_the_index_is_right"),
        "refused before it is read, by its index",
    ),
    Row(
        *("embedding that is NaN", "in one sample, in training and phases"),
        ("test_an_embedding_that_is_nan", "test_a_phase_names"),
        "sample and token named",
    ),
    Row(
        *("strange sample", "one token, two, one token repeated, padding alone, no labels"),
        ("test_a_strange_sample", "test_a_first_document_of_one_token"),
        "survived, all weights finite",
    ),
    Row(
        *("loss or gradient not finite", "weights spoilt, float16 steps all skipped"),
        ("test_spoilt_weights", "test_a_float16_run"),
        "stops, names step and last whole checkpoint, blames no sample",
    ),
)


def read_reports(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Passed tests by full name, with the counts that they recorded.

    Raises:
        SystemExit: If one failed.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                raise SystemExit(f"test failed; {case.get('name')}; see to it before its count is published")
            if case.find("skipped") is None:
                counts = {each.get("name"): int(str(each.get("value"))) for each in case.iter("property")}
                found[str(case.get("name"))] = {str(name): value for name, value in counts.items()}
    return found


def results_of(reports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows with their counts; rows without a test are left out."""
    rows = []
    for row in ROWS:
        cases = {name: counts for name, counts in reports.items() if name.startswith(row.tests)}
        if cases:
            times = sum(sum(counts.values()) or 1 for counts in cases.values())
            tests = sorted({re.sub(r"\[.*", "", name) for name in cases})
            rows.append({"fault": row.fault, "where": row.where, "times": times, "outcome": row.outcome, "tests": tests})
    return rows


def render(results: dict[str, Any]) -> str:
    """The table, with its date."""
    lines = ["| fault | where | times | outcome | tests |", "| --- | --- | --- | --- | --- |"]
    for row in results["rows"]:
        tests = ", ".join(f"`{name}`" for name in row["tests"])
        lines.append(f"| {row['fault']} | {row['where']} | {row['times']} | {row['outcome']} | {tests} |")
    return f"Run on {results['date']}, all passed.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Reads the reports, writes the results and the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    rows = results_of(read_reports(parser.parse_args().reports))
    results = {"date": datetime.now(UTC).date().isoformat(), "rows": rows, "provenance": provenance()}
    write_json(RESULTS, results)
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    with atomic_path(PAGE) as partial:
        partial.write_text(f"{before}{BEGIN}\n{render(results)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
