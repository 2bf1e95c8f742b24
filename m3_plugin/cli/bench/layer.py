"""One sparse layer's data at bench size, what runs on it, and whether that is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from m3_kernels.cache_store.torch_cpu import in_int8
from m3_kernels.index_pages import bytes_per_token, split_pages
from m3_kernels.paged import MSACaches
from m3_kernels.testing.compare import SCORE_ROUNDING, accuracy
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.session import MSASession
from m3_plugin.cli.bench.peers import PeerInputs
from m3_plugin.cli.bench.report import GateError
from m3_plugin.cli.bench.roofline import PAGE_SIZE, Geometry, Workload
from m3_plugin.model.config import MSAConfig

# Rows compared with the reference, spread over the step.
GATE_ROWS = 8


class Method(Protocol):
    """Something that attends for one layer, in one part or two."""

    def parts(self) -> Mapping[str, Any]:
        """Callables by name: "index_topk" and "sparse_attention", or "attention"."""
        ...

    def check(self) -> None:
        """Compare a sample of rows with fp32 torch on the same device.

        Raises
        ------
        GateError : with the numbers.
        """
        ...


class Layer:
    """Random pages, queries and a selection for one workload, on one device."""

    def __init__(
        self,
        workload: Workload,
        geometry: Geometry,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        g, w = geometry, workload
        random = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            # In pieces: one fp32 tensor of a long context would not fit beside the rest.
            out = torch.empty(shape, dtype=dtype, device=device)
            for piece in out.view(-1, shape[-1]).split(2**20):
                piece.copy_(torch.randn(piece.shape, generator=random, device=device))
            return out

        self.workload, self.geometry, self.device, self.dtype = w, g, device, dtype
        rows, pages = w.batch * w.rows, w.batch * w.blocks
        self.q = normal(rows, g.num_q_heads, g.head_dim)
        self.index_q = normal(rows, g.num_kv_heads, g.index_dim)
        self.pages = normal(pages, g.num_kv_heads, PAGE_SIZE, 2 * g.head_dim)
        self.index_k_pages = normal(pages, PAGE_SIZE, g.index_dim)
        order = torch.randperm(pages, generator=random, device=device).int()
        self.page_table = order.view(w.batch, w.blocks)
        starts = torch.arange(w.batch + 1, dtype=torch.int32, device=device)
        self.cu_seqlens_q = starts * w.rows
        self.seq_lens = torch.full((w.batch,), w.context, dtype=torch.int32, device=device)
        self.block_ids = selection(w, g, random=random)
        self.scale = g.head_dim**-0.5

    @property
    def sampled_rows(self) -> list[int]:
        """Rows whose results are compared, the first and the last among them."""
        last = self.q.shape[0] - 1
        return sorted({round(i * last / (GATE_ROWS - 1)) for i in range(GATE_ROWS)})

    def position(self, row: int) -> int:
        """Place of a row in its sequence."""
        w = self.workload
        return w.context - w.rows + row % w.rows

    def keys(self, row: int) -> tuple[Tensor, Tensor]:
        """K and V of the row's request in order: [num_kv_heads, context, head_dim] each."""
        pages = self.pages[self.page_table[row // self.workload.rows].long()]
        in_order = pages.transpose(0, 1).flatten(1, 2)[:, : self.workload.context]
        k, v = in_order.split(self.geometry.head_dim, dim=-1)
        return k, v

    def index_keys(self, row: int) -> Tensor:
        """Index keys of the row's request in order: [context, index_dim]."""
        pages = self.index_k_pages[self.page_table[row // self.workload.rows].long()]
        return pages.flatten(0, 1)[: self.workload.context]

    def peer_inputs(self) -> PeerInputs:
        """The same tensors in the words of the peers."""
        return PeerInputs(
            q=self.q,
            index_q=self.index_q,
            pages=self.pages,
            index_k_pages=self.index_k_pages,
            block_ids=self.block_ids,
            page_table=self.page_table,
            cu_seqlens_q=self.cu_seqlens_q,
            seq_lens=self.seq_lens,
            rows=self.workload.rows,
            max_seq_len=self.workload.context,
            topk=self.geometry.topk,
        )


def selection(workload: Workload, geometry: Geometry, *, random: torch.Generator) -> Tensor:
    """Ids for attention to read, int32 [num_kv_heads, rows, topk]: own block, others by pattern.

    Ascending, with a tail of -1 where a row sees fewer blocks than `topk`.
    """
    w, topk = workload, geometry.topk
    device = random.device
    first = w.context - w.rows
    own = (torch.arange(w.rows, device=device) + first) // PAGE_SIZE
    out = torch.full((geometry.num_kv_heads, w.batch * w.rows, topk), -1, device=device).int()
    for head in range(geometry.num_kv_heads):
        for request in range(w.batch):
            common = torch.rand(1, w.blocks, generator=random, device=device)
            # Pieces of rows: a score per row and block of a long prompt is gigabytes.
            for start in range(0, w.rows, 1024):
                stop = min(start + 1024, w.rows)
                scores = common.expand(stop - start, -1).clone()
                if w.pattern == "independent":
                    scores.uniform_(generator=random)
                blocks = torch.arange(w.blocks, device=device)
                scores[blocks > own[start:stop, None]] = -1
                scores[blocks == own[start:stop, None]] = 2
                best = scores.topk(min(topk, w.blocks), dim=-1)
                ids = best.indices.where(best.values >= 0, w.blocks).sort(dim=-1).values
                ids = ids.where(ids < w.blocks, -1)
                row = request * w.rows + start
                out[head, row : row + stop - start, : ids.shape[-1]] = ids.int()
    return out


class _Sparse:
    """A method that selects blocks and attends over given ones; how is the subclass's."""

    layer: Layer

    def select(self) -> Tensor:
        raise NotImplementedError

    def attend(self) -> Tensor:
        raise NotImplementedError

    def parts(self) -> Mapping[str, Any]:
        return {"index_topk": self.select, "sparse_attention": self.attend}

    def check(self) -> None:
        check_selection(self.layer, self.select(), index_keys=self.layer.index_keys)
        check_output(self.layer, self.attend(), sparse=True)


class OurMethod(_Sparse):
    """The session's own select and attend, as a server runs them."""

    def __init__(self, layer: Layer, kernels: KernelChoice) -> None:
        g, w = layer.geometry, layer.workload
        rules = MSAConfig(
            num_index_heads=g.num_kv_heads,
            index_dim=g.index_dim,
            block_size=PAGE_SIZE,
            topk_blocks=g.topk,
            num_init_blocks=0,
            num_local_blocks=1,
        )
        self.layer = layer
        self.session = MSASession(rules, kernels=kernels, scale=layer.scale)
        self.plan = self.session.plan(
            MSABatch(
                cu_seqlens_q=layer.cu_seqlens_q,
                seq_lens=layer.seq_lens,
                page_table=layer.page_table,
                slot_mapping=torch.full((w.batch * w.rows,), -1, device=layer.device),
                max_query_len=w.rows,
                max_seq_len=w.context,
            )
        )
        k_pages, v_pages = layer.pages.split(g.head_dim, dim=-1)
        self.caches = MSACaches(k_pages, v_pages, layer.index_k_pages)
        self.out = torch.empty_like(layer.q)

    def select(self) -> Tensor:
        return self.session.select(self.plan, self.layer.index_q, caches=self.caches)

    def attend(self) -> Tensor:
        layer = self.layer
        self.session.attend(self.plan, layer.q, layer.block_ids, caches=self.caches, out=self.out)
        return self.out


class OurInt8Method(OurMethod):
    """The same with index keys in int8; compared with the choice among these."""

    def __init__(self, layer: Layer, kernels: KernelChoice) -> None:
        super().__init__(layer, kernels)
        keys = layer.index_k_pages
        width = bytes_per_token(layer.geometry.index_dim)
        memory = torch.empty(*keys.shape[:2], width, dtype=torch.int8, device=keys.device)
        codes, scales = split_pages(memory)
        # In pieces: the fp32 copies of a long context would not fit beside the rest.
        for part in torch.arange(keys.shape[0], device=keys.device).split(2**10):
            stored, steps = in_int8(keys[part].flatten(0, 1), scales.dtype)
            codes[part], scales[part] = stored.view(keys[part].shape), steps.view(-1, PAGE_SIZE)
        self.caches = replace(self.caches, index_k_pages=codes, index_k_scales=scales)

    def check(self) -> None:
        check_selection(self.layer, self.select(), index_keys=self.stored_keys)
        check_output(self.layer, self.attend(), sparse=True)

    def stored_keys(self, row: int) -> Tensor:
        """What the int8 index keys of the row's request stand for: fp32 [context, index_dim]."""
        codes, scales = self.caches.index_k_pages, self.caches.index_k_scales
        assert scales is not None
        pages = self.layer.page_table[row // self.layer.workload.rows].long()
        keys = codes[pages].float() * scales[pages].float()[..., None]
        return keys.flatten(0, 1)[: self.layer.workload.context]


class PeerMethod(_Sparse):
    """A peer's kernels on the same tensors."""

    def __init__(self, layer: Layer, peer: Any) -> None:
        self.layer = layer
        self.peer = peer(layer.peer_inputs())

    def select(self) -> Tensor:
        return self.peer.select()

    def attend(self) -> Tensor:
        return self.peer.attend()


class DenseMethod:
    """SDPA over the whole context, on contiguous keys and values: dense attention's best case."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        rows = layer.workload.rows
        firsts = range(0, layer.q.shape[0], rows)
        pairs = [layer.keys(row) for row in firsts]
        self.k = torch.stack([k for k, _ in pairs])
        self.v = torch.stack([v for _, v in pairs])

    def parts(self) -> Mapping[str, Any]:
        return {"attention": self.attend}

    def attend(self) -> Tensor:
        layer, g, w = self.layer, self.layer.geometry, self.layer.workload
        if w.rows == 1:
            # The heads of a group become rows, so that they share a read of the keys.
            q = layer.q.view(w.batch, g.num_kv_heads, -1, g.head_dim)
            out = scaled_dot_product_attention(q, self.k, self.v, scale=layer.scale)
            return out.reshape(layer.q.shape)
        q = layer.q.view(w.batch, w.rows, g.num_q_heads, g.head_dim).transpose(1, 2)
        out = scaled_dot_product_attention(
            q,
            self.k,
            self.v,
            attn_mask=causal_lower_right(w.rows, w.context),
            scale=layer.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(layer.q.shape)

    def check(self) -> None:
        check_output(self.layer, self.attend(), sparse=False)


def check_selection(layer: Layer, ids: Tensor, *, index_keys: Callable[[int], Tensor]) -> None:
    """The ids of sampled rows as sets, equal wherever rounding of the scores cannot decide.

    Parameters
    ----------
    index_keys : those that a row's request sees, in order, [context, index_dim]

    Raises
    ------
    GateError : names row, head and margin.
    """
    g = layer.geometry
    for row in layer.sampled_rows:
        position = layer.position(row)
        own = position // PAGE_SIZE
        keys = index_keys(row)[: position + 1].float()
        query = layer.index_q[row].float()
        dots = torch.nn.functional.pad(
            query @ keys.T, (0, (own + 1) * PAGE_SIZE - position - 1), value=-torch.inf
        )
        scores = dots.unflatten(-1, (own + 1, PAGE_SIZE)).amax(-1)
        scores[:, own] = torch.inf
        expected = scores.topk(min(g.topk, own + 1), dim=-1).indices.tolist()
        norms = query.norm(dim=-1) * keys.norm(dim=-1).max()
        for head in range(g.num_kv_heads):
            got = [block for block in ids[head, row].tolist() if block >= 0]
            wanted = set(expected[head])
            if len(got) != len(wanted) or len(set(got)) != len(got) or max(got) > own:
                raise GateError(f"row {row} head {head}: chose {sorted(got)} of {own + 1} blocks")
            swapped = [float(scores[head, block]) for block in set(got) ^ wanted]
            margin = max(swapped, default=0.0) - min(swapped, default=0.0)
            if margin > 2 * SCORE_ROUNDING * float(norms[head]):
                raise GateError(
                    f"row {row} head {head}: chose {sorted(got)}, not {sorted(wanted)}; their "
                    f"scores differ by {margin:.3g}"
                )


def check_output(layer: Layer, out: Tensor, *, sparse: bool) -> None:
    """Sampled rows, at most twice as far from fp32 as plain torch in the layer's dtype.

    Parameters
    ----------
    sparse : over the layer's `block_ids`, else over all visible keys

    Raises
    ------
    GateError : with error and limit.
    """
    rows = layer.sampled_rows
    exact, plain = (
        torch.stack([_attend_row(layer, row, sparse=sparse, dtype=dtype) for row in rows])
        for dtype in (torch.float32, layer.dtype)
    )
    found = accuracy(out[rows], exact.double(), plain.double())
    if not found.ok:
        raise GateError(f"error {found.error:.3g}, allowed {found.allowed:.3g}")


def _attend_row(layer: Layer, row: int, *, sparse: bool, dtype: torch.dtype) -> Tensor:
    """[num_q_heads, head_dim] of one row by unfused torch operations in one dtype."""
    g = layer.geometry
    k, v = (part[:, : layer.position(row) + 1].to(dtype) for part in layer.keys(row))
    q = layer.q[row].view(g.num_kv_heads, -1, g.head_dim).to(dtype)
    logits = (q @ k.transpose(1, 2)) * layer.scale
    if sparse:
        blocks = torch.arange(k.shape[1], device=layer.device) // PAGE_SIZE
        seen = torch.stack([torch.isin(blocks, ids[row]) for ids in layer.block_ids])
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
    return (logits.softmax(-1) @ v).flatten(0, 1)
