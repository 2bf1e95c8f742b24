"""What both hosts are asked when they speculate, and the answers known by construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m3_plugin.testing.constructed import ConstructedCheckpoint
from m3_plugin.testing.hub_layout import EOS_TOKEN
from m3_plugin.testing.prompts import NeedlePrompt, colour_rgb, needle_prompt, picture_prompt
from m3_plugin.testing.vocabulary import VOCABULARY
from tests.integrations import golden
from tests.integrations.cases import random_prompt

PAGE = 128
# Generation passes 127, 128, 129; the budget of 4 blocks; 2047, 2048, 2049.
LENGTHS = (121, 506, 700, 2040)
NUM_TOKENS = 12


def random_prompts() -> list[list[int]]:
    """Prompts of `LENGTHS` for the random checkpoint."""
    return [random_prompt(length, seed=length) for length in LENGTHS]


def image() -> Any:
    """A picture of noise."""
    from PIL import Image

    noise = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(3))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def image_text(beginning: str = "") -> str:
    """A text around `image` that passes the random checkpoint's budget with it."""
    return f"{beginning}the old man ]<]image[>[ and the sea" + " of words" * 300


def drafting_checkpoint(folder: Path, *, wrong_every: int = 0) -> Path:
    """The constructed checkpoint with a module that errs at every `wrong_every`-th word."""
    checkpoint = ConstructedCheckpoint(mtp=True, mtp_wrong_every=wrong_every)
    return checkpoint.write(folder, dtype=torch.float32)


def ids(prompts: Sequence[NeedlePrompt]) -> list[list[int]]:
    return [list(prompt.token_ids) for prompt in prompts]


def answer(prompt: NeedlePrompt, count: int) -> list[int]:
    """`count` tokens of the constructed model when told to ignore the end.

    Behind the answer itself it goes round in a cycle of two: by design.
    """
    pair = [VOCABULARY.nowhere_id, VOCABULARY.id_of(EOS_TOKEN)]
    return (list(prompt.expected_ids) + pair * count)[:count]


def from_second_link(prompt: NeedlePrompt) -> NeedlePrompt:
    """The same text, asked for what the answer's first word means."""
    key = next(word for word in VOCABULARY.words if word.id == prompt.expected_ids[0])
    assert key.question_id is not None
    return replace(
        prompt,
        token_ids=(*prompt.token_ids[:-1], key.question_id),
        expected_ids=prompt.expected_ids[1:],
    )


def chains_of_eight_phases() -> list[NeedlePrompt]:
    """Long answers of which a module that errs at every eighth word gets other places wrong each.

    So the mistake falls on each place of a step.
    """
    whole = [needle_prompt(seed, num_tokens=420, hops=16, decoys=False) for seed in range(4)]
    return [chain for prompt in whole for chain in (prompt, from_second_link(prompt))]


PICTURE_ANSWER = " second yellow"


def picture_question() -> tuple[str, list[Any]]:
    """Text and pictures of a chain whose second word names a picture.

    Its answer is `PICTURE_ANSWER`: the target says the first word, and the draft of the colour
    needs the picture's embeddings.
    """
    from PIL import Image

    colours = ("blue", "yellow")
    pictures = [Image.new("RGB", (112, 112), colour_rgb(colour)) for colour in colours]
    shown = picture_prompt(colours, ask=1).text.rpartition(" question")[0]
    text = f"{shown} note : amber means second . and so on . question : follow amber?"
    return text, pictures


def around_a_chunk_end(tokenizer: Any, text: str, *, filler: str, size: int, end: int) -> list[str]:
    """The text behind fillers: `end` is a position before, inside and behind its first picture.

    Parameters
    ----------
    filler : one token
    size : of the picture, its start and end included
    """
    placeholder = tokenizer.convert_tokens_to_ids("]<]image[>[")
    at = tokenizer(text).input_ids.index(placeholder)
    texts = [filler * (end - inside - at) + text for inside in (0, 1, size // 2, size - 1, size)]
    for longer, inside in zip(texts, (0, 1, size // 2, size - 1, size), strict=True):
        assert tokenizer(longer).input_ids.index(placeholder) == end - inside
    return texts


def pictures_around_a_chunk_end(checkpoint: Path, *, end: int) -> list[tuple[str, list[Any]]]:
    """`picture_question` so; its first picture is 16 tokens between two."""
    from transformers import AutoTokenizer

    text, pictures = picture_question()
    texts = around_a_chunk_end(
        AutoTokenizer.from_pretrained(checkpoint),
        text,
        filler=VOCABULARY.fillers[0],
        size=18,
        end=end,
    )
    return [(longer, pictures) for longer in texts]


def require_transformers_tokens_around_a_chunk_end(
    checkpoint: Path, ask: Callable[[str], list[int]], *, end: int
) -> None:
    """Of the random checkpoint, whose every weight counts; `image` is 12 tokens between two.

    Parameters
    ----------
    ask : three greedy tokens behind a text with `image` in it, nothing of which is cached
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    texts = around_a_chunk_end(processor.tokenizer, image_text()[:40], filler="x", size=14, end=end)
    for text in texts:
        inputs = processor(text=text, images=[image()], return_tensors="pt")
        token_ids = inputs.pop("input_ids")[0].tolist()
        inputs.pop("attention_mask")
        assert ask(text) == golden.greedy(checkpoint, token_ids, num_tokens=3, **inputs)


def long_picture_questions(count: int, *, num_fillers: int) -> list[tuple[str, list[Any]]]:
    """`picture_question` behind texts that share no prefix."""
    text, pictures = picture_question()
    return [(VOCABULARY.fillers[i] * num_fillers + text, pictures) for i in range(count)]
