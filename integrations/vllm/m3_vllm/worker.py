"""Questions to the workers of a running vLLM: pass the class as `--worker-extension-cls`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm.model_executor.layers.attention import Attention

from m3_plugin.attention.session import MSASession, MSAStatistics
from m3_vllm.caches import M3IndexCache


class M3WorkerExtension:
    """Methods vLLM mixes into its worker; called with `collective_rpc`, they answer per worker."""

    model_runner: Any

    def m3_model_class(self) -> str:
        """Qualified name of the class that serves the model."""
        model = type(self.model_runner.get_model())
        return f"{model.__module__}.{model.__qualname__}"

    def m3_index_dtype(self) -> str:
        """How the pages of this worker hold index keys, e.g. "torch.int8"."""
        layers = self.model_runner.get_model().modules()
        cache = next(layer for layer in layers if isinstance(layer, M3IndexCache))
        return str(cache.kv_cache.dtype)

    def m3_dense_rows(self) -> dict[str, int | None]:
        """Rows that each dense layer has served, a draft model's too; None of one on vLLM's kernel.

        Names are vLLM's names of attention layers.
        """
        layers = self.model_runner.compilation_config.static_forward_context
        served = {
            name: getattr(layer.impl, "dense", None)
            for name, layer in layers.items()
            if isinstance(layer, Attention)
        }
        return {name: None if dense is None else dense.rows for name, dense in served.items()}

    def m3_record_statistics(self, enabled: bool) -> None:
        """Count blocks read by the MSA layers from zero on, or stop counting."""
        self._m3_session().statistics = MSAStatistics() if enabled else None

    def m3_statistics(self) -> dict[str, int]:
        """The counters of `MSAStatistics` since recording was switched on."""
        statistics = self._m3_session().statistics
        if statistics is None:
            raise RuntimeError("m3_record_statistics(True) must be called first")
        return asdict(statistics)

    def _m3_session(self) -> MSASession:
        model = self.model_runner.get_model()
        session = getattr(model, "language_model", model).model.session
        if session is None:
            raise RuntimeError("this model has no MSA layers")
        return session
