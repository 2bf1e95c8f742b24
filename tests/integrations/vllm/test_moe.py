"""The expert kernel's activation: row order on CPU, and a probe that sees a lost clamp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.integrations.vllm.engine import EngineError, EngineProcess


def swiglu_norms(limit: float | None) -> list[float]:
    """Output norms of random SwiGLU-OAI experts for inputs growing 4x each."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 64, 32, generator=generator) * 0.05
    x = torch.randn(32, generator=generator)
    norms = []
    for power in range(3, 10):
        g, u = gate @ (x * 4.0**power), up @ (x * 4.0**power)
        if limit is not None:
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        norms.append(float(((u + 1) * g * torch.sigmoid(1.702 * g)).norm()))
    return norms


def test_the_probe_tells_a_clamped_activation_from_one_without() -> None:
    from m3_vllm.moe import grows_unclamped

    assert not grows_unclamped(swiglu_norms(limit=7.0))
    assert grows_unclamped(swiglu_norms(limit=None))


@pytest.mark.parametrize("norms", [[0.0] * 7, [5.0, float("inf"), float("nan")]])
def test_the_probe_refuses_nothing_it_cannot_judge(norms: list[float]) -> None:
    from m3_vllm.moe import grows_unclamped

    assert not grows_unclamped(norms)


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
