"""Pages are held to the checkout: links lead somewhere, examples are valid, layers are those enforced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modelfs import config
from tests.test_layers import LAYERS, ROOT

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> set[Path]:
    """What the page links to in the checkout."""
    targets = (target.partition("#")[0] for target in LINK.findall(prose(page)) if "://" not in target)
    return {(page.parent / target).resolve() for target in targets if target}


def anchors(page: Path) -> set[str]:
    """The anchors that headings of the page have on a forge."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not target.exists()] == []
    for target in LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        if anchor and "://" not in target:
            assert anchor in anchors(page.parent / path if path else page), target


def test_every_page_is_reached_from_the_readme() -> None:
    reached = links(REPOSITORY / "README.md")
    missing = [page for page in PAGES[1:] if page not in reached and page.parent not in reached]
    assert missing == []


def test_the_configuration_in_the_readme_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", PAGES[0].read_text(), re.DOTALL | re.MULTILINE)
    file = tmp_path / "modelfs.yaml"
    file.write_text(example)
    settings = config.load(mountpoint=None, config_file=file)
    assert [model.name for model in settings.models] == ["finbert", "churn", "tiny"]


def test_the_layers_of_the_page_are_those_that_are_enforced() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    drawn = page.partition("## Layers")[2].split("```")[1]
    names = [re.findall(r"^(\w+)(?: {2,5}(\w+))?(?= {2})", line) for line in drawn.splitlines()]
    existing = [
        {name for name in layer if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()}
        for layer in LAYERS
    ]
    assert [set(filter(None, found[0])) for found in names if found] == [layer for layer in existing if layer]
