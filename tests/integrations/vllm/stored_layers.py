"""Load a quantised checkpoint into our layers on a CPU and compare them with the reference.

    python -m tests.integrations.vllm.stored_layers STORED REFERENCE REPORT

A process of its own, because it sets up vLLM's distributed state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3_kernels.quantised_linear.decoding import decode
from m3_plugin.checkpoint.names import TEXT_PREFIX, VISION_PREFIXES
from m3_plugin.host.torchvision_ops import declare_missing_ops
from m3_plugin.model.config import M3Config
from tests.integrations.vllm.host_layers import build, read


def differences(model: nn.Module, config: M3Config, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Per layer of ours: the kind of its weight, and its largest difference to the reference."""
    from m3_vllm.stored_layers import StoredExpertsMethod, StoredLinearMethod
    from m3_vllm.weights import fused_projections

    plain = {
        name.removeprefix(TEXT_PREFIX).removesuffix(".weight"): tensor
        for name, tensor in reference.items()
        if not name.startswith(VISION_PREFIXES)
    }
    order: dict[str, list[str]] = {}
    for part, (layer, _) in fused_projections(config).items():
        order.setdefault(layer, []).append(part)
    report: dict[str, Any] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, StoredLinearMethod):
            parent, _, own = name.rpartition(".")
            candidates = [f"{parent}.{part}" for part in order.get(own, [own])]
            expected = torch.cat([plain[part] for part in candidates if part in plain])
            matrix = method.weight.of(module)
            difference = float((decode(matrix) - expected).abs().max())
            report[name] = {"kind": matrix.kind, "difference": difference}
        if isinstance(method, StoredExpertsMethod):
            layer = name.partition(".experts")[0] + ".experts"
            w13, w2 = method.experts.w13.of(module), method.experts.w2.of(module)
            worst = 0.0
            for expert in range(config.num_experts):
                names = [f"{layer}.{expert}.{part}" for part in ("w1", "w3", "w2")]
                gate_up = torch.cat([plain[names[0]], plain[names[1]]])
                for matrix, expected in ((w13, gate_up), (w2, plain[names[2]])):
                    found = decode(matrix.part(expert, slice(None)))
                    worst = max(worst, float((found - expected).abs().max()))
            report[layer] = {"kind": w13.kind, "difference": worst}
    return report


def main(stored: str, reference: str, report: str) -> None:
    declare_missing_ops()
    model, config = build(Path(stored), own=True)
    files = read(Path(stored))
    text = [tensor for name, tensor in files.items() if not name.startswith(VISION_PREFIXES)]
    found = {
        "layers": differences(model, config, read(Path(reference))),
        "bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "files": sum(tensor.nbytes for tensor in text),
    }
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
