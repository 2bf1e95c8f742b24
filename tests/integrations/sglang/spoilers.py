"""Plugins of SGLang for tests, which spoil what checked steps must find."""

from __future__ import annotations

from typing import Any

from tests.integrations.faults import spoil_page, spoil_results


def page() -> None:
    """Entry point: one page of each long request is another one in what SGLang tells attention."""
    from m3_sglang import backend

    original = backend.msa_batch

    def spoiled(forward_batch: Any, **options: Any) -> Any:
        batch = original(forward_batch, **options)
        spoil_page(batch.page_table, batch.seq_lens)
        return batch

    backend.msa_batch = spoiled


def result() -> None:
    """Entry point: the last layer gives NaN."""
    from m3_sglang.model import M3DecoderLayer

    spoil_results(M3DecoderLayer)
