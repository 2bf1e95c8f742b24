"""Memory of a session on a GPU: how much, whose, and what it is like when a step begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from m3_kernels import tuning
from m3_kernels.index_topk.triton import _key_tiles
from m3_kernels.paged import IndexPages, KVPages
from m3_kernels.sparse_attention.triton import _page_tiles
from m3_kernels.testing.cases import Case, build
from m3_plugin.attention import assembly
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch, StepCapacity
from m3_plugin.attention.workspace import LayerShape, Workspace, allocate_workspace
from m3_plugin.model.config import M3Config, MSAConfig, local_heads
from m3_plugin.model.released import released_config

CPU, META = torch.device("cpu"), torch.device("meta")
BF16 = torch.bfloat16
SMALL = StepCapacity(max_requests=4, max_rows=64, max_seq_len=4096)


def rules() -> MSAConfig:
    msa = M3Config.from_hf(released_config()).msa
    assert msa is not None
    return msa


def shape(ranks: int = 8, cache_dtype: torch.dtype = BF16) -> LayerShape:
    """A sparse layer of the released model on one of so many ranks."""
    config = M3Config.from_hf(released_config())
    return LayerShape(
        num_q_heads=local_heads(config.num_attention_heads, ranks),
        num_kv_heads=local_heads(config.num_key_value_heads, ranks),
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        dtype=BF16,
        cache_dtype=cache_dtype,
        index_dtype=BF16,
    )


# What a server of eight GPUs schedules unless told otherwise: requests, rows of a step.
DEFAULTS = {
    "vLLM, H100 and H200": (1024, 8192),
    "vLLM, B200": (1024, 16384),
    "SGLang, the most it derives from memory": (4096, 16384),
}


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("host", DEFAULTS)
def test_default_limits_at_a_million_tokens_take_less_than_a_gibibyte(
    monkeypatch: pytest.MonkeyPatch, host: str, arch: int
) -> None:
    monkeypatch.setattr(tuning, "INTERPRETER_ARCH", arch)
    requests, rows = DEFAULTS[host]
    for decode_rows, at_once in ((1, requests), (4, min(requests, 1024))):
        capacity = StepCapacity(at_once, rows, 1048576 + decode_rows, decode_rows)
        for cache_dtype in (BF16, torch.float8_e4m3fn):
            workspace = allocate_workspace(
                rules(), shape(cache_dtype=cache_dtype), capacity, device=META
            )
            assert workspace.num_bytes < 2**30


def test_a_draft_shares_its_targets_scratch_and_no_plan() -> None:
    target = allocate_workspace(rules(), shape(), SMALL, device=CPU)
    draft = allocate_workspace(rules(), shape(), SMALL, device=CPU, beside=target)
    assert draft.scratch is target.scratch
    for name, buffer in vars(draft.plan_buffers).items():
        assert buffer.data_ptr() != getattr(target.plan_buffers, name).data_ptr()
    assert draft.num_bytes < 2**16 < target.num_bytes
    assert "shares" in draft.describe()


@pytest.mark.parametrize(
    ("capacity", "layer"),
    [
        (replace(SMALL, max_seq_len=2**20), shape()),
        (replace(SMALL, max_rows=65), shape()),
        (SMALL, shape(ranks=4)),
        (SMALL, replace(shape(), dtype=torch.float16)),
    ],
)
def test_scratch_that_does_not_fit_is_not_shared(capacity: StepCapacity, layer: LayerShape) -> None:
    target = allocate_workspace(rules(), shape(), SMALL, device=CPU)
    draft = allocate_workspace(rules(), layer, capacity, device=CPU, beside=target)
    assert draft.scratch is not target.scratch
    assert not draft.shared


def one_step(workspace: Workspace) -> None:
    workspace.plan(
        MSABatch(
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=torch.tensor([5], dtype=torch.int32),
            page_table=torch.zeros(1, 1, dtype=torch.int32),
            slot_mapping=torch.zeros(1, dtype=torch.int64),
            max_query_len=1,
            max_seq_len=5,
        )
    )


def test_every_step_begins_with_no_part_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that slept finds any bytes there, and would merge parts that are not written."""
    monkeypatch.setattr("m3_plugin.attention.workspace.fill_work_plan", lambda *a, **kw: None)
    workspace = allocate_workspace(rules(), shape(), SMALL, device=CPU)
    for tensor in workspace.scratch.tensors:
        tensor.fill_(3)
    one_step(workspace)
    assert not workspace.scratch.attention.arrivals.any()


def test_kernels_of_one_geometry_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Target and draft of one process; another cache is another test, and so is a failure."""
    calls = []

    def self_test(msa: MSAConfig, **options: object) -> tuple:
        calls.append(options)
        if options["kv_dtype"] == torch.float8_e5m2:
            raise RuntimeError("broken")
        return ()

    monkeypatch.setattr("m3_plugin.attention.self_test.self_test", self_test)
    assembly.try_kernels.cache_clear()
    kernels = KernelChoice(family="triton", reason="")

    def attempt(layer: LayerShape) -> None:
        assembly.try_kernels(
            rules(), layer, kernels=kernels, device=CPU, pages=("packed-slots",), decode_rows=4
        )

    attempt(shape())
    attempt(shape())
    assert len(calls) == 1
    assert calls[0]["pages"] == ("packed-slots",)
    assert calls[0]["decode_rows"] == 4
    attempt(shape(ranks=4))
    assert len(calls) == 2
    for _ in range(2):
        with pytest.raises(RuntimeError):
            attempt(shape(cache_dtype=torch.float8_e5m2))
    assert len(calls) == 4
    assembly.try_kernels.cache_clear()


@pytest.mark.parametrize("index_dtype", [None, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("pages", ["planes", "packed-slots", "packed-heads", "separate"])
def test_pages_of_a_test_are_read_as_pages_of_a_server_are(
    pages: str, kv_dtype: torch.dtype | None, index_dtype: torch.dtype | None
) -> None:
    """Through descriptors wherever a chip is configured for them, not by another kernel."""
    case = Case(
        "",
        ((150, 9),),
        num_kv_heads=1,
        head_dim=128,
        index_dim=128,
        page_size=128,
        dtype=BF16,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        pages=pages,  # type: ignore[arg-type]
    )
    made = build(case)
    config = {"USE_DESCRIPTORS": True}
    keys = _key_tiles(IndexPages(made.index_k_pages, made.index_k_scales), 128, 128, config, None)
    assert keys["USE_DESCRIPTORS"] is True
    tiles = _page_tiles(KVPages(made.k_pages, made.v_pages), 64, config, None)
    assert tiles["USE_DESCRIPTORS"] is True


def test_serving_compiles_nothing_that_the_warm_up_and_the_self_test_did_not() -> None:
    """Chips, layouts, drafts, short and long contexts, tables of any width."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugin.attention.specialisations"],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    for report in json.loads(done.stdout):
        assert len(report["kernels"]) == 7
        assert report["compiled"] >= 10
        assert report["new"] == []
        assert report["untried"] == []
