"""LoRA adapters through a real engine: answers are those of the merged weights in transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from tests.integrations import golden
from tests.integrations.adapters import (
    REFUSED,
    Adapter,
    two_adapters,
    write_adapter,
    write_cut_adapter,
)
from tests.integrations.cases import LOGPROB_ATOL, random_prompt
from tests.integrations.parity import require_close
from tests.integrations.quantised import QuantisedCheckpoints
from tests.integrations.sglang.engine import EngineProcess
from tests.integrations.sglang.test_tensor_parallel import TWO_RANKS

# Beyond the block budget of the checkpoint, where another index projection chooses other blocks.
LENGTH = 700
OPTIONS = {
    "chunked_prefill_size": 512,
    "enable_lora": True,
    "max_lora_rank": 16,
    "max_loras_per_batch": 3,
    "lora_target_modules": ["all"],
}


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint("engine")


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return two_adapters(checkpoint, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def engine(
    checkpoint: Path, adapters: list[Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    log = tmp_path_factory.mktemp("log") / "engine.log"
    with EngineProcess(checkpoint, log=log, **OPTIONS) as engine:
        for name, adapter in zip("ab", adapters, strict=True):
            assert engine.load_adapter(name, adapter.folder) == (True, "")
        yield engine


def adapted() -> Any:
    from m3_sglang.adapters import AdaptedLayers

    config = M3Config.from_hf(released_config())
    return AdaptedLayers(torch.nn.Module(), config, prefix="", targets=None)


def test_parts_of_a_fused_layer_that_an_adapter_lacks_are_zero() -> None:
    """Rows of A by projection, rows of B where the projection's lie in the layer."""
    module = "model.layers.3.self_attn.k_proj"
    a, b = torch.randn(8, 6144), torch.randn(512, 8)
    fused = adapted().fuse({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, rank=8)
    layer = "model.layers.3.self_attn.qkv_proj"
    assert fused.keys() == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
    whole_a, whole_b = fused[f"{layer}.lora_A.weight"], fused[f"{layer}.lora_B.weight"]
    assert whole_a.shape == (24, 6144)
    assert whole_b.shape == (8192 + 512 + 512, 8)
    assert torch.equal(whole_a[8:16], a)
    assert torch.equal(whole_b[8192 : 8192 + 512], b)
    assert whole_a.count_nonzero() == a.count_nonzero()
    assert whole_b.count_nonzero() == b.count_nonzero()


def test_an_adapter_that_says_more_than_sglang_reads_is_refused() -> None:
    from m3_sglang.adapters import fuse_tensors

    given = SimpleNamespace(
        base_model=SimpleNamespace(adapted=adapted()),
        config=SimpleNamespace(r=8, hf_config={"r": 8, "use_rslora": True}),
        layers=[],
    )
    with pytest.raises(ValueError, match="use_rslora"):
        fuse_tensors(lambda adapter: None, given)


def test_layers_take_adapters_by_whole_names() -> None:
    layers = adapted()
    assert layers.takes("model.layers.3.self_attn.index_qkv_proj")
    assert layers.takes("model.layers.3.block_sparse_moe.shared_experts.down_proj")
    assert not layers.takes("model.layers.3.block_sparse_moe.experts")
    assert not layers.takes("vision_tower.layers.3.self_attn.qkv_proj")
    # what SGLang takes for routed experts and makes room for all of them
    assert not layers.names & {"gate_up_proj", "down_proj"}


def asked(prompt: list[int], adapter: str | None) -> dict[str, object]:
    return {"input_ids": prompt, "lora_path": adapter}


def test_answers_are_those_of_the_merged_weights(
    engine: EngineProcess, checkpoint: Path, adapters: list[Adapter]
) -> None:
    """Two adapters and none in one batch, the same prompt for all, in chunks of 512."""
    prompt = random_prompt(LENGTH, seed=41)
    names = ["a", "b", None]
    weights = [adapters[0].merged, adapters[1].merged, checkpoint]
    outputs = engine.generate(
        [asked(prompt, name) for name in names], max_tokens=4, ignore_eos=True
    )
    answers = []
    for output, name, folder in zip(outputs, names, weights, strict=True):
        assert output.token_ids == golden.greedy(folder, prompt, num_tokens=4)
        whole = golden.token_logprobs(folder, prompt)
        engine.flush()
        require_close(engine.prompt_logprobs(asked(prompt, name)), whole)
        answers.append(whole)
    # an adapter of the index branch changes nothing but which blocks are read
    assert all((answer - answers[2]).abs().max() > 1e-2 for answer in answers[:2])


def test_prefixes_are_not_shared_between_adapters(
    engine: EngineProcess, checkpoint: Path, adapters: list[Adapter]
) -> None:
    prompt = random_prompt(LENGTH, seed=42)
    expected = [
        golden.greedy(path, prompt, num_tokens=4) for path in (checkpoint, adapters[0].merged)
    ]
    cached = []
    for _ in range(2):
        for name, tokens in zip((None, "a"), expected, strict=True):
            (output,) = engine.generate([asked(prompt, name)], max_tokens=4, ignore_eos=True)
            assert output.token_ids == tokens
            cached.append(output.num_cached_tokens >= 512)
    assert cached == [False, False, True, True]


@pytest.mark.parametrize(("module", "reason"), REFUSED)
def test_what_would_be_passed_over_is_refused(
    engine: EngineProcess, tmp_path: Path, module: str, reason: str
) -> None:
    """And the server goes on."""
    folder = write_adapter(tmp_path / "adapter", {module: (torch.zeros(8, 16), torch.zeros(16, 8))})
    require_refused(engine, folder, reason)


@pytest.mark.parametrize("half", [0, 1])
def test_a_wrong_shape_is_refused_when_an_adapter_is_loaded(
    engine: EngineProcess, checkpoint: Path, tmp_path: Path, half: int
) -> None:
    """SGLang looks at shapes when the first request comes, and its scheduler ends."""
    folder = write_cut_adapter(checkpoint, tmp_path / "adapter", half=half)
    require_refused(engine, folder, "o_proj.lora_[AB].weight must have shape")


def require_refused(engine: EngineProcess, folder: Path, reason: str) -> None:
    success, message = engine.load_adapter("c", folder)
    assert not success
    assert re.search(reason, message), message
    (output,) = engine.generate([asked(random_prompt(5, seed=1), "a")], max_tokens=1)
    assert len(output.token_ids) == 1


def test_adapters_come_and_go(
    engine: EngineProcess, checkpoint: Path, adapters: list[Adapter]
) -> None:
    """An adapter under another name, gone again; one that lacks a part of a fused layer."""
    prompt = random_prompt(LENGTH, seed=44)
    plain = golden.greedy(checkpoint, prompt, num_tokens=4)
    assert engine.load_adapter("c", adapters[1].folder)[0]
    (output,) = engine.generate([asked(prompt, "c")], max_tokens=4, ignore_eos=True)
    assert output.token_ids == golden.greedy(adapters[1].merged, prompt, num_tokens=4)
    assert engine.unload_adapter("c")[0]
    (output,) = engine.generate([asked(prompt, None)], max_tokens=4, ignore_eos=True)
    assert output.token_ids == plain


def test_weights_change_beneath_adapters(
    engine: EngineProcess, checkpoint: Path, adapters: list[Adapter]
) -> None:
    """The folder with one adapter merged in answers as that adapter does, and back."""
    prompt = random_prompt(LENGTH, seed=45)

    def answer(name: str | None) -> list[float]:
        engine.flush()
        return engine.prompt_logprobs(asked(prompt, name))

    plain, adapted = answer(None), answer("a")
    assert engine.update_from_disk(adapters[0].merged)[0]
    torch.testing.assert_close(answer(None), adapted, atol=LOGPROB_ATOL, rtol=0)
    assert answer("a") != adapted
    assert engine.update_from_disk(checkpoint)[0]
    assert (answer(None), answer("a")) == (plain, adapted)


@pytest.mark.extended
def test_two_ranks(checkpoint: Path, adapters: list[Adapter], tmp_path: Path) -> None:
    """And an adapter that is given when the server starts says rank and layers."""
    prompt = random_prompt(LENGTH, seed=46)
    options = {name: OPTIONS[name] for name in ("chunked_prefill_size", "enable_lora")}
    paths = [{"lora_name": "a", "lora_path": str(adapters[0].folder)}]
    with EngineProcess(
        checkpoint, log=tmp_path / "engine.log", lora_paths=paths, **options, **TWO_RANKS
    ) as engine:
        for name, folder in ((None, checkpoint), ("a", adapters[0].merged)):
            ours = engine.prompt_logprobs(asked(prompt, name))
            require_close(ours, golden.token_logprobs(folder, prompt))


@pytest.mark.extended
def test_adapters_beside_weights_in_stored_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """SGLang's LoRA layers add to whatever the layer's own method gives."""
    quantised = QuantisedCheckpoints(checkpoint, tmp_path / "quantised")
    reference = quantised.reference("nvfp4")
    adapter, _ = two_adapters(reference, tmp_path)
    prompt = random_prompt(LENGTH, seed=47)
    with EngineProcess(quantised.stored("nvfp4"), log=tmp_path / "engine.log", **OPTIONS) as engine:
        assert engine.load_adapter("a", adapter.folder)[0]
        answers = [
            torch.tensor(engine.prompt_logprobs(asked(prompt, name))) for name in ("a", None)
        ]
    for ours, folder in zip(answers, (adapter.merged, reference), strict=True):
        expected = golden.token_logprobs(folder, prompt)
        torch.testing.assert_close(ours, expected, atol=10 * LOGPROB_ATOL, rtol=0)
    assert (answers[0] - answers[1]).abs().max() > 100 * LOGPROB_ATOL
