"""Speculative settings that cannot work are named before any weight is read; the draft's steps."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.utils import select_common_block_size

from m3_vllm.backend import M3SparseBackend, dense_backend_problem
from m3_vllm.model import M3ForCausalLM, M3ForConditionalGeneration
from m3_vllm.mtp import M3MTP
from m3_vllm.registration import ARCHITECTURES
from m3_vllm.speculation import require_aux_layers, require_speculation


def vllm_config(**speculative: Any) -> Any:
    """As much of vLLM's config as the rules read; the checkpoint's headers are not looked at."""
    text = SimpleNamespace(hidden_size=640, vocab_size=1024)
    draft = SimpleNamespace(hidden_size=640, vocab_size=1024, num_mtp_modules=1)
    vars(draft).update(speculative.pop("draft", {}))
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=128),
        load_config=SimpleNamespace(load_format="dummy"),
        speculative_config=SimpleNamespace(
            **{"method": "mtp", "attention_backend": None, "kv_cache_dtype": None} | speculative,
            draft_model_config=SimpleNamespace(
                model="draft", revision=None, hf_config=draft, hf_text_config=draft
            ),
        ),
    )


def test_what_fits_is_let_through() -> None:
    require_speculation(vllm_config())
    require_speculation(vllm_config(kv_cache_dtype="auto"))
    require_speculation(SimpleNamespace(speculative_config=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draft": {"hidden_size": 512}}, r"hidden_size must be 640; draft has 512.*Leave 'model'"),
        ({"draft": {"vocab_size": 99}}, r"vocab_size must be 1024; draft has 99"),
        (
            {"method": "dspark"},
            r"method dspark is not served .* are left unread; leave --spec",
        ),
        (
            {"method": "dflash"},
            r"method dflash is not served .* are left unread; leave --spec",
        ),
        ({"kv_cache_dtype": "fp8"}, r"must be that of --kv-cache-dtype, auto; got fp8"),
        (
            {"attention_backend": AttentionBackendEnum.CPU_ATTN},
            r"takes no attention_backend; got CPU_ATTN",
        ),
        (
            {
                "method": "eagle3",
                "attention_backend": AttentionBackendEnum.CPU_ATTN,
                "kv_cache_dtype": "nvfp4",
            },
            r'CPU_ATTN cannot read a nvfp4 KV cache; .*"attention_backend": "TRITON_ATTN"',
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_speculation(vllm_config(**settings))


def paged_by(*sizes: Any) -> type[CPUAttentionBackend]:
    """A dense backend with kernels for these pages."""

    class Backend(CPUAttentionBackend):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list:
            return list(sizes)

    return Backend


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ((16, 32, 64), False),
        ((16, 32, 64, 128, 256), True),
        ((MultipleOf(16),), True),
        ((MultipleOf(48), 32), False),
        ((), True),
    ],
)
def test_a_dense_backend_must_have_pages_of_128_tokens(sizes: tuple, fits: bool) -> None:
    """As vLLM itself finds once it divides groups into kernel pages, minutes later.

    In front of that it allows 128 for FlashInfer, whose pages of 16 divide it.
    """
    backend = paged_by(*sizes)
    problem = dense_backend_problem(backend, cache_dtype="auto")
    assert (problem is None) is fits
    if sizes:
        outcome = nullcontext() if fits else pytest.raises(ValueError, match="No common block size")
        with outcome:
            select_common_block_size(128, [M3SparseBackend, backend])


def test_a_draft_backend_of_small_pages_is_refused_before_vllm_knows_its_page() -> None:
    """The page is 16, vLLM's default, until the layers have been asked."""
    backend = SimpleNamespace(name="FLASHINFER", get_class=lambda: paged_by(16, 32, 64))
    config = vllm_config(method="eagle3", attention_backend=backend)
    config.cache_config.block_size = 16
    with pytest.raises(ValueError, match="FLASHINFER has no pages of 128 tokens"):
        require_speculation(config)


@pytest.mark.parametrize("layers", [(1, 2, 2), (0, 2, 5), (-1, 1, 2)])
def test_eagle3_layers_the_model_does_not_have(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^eagle_aux.*within 0\.\.4"):
        require_aux_layers(layers, num_layers=4)
    require_aux_layers((0, 2, 4), num_layers=4)


@pytest.mark.parametrize("model", [M3ForCausalLM, M3ForConditionalGeneration])
def test_every_exported_class_has_the_interfaces_a_drafter_asks_for(model: type) -> None:
    from vllm.model_executor.models.interfaces import supports_eagle3, supports_pp

    assert supports_eagle3(model)
    assert supports_pp(model)


def test_the_draft_class_takes_image_embeddings_and_has_vllms_name() -> None:
    from vllm.model_executor.models.interfaces import supports_multimodal_embeddings

    assert supports_multimodal_embeddings(M3MTP)
    assert ARCHITECTURES["MiniMaxM3MTP"] == "m3_vllm.mtp:M3MTP"


def test_each_step_takes_its_module_in_turn() -> None:
    draft = M3MTP.__new__(M3MTP)
    nn.Module.__init__(draft)
    modules = [object(), object()]
    draft.model = SimpleNamespace(modules_in_order=modules)  # type: ignore[assignment]
    assert [draft._module(step) for step in range(4)] == modules * 2
