"""Ops of a session that do something wrong, for tests of what notices it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from m3_plugin.attention import session

Run = Callable[[Any], None]


def break_op(monkeypatch: pytest.MonkeyPatch, op: str, wrong: Callable[[Run, Any], None]) -> None:
    """Sessions made from now on run `wrong(right, call)` for the op."""
    given = getattr(session, op.upper())

    def bound(family: str) -> Run:
        right = given.bound(family)
        return lambda call: wrong(right, call)

    monkeypatch.setattr(session, op.upper(), SimpleNamespace(bound=bound))
