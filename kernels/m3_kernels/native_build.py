"""Compiles the C++ kernels once per machine and loads them; a failure is a reason, not an error."""

from __future__ import annotations


def refusal() -> str | None:
    """Why the C++ kernels cannot run here, or None if they can."""
    return "the C++ kernels are not part of this build yet"
