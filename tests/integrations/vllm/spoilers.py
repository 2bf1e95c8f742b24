"""Plugins of vLLM for tests, which spoil what checked steps must find."""

from __future__ import annotations

from typing import Any

from tests.integrations.faults import spoil_page, spoil_results


def page() -> None:
    """Entry point: one page of each long request is another one in what vLLM tells attention."""
    from m3_vllm import backend

    original = backend.msa_batch

    def spoiled(common: Any) -> Any:
        batch = original(common)
        spoil_page(batch.page_table, batch.seq_lens)
        return batch

    backend.msa_batch = spoiled


def result() -> None:
    """Entry point: the last layer gives NaN."""
    from m3_vllm.model import M3DecoderLayer

    spoil_results(M3DecoderLayer)
