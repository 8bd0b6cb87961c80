import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_tables_are_those_of_the_committed_results():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "benchmarks" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    update_readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update_readme)
    readme = (ROOT / "README.md").read_text()
    assert update_readme.updated(readme) == readme
