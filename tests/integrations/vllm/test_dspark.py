"""M3.1's draft is refused in one sentence, however it is asked of vLLM."""

from __future__ import annotations

from pathlib import Path

from tests.integrations.dspark import NO_MTP, REFUSED, every_way
from tests.integrations.vllm.engine import HOST

OURS = (
    "the folder",
    "the folder as dspark",
    "the folder as dflash",
    "the folder as eagle3",
    "the target as dflash",
)


def test_every_way_of_asking(tmp_path: Path) -> None:
    """Where vLLM refuses before it looks at a model, its own words stand."""
    said = every_way(HOST, "tests.integrations.vllm.dspark_asked", tmp_path)
    for name in OURS:
        assert REFUSED in said[name], (name, said[name])
        assert "leave --speculative-config out" in said[name]
    # by methods alone: a worker on a GPU asks `require_speculation`
    assert "does not support: dspark" in said["dspark"] or REFUSED in said["dspark"]
    assert "Input should be" in said["DSPARK"]
    assert "without speculative model" in said["dflash"]
    assert NO_MTP in said["MTP"]
    assert said.keys() == {*OURS, "dspark", "DSPARK", "dflash", "MTP"}
