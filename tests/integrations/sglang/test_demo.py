"""The main job on this host."""

import pytest

from tests.integrations.demo import check_demo


@pytest.mark.extended
def test_demo_answers_everything_right() -> None:
    check_demo("sglang")


@pytest.mark.extended
def test_demo_answers_the_same_when_drafting() -> None:
    """Two servers, one after the other."""
    check_demo("sglang", speculative=True)
