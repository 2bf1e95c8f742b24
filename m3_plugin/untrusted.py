"""What a checkpoint of a stranger may say: JSON within limits, and words that can be shown.

A checkpoint folder is looked at before it is trusted. Reading it ends with an answer or a
`ValueError`, in time and memory that its own size bounds, and what it says never reaches a terminal
or a log as anything else than text.
"""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

# The safetensors library refuses longer headers; M3's files have a few MB of JSON at most.
MAX_JSON_BYTES = 100_000_000
MAX_JSON_DEPTH = 64
_SHOWN = 200


def printable(text: str) -> str:
    """`text` with every character escaped that would do something to a terminal or a log line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A value for an error message, as Python writes it and not longer than a line or two."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def parse_json(text: bytes) -> Any:
    """What JSON says.

    Raises
    ------
    ValueError : no JSON, or nested deeper than anything a checkpoint needs.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from None
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            part
            for value in level
            if isinstance(value, dict | list)
            for part in (value.values() if isinstance(value, dict) else value)
            if isinstance(part, dict | list)
        ]
        if not level:
            return content
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises
    ------
    ValueError : no JSON, or longer or deeper than a checkpoint's files are.
    OSError : it is not there, may not be read, or is no file but a folder or a pipe.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        # a pipe would be waited for
        raise OSError(errno.EINVAL, "not a regular file")
    if found.st_size > MAX_JSON_BYTES:
        raise ValueError(f"it has {found.st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    return parse_json(path.read_bytes())
