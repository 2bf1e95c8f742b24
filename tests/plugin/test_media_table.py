"""The table of docs/media.md is the list that both servers are sent."""

from __future__ import annotations

from tests.integrations.hostile_media import corpus
from tests.integrations.media_cases import CASES, DOCUMENT, TOKENS, document_with_table


def test_the_table_is_the_list() -> None:
    """`python -m tests.integrations.media_cases` writes it."""
    assert DOCUMENT.read_text() == document_with_table()


def test_names_are_of_one_case_each() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert TOKENS.keys() <= set(names)


def test_a_seed_gives_the_same_hostile_requests() -> None:
    assert corpus(1) == corpus(1)
    assert corpus(1) != corpus(2)
