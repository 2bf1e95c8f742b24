"""Compares rows of caches that came from elsewhere with those that were stored, while it is served.

Connectors, offloaders and disaggregated servers move pages of K, V and index keys. One that forgets
the index keys, or puts them beside other keys, leaves answers that only look worse. Under
`M3_PLUGIN_VERIFY_TRANSFER`, which names a folder that all servers share, each of them writes down
what it stores, and looks up what it is about to read: a row of K and V at a position must be one
that was stored, with the index key that was stored beside it. Ranks that hold different heads write
down different rows: what one of them stored is no other's.

Every step reads the whole context of its requests, so a server is much slower; steps that a CUDA
graph replays are not seen: serve eagerly. Rows stored before the first server with this variable
began are unknown, and refused.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
from torch import Tensor

from m3_plugin.attention.checks import Rows

if TYPE_CHECKING:
    from m3_kernels.paged import MSACaches
    from m3_plugin.attention.session import MSAPlan

logger = logging.getLogger(__name__)

VARIABLE = "M3_PLUGIN_VERIFY_TRANSFER"
FILE_PATTERN = "stored-*.rows"
# Numbers of one row in a file: of its K and V, and of these with its index key.
_PER_ROW = 2
_MIX = 0x2545F4914F6CDD1D
_HEAD = 0x5DEECE66D


class TransferError(RuntimeError):
    """Rows of a cache are not those that were stored; the message says which part of them."""


class TransferVerifier:
    """Writes down the rows that one worker stores, and knows those of all others.

    Parameters
    ----------
    folder : created, for this user alone, if it is not there; workers share it
    first_head : of the KV heads that this worker holds
    """

    def __init__(self, folder: Path, *, first_head: int = 0) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.first_head = first_head
        self._own: IO[bytes] | None = None
        # bytes read so far of each worker's file
        self._read: dict[Path, int] = {}
        self._known = torch.empty(0, _PER_ROW, dtype=torch.int64)

    def look(self, plan: MSAPlan, *, caches: MSACaches) -> None:
        """A layer has stored and is about to read: note the first, look the second up.

        Raises
        ------
        TransferError : a row before the step's is not one that was stored.
        """
        batch = plan.batch
        if _is_captured(caches.k_pages) or bool((batch.slot_mapping < 0).all()):
            # a graph's values mean nothing, and a rehearsal's pages belong to nobody
            return
        page_size = caches.k_pages.shape[2]
        rows = Rows.of(batch)
        slots = batch.slot_mapping.cpu().long()[: len(rows.position)]
        stored = slots >= 0
        self._note(self._marks(caches, slots[stored], rows.position[stored]))
        for request, position, slots in _before(plan, rows, page_size=page_size):
            self._require_known(self._marks(caches, slots, position), request, position)

    def _marks(self, caches: MSACaches, slots: Tensor, position: Tensor) -> Tensor:
        """`marks` of this worker's heads."""
        return marks(caches, slots, position) ^ self.first_head * _HEAD

    def _require_known(self, seen: Tensor, request: int, position: Tensor) -> None:
        unknown = ~torch.isin(seen[:, 1], self._known[:, 1])
        if bool(unknown.any()):
            self._read_others()
            unknown = ~torch.isin(seen[:, 1], self._known[:, 1])
        if not bool(unknown.any()):
            return
        first = int(torch.nonzero(unknown)[0])
        if bool(torch.isin(seen[first, 0], self._known[:, 0])):
            what = "the index key is not the one that was stored beside this K and V"
        else:
            what = "no server that writes into this folder stored such K and V there"
        message = (
            f"{VARIABLE}: request {request} of the step, position {int(position[first])} and "
            f"{int(unknown.sum()) - 1} more of {len(position)}: {what}; leave out the connector or "
            "offloader that moved them"
        )
        logger.error("m3-plugin: %s", message)
        raise TransferError(message)

    def _note(self, stored: Tensor) -> None:
        """Before any other server can read what was stored."""
        if self._own is None:
            # opened by the process that runs the layers, not by the one that built the session
            name = FILE_PATTERN.replace("*", f"{os.getpid()}-{secrets.token_hex(4)}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._own = os.fdopen(os.open(self.folder / name, flags, 0o600), "wb")
            self._read[self.folder / name] = -1
        self._own.write(stored.contiguous().numpy().tobytes())
        self._own.flush()
        self._known = torch.cat((self._known, stored)).unique(dim=0)

    def _read_others(self) -> None:
        new = [self._known]
        for file in sorted(self.folder.glob(FILE_PATTERN)):
            start = self._read.get(file, 0)
            if start < 0:
                continue
            with file.open("rb") as stream:
                stream.seek(start)
                content = stream.read()
            # a row that is being written comes next time
            whole = len(content) // (8 * _PER_ROW) * (8 * _PER_ROW)
            self._read[file] = start + whole
            if whole:
                numbers = torch.frombuffer(bytearray(content[:whole]), dtype=torch.int64)
                new.append(numbers.view(-1, _PER_ROW))
        self._known = torch.cat(new).unique(dim=0)


def _before(plan: MSAPlan, rows: Rows, *, page_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Request, positions and slots of all that a step reads and has not stored itself."""
    table = plan.batch.page_table.cpu().long()
    for request in rows.request.unique().tolist():
        count = int(rows.position[rows.request == request].min())
        if count > 0:
            position = torch.arange(count)
            yield (
                request,
                position,
                table[request, position // page_size] * page_size + (position % page_size),
            )


def marks(caches: MSACaches, slots: Tensor, position: Tensor) -> Tensor:
    """int64 [rows, 2]: numbers of each row's K and V, and of these with its index key."""
    page_size = caches.k_pages.shape[2]
    page, offset = (slots // page_size), (slots % page_size)
    device = caches.k_pages.device
    page, offset = page.to(device), offset.to(device)
    keys = caches.k_pages[page, :, offset].flatten(1)
    values = caches.v_pages[page, :, offset].flatten(1)
    index = caches.index_k_pages[page, offset]
    beside = _number(keys, seed=1) ^ (_number(values, seed=2) * 31) ^ position * _MIX
    whole = beside ^ (_number(index, seed=3) * 127)
    return torch.stack((_mixed(beside), _mixed(whole)), dim=1)


def _number(rows: Tensor, *, seed: int) -> Tensor:
    """int64 [rows] of the bytes of each row: equal for equal bytes."""
    words = rows.contiguous().view(torch.uint8).view(torch.int64).cpu()
    # no generator: other releases of torch draw other numbers; int64 wraps around
    factors = _mixed(torch.arange(1, words.shape[1] + 1) + (seed << 40)) | 1
    return (_mixed(words) * factors).sum(dim=1)


def _mixed(words: Tensor) -> Tensor:
    """The same number of bits, each depending on many."""
    words = (words ^ (words >> 29)) * _MIX
    return words ^ (words >> 32)


def _is_captured(read: Tensor) -> bool:
    return read.is_cuda and torch.cuda.is_current_stream_capturing()
