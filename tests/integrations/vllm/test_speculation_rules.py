"""Speculative settings that cannot work are named before any weight is read; the draft's steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from m3_vllm.model import M3ForCausalLM, M3ForConditionalGeneration
from m3_vllm.mtp import M3MTP
from m3_vllm.registration import ARCHITECTURES
from m3_vllm.speculation import draft_backend_problem, require_aux_layers, require_speculation


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


def test_a_draft_backend_must_have_pages_of_128_tokens() -> None:
    class Small(CPUAttentionBackend):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list:
            return [16, 32]

    fits = {"block_size": 128, "cache_dtype": "auto"}
    assert draft_backend_problem(CPUAttentionBackend, **fits) is None
    # vLLM cuts a page into several of the backend's where it can
    assert draft_backend_problem(Small, **fits) is None

    class Odd(Small):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list:
            return [48]

    assert "has no pages of 128 tokens" in (draft_backend_problem(Odd, **fits) or "")


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
