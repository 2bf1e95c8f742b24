"""A whole model on the session: transformers' own MiniMax-M3, its sparse attention replaced.

transformers computes the expected tokens by dense attention under a mask. Prompts are longer than
the budget of blocks, so that a wrong selection changes what is attended to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.integrations import golden
from tests.integrations.cases import random_prompt

pytest.importorskip("transformers.models.minimax_m3_vl")

ROOT = Path(__file__).parents[3]
NUM_SPARSE_LAYERS = 3
BUDGET = 4 * 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    return write_random_checkpoint(folder, preset="small", dtype=torch.float32)


def generate(checkpoint: Path, ids: list[int], count: int, device: str, **env: str) -> Any:
    """In a process of its own: the attention function is registered for good."""
    arguments = [str(checkpoint), device, json.dumps(ids), str(count)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugin.attention.transformers_session", *arguments],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tokens_equal_transformers(checkpoint: Path) -> None:
    ids = random_prompt(7 * BUDGET + 3, seed=0)
    ours = generate(checkpoint, ids, 24, "cpu")
    assert ours["tokens"] == golden.greedy(checkpoint, ids, num_tokens=24)
    assert ours["calls"] == 24 * NUM_SPARSE_LAYERS


def test_tokens_of_the_triton_kernels_equal_transformers(checkpoint: Path) -> None:
    ids = random_prompt(BUDGET + 3, seed=1)
    ours = generate(checkpoint, ids, 3, "cpu", M3_PLUGIN_KERNELS="triton", TRITON_INTERPRET="1")
    assert ours["tokens"] == golden.greedy(checkpoint, ids, num_tokens=3)
    assert ours["calls"] == 3 * NUM_SPARSE_LAYERS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_on_a_gpu_equal_transformers(checkpoint: Path) -> None:
    ids = random_prompt(7 * BUDGET + 3, seed=0)
    ours = generate(checkpoint, ids, 24, "cuda")
    assert ours["tokens"] == golden.greedy(checkpoint, ids, num_tokens=24)
