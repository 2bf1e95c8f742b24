"""Sums over ranks with the norm behind them: which steps take one launch, and what it is given."""

from __future__ import annotations

import importlib.metadata
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor

from m3_sglang.compat import FusedSum
from m3_sglang.sums import RankSums

HIDDEN, ROWS, EPS = 64, 3, 1e-6


@pytest.fixture
def asked() -> list[dict[str, Any]]:
    """What the kernel was asked besides tensors."""
    return []


@pytest.fixture
def sums(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> RankSums:
    """Of two ranks with the same parts, on a chip that has the kernel for up to eight rows."""

    def kernel(
        part: Tensor, stream: Tensor, weight: Tensor, eps: float, **others: Any
    ) -> tuple[Tensor, Tensor]:
        asked.append(others)
        whole = 2 * part.float() + stream.float()
        scale = (whole.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = whole * scale * (weight.float() + others["gemma"])
        return normed.to(part.dtype), whole.to(part.dtype)

    monkeypatch.setattr("m3_sglang.sums.tensor_parallel_size", lambda: 2)
    monkeypatch.setattr("m3_sglang.sums.shared_rows", lambda: None)
    monkeypatch.setattr("m3_sglang.sums.tensor_model_parallel_all_reduce", lambda part: 2 * part)
    monkeypatch.setattr(
        "m3_sglang.sums.fused_sum",
        lambda device: FusedSum(
            lambda: asked.append({"registered": device}),
            lambda rows, columns: rows * columns <= 8 * HIDDEN,
            lambda: True,
            kernel,
        ),
    )
    return RankSums(hidden_size=HIDDEN, device_type="cuda")


def step(mode: ForwardMode, *, overlapped: bool = False) -> Any:
    return SimpleNamespace(forward_mode=mode, can_run_tbo=overlapped)


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[GemmaRMSNorm, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    norm = GemmaRMSNorm(HIDDEN, eps=EPS)
    norm.weight.data = torch.randn(HIDDEN, generator=random).to(dtype)
    part, stream = torch.randn(2, rows, HIDDEN, generator=random).to(dtype)
    return norm, part, stream


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_few_rows_take_one_launch_and_give_the_same(
    sums: RankSums, asked: list[dict[str, Any]], mode: ForwardMode
) -> None:
    norm, part, stream = inputs(torch.bfloat16)
    before = stream.clone()
    normed, whole = sums.normalise(norm, part, stream, step(mode))
    ((others),) = asked
    assert others.pop("residual_out").data_ptr() != stream.data_ptr()
    assert others == {"world_size": 2, "gemma": True}
    # a captured head may still read it
    assert torch.equal(stream, before)
    sums.fused = None
    expected, stream = sums.normalise(norm, part, stream, step(mode))
    torch.testing.assert_close(normed, expected, atol=0.04, rtol=0.02)
    torch.testing.assert_close(whole, stream, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("mode", "dtype", "rows", "overlapped"),
    [
        (ForwardMode.EXTEND, torch.bfloat16, ROWS, False),
        (ForwardMode.DRAFT_EXTEND_V2, torch.bfloat16, ROWS, False),
        (ForwardMode.DECODE, torch.float32, ROWS, False),
        (ForwardMode.DECODE, torch.bfloat16, 9, False),
        (ForwardMode.DECODE, torch.bfloat16, ROWS, True),
    ],
)
def test_other_steps_sum_and_normalise_apart(
    sums: RankSums,
    asked: list[dict[str, Any]],
    mode: ForwardMode,
    dtype: torch.dtype,
    rows: int,
    overlapped: bool,
) -> None:
    norm, part, stream = inputs(dtype, rows)
    expected = norm(2 * part, stream.clone())
    normed, whole = sums.normalise(norm, part, stream, step(mode, overlapped=overlapped))
    assert not asked
    assert torch.equal(normed, expected[0])
    assert torch.equal(whole, expected[1])


def test_what_is_not_allowed_is_apart(sums: RankSums, asked: list[dict[str, Any]]) -> None:
    assert sums.fused is not None
    sums.fused = sums.fused._replace(allowed=lambda: False)
    sums.normalise(*inputs(torch.bfloat16), step(ForwardMode.DECODE))
    assert not asked


def test_the_buffer_is_made_after_loading(sums: RankSums, asked: list[dict[str, Any]]) -> None:
    """SGLang asks the class that it serves, before it records graphs."""
    from sglang.srt.model_executor.model_runner_components import load_model_utils

    from m3_sglang.model import M3CausalLM
    from m3_sglang.models import minimax_m3

    assert '"precompile_kernels_after_loading"' in inspect.getsource(load_model_utils)
    text: Any = object.__new__(M3CausalLM)
    torch.nn.Module.__init__(text)
    text.model = SimpleNamespace(sums=sums)
    text.precompile_kernels_after_loading()
    served: Any = object.__new__(minimax_m3.MiniMaxM3SparseForConditionalGeneration)
    torch.nn.Module.__init__(served)
    served.language_model = text
    served.precompile_kernels_after_loading()
    assert asked == [{"registered": "cuda"}] * 2


@pytest.mark.skipif(
    Version(importlib.metadata.version("sglang")) < Version("0.5.23"), reason="not before 0.5.23"
)
def test_conditions_are_those_of_sglang_s_own() -> None:
    """What its own M3 asks before each fused sum; a new condition there must be judged here."""
    from sglang.kernels.ops.communication.all_reduce_fusion import all_reduce_residual_norm
    from sglang.srt.layers.layer_boundary.fusions import custom_all_reduce_fusion as own
    from sglang.srt.models import minimax_m3

    source = inspect.getsource(own.CustomAllReduceFusion._eligible)
    asked = {line.strip() for line in source.splitlines() if line.strip().startswith(("and ", "("))}
    assert asked == {
        "(mode.is_decode() or mode.is_target_verify())",
        # of bf16; ours have no other width
        "and _bf16_norm_gamma(plan.norm) is not None",
        "and not forward_batch.can_run_tbo",
        "and not is_in_breakable_cuda_graph()",
        "and not is_batch_invariant_mode_enabled()",
        "and not get_attn_tp_context().input_scattered",
        "and not get_exec().comm.enable_quant_communications",
        # rows that are shared out over ranks, which attention DP and sequence parallel do: refused
        "and TokenAxis.ATTN_TP not in plan.fused_input_rows(forward_batch).sharded",
        "and can_fuse_all_reduce(m, self.hidden_size)",
    }
    assert {"world_size", "gemma", "residual_out"} <= {
        *inspect.signature(all_reduce_residual_norm).parameters
    }
    assert "max_push_size=4 * 1024 * 1024, max_push_blocks=512" in inspect.getsource(minimax_m3)
