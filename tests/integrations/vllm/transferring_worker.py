"""What a transfer test does to the caches of a worker: vLLM mixes it in."""

from __future__ import annotations

import torch

from m3_vllm.caches import M3IndexCache
from m3_vllm.worker import M3WorkerExtension


class TransferringWorker(M3WorkerExtension):
    def forget_index_keys(self) -> int:
        """Zero every index cache; how many there are."""
        layers = self.model_runner.get_model().modules()
        caches = [layer for layer in layers if isinstance(layer, M3IndexCache)]
        with torch.inference_mode():
            for cache in caches:
                cache.kv_cache.zero_()
        return len(caches)
