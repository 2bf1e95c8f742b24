"""What a deployer may choose otherwise: the dense backend, and SGLang's own image processor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations import golden
from tests.integrations.cases import random_prompt
from tests.integrations.sglang.engine import EngineProcess


@pytest.fixture(scope="module")
def engine(
    random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """Both choices at once: they have nothing to do with each other."""
    folder = tmp_path_factory.mktemp("choices")
    checkpoint = folder / "checkpoint"
    shutil.copytree(random_checkpoint("engine"), checkpoint)
    # SGLang's own processor pads, also a single prompt
    settings = checkpoint / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"pad_token": values["eos_token"]}))
    with EngineProcess(
        checkpoint,
        log=folder / "engine.log",
        attention_backend="flex_attention",
        environment={"SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": ""},
    ) as engine:
        yield engine


@pytest.mark.extended
def test_the_named_backend_serves_the_dense_layers_only(
    engine: EngineProcess, random_checkpoint: Callable[[str], Path]
) -> None:
    assert "3 MSA and 1 dense attention layers in this process, dense ones on TorchFlex" in (
        engine.log_text()
    )
    prompt = random_prompt(1300, seed=41)
    (ours,) = engine.generate([prompt], max_tokens=8, ignore_eos=True)
    assert ours.token_ids == golden.greedy(random_checkpoint("engine"), prompt, num_tokens=8)


# docs/sglang.md states these counts; transformers' rule, the default, gives 576 for both
@pytest.mark.extended
@pytest.mark.parametrize(("size", "num_image_tokens"), [((1024, 1024), 1369), ((1920, 1080), 2691)])
def test_sglangs_own_image_rule_stays_reachable(
    engine: EngineProcess, size: tuple[int, int], num_image_tokens: int
) -> None:
    from PIL import Image

    prompt: dict[str, Any] = {"prompt": "]<]image[>[", "image_data": [Image.new("RGB", size)]}
    (output,) = engine.generate([prompt], max_tokens=1)
    # beside the placeholders only the marks around them
    assert 0 <= output.num_prompt_tokens - num_image_tokens <= 2
