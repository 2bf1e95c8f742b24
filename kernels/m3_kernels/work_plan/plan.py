"""What a step's work plan is: its numbers, and the memory it lies in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Requests of at most this many query rows are of decode kind (verify included), others of prefill,
# unless a plan draws the line lower.
DECODE_ROWS = 8

# Query rows of one tile of a prefill request; tiles begin at positions that are multiples of it.
TILE_ROWS = 8


@dataclass(frozen=True)
class WorkPlanBuffers:
    """Memory of a plan, allocated once for the largest step; all int32.

    Attributes
    ----------
    cum_blocks, cum_tiles : [max_reqs + 1]
    range_start : [num_programs + 1]
    range_request : [num_programs]
    row_request : [max_rows]
    """

    cum_blocks: Tensor
    cum_tiles: Tensor
    range_start: Tensor
    range_request: Tensor
    row_request: Tensor

    def plan(
        self,
        *,
        num_reqs: int,
        num_rows: int,
        max_query_len: int,
        max_seq_len: int,
        page_size: int,
        decode_rows: int = DECODE_ROWS,
    ) -> WorkPlan:
        """A plan of views of this memory, not filled; arguments as in `fill_work_plan`."""
        return WorkPlan(
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            page_size=page_size,
            cum_blocks=self.cum_blocks[: num_reqs + 1],
            cum_tiles=self.cum_tiles[: num_reqs + 1],
            range_start=self.range_start,
            range_request=self.range_request,
            row_request=self.row_request[:num_rows],
            decode_rows=decode_rows,
        )


@dataclass(frozen=True)
class WorkPlan:
    """How the kernels of one step share its work; the same for all layers.

    Attributes
    ----------
    max_query_len : no request of the step has more query rows
    max_seq_len : no sequence of the step is longer
    page_size : tokens per page, which is the block
    cum_blocks : int32 [R + 1], visible blocks of the requests of decode kind before request r
    cum_tiles : int32 [R + 1], tiles of the requests of prefill kind before request r; a tile is
        the rows of `TILE_ROWS` consecutive positions from a multiple of `TILE_ROWS` on
    range_start : int32 [C + 1], program c takes blocks `range_start[c]:range_start[c + 1]` of the
        flat list of (request of decode kind, block)
    range_request : int32 [C], request of the first block of program c; R if it has none
    row_request : int32 [T], request of each query row; R for padding
    decode_rows : requests of at most so many query rows are of decode kind, others of prefill
    """

    max_query_len: int
    max_seq_len: int
    page_size: int
    cum_blocks: Tensor
    cum_tiles: Tensor
    range_start: Tensor
    range_request: Tensor
    row_request: Tensor
    decode_rows: int = DECODE_ROWS

    @property
    def max_blocks(self) -> int:
        """No sequence of the step has more blocks."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def num_programs(self) -> int:
        """Programs that share the flat list of blocks."""
        return self.range_request.shape[0]

    def require_step(self, num_reqs: int, num_rows: int, page_size: int) -> None:
        """Raise ValueError unless the plan is of a step of this size."""
        planned = self.cum_blocks.shape[0] - 1, self.row_request.shape[0], self.page_size
        if planned != (num_reqs, num_rows, page_size):
            raise ValueError(
                f"plan must be of this step's {num_reqs} requests, {num_rows} rows and pages of "
                f"{page_size}; it has {planned[0]}, {planned[1]} and {planned[2]}"
            )
