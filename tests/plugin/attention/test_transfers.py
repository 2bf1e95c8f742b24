"""Rows that came from another server are those that were stored, or are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m3_kernels.paged import MSACaches
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.transfers import TransferError, TransferVerifier

PAGE, PAGES, HEADS, DIM = 128, 12, 2, 16
LENGTH = 300
SENT, RECEIVED = [3, 1, 7], [5, 6, 2]


def pool(seed: int, dtype: torch.dtype) -> MSACaches:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(PAGES, HEADS, PAGE, DIM, generator=generator).to(dtype) for _ in range(2))
    return MSACaches(k, v, torch.randn(PAGES, PAGE, DIM, generator=generator).bfloat16())


def step(pages: list[int], *, rows: int, length: int) -> Any:
    """The last `rows` of a request of `length` tokens."""
    table = torch.tensor([pages])
    position = torch.arange(length - rows, length)
    slots = table[0, position // PAGE] * PAGE + position % PAGE
    batch = MSABatch(
        cu_seqlens_q=torch.tensor([0, rows], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        page_table=table.int(),
        # padding behind it, as hosts have it
        slot_mapping=torch.cat((slots, torch.tensor([-1]))),
        max_query_len=rows,
        max_seq_len=length,
    )
    return SimpleNamespace(batch=batch)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def moved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[MSACaches, Path]:
    """Pages of another server with a prompt, stored in two chunks, moved whole."""
    theirs, ours = pool(0, request.param), pool(1, request.param)
    sender = TransferVerifier(tmp_path)
    sender.look(step(SENT, rows=140, length=140), caches=theirs)
    sender.look(step(SENT, rows=LENGTH - 140, length=LENGTH), caches=theirs)
    for source, target in zip(SENT, RECEIVED, strict=True):
        for mine, other in (
            (ours.k_pages, theirs.k_pages),
            (ours.v_pages, theirs.v_pages),
            (ours.index_k_pages, theirs.index_k_pages),
        ):
            mine[target] = other[source]
    return ours, tmp_path


def decode(caches: MSACaches, folder: Path, pages: list[int] = RECEIVED) -> None:
    TransferVerifier(folder).look(step(pages, rows=1, length=LENGTH + 1), caches=caches)


def test_rows_of_other_heads_are_not_taken_for_ones_own(moved: tuple[MSACaches, Path]) -> None:
    """A store that keeps one file for all ranks gives a rank the rows of another."""
    caches, folder = moved
    verifier = TransferVerifier(folder, first_head=2)
    with pytest.raises(TransferError, match="no server that writes into this folder stored such"):
        verifier.look(step(RECEIVED, rows=1, length=LENGTH + 1), caches=caches)


def test_what_arrives_whole_is_read(moved: tuple[MSACaches, Path]) -> None:
    decode(*moved)
    # the last page is not full
    assert len(list(moved[1].glob("stored-*.rows"))) == 2


INDEX, OTHER = "the index key is not the one", "no server that writes into this folder"


def drop_index(caches: MSACaches) -> None:
    caches.index_k_pages[RECEIVED[2], 7] = 0


def shift_index(caches: MSACaches) -> None:
    caches.index_k_pages[RECEIVED[:2]] = caches.index_k_pages[RECEIVED[1::-1]]


def other_keys(caches: MSACaches) -> None:
    caches.k_pages[RECEIVED[0], 1, 3] = caches.k_pages[RECEIVED[0], 1, 4]


def other_values(caches: MSACaches) -> None:
    caches.v_pages[RECEIVED[0], 1, 3] = caches.v_pages[RECEIVED[0], 1, 4]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drop_index, f"position {2 * PAGE + 7} and 0 more of {LENGTH}: {INDEX}"),
        (shift_index, f"position 0 and {2 * PAGE - 1} more of {LENGTH}: {INDEX}"),
        (other_keys, f"position 3 and 0 more of {LENGTH}: {OTHER}"),
        (other_values, f"position 3 and 0 more of {LENGTH}: {OTHER}"),
    ],
)
def test_what_is_dropped_or_shifted_is_named(
    moved: tuple[MSACaches, Path], spoil: Callable[[MSACaches], None], said: str
) -> None:
    caches, folder = moved
    spoil(caches)
    with pytest.raises(TransferError, match=f"M3_PLUGIN_VERIFY_TRANSFER: request 0.*{said}"):
        decode(caches, folder)


def test_whole_pages_at_another_place_are_named(moved: tuple[MSACaches, Path]) -> None:
    with pytest.raises(TransferError, match=f"position 0 and {2 * PAGE - 1} more.*{OTHER}"):
        decode(*moved, pages=[RECEIVED[1], RECEIVED[0], RECEIVED[2]])


def test_rows_from_before_the_folder_are_unknown(
    moved: tuple[MSACaches, Path], tmp_path: Path
) -> None:
    with pytest.raises(TransferError, match=OTHER):
        decode(moved[0], tmp_path / "new")


def test_a_rehearsal_is_passed_over(tmp_path: Path) -> None:
    given = step(RECEIVED, rows=1, length=LENGTH)
    given.batch.slot_mapping.fill_(-1)
    TransferVerifier(tmp_path).look(given, caches=pool(0, torch.float32))
    assert not list(tmp_path.iterdir())
