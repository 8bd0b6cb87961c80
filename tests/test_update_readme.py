from pathlib import Path

import update_readme


def test_readme_tables_are_those_of_the_committed_results():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert update_readme.updated(readme) == readme
