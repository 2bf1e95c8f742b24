"""SGLang's layers with plain weights of 16 bits on a CPU, multiplied by our products.

SGLang has kernels for them where a CPU has AMX; on any other its projections and its experts are
torch's own products, which are loops where oneDNN has none of 16 bits for the processor.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.quantization.unquant import (
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)
from torch import Tensor, nn

from m3_kernels.quantised_experts import quantised_experts
from m3_kernels.stored_matrix import StoredMatrix
from m3_plugin.model.products import choose_products, multiply, takes
from m3_plugin.settings import Settings

logger = logging.getLogger(__name__)

# SGLang's experts add a fixed 1 to `up`.
_BETA = 1.0


class OwnProduct(UnquantizedLinearMethod):
    """SGLang's method for plain weights, which stay as they were loaded; the product is ours."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is packed."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., columns] to [..., rows]."""
        return multiply(x, layer.get_parameter("weight"), bias)


class OwnExpertProducts(UnquantizedFusedMoEMethod):
    """SGLang's method for plain experts; gate rows stay before up rows, the products are ours."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is packed."""

    def apply(self, layer: nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """The weighted sum of each token's experts."""
        chosen = dispatch_output.topk_output
        rules: Any = layer.moe_runner_config
        total = quantised_experts(
            dispatch_output.hidden_states,
            StoredMatrix("plain", layer.get_parameter("w13_weight").detach()),
            StoredMatrix("plain", layer.get_parameter("w2_weight").detach()),
            expert_ids=chosen.topk_ids.int(),
            expert_weights=chosen.topk_weights.float(),
            alpha=rules.gemm1_alpha,
            limit=rules.gemm1_clamp_limit,
            beta=_BETA,
        )
        return StandardCombineInput(hidden_states=total)


def use_own_experts(experts: nn.Module, *, some_elsewhere: bool = False) -> bool:
    """Give SGLang's routed experts just built our products where SGLang's cannot serve them.

    Where torch's library has none; and where other ranks have experts: SGLang numbers those -1,
    which its kernels of a CPU do not skip, and ours do.

    Parameters
    ----------
    some_elsewhere : whether other ranks have experts, on a CPU

    Returns
    -------
    Whether it did. Quantised ones, and widths that our products do not take, keep their method.
    """
    if type(experts.quant_method) is not UnquantizedFusedMoEMethod:
        return False
    weights = [experts.get_parameter(name) for name in ("w13_weight", "w2_weight")]
    first = weights[0]
    choice = choose_products(first.device.type, first.dtype, settings=Settings.from_environment())
    if not some_elsewhere and not (choice.own and all(takes(weight) for weight in weights)):
        return False
    experts.quant_method = OwnExpertProducts()
    return True


def use_own_products(model: nn.Module) -> None:
    """Give linear layers of a model just built our product where torch's library has none.

    Layers that are quantised, or whose columns our product does not take, keep their method.
    """
    settings = Settings.from_environment()
    count, reasons = 0, set()
    for module in model.modules():
        if not isinstance(module, LinearBase):
            continue
        if type(module.quant_method) is not UnquantizedLinearMethod:
            continue
        weight = module.get_parameter("weight")
        choice = choose_products(weight.device.type, weight.dtype, settings=settings)
        if choice.own and takes(weight):
            module.quant_method = OwnProduct()
            count += 1
            reasons.add(choice.describe())
    if count:
        logger.info("m3-plugin: %d linear layers on %s", count, "; ".join(sorted(reasons)))
