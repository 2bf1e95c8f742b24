"""M3.1's size, worked out from its config, beside what its published files take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from m3_plugin.checkpoint.names import linear_shape, text_modules
from m3_plugin.cli.fit import commands_for
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import find_model
from m3_plugin.quantization.chips import how_weights_run
from m3_plugin.quantization.dialects import is_linear
from m3_plugin.sizing.cache_bytes import cache_bytes_per_token

CONFIG = M3Config.from_hf(find_model("MiniMaxAI/MiniMax-M3.1-Flash").config)


def test_the_published_number_of_text_tensors() -> None:
    """Of 89,632 in the index, 523 are of the vision side."""
    assert CONFIG.quantization is not None
    count = 0
    for module in text_modules(CONFIG):
        weight = CONFIG.quantization.format_of(module)
        count += len(weight.parts(*linear_shape(CONFIG, module))) if is_linear(module) else 1
    assert count == 89_632 - 523


def test_every_layer_keeps_index_keys() -> None:
    """Bytes per token and rank, K and V and one index key per layer."""
    cache = cache_bytes_per_token(CONFIG, tp_size=1)
    three_dense = replace(CONFIG, sparse_layers=(False,) * 3 + (True,) * 57)
    fewer = cache_bytes_per_token(three_dense, tp_size=1)
    assert cache.total == 60 * (2 * 4 * 128 + 128) * 2 == 138_240
    assert cache.total - fewer.total == 3 * 128 * 2


@pytest.mark.parametrize(
    ("arch", "vllm", "sglang"),
    [
        (None, "CPU kernels", "CPU kernels"),
        (75, "DEQUANTIZE", "DEQUANTIZE"),
        (80, "Marlin", "Marlin"),
        (90, "Marlin", "Marlin"),
        (100, "Marlin", "SGLang's own"),
        (120, "Marlin", "Marlin"),
    ],
)
def test_which_chip_runs_it_how(arch: int | None, vllm: str, sglang: str) -> None:
    found = how_weights_run(CONFIG.quantization, arch=arch)
    assert vllm in found["vLLM"]
    assert sglang in found["SGLang"]


def test_a_command_for_sglangs_own_model_asks_nothing_of_the_plugin() -> None:
    commands = commands_for("MiniMaxAI/MiniMax-M3.1-Flash", "B200", tp_size=4, context=131_072)
    assert "M3_PLUGIN" not in commands["SGLang"]
    assert "--attention-backend" not in commands["SGLang"]
    assert "--kv-cache-dtype fp8_e4m3" in commands["SGLang"]
    assert "M3_PLUGIN_REQUIRED=1" in commands["vLLM"]
