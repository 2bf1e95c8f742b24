"""What stops an execution."""

from __future__ import annotations


class Fault(Exception):
    """A kernel did what a GPU need not answer for: the message names instruction, thread, address."""
