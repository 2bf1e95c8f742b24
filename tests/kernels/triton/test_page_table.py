"""The page table: the kernel against plain torch, and that it reads no more than lengths need."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m3_kernels.page_table import fill_page_table

PAGE, CONTEXT, BLOCKS = 16, 16 * 300 - 5, 300
LENGTHS = [1, 16, 17, CONTEXT, 0, 256 * 16, 256 * 16 + 1]


def step(rows_dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    """Pages in random order; behind each length slots that are none."""
    random = torch.Generator().manual_seed(0)
    requests = len(LENGTHS) + 3
    pages = torch.randperm(requests * BLOCKS, generator=random).view(requests, BLOCKS)
    slots = (pages[..., None] * PAGE + torch.arange(PAGE)).flatten(1)[:, :CONTEXT]
    rows = torch.randperm(requests, generator=random)[: len(LENGTHS)]
    for row, length in zip(rows, LENGTHS, strict=True):
        slots[row, -(-length // PAGE) * PAGE :] = -1
    return {
        "slots": slots.to(torch.int32),
        "rows": rows.to(rows_dtype),
        "seq_lens": torch.tensor(LENGTHS, dtype=torch.int32),
        "page_size": PAGE,
    }


@pytest.mark.parametrize("rows_dtype", [torch.int32, torch.int64])
def test_equals_the_reference_and_leaves_what_is_behind_a_length(rows_dtype: torch.dtype) -> None:
    given = step(rows_dtype)
    # rows wider apart than they are long, as views of a larger table
    found, expected = (torch.full((len(LENGTHS), BLOCKS + 7), -7).int() for _ in range(2))
    fill_page_table(found[:, :BLOCKS], **given, backend="triton")
    fill_page_table(expected[:, :BLOCKS], **given, backend="reference")
    assert torch.equal(found, expected)
    for line, length in zip(found, LENGTHS, strict=True):
        written = -(-length // PAGE)
        assert (line[:written] >= 0).all()
        assert (line[written:] == -7).all()


def test_no_program_behind_a_requests_end_reads_a_slot() -> None:
    """A slot table that ends with the lengths suffices, whatever the width of the page table."""
    table = torch.full((2, 100 * BLOCKS), -7, dtype=torch.int32)
    slots = torch.arange(2 * 3 * PAGE, dtype=torch.int32).view(2, -1)
    fill_page_table(
        table,
        slots=slots,
        rows=torch.tensor([1, 0]),
        seq_lens=torch.tensor([3 * PAGE, PAGE + 1], dtype=torch.int32),
        page_size=PAGE,
        backend="triton",
    )
    assert table[0, :4].tolist() == [3, 4, 5, -7]
    assert table[1, :3].tolist() == [0, 1, -7]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slots": torch.zeros(1, 4)}, TypeError, "slots must be torch.int32"),
        ({"rows": torch.zeros(7)}, TypeError, "rows must be torch.int32 or torch.int64"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, ValueError, "seq_lens"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1; got 0"),
        ({"backend": "native"}, ValueError, "backend must be"),
    ],
)
def test_what_is_not_in_the_contract_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    table = torch.zeros(len(LENGTHS), BLOCKS, dtype=torch.int32)
    with pytest.raises(error, match=message):
        fill_page_table(table, **(step() | changes))


def test_a_step_of_no_requests() -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    fill_page_table(
        empty.view(0, 4),
        slots=torch.zeros(1, 4 * PAGE, dtype=torch.int32),
        rows=empty,
        seq_lens=empty,
        page_size=PAGE,
        backend="triton",
    )
