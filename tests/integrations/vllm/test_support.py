"""Flags, metrics and messages of vLLM that docs/ and deploy/ name, looked up in vLLM itself."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import vllm

from tests.deployment import server_arguments, support_flags, support_rows, unknown_metrics


@cache
def parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def test_every_flag_exists() -> None:
    known = {option for action in parser()._actions for option in action.option_strings}
    assert len(support_flags("vllm")) > 15
    assert support_flags("vllm") - known == set()


def test_the_pod_starts_a_server_that_vllm_understands() -> None:
    found = vars(parser().parse_args(server_arguments("vllm")))
    assert (found["model_tag"] or found["model"]).startswith("/models/")
    assert found["tensor_parallel_size"] == 8
    assert found["max_model_len"] == 131072
    assert found["tool_call_parser"] == found["reasoning_parser"] == "minimax_m3"


def test_every_metric_exists() -> None:
    assert unknown_metrics("vllm", Path(vllm.__file__).parent) == set()


def test_refusals_of_vllm_are_in_its_sources() -> None:
    root = Path(vllm.__file__).parent
    folders = (root / "v1" / "worker", root / "config")
    text = " ".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    said = [
        quoted
        for _, cell, _ in support_rows()
        if "vLLM says" in cell
        for quoted in re.findall(r'"([^"]+)"', cell)
    ]
    assert said
    assert [quoted for quoted in said if quoted not in text] == []


def test_every_option_that_is_refused_has_a_row() -> None:
    from m3_vllm.options import _REFUSED

    options = " ".join(option for _, option, _ in _REFUSED)
    refused = set(re.findall(r"--[a-z][\w-]*", options))
    assert len(refused) > 4
    assert refused - support_flags("vllm") == set()
