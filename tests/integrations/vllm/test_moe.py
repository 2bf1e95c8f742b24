"""The probe of the expert kernel's activation sees a lost clamp in a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.vllm.engine import EngineError, EngineProcess


def test_an_expert_kernel_without_the_clamp_is_refused_at_start(
    random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A real engine whose experts run plain SiLU: the start must fail and say why."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "class Break(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'm3_vllm.model':\n"
        "            import m3_vllm.moe as moe\n"
        "            factory = moe.FusedMoEFactory\n"
        "            moe.FusedMoEFactory = lambda **kw: factory(**{**kw, 'activation': 'silu'})\n"
        "sys.meta_path.insert(0, Break())\n"
    )
    with pytest.raises(EngineError, match=r"does not apply swiglu_limit=7\.0"):
        EngineProcess(random_checkpoint("engine"), environment={"PYTHONPATH": str(tmp_path)})
