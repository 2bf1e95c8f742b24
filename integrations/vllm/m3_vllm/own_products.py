"""vLLM's linear layers with plain weights of 16 bits on a CPU, multiplied by our product.

vLLM falls back to torch's own loop where oneDNN has no products of 16 bits for the processor. Its
experts have a kernel of their own there, which keeps pace with fp32, and stay on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

import m3_vllm.stored_layers  # noqa: F401 - registers the op
from m3_plugin.model.products import choose_products, takes
from m3_plugin.settings import Settings
from m3_vllm.compat import device_type

logger = init_logger("vllm.m3_plugin.products")


class OwnProduct(UnquantizedLinearMethod):
    """vLLM's method for plain weights, which stay as they were loaded; the product is ours."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is packed."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., columns] to [..., rows]."""
        return _multiply(layer, x, bias)


class OwnHeadProduct(UnquantizedEmbeddingMethod):
    """The same of an output head."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is packed."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., columns] to [..., rows]."""
        return _multiply(layer, x, bias)


def _multiply(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """As one node of a compiled graph."""
    rows, weight = x.reshape(-1, x.shape[-1]), layer.get_parameter("weight")
    out = torch.ops.vllm.m3_stored_linear(rows, weight, None, None, None, "plain", 0)
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def use_own_products(model: nn.Module) -> None:
    """Give layers of a model just built our product where vLLM's library has none.

    Layers that are quantised, or whose columns our product does not take, keep their method.
    """
    settings = Settings.from_environment()
    count, reasons = 0, set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        linear = isinstance(module, LinearBase) and type(method) is UnquantizedLinearMethod
        head = isinstance(module, ParallelLMHead) and type(method) is UnquantizedEmbeddingMethod
        if not (linear or head):
            continue
        weight = module.get_parameter("weight")
        choice = choose_products(device_type(), weight.dtype, settings=settings)
        if choice.own and takes(weight):
            own: Any = OwnProduct() if linear else OwnHeadProduct()
            module.quant_method = own
            count += 1
            reasons.add(choice.describe())
    if count:
        logger.info("m3-plugin: %d linear layers on %s", count, "; ".join(sorted(reasons)))
