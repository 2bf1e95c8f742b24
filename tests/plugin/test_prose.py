"""Pages for those who run the plugin: short sentences and paragraphs; links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
USER_PAGES = [
    README,
    *(
        DOCS / f"{name}.md"
        for name in (
            *("install", "deploy", "operations", "evaluation", "benchmarks", "troubleshooting"),
            *("sizing", "support", "glossary"),
        )
    ),
]
WORDS_OF_A_SENTENCE = 25
WORDS_OF_A_PARAGRAPH = 75
LINES_OF_THE_README = 90
# Where a new paragraph, list item or quotation begins, and what is no prose.
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
_SKIPPED = re.compile(r"^(#|!\[|\|\s*-)")


def blocks(text: str) -> Iterator[str]:
    """Paragraphs, list items and table cells, each as one line; code blocks are left out."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        line = line.removeprefix("> ").removeprefix(">")
        cells = line.startswith("|")
        if not line.strip() or cells or _SKIPPED.match(line) or _ITEM.match(line):
            if paragraph:
                yield " ".join(paragraph)
            paragraph = []
        if cells and not _SKIPPED.match(line):
            yield from (cell.strip() for cell in line.strip().strip("|").split(" | "))
        elif line.strip() and not cells and not _SKIPPED.match(line):
            paragraph.append(_ITEM.sub("", line).strip())


def sentences(block: str) -> list[str]:
    """Sentences of a block; code in backticks counts as one word, a link as its text."""
    plain = re.sub(r"`[^`]*`", "code", block)
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    return re.split(r"(?<=[.!?])[\"*)]*\s+", plain)


def words(text: str) -> int:
    return len([word for word in text.split() if re.search(r"\w", word)])


def test_counting() -> None:
    text = (
        "One two. Three `a b c` [four five](x.md)!\n\n- item\n  goes on\n\n| a b | c |\n|---|---|\n"
    )
    found = list(blocks(text))
    assert found == ["One two. Three `a b c` [four five](x.md)!", "item goes on", "a b", "c"]
    assert [words(sentence) for sentence in sentences(found[0])] == [2, 4]


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.stem)
def test_sentences_and_paragraphs_are_short(page: Path) -> None:
    found = list(blocks(page.read_text()))
    long = [s for b in found for s in sentences(b) if words(s) > WORDS_OF_A_SENTENCE]
    assert long == []
    assert [b for b in found if sum(map(words, sentences(b))) > WORDS_OF_A_PARAGRAPH] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < LINES_OF_THE_README


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.stem)
def test_lines_fit_the_page(page: Path) -> None:
    """100 columns, but for tables, code and links that cannot be broken."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    wide = [line for line in text.splitlines() if len(line) > 104 and not line.startswith("|")]
    assert wide == []


def anchors(page: Path) -> set[str]:
    """Of the headings, as the usual forge makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("kernels/**/*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_of_the_docs_is_named_by_another_one() -> None:
    text = {page: page.read_text() for page in PAGES}
    for page in DOCS.glob("*.md"):
        others = (body for other, body in text.items() if other != page)
        assert any(page.name in body for body in others), page.name
