"""A plugin of SGLang for tests: before each speculating step, NaN over what no step may read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.integrations.sglang import extra_plugin

STEP = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation"


@dataclass(frozen=True)
class Poison:
    """The test's hand on an engine with this plugin: what to poison, and how much has been."""

    folder: Path

    def install(self) -> dict[str, str]:
        """Make this module a plugin; returns the variables of engines that are to load it."""
        return extra_plugin.install(self.folder, module=__name__)

    def start(self, *, reach: int = 0) -> None:
        """Poison from the next step on; `reach` committed tokens too, which must show."""
        (self.folder / "slots").write_text("0")
        (self.folder / "reach").write_text(str(reach))

    def stop(self) -> int:
        """Poison no more; returns the number of slots overwritten, counted per cache."""
        (self.folder / "reach").unlink()
        return int((self.folder / "slots").read_text())


def register() -> None:
    """Entry point: hook the step of SGLang's draft worker."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(STEP, poisoned_step, HookType.AROUND)


def poisoned_step(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: a step of drafting, verifying and extending, or one of prompts."""
    folder = extra_plugin.folder()
    if batch.forward_mode.is_decode() and (folder / "reach").exists():
        slots = uncommitted_slots(batch, reach=int((folder / "reach").read_text()))
        runners = (worker.target_worker.model_runner, worker.draft_worker.draft_runner)
        caches = [cache for runner in runners for cache in slot_caches(runner.token_to_kv_pool)]
        for cache in caches:
            cache[slots] = torch.nan
        counted = int((folder / "slots").read_text()) + len(slots) * len(caches)
        (folder / "slots").write_text(str(counted))
    return original(worker, batch, *args, **kwargs)


def uncommitted_slots(batch: Any, *, reach: int) -> torch.Tensor:
    """Slots the requests own at or past their committed tokens; `reach` tokens before those too.

    They hold what earlier steps drafted and rejected. They are also where the step itself stores.
    """
    table = batch.req_to_token_pool.req_to_token
    return torch.cat(
        [
            table[req.kv.req_pool_idx, max(0, committed - reach) : req.kv.kv_allocated_len].long()
            for req, committed in zip(batch.reqs, batch.seq_lens.tolist(), strict=True)
        ]
    )


def slot_caches(pool: Any) -> list[torch.Tensor]:
    """K, V and index keys of each layer of a runner's pool: [slots, heads, dim]."""
    sparse = list(pool.sparse_layer_id_mapping)
    layers = sorted({*sparse, *pool._dense_layer_ids})
    return [
        *(pool.get_key_buffer(layer) for layer in layers),
        *(pool.get_value_buffer(layer) for layer in layers),
        *(pool.get_index_k_buffer(layer) for layer in sparse),
    ]
