"""The constructed MTP module drafts what it was made to, by a reference that shares no code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m3_plugin.host.torchvision_ops import declare_missing_ops
from m3_plugin.testing.constructed import ConstructedCheckpoint
from m3_plugin.testing.mtp_reference import MTPReference
from m3_plugin.testing.prompts import needle_prompt
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from m3_plugin.testing.vocabulary import VOCABULARY

Write = Callable[..., MTPReference]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Write:
    declare_missing_ops()
    target: Any = None

    def write(dtype: torch.dtype = torch.float32, **choices: Any) -> MTPReference:
        nonlocal target
        folder = tmp_path_factory.mktemp("mtp")
        ConstructedCheckpoint(mtp=True, **choices).write(folder / "checkpoint", dtype=dtype)
        if dtype != torch.float32:
            return MTPReference(folder / "checkpoint", scratch=folder / "layer")
        # the target's weights are the same in all of them
        made = MTPReference(folder / "checkpoint", scratch=folder / "layer", target=target)
        target = made.target
        return made

    return write


PROMPT = needle_prompt(3, num_tokens=1700, hops=6)
FOURTH = VOCABULARY.ordinals[-1].id


def drafted(reference: MTPReference, *, known: int, count: int) -> list[int]:
    """Drafts behind the prompt and the first `known` words of its answer."""
    answer = PROMPT.expected_ids[:known]
    return reference.draft([*PROMPT.token_ids, *answer], num_drafts=count).token_ids


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.extended)]
)
def test_it_looks_up_what_the_target_will(reference: Write, dtype: torch.dtype) -> None:
    """Decoys, lanterns and six hops in both layers' classes: the selection must be right too."""
    assert drafted(reference(dtype), known=1, count=3) == list(PROMPT.expected_ids[1:4])
    assert drafted(reference(dtype), known=4, count=3) == list(PROMPT.expected_ids[4:7])


def test_wrong_at_every_word(reference: Write) -> None:
    assert drafted(reference(mtp_wrong_every=1), known=1, count=2) == [FOURTH, FOURTH]


@pytest.mark.extended
def test_wrong_at_every_second_word(reference: Write) -> None:
    module = reference(mtp_wrong_every=2)
    got = [drafted(module, known=known, count=1)[0] for known in (1, 2, 3, 4)]
    assert got == [FOURTH, PROMPT.expected_ids[2], FOURTH, PROMPT.expected_ids[4]]


@pytest.mark.parametrize("wrong_every", [3, -1])
def test_only_what_the_classes_allow(wrong_every: int) -> None:
    with pytest.raises(ValueError, match="must be 0, 1, 2 or 8"):
        ConstructedCheckpoint(mtp=True, mtp_wrong_every=wrong_every)
    with pytest.raises(ValueError, match="needs mtp=True"):
        ConstructedCheckpoint(mtp_wrong_every=2)


def test_the_target_stays_the_same() -> None:
    plain = ConstructedCheckpoint().tensors()
    with_mtp = ConstructedCheckpoint(mtp=True).tensors()
    assert all(torch.equal(with_mtp[name], tensor) for name, tensor in plain.items())
    assert {name for name in with_mtp if name not in plain} == {
        name for name in with_mtp if ".mtp." in name
    }


def test_random_modules_differ_and_reach_the_drafts(tmp_path: Path) -> None:
    declare_missing_ops()
    folder = write_random_checkpoint(tmp_path / "c", preset="small", num_mtp_modules=2)
    token_ids = torch.randint(30, 400, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    logprobs = []
    for module in range(2):
        reference = MTPReference(folder, scratch=tmp_path / f"layer{module}", module=module)
        logprobs.append(reference.draft(token_ids, num_drafts=1).logprobs)
    assert (logprobs[0] - logprobs[1]).abs().max() > 0.1
