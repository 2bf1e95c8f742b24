"""Scales of whole NVFP4 weights: refused where they mean nothing, or more than a kernel can say."""

from __future__ import annotations

import math

from torch import Tensor

from m3_plugin.quantization.dialects import Quantization
from m3_plugin.quantization.formats import Nvfp4


class GlobalScales:
    """Looks at the scale of every NVFP4 weight while a checkpoint is loaded.

    Parameters
    ----------
    quantization : of the checkpoint, None for plain weights
    fused : w1 and w3 of an expert go to one kernel, which takes one scale for both
    """

    def __init__(self, quantization: Quantization | None, *, fused: bool) -> None:
        self.quantization = quantization
        # other exporters' scales multiply; hosts have their own way with those that differ
        self.fused = fused and quantization is not None and quantization.has_own_experts
        self.seen: dict[str, float] = {}

    def see(self, name: str, tensor: Tensor) -> None:
        """Look at a tensor on its way; `name` is relative to the text model.

        Raises
        ------
        ValueError : no finite positive number; w1 and w3 differ where they must not.
        """
        module, _, suffix = name.rpartition(".")
        if self.quantization is None or "scale" not in suffix or tensor.numel() != 1:
            return
        weight = self.quantization.format_of(module)
        if not isinstance(weight, Nvfp4) or suffix != weight.global_scale:
            return
        value = float(tensor)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"tensor {name} must be a finite positive number; got {value}: without it {module} "
                "means nothing; download the checkpoint again"
            )
        parent, _, matrix = module.rpartition(".")
        if not self.fused or matrix not in ("w1", "w3"):
            return
        other = self.seen.setdefault(parent, value)
        if other != value:
            raise ValueError(
                f"tensor {name} must equal that of the other of w1 and w3, {other}; got {value}: "
                "one kernel makes the products of both and takes one scale; set "
                "M3_PLUGIN_DEQUANTIZE=1 if memory suffices"
            )
