"""What one sparse layer cannot be faster than: bytes over bandwidth, operations over throughput."""

from __future__ import annotations

from dataclasses import dataclass

PAGE_SIZE = 128


@dataclass(frozen=True)
class Geometry:
    """One MSA layer on one device; MiniMax-M3's own by default."""

    num_q_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    index_dim: int = 128
    topk: int = 16


@dataclass(frozen=True)
class Workload:
    """One step of one layer: `batch` requests of the same length.

    Attributes
    ----------
    phase : "decode" (one row per request), "verify" (2 to 8) or "prefill"
    context : keys per request, the step's own included
    rows : query rows per request, the last ones of the context
    pattern : "shared" if the rows of a request choose nearly the same blocks, "independent" if
        every row and head chooses for itself
    """

    phase: str
    batch: int
    context: int
    rows: int = 1
    pattern: str = "independent"

    @property
    def blocks(self) -> int:
        """Blocks of one request."""
        return -(-self.context // PAGE_SIZE)

    @property
    def label(self) -> str:
        """A name for tables: "decode B64 128K"."""
        size = f"{self.context / 1024:.4g}K"
        rows = "" if self.rows == 1 else f" q{self.rows} {self.pattern}"
        return f"{self.phase} B{self.batch} {size}{rows}"


@dataclass(frozen=True)
class Work:
    """Unavoidable traffic and arithmetic of one layer's step.

    Attributes
    ----------
    bytes_moved : read or written in device memory, every cached byte once
    operations : multiplications and additions of the matrix products
    """

    bytes_moved: int
    operations: int


def sparse_work(
    workload: Workload,
    geometry: Geometry,
    *,
    bytes_per_value: int,
    index_token_bytes: int | None = None,
) -> Work:
    """MSA: every index key once, then the chosen blocks.

    Blocks chosen by several rows of a request count once under "shared". Under "independent" they
    count per row, up to the whole context: that much has to be read when nothing is chosen twice.

    Parameters
    ----------
    index_token_bytes : of one index key with its scale; None if it is stored as K and V are
    """
    g, w = geometry, workload
    chosen = min(w.context, g.topk * PAGE_SIZE)
    per_request = chosen if w.pattern == "shared" else min(w.context, chosen * w.rows)
    index_bytes = w.batch * w.context * (index_token_bytes or g.index_dim * bytes_per_value)
    kv_bytes = w.batch * per_request * 2 * g.num_kv_heads * g.head_dim * bytes_per_value
    index_operations = 2 * _visible_keys(w) * g.num_kv_heads * g.index_dim
    attended = w.batch * w.rows * chosen
    attention_operations = 4 * attended * g.num_q_heads * g.head_dim
    return Work(
        bytes_moved=index_bytes + kv_bytes + _activation_bytes(w, g, bytes_per_value),
        operations=index_operations + attention_operations,
    )


def dense_work(workload: Workload, geometry: Geometry, *, bytes_per_value: int) -> Work:
    """Dense attention over the same context: every key and value once."""
    g, w = geometry, workload
    kv_bytes = w.batch * w.context * 2 * g.num_kv_heads * g.head_dim * bytes_per_value
    return Work(
        bytes_moved=kv_bytes + _activation_bytes(w, g, bytes_per_value),
        operations=4 * _visible_keys(w) * g.num_q_heads * g.head_dim,
    )


def floor_seconds(work: Work, *, bytes_per_second: float, operations_per_second: float) -> float:
    """The larger of the two times: memory and arithmetic can overlap perfectly at best."""
    return max(work.bytes_moved / bytes_per_second, work.operations / operations_per_second)


def copies_beyond_cache(bytes_touched: int, *, cache_bytes: int) -> int:
    """Copies of the data to go through in turn so that none is met in the cache again.

    Between two uses of a copy at least twice the cache passes through it.
    """
    return 1 + -(-2 * cache_bytes // max(1, bytes_touched))


def _visible_keys(workload: Workload) -> int:
    """(row, key) pairs under the causal mask."""
    w = workload
    first = w.context - w.rows + 1
    return w.batch * w.rows * (first + w.context) // 2


def _activation_bytes(workload: Workload, geometry: Geometry, bytes_per_value: int) -> int:
    """Queries in, outputs out."""
    rows = workload.batch * workload.rows
    return rows * 2 * geometry.num_q_heads * geometry.head_dim * bytes_per_value
