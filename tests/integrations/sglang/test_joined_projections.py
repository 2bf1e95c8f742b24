"""One product for q, k, v and the index branch, of weights that loads and updates find apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import Tensor, nn

from m3_sglang.attention import M3SparseAttention, can_be_joined, join_rows

HIDDEN, HEAD = 32, 8


class Linear(nn.Module):
    """As SGLang's, of which a CPU's are left as they are."""

    def __init__(self, rows: int, *, device: str = "cpu", quant_method: Any = None) -> None:
        super().__init__()
        weight = torch.linspace(-1, 1, rows * HIDDEN, device=device).sin().view(rows, HIDDEN)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.quant_method = quant_method or UnquantizedLinearMethod()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return self.quant_method.apply(self, hidden_states), None


@pytest.fixture
def layer() -> Any:
    """Two KV heads with four query heads, and their index heads."""
    made: Any = object.__new__(M3SparseAttention)
    nn.Module.__init__(made)
    made.num_kv_heads, made.head_dim = 2, HEAD
    made.split_sizes, made.index_split_sizes = [4 * HEAD, 2 * HEAD, 2 * HEAD], [2 * HEAD, HEAD]
    made.qkv_proj, made.index_qkv_proj = Linear(8 * HEAD), Linear(3 * HEAD)
    made.joined = None
    return made


def test_products_are_those_of_the_layers(layer: Any) -> None:
    rows = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    apart = layer.project_with_index(rows)
    assert [part.shape[1] // HEAD for part in apart] == [4, 2, 2, 2, 1]
    weights = [layer.qkv_proj.weight.clone(), layer.index_qkv_proj.weight.clone()]
    layer.joined = join_rows(layer.qkv_proj, layer.index_qkv_proj)
    together = layer.project_with_index(rows)
    for a, b in zip(apart, together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    # what an update writes into a layer's own parameter, the product reads
    assert torch.equal(layer.qkv_proj.weight, weights[0])
    assert torch.equal(layer.index_qkv_proj.weight, weights[1])
    layer.index_qkv_proj.weight.data[-HEAD:].fill_(1.0)
    layer.qkv_proj.weight.data[:HEAD].copy_(torch.full((HEAD, HIDDEN), 2.0))
    q, *_, index_k = layer.project_with_index(rows)
    torch.testing.assert_close(index_k, rows.sum(-1, keepdim=True).expand(-1, HEAD))
    torch.testing.assert_close(q[:, :HEAD], 2 * rows.sum(-1, keepdim=True).expand(-1, HEAD))


def test_only_plain_rows_are_joined() -> None:
    plain, other = Linear(HEAD, device="meta"), Linear(2 * HEAD, device="meta")
    assert can_be_joined(plain, other)
    assert not can_be_joined(plain, Linear(HEAD, device="meta", quant_method=object()))
    assert not can_be_joined(plain, Linear(HEAD))
