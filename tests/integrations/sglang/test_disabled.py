"""With M3_PLUGIN_DISABLE=1 SGLang gets M3.1's folder as if the plugin were not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3_plugin.model.released import published_config
from m3_sglang.compat import serves_own_experts
from tests.integrations.foreign import write
from tests.integrations.sglang.engine import ENVIRONMENT

ASK = """
import json, sys
from types import SimpleNamespace
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.configs.model_config import ModelImpl
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.model_loader.utils import get_model_architecture
from sglang.srt.utils.hf_transformers_utils import get_config
config = get_config(sys.argv[1], trust_remote_code=False)
asked = SimpleNamespace(hf_config=config, model_impl=ModelImpl.AUTO, quantization=None)
answer = {"model": get_model_architecture(asked)[0].__module__}
try:
    from sglang.srt.arg_groups.model_overrides.minimax_m3 import _resolve_quant_method
    answer["quantization"] = _resolve_quant_method(config)
except ImportError:
    answer["quantization"] = None
answer["ours"] = [name for name in QUANTIZATION_METHODS if name.startswith("m3_")]
print("ANSWER", json.dumps(answer))
"""


@pytest.mark.extended
def test_m3_1_is_sglangs_own(tmp_path: Path) -> None:
    """As far as a CPU goes: the class and the method; 0.5.23 knows M3.1's."""
    folder = write(tmp_path / "m31", published_config("MiniMaxAI/MiniMax-M3.1-Flash"))
    environment = {**os.environ, **ENVIRONMENT, "M3_PLUGIN_DISABLE": "1"}
    environment.pop("M3_PLUGIN_REQUIRED", None)
    result = subprocess.run(
        [sys.executable, "-c", ASK, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("ANSWER")]
    answer = json.loads(line.removeprefix("ANSWER "))
    assert answer["model"] == "sglang.srt.models.minimax_m3_vl", answer
    assert answer["ours"] == []
    if serves_own_experts():
        assert answer["quantization"] == "minimax_m3_nvfp4"
