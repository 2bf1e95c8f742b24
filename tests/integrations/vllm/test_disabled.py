"""With M3_PLUGIN_DISABLE=1 vLLM gets M3.1's folder as if the plugin were not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3_plugin.model.released import published_config
from tests.integrations.foreign import write
from tests.integrations.vllm.engine import ENVIRONMENT

pytestmark = pytest.mark.vllm

ASK = """
import json, sys
from types import SimpleNamespace
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.models import ModelRegistry, registry
from vllm.transformers_utils.config import get_config
# whether a class can be imported on this machine is not asked
registry._LazyRegisteredModel.load_model_cls = lambda self: self
config = get_config(sys.argv[1], trust_remote_code=False)
asked = SimpleNamespace(hf_config=config, model_impl="auto", convert_type="none")
found, _ = ModelRegistry.resolve_model_cls(config.architectures, asked)
method = config.quantization_config["quant_method"]
print("ANSWER", json.dumps({
    "model": found.module_name,
    "quantization": get_quantization_config(method).__name__,
    "ours": [name for name in QUANTIZATION_METHODS if name.startswith("m3_")],
}))
"""


@pytest.mark.extended
def test_m3_1_is_vllms_own(tmp_path: Path) -> None:
    """0.32 reads its experts as MXFP8, like all its weights; what it loads of them is its own."""
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
    assert answer["model"].startswith("vllm."), answer
    assert answer["quantization"] == "ModelOptMxFp8Config"
    assert answer["ours"] == []
