"""Load an M3.1 checkpoint into vLLM's own quantised layers and compare them with its files.

    python -m tests.integrations.vllm.host_layers_m31 STORED REFERENCE REPORT

As `host_layers`, with the bytes of experts and vLLM's own decoders besides.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from m3_plugin.host.torchvision_ops import declare_missing_ops
from tests.integrations.m31_layers import decoded_alike, experts_as_stored
from tests.integrations.vllm.host_layers import build, compare, read


def main(stored: str, reference: str, report: str) -> None:
    declare_missing_ops()
    model, config = build(Path(stored))
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import dequant_mxfp8_to_bf16
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        dequantize_to_dtype,
    )

    def nvfp4(packed: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
        return dequantize_to_dtype(packed, scales, factor, torch.float32, swizzle=False)

    files = read(Path(stored))
    facts = {
        "layers": compare(model, config, read(Path(reference))),
        "experts": experts_as_stored(model, files),
        "decoders": decoded_alike(files, mxfp8=dequant_mxfp8_to_bf16, nvfp4=nvfp4),
    }
    Path(report).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
