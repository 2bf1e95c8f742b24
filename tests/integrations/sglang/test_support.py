"""Flags and metrics of SGLang that docs/ and deploy/ name, looked up in SGLang itself."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import sglang

from tests.deployment import server_arguments, support_flags, unknown_metrics


@cache
def parser() -> argparse.ArgumentParser:
    from sglang.srt.server_args import ServerArgs, add_attention_backend_choices

    from m3_sglang.options import BACKEND_NAME

    # as the plugin's registration does it
    add_attention_backend_choices([BACKEND_NAME])
    found = argparse.ArgumentParser()
    ServerArgs.add_cli_args(found)
    return found


def test_every_flag_exists() -> None:
    known = {option for action in parser()._actions for option in action.option_strings}
    assert len(support_flags("sglang")) > 15
    assert support_flags("sglang") - known == set()


def test_the_pod_starts_a_server_that_sglang_understands() -> None:
    found = vars(parser().parse_args(server_arguments("sglang")))
    assert found["model_path"].startswith("/models/")
    assert found["tp_size"] == 8
    assert found["context_length"] == 131072
    assert found["attention_backend"] == "msa"
    assert found["tool_call_parser"] == found["reasoning_parser"] == "minimax-m3"
    assert found["enable_metrics"]


def test_every_metric_exists() -> None:
    assert unknown_metrics("sglang", Path(sglang.__file__).parent) == set()


def test_every_argument_that_is_refused_has_a_row() -> None:
    from m3_sglang.options import _SERVED

    known = {option for action in parser()._actions for option in action.option_strings}
    refused = {f"--{name.replace('_', '-')}" for name in _SERVED} & known
    assert len(refused) > 10
    assert refused - support_flags("sglang") == set()
