"""What commands print, held against the schemas that are installed with them."""

from __future__ import annotations

import json
from typing import Any

from jsonschema import Draft202012Validator

from m3_plugin.cli.outputs import SCHEMAS


def checked(command: str, text: str) -> dict[str, Any]:
    """The parsed JSON of a command; `command` as in the name of its schema."""
    schema = json.loads((SCHEMAS / f"{command}.json").read_text())
    found = json.loads(text, parse_constant=lambda name: f"{name} is not JSON")
    errors = Draft202012Validator(schema).iter_errors(found)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []
    return found
