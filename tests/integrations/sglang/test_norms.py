"""Norms and RoPE of a dense layer's heads in one launch on a GPU."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m3_sglang import compat, norms
from m3_sglang.norms import norm_and_rotate


def heads(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    norm = SimpleNamespace(weight=torch.zeros(128), variance_epsilon=1e-6)
    rope = SimpleNamespace(cos_sin_cache=torch.zeros(9, 64))
    return {
        "qkv": torch.zeros(3, 4 * 128, dtype=dtype),
        "positions": torch.arange(3),
        "norms": (norm, norm),
        "rope": rope,
        "heads": (2, 1),
    }


def test_heads_are_normed_and_rotated_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(norms, "fused_norm_and_rope", lambda: lambda *args: given.append(args))
    asked = heads()
    assert norm_and_rotate(asked.pop("qkv"), asked.pop("positions"), **asked)
    ((qkv, _, _, table, _, *numbers),) = given
    assert (len(qkv), len(table), numbers) == (3, 9, [2, 1, 1, 1e-6])


@pytest.mark.parametrize("what", ["dtype", "table", "width", "head", "platform"])
def test_heads_that_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(norms, "fused_norm_and_rope", lambda: None if what == "platform" else 1)
    asked = heads(torch.float16 if what == "dtype" else torch.bfloat16)
    if what == "table":
        asked["rope"].cos_sin_cache = asked["rope"].cos_sin_cache.bfloat16()
    if what == "width":
        asked["rope"].cos_sin_cache = torch.zeros(9, 128)
    if what == "head":
        asked["norms"][0].weight = torch.zeros(64)
    assert not norm_and_rotate(asked.pop("qkv"), asked.pop("positions"), **asked)


@pytest.mark.every_release
def test_sglang_s_kernel_takes_what_we_give() -> None:
    """Bound to its source: it cannot be built without a GPU."""
    compat.fused_norm_and_rope.cache_clear()
    assert compat.fused_norm_and_rope() is None
    if compat._is_older_than("0.5.22"):
        pytest.skip("older releases get norms and RoPE one by one")
    from sglang.kernels.ops.attention import minimax_qknorm_rope as module

    assert list(inspect.signature(module.minimax_qknorm_rope).parameters) == [
        *("qkv", "q_weight", "k_weight", "cos_sin_cache", "positions"),
        *("nq", "nk", "nv", "eps"),
    ]


def test_a_dense_layer_normalises_its_heads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, or by the norms of its heads where there is none: never by both."""
    from m3_sglang import attention

    made: Any = object.__new__(attention.M3DenseAttention)
    torch.nn.Module.__init__(made)
    made.num_heads, made.num_kv_heads, made.head_dim = 2, 1, 4
    made.split_sizes = [8, 4, 4]
    made.qkv_proj = made.o_proj = torch.nn.Identity()
    made.q_norm = made.k_norm = lambda heads: heads + 1
    made.rope = (lambda positions, q, k: (q, k),)
    made.attn = lambda q, k, v, batch: torch.cat((q, k, v), dim=-1)
    monkeypatch.setattr(torch.nn.Identity, "forward", lambda layer, x: (x, None))
    done, seen = False, []

    def fused(qkv: Any, *given: Any, **asked: Any) -> bool:
        seen.append(asked["heads"])
        return done

    monkeypatch.setattr(attention, "norm_and_rotate", fused)
    for done in (False, True):
        out = made(None, None, torch.zeros(3, 16), None)
        assert out[0].tolist() == [0.0 if done else 1.0] * 12 + [0.0] * 4
    assert seen == [(2, 1), (2, 1)]
