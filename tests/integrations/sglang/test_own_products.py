"""Our products under SGLang's plain layers of 16 bits, and what keeps SGLang's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from m3_plugin.model import products


@pytest.fixture(autouse=True)
def _without_products_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "library_multiplies", lambda dtype: False)


def model(dtype: torch.dtype = torch.bfloat16, *, columns: int = 64) -> Any:
    from sglang.srt.layers.linear import ReplicatedLinear

    layer: Any = ReplicatedLinear(columns, 80, bias=False, params_dtype=dtype)
    random = torch.Generator().manual_seed(0)
    layer.weight.data.copy_(torch.randn(80, columns, generator=random))
    return nn.ModuleDict({"layer": layer})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_layer_stays_and_the_product_is_ours(dtype: torch.dtype) -> None:
    from m3_sglang.own_products import OwnProduct, use_own_products

    use_own_products(made := model(dtype))
    layer = made["layer"]
    layer.quant_method.process_weights_after_loading(layer)
    assert isinstance(layer.quant_method, OwnProduct)
    x = torch.randn(130, 64).to(dtype)
    out, _ = layer(x)
    assert torch.equal(out, products.multiply(x, layer.weight))
    torch.testing.assert_close(out, nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize(
    ("dtype", "columns", "variable"),
    [
        (torch.float32, 64, "auto"),
        (torch.bfloat16, 72, "auto"),
        (torch.bfloat16, 64, "host"),
    ],
)
def test_sglangs_product_is_kept(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, columns: int, variable: str
) -> None:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from m3_sglang.own_products import use_own_products

    monkeypatch.setenv("M3_PLUGIN_PRODUCTS", variable)
    use_own_products(made := model(dtype, columns=columns))
    assert type(made["layer"].quant_method) is UnquantizedLinearMethod


class Experts(nn.Module):
    """What SGLang's experts hold of plain weights: gate rows before up rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

        super().__init__()
        random = torch.Generator().manual_seed(1)
        w13 = torch.randn(6, 2 * 48, 64, generator=random) / 8
        w2 = torch.randn(6, 64, 48, generator=random) / 7
        self.w13_weight = nn.Parameter(w13.to(dtype), requires_grad=False)
        self.w2_weight = nn.Parameter(w2.to(dtype), requires_grad=False)
        self.num_experts = 6
        self.moe_runner_config = SimpleNamespace(
            gemm1_alpha=1.702,
            gemm1_clamp_limit=7.0,
            apply_router_weight_on_input=False,
            activation="silu",
        )
        self.quant_method: Any = UnquantizedFusedMoEMethod()


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_equal_sglangs_own(tokens: int) -> None:
    """Which know the activation with gate and up rows interleaved."""
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from m3_plugin.checkpoint.loading import interleave_gate_up
    from m3_sglang.own_products import OwnExpertProducts, use_own_experts

    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=random).bfloat16()
    ids = torch.rand(tokens, 6, generator=random).argsort(1)[:, :3]
    chosen = StandardTopKOutput(torch.rand(tokens, 3, generator=random), ids, torch.zeros(1))
    ours = Experts(torch.bfloat16)
    assert use_own_experts(ours)
    assert isinstance(ours.quant_method, OwnExpertProducts)
    step: Any = SimpleNamespace(hidden_states=x, topk_output=chosen)
    found = ours.quant_method.apply(ours, step).hidden_states
    exact: Any = Experts(torch.bfloat16).float()
    exact.w13_weight.data = interleave_gate_up(exact.w13_weight.data)
    with torch.compiler.set_stance("force_eager"):
        wanted = moe_forward_native(exact, x.float(), chosen, exact.moe_runner_config)
    torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-5)


def test_experts_of_fp32_stay_sglangs() -> None:
    from m3_sglang.own_products import use_own_experts

    assert not use_own_experts(Experts(torch.float32))
