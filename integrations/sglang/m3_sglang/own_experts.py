"""NVFP4 experts of MiniMax-M3.1 in SGLang below SM100: weight-only, through SGLang's own scheme.

SGLang's scheme for such experts multiplies on Marlin where the chip has no FP4; here it does so on
every chip this plugin serves them on. The names of the class are those of SGLang 0.5.23.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from torch import nn

from m3_sglang.compat import serves_own_experts, sglang_version


def weight_only_experts(config: Any, layer: nn.Module) -> FusedMoEMethodBase:
    """SGLang's method for the routed experts of a layer; its scheme is put into the layer.

    Parameters
    ----------
    config : ours of the checkpoint, as SGLang's method keeps it
    layer : SGLang's `FusedMoE`

    Raises
    ------
    ValueError : an SGLang without the scheme.
    """
    if not serves_own_experts():
        raise ValueError(
            f"m3-plugin: NVFP4 experts beside MXFP8 need SGLang 0.5.23; got {sglang_version()}. "
            "Install it, or set M3_PLUGIN_DEQUANTIZE=1 if memory suffices"
        )
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsFusedMoEMethod,
    )
    from sglang.srt.layers.quantization.minimax_m3_nvfp4 import MiniMaxM3Nvfp4MoE

    class WeightOnly(MiniMaxM3Nvfp4MoE):
        """SGLang's scheme, on Marlin whatever the chip could do."""

        def __init__(self) -> None:
            self.group_size = 16
            self.use_marlin = True
            self.use_flashinfer_trtllm = False
            self.use_mega_moe_prefill = False

    experts: Any = layer
    experts.scheme = WeightOnly()
    return CompressedTensorsFusedMoEMethod(config)
