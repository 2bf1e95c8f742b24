"""What a command said, whatever the width at which it was broken into lines and framed."""

from __future__ import annotations


def in_one_line(output: str) -> str:
    """The words in one line; a long path in front of a message moves where lines end."""
    return " ".join(output.replace("│", " ").split())
