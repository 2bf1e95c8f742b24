"""With M3_PLUGIN_DISABLE=1 vLLM gets M3.1's folder as if the plugin were not there."""

from __future__ import annotations

from tests.integrations.disabled import DisabledCases
from tests.integrations.vllm.engine import ENVIRONMENT

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

def answer(folder):
    config = get_config(folder, trust_remote_code=False)
    asked = SimpleNamespace(hf_config=config, model_impl="auto", convert_type="none")
    found, _ = ModelRegistry.resolve_model_cls(config.architectures, asked)
    method = config.quantization_config["quant_method"]
    return {
        "model": found.module_name,
        "quantization": get_quantization_config(method).__name__,
        "ours": [name for name in QUANTIZATION_METHODS if name.startswith("m3_")],
    }

print("ANSWER", json.dumps([answer(folder) for folder in sys.argv[1:]]))
"""


class TestDisabled(DisabledCases):
    """vLLM 0.32 reads experts as MXFP8, like all weights; what it loads of them is its own."""

    ask = ASK
    environment = ENVIRONMENT
    model = "vllm."
    quantization = "ModelOptMxFp8Config"
