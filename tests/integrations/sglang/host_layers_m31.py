"""Load an M3.1 checkpoint by SGLang's own loader, without an engine, and compare with its files.

    python -m tests.integrations.sglang.host_layers_m31 STORED REPORT

As `host_layers`, with the bytes of experts and SGLang's own decoders besides. What needs a GPU is
left out: SGLang's packing for Marlin and the proof of the experts. Nothing is computed with the
layers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.integrations.m31_layers import decoded_alike, experts_as_stored
from tests.integrations.sglang.host_layers import build, compare


def without_a_gpu() -> None:
    """Let SGLang's scheme for the experts be built although no kernel of it runs here."""
    from sglang.srt.layers.quantization.minimax_m3_nvfp4 import MiniMaxM3Nvfp4MoE

    from m3_sglang import moe, registration

    host: Any = MiniMaxM3Nvfp4MoE
    host.create_moe_runner = lambda self, layer, config: None
    host.process_weights_after_loading = lambda self, layer: None
    plugin: Any = registration
    plugin.is_stored = lambda quantization, device: False
    proof: Any = moe.ExpertProof
    proof.run = lambda self: None


def main(stored: str, report: str) -> None:
    without_a_gpu()
    model = build(Path(stored))
    files: dict[str, Tensor] = {}
    for file in Path(stored).glob("*.safetensors"):
        files |= load_file(file)
    from sglang.srt.layers.quantization.dequantization import dequantize_nvfp4
    from sglang.srt.layers.quantization.mxfp8_block_convert import dequant_mxfp8_2d_to_bf16

    def nvfp4(packed: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
        return dequantize_nvfp4(packed, scales, factor, torch.float32)

    facts = {
        "layers": compare(model, files),
        "experts": experts_as_stored(model, files),
        "decoders": decoded_alike(files, mxfp8=dequant_mxfp8_2d_to_bf16, nvfp4=nvfp4),
    }
    Path(report).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
