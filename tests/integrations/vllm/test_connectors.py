"""vLLM's KV connectors: K, V and index keys of every MSA layer travel together, or nothing does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.vllm.engine import EngineError, EngineProcess

# more than the 16 blocks that attention reads
LENGTHS = (2700, 3300)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage") / "pages"


@pytest.fixture(scope="module")
def engine(constructed_checkpoint: Path, storage: Path) -> Iterator[EngineProcess]:
    with EngineProcess(
        constructed_checkpoint,
        max_num_batched_tokens=4096,
        environment={"M3_PLUGIN_VERIFY_TRANSFER": str(storage.with_name("rows"))},
        kv_transfer_config={
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(storage)},
        },
    ) as engine:
        yield engine


def test_layers_saved_by_a_connector_answer_when_they_come_back(
    engine: EngineProcess, storage: Path
) -> None:
    prompts = [needle_prompt(seed, num_tokens=n) for seed, n in zip((61, 62), LENGTHS, strict=True)]

    def ask() -> list[bool]:
        # one by one: this connector tells no two requests of a step apart
        answers = []
        for prompt in prompts:
            (output,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
            answers.append(tuple(output.token_ids) == prompt.expected_ids)
        return answers

    assert ask() == [True, True]
    files = sorted(file.name for file in storage.rglob("*.safetensors"))
    assert sum(name.endswith("attn.index_cache.safetensors") for name in files) > 0
    layers = {name for name in files if not name.endswith("index_cache.safetensors")}
    sparse = {name.replace(".index_cache", "") for name in files if "index_cache" in name}
    assert sparse < layers
    assert engine.flush()
    assert ask() == [True, True]
    # every row that came back was looked up: without its index keys none of it is served
    for file in storage.rglob("*.index_cache.safetensors"):
        save_file({"kv_cache": torch.zeros_like(load_file(file)["kv_cache"])}, file)
    assert engine.flush()
    with pytest.raises(EngineError, match="the index key is not the one that was stored beside"):
        ask()
