"""Dense layers on a CPU: our kernel over the whole context, or the host's own.

Layers without an index branch cost most of a step there at long contexts: the hosts' kernels for
CPUs are several times slower than ours.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels.cache_store import cache_store
from m3_kernels.capability import Implementation
from m3_kernels.dense_attention import dense_attention
from m3_plugin.attention.backends import FULL_DTYPES, choose_kernels
from m3_plugin.attention.batch import MSABatch
from m3_plugin.host.metrics import dense_counters
from m3_plugin.settings import Settings

# of the op `dense_attention`, those that are fast enough for whole contexts
FAMILIES = ("native", "torch")


@dataclass(frozen=True)
class DenseChoice:
    """What attends in dense layers.

    Attributes
    ----------
    backend : of the op `dense_attention`; None for the host's own kernels
    reason : why, for a log
    """

    backend: Implementation | None
    reason: str

    def describe(self, host: str) -> str:
        """One line for a log.

        Parameters
        ----------
        host : what attends in the place of ours
        """
        ours = f"dense_attention ({self.backend})"
        return f"{host if self.backend is None else ours}: {self.reason}"


def choose_dense(
    device_type: str, *, cache_dtype: torch.dtype, settings: Settings, named: bool = False
) -> DenseChoice:
    """Our kernel wherever it can serve and nobody asked for the host's.

    Parameters
    ----------
    device_type : `torch.device.type`
    cache_dtype : of the pages of dense layers
    named : the operator named one of the host's attention backends
    """
    if device_type != "cpu":
        return DenseChoice(None, "our kernel for dense layers is for CPUs")
    if settings.dense == "host":
        return DenseChoice(None, "requested by M3_PLUGIN_DENSE")
    if named:
        return DenseChoice(None, "requested by name")
    if cache_dtype not in FULL_DTYPES:
        return DenseChoice(None, f"our kernel for dense layers reads no {cache_dtype} cache")
    family = choose_kernels(device_type, settings.kernels).family
    if family not in FAMILIES:
        return DenseChoice(None, f"kernel family {family!r} is too slow for whole contexts")
    return DenseChoice(family, "as the MSA layers' kernels")


class DenseAttention:
    """Runs dense layers; all layers and steps of one worker may share it.

    Parameters
    ----------
    backend : of the op `dense_attention`
    settings : whether to count rows and time in the host's metrics

    Attributes
    ----------
    rows : query rows served, times layers
    """

    def __init__(self, backend: Implementation, *, settings: Settings) -> None:
        self.backend: Implementation = backend
        self.rows = 0
        self._counted = dense_counters()["rows"] if settings.statistics else None
        self._seconds = dense_counters()["seconds"] if settings.timings else None

    def store(
        self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, *, slot_mapping: Tensor
    ) -> None:
        """Write a step's keys and values into their pages; for hosts that leave it to the backend.

        Parameters
        ----------
        k, v : [rows, num_kv_heads, head_dim], normalised and rotated
        k_pages, v_pages : [pages, num_kv_heads, page_size, head_dim], any strides
        slot_mapping : int64 [rows], page * page_size + offset; negative = do not store
        """
        pages, _, page_size, _ = k_pages.shape
        # a layer without an index branch: index keys of no channels
        cache_store(
            k,
            v,
            k.new_empty(k.shape[0], 0),
            k_pages,
            v_pages,
            k_pages.new_empty(pages, page_size, 0),
            slot_mapping=slot_mapping,
            backend=self.backend,
        )

    def attend(
        self,
        batch: MSABatch,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        *,
        scale: float,
        out: Tensor,
    ) -> None:
        """Attend over everything that is visible to each row.

        Parameters
        ----------
        batch : the step; its slots are not read
        q : [rows, num_q_heads, head_dim], normalised and rotated
        k_pages, v_pages : [pages, num_kv_heads, page_size, head_dim], any strides; hold the step's
            own keys already
        scale : softmax scale
        out : [rows, num_q_heads, head_dim], filled in place; padding rows become zero
        """
        start = time.perf_counter()
        dense_attention(
            q,
            k_pages,
            v_pages,
            page_table=batch.page_table,
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            scale=scale,
            out=out,
            backend=self.backend,
        )
        self.rows += q.shape[0]
        if self._counted is not None:
            self._counted.labels(phase=batch.phase).inc(q.shape[0])
        if self._seconds is not None:
            self._seconds.labels(phase=batch.phase).inc(time.perf_counter() - start)
