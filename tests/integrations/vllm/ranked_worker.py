"""What a test of ranks asks a worker: vLLM imports it before it loads weights, and mixes it in."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader import ep_weight_filter, weight_utils

from m3_vllm.worker import M3WorkerExtension

# tensors that vLLM's filter has left in the files, by name
LEFT: set[str] = set()


def _noting(name: str, local: set[int] | None) -> bool:
    """vLLM's own question, and a note of the answer."""
    skipped = ep_weight_filter.should_skip_weight(name, local)
    if skipped:
        LEFT.add(name)
    return skipped


host: Any = weight_utils
host.should_skip_weight = _noting


class RankedWorker(M3WorkerExtension):
    def experts_here(self) -> list[tuple[str, int, int]]:
        """Of each layer with experts: who multiplies them, how many are here, and in all."""
        layers: list[Any] = [
            layer
            for layer in self.model_runner.get_model().modules()
            if isinstance(layer, RoutedExperts)
        ]
        return [
            (type(each.quant_method).__name__, each.local_num_experts, each.global_num_experts)
            for each in layers
        ]

    def left_in_files(self) -> list[str]:
        """Names of the tensors that this rank did not read."""
        return sorted(LEFT)
