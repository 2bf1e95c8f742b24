"""What `m3-plugin fit` prints is what vLLM's own parser and configuration take, and does it."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from tests.integrations.vllm.engine import HOST
from tests.plugin.cli.schemas import checked

MODEL = "MiniMaxAI/MiniMax-M3-MXFP8"
CPU = ("--gpu", "CPU", "--gpu-memory", "2000", "--tp", "1")

# The class under vLLM's configuration of these options: whether it has a tower, and what loads.
BUILD = """
import json, sys, tempfile
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype

load_general_plugins()
arguments = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
    ["--model", sys.argv[1], "--max-model-len", "2048", "--enforce-eager", *sys.argv[2:]]
)
config = EngineArgs.from_cli_args(arguments).create_engine_config()
with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
    init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
    initialize_model_parallel(1, 1)
    with set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config)
    loader = get_model_loader(config.load_config)
    loaded = model.load_weights(loader.get_all_weights(config.model_config, model))
media = config.model_config.multimodal_config
found = {
    "class": type(model).__module__,
    "tower_left_out": isinstance(model.vision_tower, StageMissingLayer),
    "tower_parameters": sum(n.startswith("vision_tower") for n, _ in model.named_parameters()),
    "text_is_loaded": any(n.startswith("language_model") for n in loaded),
    "images": media.get_limit_per_prompt("image"),
    "skips_profile": media.skip_mm_profiling,
}
print("FOUND" + json.dumps(found))
"""


def arguments_module() -> Any:
    """Where vLLM has the arguments of its server."""
    try:
        return importlib.import_module("vllm.entrypoints.launchers.cli_args")
    except ImportError:  # vLLM 0.31
        return importlib.import_module("vllm.entrypoints.openai.cli_args")


@pytest.mark.parametrize(
    "options",
    [
        ("--gpu", "H100", "--max-model-len", "131072"),
        ("--gpu", "H200", "--kv-cache-dtype", "fp8", "--index-cache-dtype", "int8", "--text-only"),
        CPU,
    ],
    ids=["H100", "8 bits, text", "CPU"],
)
def test_the_parser_takes_what_fit_prints(options: tuple[str, ...]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    result = CliRunner().invoke(app, ["fit", "--model", MODEL, *options, "--json"])
    found = checked("fit", result.stdout)
    words = shlex.split(found["commands"]["vLLM"].replace("\\\n", " "))
    after = "serve" if "serve" in words else "vllm.entrypoints.openai.api_server"
    given = words[words.index(after) + 1 :]
    arguments = arguments_module().make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    engine = EngineArgs.from_cli_args(arguments)
    assert MODEL in (engine.model, getattr(arguments, "model_tag", None))
    assert engine.max_model_len == int(given[given.index("--max-model-len") + 1])
    assert engine.language_model_only is ("--text-only" in options)
    assert engine.skip_mm_profiling is ("--text-only" not in options)
    if "fp8" in options:
        assert engine.kv_cache_dtype == "fp8_e4m3"


# a process that imports vLLM and builds its configuration: as long as an engine's start
@pytest.mark.extended
def test_our_class_does_what_these_options_say(random_checkpoint: Callable[[str], Path]) -> None:
    """Without a tower the text is loaded all the same, and images are not taken."""
    options = ("--language-model-only", "--skip-mm-profiling")
    done = HOST.interpret("-c", BUILD, random_checkpoint("engine"), *options)
    found: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2].splitlines()[0])
    assert found == {
        "class": "m3_vllm.model",
        "tower_left_out": True,
        "tower_parameters": 0,
        "text_is_loaded": True,
        "images": 0,
        "skips_profile": True,
    }
