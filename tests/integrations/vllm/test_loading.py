"""What the engine accepts at start: complete checkpoints, page sizes, cache dtypes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.vllm.engine import EngineError, EngineProcess

EXPERT = "language_model.model.layers.2.block_sparse_moe.experts.3.w2.weight"
INDEX_KEY = "language_model.model.layers.1.self_attn.index_k_proj.weight"


def copy_checkpoint(
    source: Path, target: Path, *, without: str = "", extra: dict[str, torch.Tensor] | None = None
) -> Path:
    """The checkpoint in one shard, with a tensor left out or some added."""
    target.mkdir()
    tensors = dict(extra or {})
    for shard in source.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if name != without}  # noqa: SIM118
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, target)
    return target


@pytest.mark.parametrize("name", [pytest.param(EXPERT, marks=pytest.mark.extended), INDEX_KEY])
def test_one_missing_tensor_stops_the_start_and_is_named(
    constructed_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    """Both are parts of fused parameters, which the host's own check would count as loaded."""
    broken = copy_checkpoint(constructed_checkpoint, tmp_path / "broken", without=name)
    module = name.removeprefix("language_model.").removesuffix(".weight")
    with pytest.raises(EngineError, match=rf"missing 1 tensor\(s\): {module}"):
        EngineProcess(broken)


@pytest.mark.extended
def test_a_left_over_tensor_stops_the_start_and_is_named(
    constructed_checkpoint: Path, tmp_path: Path
) -> None:
    name = "language_model.model.layers.0.self_attn.index_v_proj.weight"
    odd = copy_checkpoint(constructed_checkpoint, tmp_path / "odd", extra={name: torch.ones(2, 2)})
    with pytest.raises(EngineError, match=r"left over 1 tensor\(s\): .*index_v_proj\.weight"):
        EngineProcess(odd)


def test_mtp_tensors_are_passed_over_and_pages_may_be_larger(
    constructed_checkpoint: Path, tmp_path: Path
) -> None:
    """vLLM splits a 256-token page into the 128-token pages the kernels ask for."""
    mtp = {"language_model.model.mtp.layers.0.enorm.weight": torch.ones(4)}
    checkpoint = copy_checkpoint(constructed_checkpoint, tmp_path / "mtp", extra=mtp)
    prompts = [needle_prompt(seed, num_tokens=1500) for seed in (801, 802)]
    with EngineProcess(checkpoint, block_size=256, max_num_batched_tokens=2048) as engine:
        outputs = engine.generate([list(p.token_ids) for p in prompts], max_tokens=5)
    assert [tuple(o.token_ids) for o in outputs] == [p.expected_ids for p in prompts]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(
            {"block_size": 64}, r"No common block size for 64", marks=pytest.mark.extended
        ),
        (
            {"kv_cache_dtype": "fp8"},
            r"K and V cannot be cached as torch\.float8_e4m3fn: .*use one of these",
        ),
    ],
    ids=["block size", "cache dtype"],
)
def test_impossible_cache_options_are_refused(
    constructed_checkpoint: Path, options: dict, said: str
) -> None:
    with pytest.raises(EngineError, match=said):
        EngineProcess(constructed_checkpoint, **options)


@pytest.mark.extended
def test_a_config_m3_cannot_be_served_with_is_refused(
    random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = copy_checkpoint(random_checkpoint("engine"), tmp_path / "lse")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["sparse_attention_config"]["sparse_score_type"] = "lse"
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"sparse_score_type' must be 'max'.*got 'lse'"):
        EngineProcess(checkpoint)
