"""The ops' READMEs have one shape, and their examples and contract tables are true."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import m3_kernels
from m3_kernels.cache_store import cache_store
from m3_kernels.dense_attention import dense_attention
from m3_kernels.index_merge import index_merge
from m3_kernels.index_topk import index_topk
from m3_kernels.mxfp8_linear import mxfp8_linear
from m3_kernels.norm_rope_store import norm_rope_store
from m3_kernels.page_table import fill_page_table
from m3_kernels.quantised_experts import quantised_experts
from m3_kernels.quantised_linear import quantised_linear
from m3_kernels.sparse_attention import sparse_attention
from m3_kernels.work_plan import fill_work_plan

PACKAGE = Path(m3_kernels.__file__).parent
OPS = {
    "cache_store": cache_store,
    "dense_attention": dense_attention,
    "index_merge": index_merge,
    "index_topk": index_topk,
    "mxfp8_linear": mxfp8_linear,
    "norm_rope_store": norm_rope_store,
    "page_table": fill_page_table,
    "quantised_experts": quantised_experts,
    "quantised_linear": quantised_linear,
    "sparse_attention": sparse_attention,
    "work_plan": fill_work_plan,
}
HEADINGS = ["## Purpose", "## Example", "## Contract", "## Maths", "## Limits"]


def readme(op: str) -> str:
    return (PACKAGE / op / "README.md").read_text()


def test_every_op_has_a_readme() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/interface.py")} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_headings(op: str) -> None:
    lines = readme(op).splitlines()
    assert lines[0] == f"# {op}"
    assert [line for line in lines if line.startswith("## ")] == HEADINGS


@pytest.mark.parametrize("op", OPS)
def test_the_example_runs(op: str) -> None:
    code = re.findall(r"## Example\n```python\n(.*?)```", readme(op), re.DOTALL)
    assert len(code) == 1
    exec(code[0], {})


@pytest.mark.parametrize("op", OPS)
def test_the_contract_names_every_argument(op: str) -> None:
    table = readme(op).split("## Contract")[1].split("## Maths")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    parameters = set(inspect.signature(OPS[op]).parameters) - {"backend"}
    assert parameters <= named
