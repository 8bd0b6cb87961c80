import json
import re
from pathlib import Path

import fault_results
import pytest

ROOT = Path(__file__).parents[1]
TESTS = {
    name
    for file in ("test_kills.py", "test_faults.py", "test_out_of_memory.py", "test_sample_watch.py", "test_full_disk.py")
    for name in re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE)
}


def test_the_page_has_the_table_of_the_results():
    results = json.loads(fault_results.RESULTS.read_text())
    page = fault_results.PAGE.read_text()
    assert page.split(fault_results.BEGIN)[1].split(fault_results.END)[0].strip() == fault_results.render(results).strip()
    assert {name for row in results["rows"] for name in row["tests"]} <= TESTS
    assert len(results["rows"]) == len(fault_results.ROWS)


def test_every_row_has_tests_that_exist():
    for row in fault_results.ROWS:
        for start in row.tests:
            assert any(name.startswith(start) for name in TESTS), start


def report(folder, *cases):
    path = folder / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def test_counts_are_those_of_passed_tests(tmp_path):
    kills = (
        '<testcase name="test_killed_at_every_event[{}]"><properties><property name="kills" value="{}"/></properties></testcase>'
    )
    skipped = '<testcase name="test_every_size_of_disk"><skipped/></testcase>'
    plain = '<testcase name="test_spoilt_weights_blame_no_sample"/>'
    rows = fault_results.results_of(
        fault_results.read_reports([report(tmp_path, kills.format(0, 9), kills.format(1, 8), skipped, plain)])
    )
    assert [(row["fault"], row["times"], row["tests"]) for row in rows] == [
        ("`kill -9`", 17, ["test_killed_at_every_event"]),
        ("loss or gradient not finite", 1, ["test_spoilt_weights_blame_no_sample"]),
    ]
    with pytest.raises(SystemExit, match="test failed; x"):
        fault_results.read_reports([report(tmp_path, '<testcase name="x"><failure/></testcase>')])
