"""The documentation's links lead somewhere, and every setting stands in it."""

import dataclasses
import re
from pathlib import Path

import pytest

from lemo_hf import LemoConfig, LemoTrainingArguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"(?m)^#+ (.+)$", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_setting_is_described():
    # The log of experiments mentions settings, and describes none.
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES if "experiments" not in str(page.relative_to(ROOT)))
    settings = {field.name for field in dataclasses.fields(LemoConfig)} - {"schema_version"}
    assert [name for name in sorted(settings) if not re.search(rf"`{name}`|LemoConfig\({name}=|[(` ]{name}=", pages)] == []


def test_the_arguments_have_the_defaults_that_the_page_says():
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"(?m)^\| `(\w+)` \| (\S+) \|", page))
    own = {name: LemoTrainingArguments.__dataclass_fields__[name].default for name in LemoTrainingArguments.__annotations__}
    assert said == {name: "none" if default is None else str(default) for name, default in own.items()}
