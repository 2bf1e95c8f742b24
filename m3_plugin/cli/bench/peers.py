"""Other people's M3 kernels as peers, unchanged, from an installed or an unpacked wheel.

The Triton kernels of vLLM and SGLang need a handful of their host's helpers. Importing the hosts
for those would take a minute and half of their dependencies, and a benchmark box has neither; the
helpers are given here as stand-ins with the same meaning. Nothing of a peer is stored or changed.
FlashInfer is a library and is imported as one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from m3_kernels.sparse_attention.flashinfer import ARCHES, installed_release

PAGE_SIZE = 128
FLASHINFER_FUNCTIONS = (
    "msa_proxy_score",
    "msa_topk_select",
    "msa_sparse_attention",
    "msa_sparse_decode_attention",
)


class PeerUnavailable(RuntimeError):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True)
class PeerInputs:
    """One layer's step in the words of all peers.

    Attributes
    ----------
    q : [T, num_q_heads, head_dim]
    index_q : [T, num_kv_heads, index_dim]
    pages : [P, num_kv_heads, 128, 2 * head_dim], K and V beside each other
    index_k_pages : [P, 128, index_dim]
    block_ids : int32 [num_kv_heads, T, topk], what attention reads
    page_table : int32 [R, max_pages]
    cu_seqlens_q, seq_lens : int32 [R + 1], [R]
    rows : query rows of every request
    max_seq_len : host integer
    topk : blocks per row
    """

    q: Tensor
    index_q: Tensor
    pages: Tensor
    index_k_pages: Tensor
    block_ids: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    rows: int
    max_seq_len: int
    topk: int

    @property
    def num_kv_heads(self) -> int:
        """KV heads, which are as many as index heads."""
        return self.pages.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.q.shape[2]


class PeerLayer(Protocol):
    """A peer's two steps on fixed inputs, its own copies of them made beforehand."""

    def select(self) -> Tensor:
        """Block ids, int32 [num_kv_heads, T, topk]."""
        ...

    def attend(self) -> Tensor:
        """Outputs [T, num_q_heads, head_dim] over the inputs' `block_ids`."""
        ...


def load_peer(name: str, folder: Path | None = None) -> Any:
    """The layer class of a peer, "vllm", "sglang" or "flashinfer".

    Parameters
    ----------
    folder : a folder that holds the package (`site-packages`, or an unpacked wheel); by default
        where Python finds it, as FlashInfer always is

    Raises
    ------
    PeerUnavailable : not installed, other files than expected, the host is already imported, or
        not for this GPU.
    """
    if name == "flashinfer":
        return _load_flashinfer()
    loaders = {"vllm": _load_vllm, "sglang": _load_sglang}
    package = _package_folder(name, folder)
    if name in sys.modules and not getattr(sys.modules[name], "m3_stand_in", False):
        raise PeerUnavailable(f"{name} itself is already imported in this process")
    try:
        return loaders[name](package)
    except (ImportError, AttributeError, OSError) as error:
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]
        raise PeerUnavailable(
            f"the kernels in {package} are not what this version knows: "
            f"{type(error).__name__}: {error}"
        ) from error


def _package_folder(name: str, folder: Path | None) -> Path:
    if folder is not None:
        if not (folder / name).is_dir():
            raise PeerUnavailable(f"{folder} holds no folder {name!r}")
        return folder / name
    # find_spec of a top-level name reads no file of the package
    spec = importlib.util.find_spec(name) if name not in sys.modules else None
    if spec is None or not spec.submodule_search_locations:
        raise PeerUnavailable(f"{name} is not installed; unpack its wheel and name the folder")
    return Path(next(iter(spec.submodule_search_locations)))


def _stand_in(name: str, folder: Path | None = None, **attributes: Any) -> ModuleType:
    """Put a module into `sys.modules`; with a folder, files in it are its submodules."""
    module = ModuleType(name)
    module.m3_stand_in = True  # pyright: ignore[reportAttributeAccessIssue]
    module.__path__ = [str(folder)] if folder else []
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    sys.modules[name] = module
    return module


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def _load_vllm(package: Path) -> Any:
    import triton
    import triton.language

    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available,
        is_rocm=lambda: False,
        is_arch_support_pdl=lambda: _capability()[0] >= 9,
        is_device_capability=lambda wanted: _capability() == tuple(wanted),
        is_device_capability_family=lambda family: _capability()[0] * 10 == family,
    )
    for name in ("vllm", "vllm.utils", "vllm.models", "vllm.models.minimax_m3"):
        _stand_in(name)
    _stand_in("vllm.platforms", current_platform=platform)
    _stand_in("vllm.triton_utils", triton=triton, tl=triton.language)
    _stand_in("vllm.utils.math_utils", round_up=lambda value, to: -(-value // to) * to)
    _stand_in("vllm.models.minimax_m3.common", package / "models/minimax_m3/common")
    ops = importlib.import_module("vllm.models.minimax_m3.common.ops")

    class Layer(VllmLayer):
        functions = ops

    return Layer


def _load_sglang(package: Path) -> Any:
    class Unset(SimpleNamespace):
        """Environment variables of SGLang, none of them set."""

        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(get=lambda: False)

    platform = SimpleNamespace(is_sm90=_capability()[0] == 9)
    for name in ("sglang", "sglang.srt", "sglang.kernels", "sglang.kernels.ops"):
        _stand_in(name)
    _stand_in("sglang.kernels.ops.attention", package / "kernels/ops/attention")
    # The radix top-k is a CUDA extension compiled at first use; the Triton one needs nothing.
    _stand_in("sglang.srt.environ", envs=Unset())
    _stand_in("sglang.srt.runtime_context", get_platform=lambda: platform)
    _stand_in(
        "sglang.srt.utils",
        is_gfx95_supported=lambda: False,
        is_xpu=lambda: False,
        is_hip=lambda: False,
    )
    modules = {
        step: importlib.import_module(f"sglang.kernels.ops.attention.minimax_sparse.{step}")
        for step in (
            "decode.flash_with_topk_idx",
            "decode.topk_sparse",
            "prefill.flash_with_topk_idx",
            "prefill.topk_sparse",
        )
    }

    class Layer(SglangLayer):
        functions = SimpleNamespace(
            select_decode=modules["decode.flash_with_topk_idx"].flash_decode_with_topk_idx,
            attend_decode=modules["decode.topk_sparse"].flash_decode_with_gqa_share_sparse,
            select_prefill=modules["prefill.flash_with_topk_idx"].flash_prefill_with_topk_index,
            attend_prefill=modules["prefill.topk_sparse"].flash_prefill_with_gqa_share_sparse,
        )

    return Layer


def _load_flashinfer() -> Any:
    major, minor = _capability()
    if (arch := major * 10 + minor) not in ARCHES:
        why = (
            "can be captured once per workspace, and a graph here holds many calls"
            if major == 10
            else "do not exist"
        )
        raise PeerUnavailable(f"its kernels for compute capability {major}.{minor} {why}")
    if (release := installed_release()) is None:
        raise PeerUnavailable("flashinfer-python is not installed, which a wheel cannot replace")
    try:
        ops = importlib.import_module("flashinfer.msa_ops")
        functions = SimpleNamespace(**{name: getattr(ops, name) for name in FLASHINFER_FUNCTIONS})
    except Exception as error:
        raise PeerUnavailable(
            f"flashinfer-python {release} is not what this version knows on SM{arch}: "
            f"{type(error).__name__}: {error}"
        ) from error

    class Layer(FlashinferLayer):
        pass

    Layer.functions = functions
    return Layer


class VllmLayer:
    """vLLM's Triton kernels; their cache layout is the one our inputs already have."""

    functions: Any

    def __init__(self, inputs: PeerInputs) -> None:
        self.inputs = inputs
        self.out = torch.empty_like(inputs.q)
        self.ids = torch.empty_like(inputs.block_ids)
        self.prefix_lens = inputs.seq_lens - inputs.rows
        self.decodes = inputs.rows <= 8

    def select(self) -> Tensor:
        i = self.inputs
        if self.decodes:
            return self.functions.minimax_m3_index_decode(**self.decode_arguments())
        score = self.functions.minimax_m3_index_score(
            idx_q=i.index_q,
            index_kv_cache=i.index_k_pages,
            block_table=i.page_table,
            cu_seqlens_q=i.cu_seqlens_q,
            seq_lens=i.seq_lens,
            prefix_lens=self.prefix_lens,
            max_query_len=i.rows,
            max_seq_len=i.max_seq_len,
            num_kv_heads=i.num_kv_heads,
        )
        return self.functions.minimax_m3_index_topk(
            score=score,
            cu_seqlens_q=i.cu_seqlens_q,
            prefix_lens=self.prefix_lens,
            max_query_len=i.rows,
            topk=i.topk,
            init_blocks=0,
            local_blocks=1,
            out=self.ids,
        )

    def decode_arguments(self) -> Mapping[str, Any]:
        i = self.inputs
        return {
            "idx_q": i.index_q,
            "index_kv_cache": i.index_k_pages,
            "block_table": i.page_table,
            "seq_lens": i.seq_lens,
            "max_seq_len": i.max_seq_len,
            "topk": i.topk,
            "init_blocks": 0,
            "local_blocks": 1,
            "num_kv_heads": i.num_kv_heads,
            "decode_query_len": i.rows,
            "max_decode_query_len": i.rows,
            "out": self.ids,
        }

    def attend(self) -> Tensor:
        i = self.inputs
        arguments = {
            "q": i.q,
            "kv_cache": i.pages,
            "topk_idx": i.block_ids,
            "block_table": i.page_table,
            "seq_lens": i.seq_lens,
            "num_kv_heads": i.num_kv_heads,
            "sm_scale": i.head_dim**-0.5,
            "output": self.out,
        }
        if self.decodes:
            self.functions.minimax_m3_sparse_attn_decode(**arguments, decode_query_len=i.rows)
        else:
            self.functions.minimax_m3_sparse_attn(
                **arguments,
                cu_seqlens_q=i.cu_seqlens_q,
                prefix_lens=self.prefix_lens,
                max_query_len=i.rows,
            )
        return self.out


class SglangLayer:
    """SGLang's Triton kernels, on slots in their own layout: [slots, heads, dim]."""

    functions: Any

    def __init__(self, inputs: PeerInputs) -> None:
        i = self.inputs = inputs
        k_pages, v_pages = i.pages.split(i.head_dim, dim=-1)
        self.k, self.v = (
            pages.transpose(1, 2).flatten(0, 1).contiguous() for pages in (k_pages, v_pages)
        )
        self.index_k = i.index_k_pages.flatten(0, 1)[:, None]
        offsets = torch.arange(PAGE_SIZE, device=i.q.device, dtype=torch.int32)
        self.req_to_token = (i.page_table[:, :, None] * PAGE_SIZE + offsets).flatten(1)
        requests = torch.arange(i.seq_lens.shape[0], device=i.q.device)
        self.decodes = i.rows <= 8
        # A verify row is a request of its own to the decode kernels, one key longer than the last.
        per_row = i.rows if self.decodes else 1
        self.slot_ids = requests.repeat_interleave(per_row)
        lens = i.seq_lens.repeat_interleave(per_row)
        if self.decodes:
            lens = (
                lens - (i.rows - 1) + torch.arange(i.rows, device=i.q.device).repeat(len(requests))
            )
        self.lens = lens.to(torch.int32)
        self.prefix_lens = i.seq_lens - i.rows

    def _common(self) -> dict[str, Any]:
        return {
            "sink": None,
            "req_to_token": self.req_to_token,
            "seq_lens": self.lens,
            "slot_ids": self.slot_ids,
        }

    def select(self) -> Tensor:
        i = self.inputs
        rules = {
            **self._common(),
            "q": i.index_q,
            "k_cache": self.index_k,
            "v_cache": None,
            "topk": i.topk,
            "init_blocks": 0,
            "local_blocks": 1,
            "disable_index_value": True,
            "page_size": PAGE_SIZE,
        }
        if self.decodes:
            return self.functions.select_decode(
                **rules, max_seqlen=i.max_seq_len, block_size=PAGE_SIZE
            )[1]
        return self.functions.select_prefill(
            **rules,
            cu_seqlens=i.cu_seqlens_q,
            prefix_lens=self.prefix_lens,
            max_seqlen_q=i.rows,
            max_seqlen_k=i.max_seq_len,
            block_size_q=1,
            block_size_k=PAGE_SIZE,
            **self._query_blocks(),
        )[1]

    def attend(self) -> Tensor:
        i = self.inputs
        common = {
            **self._common(),
            "q": i.q,
            "k_cache": self.k,
            "v_cache": self.v,
            "topk_idx": i.block_ids,
            "sm_scale": i.head_dim**-0.5,
        }
        if self.decodes:
            return self.functions.attend_decode(**common, block_size=PAGE_SIZE, page_size=PAGE_SIZE)
        blocks = self._query_blocks()
        del blocks["all_seqblock_q"]
        return self.functions.attend_prefill(
            **common,
            cu_seqlens=i.cu_seqlens_q,
            prefix_lens=self.prefix_lens,
            max_seqlen_q=i.rows,
            block_size_q=1,
            block_size_k=PAGE_SIZE,
            **blocks,
        )

    def _query_blocks(self) -> dict[str, Any]:
        """With one row per query block, blocks of rows are rows."""
        return {
            "cu_seqblocks_q": self.inputs.cu_seqlens_q,
            "max_seqblock_q": self.inputs.rows,
            "all_seqblock_q": self.inputs.q.shape[0],
        }


class FlashinferLayer:
    """FlashInfer's `msa_ops` for SM120, on K and V side by side, as our inputs have them."""

    functions: Any

    def __init__(self, inputs: PeerInputs) -> None:
        i = self.inputs = inputs
        self.k, self.v = i.pages.split(i.head_dim, dim=-1)
        requests, device = i.seq_lens.shape[0], i.q.device
        rows = torch.arange(i.rows, device=device).repeat(requests)
        position = (i.seq_lens - i.rows).repeat_interleave(i.rows) + rows
        self.visible_blocks = (position // PAGE_SIZE + 1).int()
        blocks = -(-i.max_seq_len // PAGE_SIZE)
        shape = (i.num_kv_heads, blocks, i.q.shape[0])
        self.scores = torch.empty(shape, dtype=torch.float32, device=device)
        self.ids = torch.empty(
            (i.q.shape[0], i.num_kv_heads, i.topk), dtype=torch.int32, device=device
        )

    def select(self) -> Tensor:
        i = self.inputs
        self.functions.msa_proxy_score(
            i.index_q,
            i.index_k_pages[:, None],
            i.cu_seqlens_q,
            page_table=i.page_table,
            seqused_k=i.seq_lens,
            causal=True,
            max_seqlen_q=i.rows,
            max_k_tiles=self.scores.shape[1],
            output=self.scores,
        )
        self.functions.msa_topk_select(
            self.scores,
            i.topk,
            num_valid_pages=self.visible_blocks,
            output=self.ids,
            force_end_blocks=1,
        )
        # its attention takes heads first, and no view of them
        return self.ids.transpose(0, 1).contiguous()

    def attend(self) -> Tensor:
        i = self.inputs
        step = {
            "page_table": i.page_table,
            "seqused_k": i.seq_lens,
            "causal": True,
            "softmax_scale": i.head_dim**-0.5,
        }
        layer = (i.q, self.k, self.v, i.block_ids)
        if i.rows <= 8:
            return self.functions.msa_sparse_decode_attention(*layer, **step, seqlen_q=i.rows)
        return self.functions.msa_sparse_attention(*layer, i.cu_seqlens_q, **step)
