"""M3.1's draft is refused in one sentence, however it is asked of SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_sglang.compat import speculation_is_tested
from tests.integrations.dspark import NO_MTP, REFUSED, every_way
from tests.integrations.sglang.engine import HOST

BY_NAME = "--speculative-algorithm must be None or NEXTN or EAGLE or EAGLE3 for MiniMax-M3; got"
BY_PATH = ("EAGLE3 and the folder", "NEXTN and the folder")


@pytest.mark.skipif(not speculation_is_tested(), reason="no speculation on this SGLang")
def test_every_way_of_asking(tmp_path: Path) -> None:
    """By an algorithm that is none of ours, or by one of ours for its folder."""
    said = every_way(HOST, "tests.integrations.sglang.dspark_asked", tmp_path)
    assert NO_MTP in said.pop("MTP")
    for name, sentence in said.items():
        assert (REFUSED if name in BY_PATH else BY_NAME) in sentence, (name, sentence)
    assert said.keys() == {*BY_PATH, "DSPARK", "DSPARK and the folder", "DFLASH and the folder"}
