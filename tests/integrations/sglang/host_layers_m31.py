"""Load an M3.1 checkpoint by SGLang's own loader, without an engine, and compare with its files.

    python -m tests.integrations.sglang.host_layers_m31 STORED REPORT

As `host_layers`; what needs a GPU is left out: SGLang's packing for Marlin and the proof of the
experts. Nothing is computed with the layers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from m3_plugin.checkpoint.names import TEXT_PREFIX
from tests.integrations.sglang.host_layers import build, compare

SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


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


def experts(model: nn.Module, files: dict[str, Tensor]) -> dict[str, bool]:
    """Per layer and part of its experts: whether SGLang holds the files' bytes."""
    report = {}
    for name, module in model.named_modules():
        own = {n: p.data for n, p in module.named_parameters(recurse=False)}
        for prefix, matrices in (("w13", ("w1", "w3")), ("w2", ("w2",))):
            for suffix in SUFFIXES:
                if f"{prefix}_{suffix}" not in own:
                    continue
                stored = [
                    torch.cat([files[f"{TEXT_PREFIX}{name}.{e}.{m}.{suffix}"] for m in matrices])
                    for e in range(len(own["w2_weight_packed"]))
                ]
                held = own[f"{prefix}_{suffix}"].reshape(len(stored), *stored[0].shape)
                report[f"{name}.{prefix}_{suffix}"] = torch.equal(
                    held.view(torch.uint8), torch.stack(stored).view(torch.uint8)
                )
    return report


def main(stored: str, report: str) -> None:
    without_a_gpu()
    model = build(Path(stored))
    files: dict[str, Tensor] = {}
    for file in Path(stored).glob("*.safetensors"):
        files |= load_file(file)
    facts = {"layers": compare(model, files), "experts": experts(model, files)}
    Path(report).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
