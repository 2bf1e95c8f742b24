"""A plugin of vLLM for tests: it spoils what checked steps must find, once a test says so."""

from __future__ import annotations

from typing import Any

from tests.integrations.faults import spoil_page, spoil_results


def register() -> None:
    """Entry point: hooks around what vLLM tells attention, and what our model gives."""
    from m3_vllm import backend

    original = backend.msa_batch

    def spoiled(common: Any) -> Any:
        batch = original(common)
        spoil_page(batch.page_table, batch.seq_lens)
        return batch

    backend.msa_batch = spoiled
    spoil_results()
