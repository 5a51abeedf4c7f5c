"""README and docs: their links lead somewhere, and they describe every setting."""

import re
from pathlib import Path

import pytest

from settings import READERS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """Return the page without its code blocks, where # starts no heading."""
    return re.sub(
        r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the page's headings."""
    names = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(words.strip().replace(" ", "-"))
    return names


def relative_links(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in links if not re.match(r"https?:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    broken = []
    for link in relative_links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target):
            broken.append(link)
    assert broken == []


def test_readme_links_to_every_document():
    linked = set(relative_links(ROOT / "README.md"))
    documents = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert documents <= linked


def test_the_table_of_settings_has_every_setting_and_no_other():
    rows = re.findall(
        r"^\| (`[A-Z].*?) \|",
        (ROOT / "docs/settings.md").read_text(),
        flags=re.MULTILINE,
    )
    documented = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(documented) == sorted(READERS)


def test_the_command_that_ci_takes_from_readme_installs_both_requirements():
    commands = re.findall(
        r"^.*-m pytest$", (ROOT / "README.md").read_text(), flags=re.MULTILINE
    )
    assert len(commands) == 1
    assert "-r requirements.txt -r tests/requirements.txt" in commands[0]
