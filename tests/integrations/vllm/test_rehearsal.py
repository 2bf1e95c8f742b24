"""Command lines of README, docs and recipes, resolved by vLLM as on GPUs of four families."""

from __future__ import annotations

import json
from typing import Any

import pytest

from m3_plugin.model.released import released_config
from tests.interpreters import Forking


@pytest.fixture(scope="module")
def found(gpus: Forking, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Report of `rehearsal.py`: chip and command -> what was resolved."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "config.json").write_text(json.dumps(released_config()))
    return gpus.report("tests.integrations.vllm.rehearsal", folder)


def test_every_command_line_is_resolved(found: dict[str, Any]) -> None:
    assert len(found) == 12
    assert {name: entry["error"] for name, entry in found.items() if "error" in entry} == {}


def test_a_worker_takes_less_than_a_gibibyte_beside_weights_and_pages(
    found: dict[str, Any],
) -> None:
    """At the limits that vLLM chose itself, and the model's million tokens."""
    assert found["H100: tp8"]["capacity"] == {
        "max_requests": 1024,
        "max_rows": 8192,
        "max_seq_len": 1048577,
        "decode_rows": 1,
    }
    assert all(entry["workspace_mib"] < 1024 for entry in found.values())
    assert found["H100: mtp"]["capacity"]["decode_rows"] == 4


def test_what_our_choices_rest_on(found: dict[str, Any]) -> None:
    """No torch.compile for this model's name, so norms run as their own kernels."""
    for name, entry in found.items():
        assert entry["compiles"] == "0", name
        assert entry["norms_enabled"], name
        wanted = ["LBHNC", "BLHNC"] if name.startswith("B200") else None
        assert entry["layouts"] == wanted, name
