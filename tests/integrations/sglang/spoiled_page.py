"""A plugin of SGLang for tests: one page of each long request is another one."""

from __future__ import annotations

from typing import Any

from tests.integrations.faults import spoil_page


def register() -> None:
    """Entry point: spoil what SGLang tells attention."""
    from m3_sglang import backend

    original = backend.msa_batch

    def spoiled(forward_batch: Any, **options: Any) -> Any:
        batch = original(forward_batch, **options)
        spoil_page(batch.page_table, batch.seq_lens)
        return batch

    backend.msa_batch = spoiled
