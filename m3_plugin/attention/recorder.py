"""Writes a sample of the chosen blocks to a file, one line per layer and step.

Off unless `M3_PLUGIN_RECORD_BLOCKS` names a folder. Every record reads values of the device, so a
server that records is slower, and steps replayed from a CUDA graph are not seen: record with eager
execution.

What a prompt looks at says something about the prompt, so folder and files are this user's alone.
A worker's file ends at `MAX_BYTES`, and where it cannot be written; requests go on.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from m3_kernels.work_plan import TILE_ROWS
from m3_plugin import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from m3_plugin.attention.batch import MSABatch
    from m3_plugin.model.config import MSAConfig

logger = logging.getLogger(__name__)

FILE_PATTERN = "selection-*.jsonl"
# Of one worker's file: about 1 GiB, twenty minutes of the released model's steps at 1 MB each.
MAX_BYTES = 2**30
# Rows of one step that are kept; the rows of a tile of prefill are kept together.
ROWS_PER_STEP = 64

_numbers = itertools.count()


class SelectionRecorder:
    """Appends samples of one session's selections to a file of its own in `folder`.

    The first line holds the model's rules. Each further line holds one layer of one step: `ids`
    [group][row] the chosen blocks, and in a step's first layer `rows` [position, page, query rows],
    where the page of a row's own block tells requests apart and the third number counts the rows of
    its request in this step, 1 in decode.

    Parameters
    ----------
    folder : created, for this user alone, if it is not there; workers share it
    rows_per_step : at most so many rows of a step are kept, whole tiles of `TILE_ROWS` positions of
        a request, as a kernel for prefill takes them, evenly spaced
    max_bytes : the file ends before it would get longer

    Raises
    ------
    ValueError : rows_per_step leaves no room for one tile
    """

    def __init__(
        self,
        folder: Path,
        msa: MSAConfig,
        *,
        rows_per_step: int = ROWS_PER_STEP,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if rows_per_step < TILE_ROWS:
            raise ValueError(
                f"rows_per_step must be at least {TILE_ROWS}, the rows of a tile; "
                f"got {rows_per_step}"
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.msa = msa
        self.rows_per_step = rows_per_step
        self.max_bytes = max_bytes
        self._file: IO[bytes] | None = None
        self._size = 0
        self._ended = False
        self._batch: MSABatch | None = None
        self._sample = torch.empty(0, dtype=torch.long)
        self._step = -1
        self._layer = 0

    def add(self, block_ids: Tensor, *, batch: MSABatch) -> None:
        """Record one layer; layers of a step come in their order, with the same batch.

        Parameters
        ----------
        block_ids : int32 [num_kv_heads, rows, topk], -1 where nothing was chosen
        """
        if self._ended:
            return
        if block_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            # nothing may be read back while a graph is captured, and its values mean nothing
            return
        line: dict[str, Any] = {}
        if batch is not self._batch:
            self._batch = batch
            self._step += 1
            self._layer = 0
            self._sample, line["rows"] = _sample_rows(
                batch, limit=self.rows_per_step, block_size=self.msa.block_size
            )
        else:
            self._layer += 1
        if not self._sample.numel():
            return
        chosen = block_ids[:, self._sample.to(block_ids.device)].tolist()
        ids = [[[b for b in row if b >= 0] for row in group] for group in chosen]
        self._write({"step": self._step, "layer": self._layer, **line, "ids": ids})

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line, or end the recording: what is recorded must never end a request."""
        try:
            if self._file is None:
                # opened by the process that runs the layers, not by the one that built the session
                self._file = self._open()
                self._append(
                    {
                        "plugin": __version__,
                        "block_size": self.msa.block_size,
                        "topk": self.msa.topk_blocks,
                        "num_init_blocks": self.msa.num_init_blocks,
                        "num_local_blocks": self.msa.num_local_blocks,
                    }
                )
            self._append(line)
        except OSError as error:
            self._end(str(error))

    def _open(self) -> IO[bytes]:
        """A file that was not there: process ids come again after a restart of a container."""
        own = f"{os.getpid()}-{next(_numbers)}-{secrets.token_hex(4)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(self.folder / FILE_PATTERN.replace("*", own), flags, 0o600), "wb")

    def _append(self, line: dict[str, Any]) -> None:
        if self._ended or self._file is None:
            return
        text = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if self._size + len(text) > self.max_bytes:
            self._end(f"its file has reached {self.max_bytes:,} bytes")
            return
        self._file.write(text)
        # a server is ended by a signal: what is not written by then is lost
        self._file.flush()
        self._size += len(text)

    def _end(self, reason: str) -> None:
        self._ended = True
        # what the layers hold of the last step is not needed any more
        self._batch = None
        logger.warning("m3-plugin: chosen blocks are no longer recorded: %s", reason)
        if self._file is not None:
            # tries once more to write what could not be written
            with suppress(OSError):
                self._file.close()
            self._file = None


def _sample_rows(batch: MSABatch, *, limit: int, block_size: int) -> tuple[Tensor, list[list[int]]]:
    """Rows of a step to keep, and [position, page of its block, rows of its request] of each."""
    starts = batch.cu_seqlens_q.cpu().long()
    total = int(starts[-1])
    if total == 0:
        return torch.empty(0, dtype=torch.long), []
    rows = torch.arange(total)
    request = torch.searchsorted(starts[1:], rows, right=True)
    position = batch.seq_lens.cpu().long()[request] - starts[1:][request] + rows
    # a tile ends where the request does, or before a position that is a multiple of its rows
    begins = (position % TILE_ROWS == 0) | (rows == starts[request])
    tile = begins.cumsum(0) - 1
    kept = torch.isin(tile, _tiles_to_keep(tile.bincount(), limit=limit))
    rows, request, position = rows[kept], request[kept], position[kept]
    page = batch.page_table.cpu()[request, position // block_size].long()
    return rows, torch.stack([position, page, starts.diff()[request]], dim=1).tolist()


def _tiles_to_keep(sizes: Tensor, *, limit: int) -> Tensor:
    """Numbers of as many evenly spaced tiles as hold no more than `limit` rows."""
    last = len(sizes) - 1
    spaced = (torch.linspace(0, last, n).long() for n in range(min(limit, last + 1), 0, -1))
    return next(tiles for tiles in spaced if sizes[tiles].sum() <= limit)
