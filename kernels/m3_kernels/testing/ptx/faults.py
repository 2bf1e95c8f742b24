"""What stops an execution."""

from __future__ import annotations


class Fault(Exception):
    """A kernel did what it must not; the message names instruction, thread and address."""
