"""A plugin of vLLM for tests: one page of each long request is another one."""

from __future__ import annotations

from typing import Any

from tests.integrations.faults import spoil_page


def register() -> None:
    """Entry point: spoil what vLLM tells attention."""
    from m3_vllm import backend

    original = backend.msa_batch

    def spoiled(common: Any) -> Any:
        batch = original(common)
        spoil_page(batch.page_table, batch.seq_lens)
        return batch

    backend.msa_batch = spoiled
