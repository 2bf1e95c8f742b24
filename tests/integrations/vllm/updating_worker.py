"""What a trainer's worker extension does with the weights of a worker: vLLM mixes it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from m3_vllm.worker import M3WorkerExtension


def read(folder: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in an order that no layer's are in."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return dict(sorted(tensors.items(), key=lambda item: item[0][::-1]))


class UpdatingWorker(M3WorkerExtension):
    vllm_config: Any

    def load_directly(self, folder: str, names: list[str] | None = None) -> int:
        """`model.load_weights` of some tensors of a folder, or of all, in one bucket."""
        tensors = read(folder)
        bucket = [(name, tensors[name]) for name in (names or tensors)]
        self._model().load_weights(bucket)
        return len(bucket)

    def load_misshapen(self, folder: str, name: str) -> None:
        """One good tensor and one whose last row is missing, in one bucket."""
        tensors = read(folder)
        good = next(other for other in tensors if other != name)
        self._model().load_weights([(good, tensors[good] * 2), (name, tensors[name][:-1])])

    def update_in_buckets(self, folder: str, size: int, without: str = "") -> None:
        """A session of vLLM's weight-transfer engines: open, buckets, close.

        A sender's buffer is written again after each bucket.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model = self._model()
        items = [(name, t) for name, t in read(folder).items() if name != without]
        with set_current_vllm_config(self.vllm_config), torch.inference_mode():
            initialize_layerwise_reload(model)
            for start in range(0, len(items), size):
                bucket = [(name, tensor.clone()) for name, tensor in items[start : start + size]]
                model.load_weights(bucket)
                for _, tensor in bucket:
                    tensor.fill_(7)
            finalize_layerwise_reload(model, self.vllm_config.model_config)

    def _model(self) -> Any:
        return self.model_runner.get_model()
