"""A worker that shows what was drafted, and can overwrite with NaN what no step may read again."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from m3_vllm.caches import M3SparseCacheLayer
from m3_vllm.worker import M3WorkerExtension


class SpeculationWorkerExtension(M3WorkerExtension):
    """Questions about drafts, and what a careless host could do to rejected ones."""

    def record_drafts(self) -> None:
        """Keep what is drafted from now on."""
        drafter = self.model_runner.drafter
        plain = type(drafter).propose
        self.recorded: list[list[list[int]]] = []

        def propose(*args: Any, **kwargs: Any) -> Any:
            drafts = plain(drafter, *args, **kwargs)
            self.recorded.append(drafts.tolist())
            return drafts

        drafter.propose = propose

    def recorded_drafts(self) -> list[list[list[int]]]:
        """Per step: the drafts of each request."""
        return self.recorded

    def record_rows(self, enabled: bool) -> None:
        """Keep how many rows each request has in every step from now on, or stop."""
        runner = self.model_runner
        if enabled:
            plain = runner.execute_model
            self.rows: list[list[int]] = []

            def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                self.rows.append(list(scheduler_output.num_scheduled_tokens.values()))
                return plain(scheduler_output, *args, **kwargs)

            runner.execute_model = execute_model
        else:
            del runner.execute_model

    def recorded_rows(self) -> list[list[int]]:
        """Per step with requests: the rows of each."""
        return [rows for rows in self.rows if rows]

    def poison_uncommitted(self, enabled: bool, reach: int = 0) -> None:
        """Before each step, NaN into every slot at or past a request's committed tokens.

        Those hold the K, V and index keys of rejected drafts, of the target's layers and of the
        draft model's. They are also where the step itself stores. `reach` poisons that many
        committed tokens too, which must show.
        """
        runner = self.model_runner
        if enabled:
            plain = runner.execute_model

            def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                self._poison(scheduler_output, reach)
                return plain(scheduler_output, *args, **kwargs)

            self.poisoned_slots = 0
            runner.execute_model = execute_model
        else:
            del runner.execute_model

    def poisoned(self) -> int:
        """Slots overwritten so far, counted per layer."""
        return self.poisoned_slots

    def _poison(self, scheduler_output: Any, reach: int) -> None:
        requests = scheduler_output.scheduled_cached_reqs
        layers = self.model_runner.compilation_config.static_forward_context.values()
        sparse = [layer for layer in layers if isinstance(layer, M3SparseCacheLayer)]
        dense = [x for x in layers if isinstance(x, Attention) and x.impl.dense is not None]
        for name, committed in zip(requests.req_ids, requests.num_computed_tokens, strict=True):
            pages = self.model_runner.requests[name].block_ids[0]
            first = committed - reach
            for index in range(first // 128, len(pages)):
                start = max(0, first - index * 128)
                for layer in dense:
                    layer.kv_cache[pages[index], :, start:] = torch.nan
                for layer in sparse:
                    caches = layer.paged_caches()
                    page = pages[index]
                    caches.k_pages[page, :, start:] = torch.nan
                    caches.v_pages[page, :, start:] = torch.nan
                    caches.index_k_pages[page, start:] = torch.nan
                    self.poisoned_slots += 128 - start
