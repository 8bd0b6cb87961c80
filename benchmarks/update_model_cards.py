"""Renders the example cards in `model_cards/` from committed result files. `--check` only says whether they are current.

python benchmarks/update_model_cards.py [--check]
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lemo_hf.hub.model_card import CARD_FILE, PLOT_FILE, Kind, write_model_card
from lemo_hf.quickstart.report import arm_results

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"


@dataclass
class Example:
    """One rendered card.

    Args:
        folder: Its folder in `model_cards/`.
        results: Pattern of the quickstart's result file.
        arm: The quickstart's arm.
        kind: What the card would lie beside.
        title: Its heading.
    """

    folder: str
    results: str
    arm: str
    kind: Kind
    title: str


_RESULTS = "quickstart--*.json"
EXAMPLES = (
    Example("adapter", _RESULTS, "exact", "adapter", "Python sources at 4096 tokens: LoRA adapter, exact form"),
    Example("merged", _RESULTS, "exact", "merged", "Python sources at 4096 tokens: merged checkpoint, exact form"),
    Example("remote_code", _RESULTS, "kept_keys", "remote-code", "Python sources at 4096 tokens: LeMo model, kept keys"),
)


def render(example: Example, folder: Path) -> None:
    """Writes one example's card and plot into `folder`.

    Raises:
        FileNotFoundError: If there is no such result file, or several.
    """
    found = sorted((ROOT / "benchmarks" / "results").glob(example.results))
    if len(found) != 1:
        raise FileNotFoundError(f"an example card needs one result file {example.results}; found {[file.name for file in found]}")
    folder.mkdir(parents=True, exist_ok=True)
    results = arm_results(json.loads(found[0].read_text()), example.arm)
    # As if there were no card yet: the examples hold nothing that a person added.
    (folder / CARD_FILE).unlink(missing_ok=True)
    write_model_card(results, folder, example.title, kind=example.kind)


def stale(cards: Path = CARDS) -> list[str]:
    """Example files in `cards` that are missing or not what the committed results give.

    Plots are compared by the description stored in them: their pixels depend on matplotlib's version.
    """
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for example in EXAMPLES:
            fresh, kept = Path(temporary) / example.folder, cards / example.folder
            render(example, fresh)
            for name, content in ((CARD_FILE, Path.read_bytes), (PLOT_FILE, description)):
                if not (kept / name).is_file() or content(kept / name) != content(fresh / name):
                    found.append(f"{example.folder}/{name}")
    return found


def description(plot: Path) -> str:
    """What a plot says of itself."""
    from PIL import Image

    with Image.open(plot) as image:
        return str(image.info.get("Description"))


def main() -> int:
    """Renders the examples, or with `--check` compares."""
    if "--check" in sys.argv[1:]:
        found = stale()
        print(f"stale: {', '.join(found)}; run benchmarks/update_model_cards.py" if found else "example cards: current")
        return int(bool(found))
    for example in EXAMPLES:
        render(example, CARDS / example.folder)
    print("example cards: written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
