"""MiniMax-M3.1 through a real engine: what every host must answer, as one list.

A host's `test_m31.py` derives `M31Cases` with its engine on `m31_random` in the fixture `engine`,
and `M31Answers` with its engine on `m31_constructed` there. Both checkpoints are stored as M3.1 is.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from m3_plugin.model.released import published_config
from m3_plugin.testing.constructed import ConstructedCheckpoint
from m3_plugin.testing.dspark import add_dspark
from m3_plugin.testing.prompts import first_block_prompt, needle_prompt
from m3_plugin.testing.quantised import quantise_checkpoint, reference_checkpoint
from m3_plugin.testing.random_checkpoint import M31_PRESETS, write_random_checkpoint
from tests.integrations.cases import LOGPROB_ATOL, random_prompt
from tests.integrations.constructed import PAGE, answer, check
from tests.integrations.m31_reference import reference

PUBLISHED = "MiniMaxAI/MiniMax-M3.1-Flash"
DOCS = Path(__file__).parents[2] / "docs"
QUANT = "mxfp8-nvfp4"
# Of the constructed one: two places beside the own and the first block, as prompts for 4 expect.
TOPK, INIT = 5, 1
# Of scores in the hundreds, and of an expert's chance: another order of summing may take the other.
NEAR_TIE = 5e-4
# Matrices of a random one: nine of each of four layers, and three of eight experts in two.
DECODED = {"mxfp8": 4 * 9, "nvfp4": 2 * 8 * 3}
# Beside the model's dtype: what caches may hold on a CPU.
CACHES = (
    pytest.param({"M3_PLUGIN_CACHE_VALUES": "nvfp4"}, id="as NVFP4 rounds"),
    pytest.param({"M3_PLUGIN_INDEX_KEYS": "int8"}, id="index keys of int8"),
)
FOREIGN_TENSOR = "language_model.model.dspark.fc.weight"


def write_random(folder: Path, *, init: int) -> Path:
    """A random M3.1 with its draft model's folder beside, and the same numbers plain.

    `folder/stored` is as published, `folder/reference` what it means. One tensor of the draft also
    stands among the target's, as in some repositories.
    """
    shape = dataclasses.replace(M31_PRESETS["engine"], num_init_blocks=init)
    plain = write_random_checkpoint(folder / "plain", preset=shape, dtype=torch.bfloat16)
    reference_checkpoint(plain, folder / "reference", QUANT)
    add_draft(quantise_checkpoint(plain, folder / "stored", QUANT))
    return folder


def add_draft(checkpoint: Path) -> Path:
    """Put a draft model's folder into a checkpoint, and a tensor of it among the target's."""
    add_dspark(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    save_file({FOREIGN_TENSOR: torch.zeros(8, 40)}, checkpoint / "model-draft.safetensors")
    content["weight_map"][FOREIGN_TENSOR] = "model-draft.safetensors"
    index.write_text(json.dumps(content))
    return checkpoint


def write_constructed(folder: Path) -> Path:
    """The constructed M3.1 whose first block is always read, stored as published."""
    made = ConstructedCheckpoint(topk_blocks=TOPK, num_init_blocks=INIT, sparse_everywhere=True)
    plain = made.write(folder / "plain")
    stored = quantise_checkpoint(plain, folder / "stored", QUANT)
    shutil.rmtree(plain)
    return stored


def documented_options(program: str) -> list[str]:
    """What docs/m31.md types behind a host's program, without the model's name.

    Parameters
    ----------
    program : "vllm serve" or "sglang.launch_server"
    """
    page = (DOCS / "m31.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in page.splitlines() if f"{program} " in line]
    words = shlex.split(line.partition(f"{program} ")[2])
    assert words.count(PUBLISHED) == 1, line
    place = words.index(PUBLISHED)
    before = 1 if words[place - 1] == "--model-path" else 0
    return words[: place - before] + words[place + 1 :]


def write_published_config(folder: Path, *, layers: int | None = None) -> Path:
    """The published config in a folder, whole or of its first layers, which are in full size."""
    config = copy.deepcopy(published_config(PUBLISHED))
    if layers is not None:
        text = config["text_config"]
        holders = (text, text["sparse_attention_config"])
        for holder, name in ((h, n) for h in holders for n, v in h.items() if is_per_layer(v)):
            holder[name] = holder[name][:layers]
        text["num_hidden_layers"] = layers
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_per_layer(value: object) -> bool:
    return isinstance(value, list) and len(value) == 60


class M31Cases:
    """Tokens and log probabilities; `engine` computes in fp32 and takes 4,096 tokens.

    Attributes
    ----------
    init : first blocks that are always read
    """

    init: ClassVar[int] = 2

    @pytest.fixture(scope="class")
    def checkpoint(self, m31_random: Callable[[int], Path]) -> Path:
        return m31_random(self.init)

    @pytest.mark.parametrize("length", [127, 513, 2300])
    def test_greedy_tokens_and_logprobs_are_the_reference_s(
        self, engine: Any, checkpoint: Path, length: int
    ) -> None:
        """The last prompt fills 18 blocks, of which a row reads 4.

        Few rows differ, and only as far as the reference itself goes where its near ties are
        broken the other way: in the row of the tie, and in rows that read that one.
        """
        expected = reference(checkpoint / "reference")
        prompt = random_prompt(length, seed=length)
        (ours,) = engine.generate([prompt], max_tokens=4, ignore_eos=True)
        likeliest = expected.next_tokens([*prompt, *ours.token_ids])
        assert ours.token_ids == likeliest[length - 1 : -1]
        wanted = expected.token_logprobs(prompt)
        off = (torch.as_tensor(engine.prompt_logprobs(prompt)) - wanted).abs()
        assert (off > LOGPROB_ATOL).float().mean() < 0.01
        if (off > LOGPROB_ATOL).any():
            ties = expected.gaps[:-1] <= NEAR_TIE
            assert ties[: int((off > LOGPROB_ATOL).nonzero()[0]) + 1].any()
            reach = (expected.token_logprobs(prompt, tie=NEAR_TIE) - wanted).abs()
            # the engine may break some of the ties so, and the effects of several may cancel
            assert (off <= LOGPROB_ATOL + 2 * reach).all(), torch.stack([off, reach]).T

    def test_another_number_of_first_blocks_is_another_model(
        self, engine: Any, checkpoint: Path
    ) -> None:
        """So that the cases see whether they are read."""
        prompt = random_prompt(1100, seed=1100)
        ours = torch.as_tensor(engine.prompt_logprobs(prompt))
        rule = reference(checkpoint / "reference").config["sparse_attention_config"]
        for init in {0, 1, 2} - {self.init}:
            rule["sparse_init_block"] = init
            other = reference(checkpoint / "reference").token_logprobs(prompt)
            assert ((ours - other).abs() > LOGPROB_ATOL).float().mean() > 0.1
        rule["sparse_init_block"] = self.init


class M31Answers:
    """Known answers; `engine` takes 10,000 tokens in chunks of 2,048."""

    def test_only_a_first_block_that_is_always_read_answers(self, engine: Any) -> None:
        prompts = [first_block_prompt(seed, num_tokens=2500, topk_blocks=TOPK) for seed in (1, 2)]
        check(prompts, answer(engine, prompts))

    def test_forced_blocks_count_within_the_budget(self, engine: Any) -> None:
        """Decoys are next in rank: a block too many is a wrong word. In chunks, and in a batch."""
        prompts = [
            needle_prompt(seed, num_tokens=tokens)
            for seed, tokens in enumerate((1408, 2049, 5000, 8192))
        ]
        completions = answer(engine, prompts)
        check(prompts, completions)
        assert prompts[-1].dense_answer not in (None, completions[-1].text)

    def test_a_prefix_from_the_cache_answers_the_same(self, engine: Any) -> None:
        prompt = needle_prompt(501, num_tokens=3000)
        first, second = (answer(engine, [prompt]) for _ in range(2))
        check([prompt], first)
        check([prompt], second)
        assert second[0].num_cached_tokens == 2999 // PAGE * PAGE
