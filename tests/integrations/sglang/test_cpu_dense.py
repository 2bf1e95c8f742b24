"""Our kernel in the place of SGLang's torch-native attention, on SGLang's own pools and batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations.sglang.steps import forward_batch, verify_step
from tests.integrations.sglang.test_batch import REQ_TO_TOKEN

HEADS, KV_HEADS, DIM = 4, 2, 32


def runner() -> Any:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = MHATokenToKVPool(
        size=128 * 10,
        page_size=128,
        dtype=torch.float32,
        head_num=KV_HEADS,
        head_dim=DIM,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    random = torch.Generator().manual_seed(0)
    pool.get_key_buffer(0).normal_(generator=random)
    pool.get_value_buffer(0).normal_(generator=random)
    return SimpleNamespace(
        device="cpu",
        kv_cache_dtype=torch.float32,
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=REQ_TO_TOKEN),
    )


def attention_layer(**options: Any) -> Any:
    from sglang.srt.layers.radix_attention import RadixAttention

    return RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id=0, **options)


def last_slots(seq_lens: list[int], rows: list[int], unseen: int = 0) -> torch.Tensor:
    """Slots of the last rows of each request."""
    parts = [
        REQ_TO_TOKEN[request, length + unseen - count : length + unseen]
        for request, (length, count) in enumerate(zip(seq_lens, rows, strict=True))
    ]
    return torch.cat(parts).long()


def steps() -> dict[str, tuple[Any, int]]:
    """Every kind of step with the number of tokens drafted before it plus one."""
    lengths = torch.tensor([72, 1])
    return {
        "decode": (
            forward_batch(
                "DECODE", seq_lens=[129, 300], out_cache_loc=last_slots([129, 300], [1, 1])
            ),
            0,
        ),
        "chunk behind a prefix beside decode": (
            forward_batch(
                "MIXED",
                seq_lens=[200, 131],
                out_cache_loc=last_slots([200, 131], [72, 1]),
                extend_seq_lens=lengths,
                extend_seq_lens_cpu=[72, 1],
                extend_prefix_lens=torch.tensor([128, 130]),
            ),
            0,
        ),
        "verification": (
            verify_step(
                seq_lens=[126, 250],
                query_len=4,
                out_cache_loc=last_slots([126, 250], [4, 4], unseen=4),
            ),
            0,
        ),
        "third drafting step": (
            forward_batch(
                "DECODE",
                seq_lens=[127, 255],
                out_cache_loc=last_slots([127, 255], [1, 1], unseen=3),
            ),
            3,
        ),
    }


@pytest.mark.parametrize("kind", steps())
def test_equals_torch_native_attention(kind: str) -> None:
    """What is stored, too."""
    from m3_sglang.cpu_dense import M3DenseBackend, cpu_dense_backend
    from m3_sglang.plain_dense import PlainDenseBackend

    step, drafted = steps()[kind]
    rows = len(step.out_cache_loc)
    random = torch.Generator().manual_seed(1)
    q = torch.randn(rows, HEADS * DIM, generator=random)
    k, v = (torch.randn(rows, KV_HEADS, DIM, generator=random) for _ in range(2))
    ours = cpu_dense_backend(host := runner(), drafted=drafted)
    assert isinstance(ours, M3DenseBackend)
    plain = PlainDenseBackend(other := runner(), drafted=drafted)
    results = []
    for backend in (ours, plain):
        backend.init_forward_metadata(step)
        results.append(backend.forward(q.clone(), k.clone(), v.clone(), attention_layer(), step))
    torch.testing.assert_close(*results)
    for pool in ("get_key_buffer", "get_value_buffer"):
        mine, theirs = (getattr(r.token_to_kv_pool, pool)(0) for r in (host, other))
        assert torch.equal(mine, theirs)
    assert ours.dense.rows == rows


def test_a_step_is_described_anew() -> None:
    from m3_sglang.cpu_dense import cpu_dense_backend

    backend: Any = cpu_dense_backend(runner())
    for step, seq_lens in (
        (steps()["decode"][0], [129, 300]),
        (steps()["verification"][0], [130, 254]),
    ):
        rows = len(step.out_cache_loc)
        backend.init_forward_metadata(step)
        backend.forward(
            torch.zeros(rows, HEADS * DIM),
            torch.zeros(rows, KV_HEADS, DIM),
            torch.zeros(rows, KV_HEADS, DIM),
            attention_layer(),
            step,
        )
        assert backend.step.seq_lens.tolist() == seq_lens


@pytest.mark.parametrize(
    "options", [{"sliding_window_size": 7}, {"logit_cap": 30.0}, {"is_cross_attention": True}]
)
def test_layers_of_another_kind_stay_torch_native(options: dict[str, Any]) -> None:
    from m3_sglang.cpu_dense import is_plain

    assert is_plain(attention_layer())
    assert not is_plain(attention_layer(**options))


def test_the_hosts_kernel_is_kept_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from m3_sglang.backend import dense_backend
    from m3_sglang.cpu_dense import M3DenseBackend
    from m3_sglang.plain_dense import PlainDenseBackend

    assert type(dense_backend(runner())) is M3DenseBackend
    monkeypatch.setenv("M3_PLUGIN_DENSE", "host")
    assert type(dense_backend(runner())) is PlainDenseBackend
