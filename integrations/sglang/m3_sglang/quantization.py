"""MXFP8 checkpoints in SGLang below SM100: weight-only, through SGLang's own quantisation classes.

SGLang multiplies MXFP8 weights with quantised activations, which tensor cores do from SM100 on, and
refuses the format below. Here the weights stay as they are on disk and are decoded within the
product (`m3_kernels.mxfp8_linear`): half the memory of BF16, on any chip. `registration` decides
which checkpoints are served so; the class takes over M3 and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE, FusedMoeWeightScaleSupported
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import (
    swiglu_no_interleaved_with_alpha_and_limit,
)
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.utils import set_weight_attrs
from torch import Tensor, nn

from m3_kernels.mxfp8_linear import compile_mxfp8_linear, mxfp8_linear
from m3_plugin.checkpoint.stored_layers import format_of_layer
from m3_plugin.quantization.chips import WEIGHT_ONLY_MXFP8
from m3_plugin.quantization.formats import MX_GROUP, Mxfp8
from m3_sglang.checkpoint_config import CheckpointConfig
from m3_sglang.ours import MXFP8_METHOD
from m3_sglang.own_experts import weight_only_experts
from m3_sglang.weights import FUSED

SCALE = Mxfp8().scale


class M3Mxfp8Config(CheckpointConfig):
    """A checkpoint whose linear weights are MXFP8, its experts perhaps NVFP4."""

    name = MXFP8_METHOD
    min_capability = WEIGHT_ONLY_MXFP8

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, FusedMoE):
            if self.quantization.has_own_experts:
                return weight_only_experts(self, layer)
            return Mxfp8ExpertsMethod() if self._is_mxfp8(f"{prefix}.0.w1") else None
        if isinstance(layer, LinearBase):
            return Mxfp8LinearMethod() if self._is_mxfp8(prefix) else UnquantizedLinearMethod()
        return None

    def _is_mxfp8(self, prefix: str) -> bool:
        """Whether a layer's weight is quantised."""
        return isinstance(format_of_layer(self.quantization, prefix, fused=FUSED), Mxfp8)


class Mxfp8LinearMethod(LinearMethodBase):
    """A linear layer that keeps the checkpoint's bytes: `weight` and `weight_scale_inv`."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.activations = params_dtype
        rows = (sum(output_partition_sizes),)
        weight, scale = _stored(rows, input_size_per_partition)
        for name, parameter in (("weight", weight), (SCALE, scale)):
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0} | extra_weight_attrs)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Kernels are compiled before the port opens."""
        weight, scale = layer.get_parameter("weight"), layer.get_parameter(SCALE)
        compile_mxfp8_linear(weight, scale, dtype=self.activations)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = mxfp8_linear(rows, layer.get_parameter("weight"), layer.get_parameter(SCALE))
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


class Mxfp8ExpertsMethod(FusedMoEMethodBase):
    """Routed experts that keep the checkpoint's bytes; gate rows before up rows in `w13`."""

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.activations = params_dtype
        sizes = {
            "w13": ((num_experts, 2 * intermediate_size_per_partition), hidden_size),
            "w2": ((num_experts, hidden_size), intermediate_size_per_partition),
        }
        block = {"quant_method": FusedMoeWeightScaleSupported.BLOCK.value}
        for name, (rows, columns) in sizes.items():
            weight, scale = _stored(rows, columns)
            set_weight_attrs(weight, extra_weight_attrs)
            set_weight_attrs(scale, extra_weight_attrs | block)
            layer.register_parameter(f"{name}_weight", weight)
            layer.register_parameter(f"{name}_{SCALE}", scale)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Kernels are compiled before the port opens."""
        for name in ("w13", "w2"):
            weight = layer.get_parameter(f"{name}_weight")
            scale = layer.get_parameter(f"{name}_{SCALE}")
            compile_mxfp8_linear(weight, scale, dtype=self.activations)

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """Nothing of SGLang's runs: `apply` is the whole of it."""

    def apply(self, layer: nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """Sort the tokens by expert, three products, and the weighted sum of each token's own.

        Shapes alone decide what is launched, so that a CUDA graph can hold it.
        """
        hidden, chosen = dispatch_output.hidden_states, dispatch_output.topk_output
        tokens, topk = chosen.topk_ids.shape
        w13, w2 = layer.get_parameter("w13_weight"), layer.get_parameter("w2_weight")
        ids = chosen.topk_ids.flatten()
        order = ids.argsort(stable=True)
        experts = torch.arange(len(w13) + 1, dtype=ids.dtype, device=ids.device)
        starts = torch.searchsorted(ids[order], experts).int()
        gate_up = mxfp8_linear(
            hidden[order // topk], w13, layer.get_parameter(f"w13_{SCALE}"), group_starts=starts
        )
        rules: Any = layer.moe_runner_config
        activated = swiglu_no_interleaved_with_alpha_and_limit(
            gate_up, rules.gemm1_alpha, rules.gemm1_clamp_limit
        )
        back = order.argsort()
        # in the tokens' order at once, so that the experts' order takes no memory beside the sum
        down = mxfp8_linear(activated, w2, layer.get_parameter(f"w2_{SCALE}"), group_starts=starts)[
            back
        ]
        parts = down.view(tokens, topk, -1) * chosen.topk_weights[..., None]
        return StandardCombineInput(hidden_states=parts.sum(1).to(hidden.dtype))


def _stored(rows: tuple[int, ...], columns: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Uninitialised values and scales of a weight [..., columns].

    Raises
    ------
    ValueError : a rank's columns are no whole number of groups.
    """
    if columns % MX_GROUP:
        raise ValueError(
            f"mxfp8 weights need columns in multiples of {MX_GROUP} on every rank; got {columns}: "
            "use fewer tensor parallel ranks"
        )
    weight = torch.empty(*rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.empty(*rows, columns // MX_GROUP, dtype=torch.uint8)
    return nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)
