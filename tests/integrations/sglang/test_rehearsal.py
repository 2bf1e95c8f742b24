"""SGLang's command lines on each family of GPUs, as far as a machine without one can tell.

The rehearsal is one process for all of them (`rehearsal.py`).
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from m3_plugin.testing.quantised import quantise_checkpoint
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.integrations.sglang.engine import HOST
from tests.integrations.sglang.rehearsal import CHIPS, COMMANDS

SERVED = ("readme", "cookbook", "small chunks", "eagle3")
REFUSED = {
    "old data parallel attention": "--attn-dp-size must be 1",
    "data parallel attention": "--attn-dp-size must be 1",
    "deterministic": "--enable-deterministic-inference must be False",
    "ray": "--use-ray must be False",
    "full prefill graphs": "prefill.backend must be disabled",
}
BLACKWELL = ("B200",)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rehearsal")
    write_random_checkpoint(folder / "plain", preset="engine")
    quantise_checkpoint(folder / "plain", folder / "mxfp8", "mxfp8")
    module = "tests.integrations.sglang.rehearsal"
    found: dict[str, Any] = HOST.report(module, folder, folder=folder)
    return found


def each(*commands: str, stored: tuple[str, ...] = ("plain", "mxfp8")) -> list[str]:
    return [f"{chip}, {kind}, {name}" for chip in CHIPS for kind in stored for name in commands]


def test_published_commands_resolve_to_our_backend(outcomes: dict[str, Any]) -> None:
    for key in each(*SERVED):
        facts = outcomes[key]
        assert isinstance(facts, dict), f"{key}: {facts}"
        assert (facts["attention_backend"], facts["page_size"]) == ("msa", 128), key


def test_graphs_are_of_decode_steps_alone(outcomes: dict[str, Any]) -> None:
    for key in each(*SERVED):
        assert (outcomes[key]["decode_graph"], outcomes[key]["prefill_graph"]) == (
            "full",
            "disabled",
        ), key


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_not_served_is_refused_by_name(outcomes: dict[str, Any], command: str) -> None:
    for key in each(command):
        assert REFUSED[command] in outcomes[key], key


def test_experts_of_mxfp8(outcomes: dict[str, Any]) -> None:
    """SGLang's default on SM100 is wrong for long prompts; elsewhere it has no kernels for them."""
    for chip in CHIPS:
        facts = outcomes[f"{chip}, mxfp8, readme"]
        found = facts["quantization"], facts["moe_runner_backend"]
        routed = ("mxfp8", "flashinfer_trtllm_routed")
        assert found == (routed if chip in BLACKWELL else ("m3_mxfp8", "triton")), chip


def test_sglangs_deep_gemm_still_leaves_swiglu_out() -> None:
    """If this fails, read SGLang's kernel: `registration.right_experts` may be needless."""
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmRunnerCore

    given = "gemm1_alpha=self.config.gemm1_alpha"
    assert given not in inspect.getsource(DeepGemmRunnerCore._run_contiguous_gemm)
    assert given in inspect.getsource(DeepGemmRunnerCore._run_masked_gemm)


def test_sglang_counts_a_head_as_a_layer_of_the_target() -> None:
    """If this fails, read docs/gpu-audit.md, D6: a head's own KV heads may be counted now."""
    from sglang.srt.model_executor import pool_configurator

    assumed = "assumes the draft shares the target's per-layer KV size"
    assert assumed in inspect.getsource(pool_configurator)


def test_tokenizer_workers_without_plugins(outcomes: dict[str, Any]) -> None:
    """They know no method of ours, so that a checkpoint which needs it is refused with them."""
    for chip in CHIPS:
        outcome = outcomes[f"{chip}, mxfp8, several tokenizers"]
        if chip in BLACKWELL:
            assert outcome["quantization"] == "mxfp8"
        else:
            assert "--tokenizer-worker-num must be 1" in outcome
        assert outcomes[f"{chip}, plain, several tokenizers"]["quantization"] is None


@pytest.mark.parametrize(
    ("chip", "wanted"),
    [
        ("H100", {"bfloat16": ("fa3", "fa3"), "float8_e5m2": ("triton", "triton")}),
        ("B200", {"bfloat16": ("trtllm_mha", "fa4"), "float8_e5m2": ("trtllm_mha", "fa4")}),
    ],
)
def test_backends_of_dense_layers(
    outcomes: dict[str, Any], chip: str, wanted: dict[str, tuple[str, str]]
) -> None:
    """Those that can serve the target's grouped heads, and an EAGLE3 head without groups."""
    for command in ("readme", "eagle3"):
        dense = outcomes[f"{chip}, plain, {command}"]["dense"]
        for cache, (target, head) in wanted.items():
            assert (dense[f"target {cache}"], dense[f"head {cache}"]) == (target, head), command


def test_workspaces_are_made_for_chunks_and_not_for_contexts(outcomes: dict[str, Any]) -> None:
    for key in each(*SERVED):
        facts = outcomes[key]
        chain = facts["speculative_num_draft_tokens"] or 1
        largest = max(facts["max_prefill_tokens"], facts["chunked_prefill_size"])
        for requests, rows in facts["max_rows"].items():
            assert rows == largest + int(requests) * chain, key


def test_every_command_is_judged() -> None:
    judged = {*SERVED, *REFUSED, "several tokenizers", "deep_gemm by name"}
    assert judged == COMMANDS.keys()
