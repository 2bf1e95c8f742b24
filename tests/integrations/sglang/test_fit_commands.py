"""What `m3-plugin fit` prints is what SGLang's own parser takes; and what it has no option for."""

from __future__ import annotations

import argparse
import shlex

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from tests.plugin.cli.schemas import checked

MODEL = "MiniMaxAI/MiniMax-M3-MXFP8"


@pytest.mark.parametrize(
    "options",
    [
        ("--gpu", "H100", "--max-model-len", "131072"),
        ("--gpu", "H200", "--kv-cache-dtype", "fp8", "--index-cache-dtype", "int8", "--text-only"),
        ("--gpu", "CPU", "--gpu-memory", "2000", "--tp", "1"),
    ],
    ids=["H100", "8 bits, text", "CPU"],
)
def test_the_parser_takes_what_fit_prints(options: tuple[str, ...]) -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    result = CliRunner().invoke(app, ["fit", "--model", MODEL, *options, "--json"])
    found = checked("fit", result.stdout)
    words = shlex.split(found["commands"]["SGLang"].replace("\\\n", " "))
    given = words[words.index("sglang.launch_server") + 1 :]
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = parser.parse_args(given)
    assert arguments.model_path == MODEL
    assert arguments.context_length == int(given[given.index("--context-length") + 1])
    assert arguments.enable_metrics
    if "CPU" not in options:
        assert arguments.attention_backend == "msa"
        assert arguments.tp_size == 8
    if "fp8" in options:
        assert arguments.kv_cache_dtype == "fp8_e4m3"


def test_serving_text_alone_is_not_for_minimax_m3() -> None:
    """The day SGLang allows it, fit can print `--language-model-only` for SGLang too."""
    from sglang.srt.server_args import ServerArgs

    allowed = getattr(ServerArgs, "LANGUAGE_MODEL_ONLY_ARCHITECTURES", ())
    assert not [name for name in allowed if "MiniMaxM3" in name]
