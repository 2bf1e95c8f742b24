"""A plugin of SGLang for tests: before each speculating step, NaN over what no step may read again.

`install` writes the metadata of a distribution, by which SGLang's own loader finds `register` in
every process of an engine. What is poisoned is said through a file, since the engine's processes
share nothing else with the test.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VARIABLE = "M3_TEST_POISON"
STEP = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation"


@dataclass(frozen=True)
class Poison:
    """The test's hand on an engine with this plugin: what to poison, and how much has been."""

    folder: Path

    def environment(self) -> dict[str, str]:
        """Variables of the engine's processes."""
        return {"PYTHONPATH": str(self.folder), VARIABLE: str(self.folder)}

    def start(self, *, reach: int = 0) -> None:
        """Poison from the next step on; `reach` committed tokens too, which must show."""
        (self.folder / "slots").write_text("0")
        (self.folder / "reach").write_text(str(reach))

    def stop(self) -> int:
        """Poison no more; returns the number of slots overwritten, counted per cache."""
        (self.folder / "reach").unlink()
        return int((self.folder / "slots").read_text())


def install(folder: Path) -> Poison:
    """Make this module a plugin of engines started with `Poison.environment`."""
    info = folder / "m3_test_poison-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: m3-test-poison\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\nm3_test_poison = {__name__}:register\n"
    )
    return Poison(folder)


def register() -> None:
    """Entry point: hook the step of SGLang's draft worker."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(STEP, poisoned_step, HookType.AROUND)


def poisoned_step(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: a step of drafting, verifying and extending, or one of prompts."""
    folder = Path(os.environ[VARIABLE])
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
