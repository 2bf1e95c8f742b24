"""What a vLLM worker tells its session, on vLLM's own configuration objects."""

from __future__ import annotations

import pytest
import torch
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig, CompilationMode, VllmConfig

import m3_vllm.attention  # noqa: F401  registers the op
from m3_plugin.config import M3Config
from m3_plugin.released import released_config
from m3_vllm.session import (
    ATTENTION_OP,
    keep_attention_out_of_piecewise_graphs,
    worker_session,
)


class Layer(torch.nn.Module):
    """A projection, our op, another projection: three pieces if vLLM splits at the op."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        torch.ops.vllm.m3_msa_attention(q * 2, q, q, q, q, out, "layer")
        return out + 1


def pieces(config: VllmConfig) -> list[bool]:
    """Whether each piece of the split layer is left out of piecewise graphs."""
    traced = torch.fx.symbolic_trace(Layer())
    splitting = config.compilation_config.splitting_ops
    assert splitting is not None
    _, items = split_graph(traced, splitting)
    return [item.is_splitting_graph for item in items]


def compiled() -> VllmConfig:
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.VLLM_COMPILE))
    config.compilation_config.splitting_ops = None
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.set_splitting_ops_for_v1("naive")
    return config


def test_piecewise_graphs_never_hold_our_attention() -> None:
    config = compiled()
    assert pieces(config) == [False]
    keep_attention_out_of_piecewise_graphs(config)
    assert pieces(config) == [False, True, False]
    keep_attention_out_of_piecewise_graphs(config)
    splitting = config.compilation_config.splitting_ops
    assert splitting is not None
    assert splitting.count(ATTENTION_OP) == 1
    assert ATTENTION_OP not in CompilationConfig._attention_ops


def test_a_model_that_is_not_split_stays_whole() -> None:
    config = compiled()
    config.compilation_config.splitting_ops = []
    keep_attention_out_of_piecewise_graphs(config)
    assert config.compilation_config.splitting_ops == []


def test_two_micro_batches_are_refused() -> None:
    config = VllmConfig()
    config.parallel_config.enable_dbo = True
    with pytest.raises(ValueError, match="without --enable-dbo"):
        worker_session(M3Config.from_hf(released_config()), config)
