from pathlib import Path

import pytest
import update_readme


@pytest.mark.parametrize("page", update_readme.TABLES)
def test_tables_are_those_of_the_committed_results(page):
    text = (Path(__file__).parents[1] / page).read_text()
    assert update_readme.updated(text, page) == text


def test_a_page_without_a_place_for_a_table_is_named():
    with pytest.raises(ValueError, match=r"docs/benchmarks\.md has 0 places for table bench_small; it needs 1; add"):
        update_readme.updated("nothing", "docs/benchmarks.md")
