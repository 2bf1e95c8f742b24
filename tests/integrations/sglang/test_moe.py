"""The expert kernel's activation: row order on CPU, and a proof that sees a wrong kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.sglang.engine import EngineDiedError, EngineProcess

# sabotage of our module that leaves SGLang computing something else than SwiGLU-OAI
OTHER_ROW_ORDER = "moe.interleave_gate_up = lambda w13: w13"
NO_CLAMP = "moe.FusedMoE = wrong(moe.FusedMoE, gemm1_clamp_limit=1e9)"
# ... and leaves us without the weights, as a dummy load does
NOTHING_TO_COMPARE = "moe.ExpertProof.known = property(lambda p: None, lambda p, known: None)"

COMPARED = "does not compute MiniMax-M3's SwiGLU-OAI"
GREW = "does not apply swiglu_limit"


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        pytest.param(
            OTHER_ROW_ORDER, COMPARED, id="rows in another order", marks=pytest.mark.extended
        ),
        pytest.param(NO_CLAMP, COMPARED, id="no clamp"),
        pytest.param(
            f"{NOTHING_TO_COMPARE}; {NO_CLAMP}",
            GREW,
            id="no clamp, nothing to compare with",
            marks=pytest.mark.extended,
        ),
    ],
)
def test_a_wrong_expert_kernel_is_refused_at_start(
    random_checkpoint: Callable[[str], Path], tmp_path: Path, sabotage: str, reason: str
) -> None:
    """A real engine with sabotaged experts: the start must fail and say why."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "def wrong(factory, **options):\n"
        "    return lambda **given: factory(**{**given, **options})\n"
        "class Break(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'm3_sglang.model':\n"
        "            import m3_sglang.moe as moe\n"
        f"            {sabotage}\n"
        "sys.meta_path.insert(0, Break())\n"
    )
    with pytest.raises(EngineDiedError, match=reason):
        EngineProcess(
            random_checkpoint("engine"),
            log=tmp_path / "engine.log",
            environment={"PYTHONPATH": str(tmp_path)},
        )
