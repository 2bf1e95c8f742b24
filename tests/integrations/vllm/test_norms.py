"""Norms of the hidden stream: one launch on a GPU, and one with the sum over ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import fused_allreduce_gemma_rms_norm as fused_allreduce
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.models.interfaces import EagleModelMixin

from m3_vllm import model as model_module
from m3_vllm import norms
from m3_vllm.model import M3Model
from m3_vllm.norms import HiddenNorm, add_and_norm


class Counting(TorchDispatchMode):
    """The operations that would be launches: views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.launches.append(str(func))
        return func(*args, **kwargs or {})


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """FlashInfer's two norms as far as their contract goes; which of them were called."""
    calls: list[str] = []

    def gemma_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls.append("gemma_rmsnorm")
        assert x.dim() == 2
        assert x.dtype == weight.dtype
        return torch.empty_like(x)

    def gemma_fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        calls.append("gemma_fused_add_rmsnorm")
        assert x.dtype == residual.dtype == weight.dtype

    module: Any = ModuleType("flashinfer")
    module.norm = SimpleNamespace(
        gemma_rmsnorm=gemma_rmsnorm, gemma_fused_add_rmsnorm=gemma_fused_add_rmsnorm
    )
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setitem(sys.modules, "flashinfer.norm", module.norm)
    monkeypatch.setattr(norms, "has_flashinfer", lambda: True)
    norms._kernels.cache_clear()
    yield calls
    norms._kernels.cache_clear()


def made(kind: type[GemmaRMSNorm], dtype: torch.dtype) -> Any:
    with set_current_vllm_config(VllmConfig()):
        return kind(64).to(dtype)


def test_a_norm_is_one_launch_on_a_gpu(called: list[str]) -> None:
    norm = made(HiddenNorm, torch.bfloat16)
    x = torch.zeros(3, 64).bfloat16()
    with Counting() as counted:
        assert norm.forward_cuda(x).shape == (3, 64)
        assert norm.forward_cuda(torch.zeros(3, 2, 64).bfloat16()).shape == (3, 2, 64)
        out, residual = norm.forward_cuda(x, x.clone())
    assert called == ["gemma_rmsnorm", "gemma_rmsnorm", "gemma_fused_add_rmsnorm"]
    assert out.data_ptr() == x.data_ptr()
    assert residual.data_ptr() != x.data_ptr()
    # what the stubs allocate for results, and this test for arguments
    assert set(counted.launches) <= {
        "aten.empty_like.default",
        "aten.zeros.default",
        "aten._to_copy.default",
        "aten.clone.default",
    }


def test_why_vllms_own_norm_is_not_used() -> None:
    """A dozen launches, since its kernel takes no fp32 weight beside bf16; if it does, use it."""
    from vllm.kernels.vllm_c import rms_add_no_var_size, rms_no_var_size

    x, weight = torch.zeros(3, 64).bfloat16(), torch.zeros(64)
    assert not rms_no_var_size(x, weight, 1e-6)
    assert not rms_add_no_var_size(x, x, weight, 1e-6)
    with Counting() as counted:
        ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, x, weight, 1e-6)
    assert len(counted.launches) > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_flashinfer_it_is_vllms_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(norms, "has_flashinfer", lambda: False)
    norms._kernels.cache_clear()
    ours, theirs = made(HiddenNorm, dtype), made(GemmaRMSNorm, dtype)
    x, residual = torch.randn(2, 5, 64).to(dtype).unbind()
    for given in ((x,), (x, residual)):
        torch.testing.assert_close(ours.forward_cuda(*given), theirs.forward_cuda(*given))
    norms._kernels.cache_clear()


class Layer(torch.nn.Module):
    """A decoder layer on one of two equal ranks: adds 1 to the stream, half of it from each."""

    partial = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = HiddenNorm(64)

    def forward(
        self, positions: Tensor, cos_sin: Tensor, x: Tensor, residual: Any, *, partial: bool = False
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            return torch.full_like(x, 0.5), x
        _, residual = add_and_norm(x, residual, self.norm, partial=partial)
        return torch.full_like(x, 0.5), residual


def test_sums_over_ranks_are_made_where_the_stream_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next norm, once per layer; before it where an EAGLE3 head reads the stream.

    The head would be given this rank's part otherwise, as vLLM's own model gives it.
    """
    sums = []

    def all_reduce(x: Tensor) -> Tensor:
        sums.append(x)
        return x * 2

    for module in (model_module, fused_allreduce):
        monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", all_reduce)
    monkeypatch.setattr(fused_allreduce, "get_tensor_model_parallel_world_size", lambda: 2)
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1)
    monkeypatch.setattr(model_module, "get_pp_group", lambda: group)
    with set_current_vllm_config(VllmConfig()):
        layers = torch.nn.ModuleList([Layer() for _ in range(4)])
        norm = HiddenNorm(64)
    model: Any = SimpleNamespace(
        layers=layers,
        norm=norm,
        start_layer=0,
        end_layer=4,
        angles=lambda positions: positions,
        aux_hidden_state_layers=(1, 3),
        collect_remote_aux_hidden_states=lambda tensors: [],
    )
    model._maybe_add_hidden_state = EagleModelMixin._maybe_add_hidden_state.__get__(model)
    out, streams = M3Model.forward(
        model,
        None,
        torch.arange(2),
        None,
        torch.zeros(2, 64),  # type: ignore[arg-type]
    )
    assert [float(stream[0, 0]) for stream in streams] == [1.0, 3.0]
    assert len(sums) == 4
    torch.testing.assert_close(out, torch.ones(2, 64), atol=1e-3, rtol=0)


def test_heads_of_dense_layers_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, by the kernel and with the arguments of vLLM's own M3; 16 bits alone."""
    from vllm.models.minimax_m3.nvidia import model as own

    calls: list[Any] = []

    def kernel(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    host: Any = own
    monkeypatch.setattr(host.ops, "fused_minimax_m3_qknorm_rope_kv_insert", kernel)
    norm = made(HiddenNorm, torch.bfloat16)
    rope = SimpleNamespace(cos_sin_cache=torch.zeros(8, 64), rotary_dim=64)
    qkv, positions = torch.zeros(3, 4 * 64).bfloat16(), torch.arange(3)
    layer: Any = SimpleNamespace(
        qkv_proj=lambda hidden: (qkv, None),
        q_norm=norm,
        k_norm=norm,
        rotary_emb=rope,
        num_heads=2,
        num_kv_heads=1,
        q_size=128,
        kv_size=64,
        attn=lambda q, k, v: q,
        o_proj=lambda attended: (attended, None),
    )
    own.MiniMaxM3Attention.forward(layer, positions, qkv)
    given: Any = {"norms": (norm, norm), "rope": rope, "heads": (2, 1)}
    monkeypatch.setattr(norms, "_norm_and_rope", lambda: kernel)
    assert norms.norm_and_rotate(qkv, positions, **given)
    theirs, ours = calls
    assert ours[1] == theirs[1]
    assert all(a is b or a == b for a, b in zip(ours[0], theirs[0], strict=True))
    assert not norms.norm_and_rotate(qkv.float(), positions, **given)
    monkeypatch.setattr(norms, "_norm_and_rope", lambda: None)
    assert not norms.norm_and_rotate(qkv, positions, **given)
