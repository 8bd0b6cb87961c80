"""The example cards are current, and their template is found from a checkout and from a wheel."""

import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import update_model_cards
from card_results import results

from lemo_hf.hub.lemo_files import write_json
from lemo_hf.hub.model_card import PLOT_FILE, render_card, template_path

ROOT = Path(__file__).parents[1]


def test_example_cards_are_those_of_the_committed_results(tmp_path):
    assert update_model_cards.stale() == []
    copytree(ROOT / "model_cards", tmp_path / "cards")
    card = tmp_path / "cards" / "adapter" / "README.md"
    card.write_text(card.read_text().replace("| Optimizer steps | ", "| Optimizer steps | 1"))
    (tmp_path / "cards" / "merged" / PLOT_FILE).unlink()
    assert update_model_cards.stale(tmp_path / "cards") == ["adapter/README.md", f"merged/{PLOT_FILE}"]


def test_the_template_is_found_in_a_checkout():
    assert template_path() == ROOT / "model_cards" / "card_template.md"


@pytest.mark.slow
def test_a_wheel_holds_the_template_and_renders_with_it(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("lemo_hf", "model_cards", "kernels"):
        if (ROOT / name).is_dir():
            copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    write_json(tmp_path / "results.json", results().to_dict())
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from lemo_hf.hub.model_card import RunResults, template_path, write_model_card\n"
        "write_model_card(RunResults.read('results.json'), 'out', 'mine')\n"
        "print(template_path())"
    )
    (tmp_path / "out").mkdir()
    run = subprocess.run([sys.executable, "-c", code, str(site)], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == str(site / "lemo_hf" / "model_cards" / "card_template.md")
    assert (tmp_path / "out" / "README.md").read_text() == render_card(results(), "mine", plot=PLOT_FILE)
