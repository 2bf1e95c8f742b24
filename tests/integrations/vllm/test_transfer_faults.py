"""What is left of a store that failed in the middle: an error.

Never a word that is not the model's own. Prompts are longer than the sparse layers read, among
decoys, so that index keys which are lost or another's lead to a wrong one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from tests.integrations.vllm.engine import Completion, EngineDiedError, EngineError, EngineProcess
from tests.integrations.vllm.killed_worker import FILES

pytestmark = pytest.mark.extended

PROMPT = needle_prompt(71, num_tokens=2700)


def on_storage(checkpoint: Path, storage: Path, **options: Any) -> EngineProcess:
    """An engine that saves pages of prompts to files, layer by layer, and reads them."""
    return EngineProcess(
        checkpoint,
        max_num_batched_tokens=4096,
        kv_transfer_config={
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(storage)},
        },
        **options,
    )


def ask(engine: EngineProcess, prompt: NeedlePrompt = PROMPT) -> Completion:
    (output,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
    return output


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("pattern", "harm", "said"),
    [
        ("*.1.self_attn.attn.safetensors", Path.unlink, "No such file or directory: .*safetensors"),
        ("*.index_cache.safetensors", Path.unlink, "No such file or directory: .*index_cache"),
        ("*.index_cache.safetensors", cut, "SafetensorError"),
    ],
)
def test_files_that_are_gone_or_cut_when_they_are_read(
    constructed_checkpoint: Path,
    tmp_path: Path,
    pattern: str,
    harm: Callable[[Path], None],
    said: str,
) -> None:
    """The lookup finds a folder; what was in it is lost before the pages are filled."""
    with on_storage(constructed_checkpoint, tmp_path / "pages") as engine:
        assert tuple(ask(engine).token_ids) == PROMPT.expected_ids
        assert engine.flush()
        file = next(iter(sorted((tmp_path / "pages").rglob(pattern))))
        harm(file)
        with pytest.raises(EngineError, match=said):
            ask(engine)


def test_an_engine_that_is_killed_while_it_stores(
    constructed_checkpoint: Path, tmp_path: Path
) -> None:
    """The next one finds its folder, and in it half a file and none of the layers behind it."""
    with (
        on_storage(
            constructed_checkpoint,
            tmp_path / "pages",
            worker_extension_cls="tests.integrations.vllm.killed_worker.KilledWorker",
            environment={FILES: "1"},
        ) as engine,
        pytest.raises(EngineDiedError),
    ):
        ask(engine)
    assert len(list((tmp_path / "pages").rglob("*.safetensors"))) == 2
    with (
        on_storage(constructed_checkpoint, tmp_path / "pages") as engine,
        pytest.raises(EngineError, match=r"No such file or directory: .*index_cache"),
    ):
        ask(engine)


def test_ranks_that_store_under_one_name_are_noticed(
    constructed_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """vLLM's example writes a layer's file once for all ranks: heads of one are read by another.

    The rank that sees it says so in the log; the other waits for it until vLLM gives up.
    """
    with on_storage(
        constructed_checkpoint,
        tmp_path / "pages",
        tensor_parallel_size=2,
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "M3_PLUGIN_VERIFY_TRANSFER": str(tmp_path / "rows"),
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "60",
        },
    ) as engine:
        assert tuple(ask(engine).token_ids) == PROMPT.expected_ids
        assert engine.flush()
        with pytest.raises(EngineError):
            ask(engine)
    said = "".join(capfd.readouterr())
    assert "no server that writes into this folder stored such K and V there" in said
