"""With M3_PLUGIN_DISABLE=1 SGLang gets M3.1's folder as if the plugin were not there."""

from __future__ import annotations

from m3_sglang.compat import serves_own_experts
from tests.integrations.disabled import DisabledCases
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
try:
    from sglang.srt.arg_groups.model_overrides.minimax_m3 import _resolve_quant_method
except ImportError:
    _resolve_quant_method = lambda config: None

def answer(folder):
    config = get_config(folder, trust_remote_code=False)
    asked = SimpleNamespace(hf_config=config, model_impl=ModelImpl.AUTO, quantization=None)
    return {
        "model": get_model_architecture(asked)[0].__module__,
        "quantization": _resolve_quant_method(config),
        "ours": [name for name in QUANTIZATION_METHODS if name.startswith("m3_")],
    }

print("ANSWER", json.dumps([answer(folder) for folder in sys.argv[1:]]))
"""


class TestDisabled(DisabledCases):
    """SGLang 0.5.23 has a method for M3.1, earlier releases have none."""

    ask = ASK
    environment = ENVIRONMENT
    model = "sglang.srt.models.minimax_m3_vl"
    quantization = "minimax_m3_nvfp4" if serves_own_experts() else None
