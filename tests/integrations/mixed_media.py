"""Pictures and videos of one prompt in every order, on real engines, against transformers in fp32.

The log probability of every token of the prompt is compared, so that every picture's place and
every weight of the tower counts. A host's `test_parity.py` derives `MixedMediaCases`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.integrations import golden
from tests.integrations.cases import LOGPROB_ATOL

# All orders of two pictures and two videos.
ORDERS = sorted({"".join(order) for order in itertools.permutations("iivv")})
_PLACES = {"i": "]<]image[>[", "v": "]<]video[>["}
# heights and widths, so that no item passes for another
_SIZES = {"i": ((90, 120), (56, 84)), "v": ((56, 112), (84, 84))}


@dataclass(frozen=True, kw_only=True)
class MixedPrompt:
    """A text with its media: Pillow's pictures, and videos [2, height, width, 3], uint8."""

    text: str
    images: list[Any]
    videos: list[np.ndarray]


def mixed_prompt(order: str) -> MixedPrompt:
    """Past the random checkpoint's block budget, the media among its first tokens."""
    generator = np.random.default_rng(5)
    images, videos = (
        [generator.integers(0, 256, (count, *size, 3), np.uint8) for size in _SIZES[kind]]
        for kind, count in (("i", 1), ("v", 2))
    )
    words = "".join(f"the old man {_PLACES[kind]} and" for kind in order)
    pictures = [Image.fromarray(image[0]) for image in images]
    return MixedPrompt(text=words + " the sea" * 120, images=pictures, videos=videos)


def prepared(checkpoint: Path, prompt: MixedPrompt) -> Any:
    """The prompt's ids, pixel values and grids by transformers' processor; videos have no times."""
    from transformers import AutoProcessor

    untimed = {"fps": None, "frames_indices": None, "total_num_frames": 2}
    return AutoProcessor.from_pretrained(checkpoint)(
        text=prompt.text,
        images=prompt.images,
        videos=[torch.from_numpy(video).permute(0, 3, 1, 2) for video in prompt.videos],
        video_metadata=[untimed] * len(prompt.videos),
        videos_kwargs={"do_sample_frames": False, "do_resize": True},
        return_tensors="pt",
    )


def expected(checkpoint: Path, prompt: MixedPrompt) -> tuple[list[int], Tensor]:
    """Token ids of the prompt, and the log probability of each after the first by transformers."""
    inputs = prepared(checkpoint, prompt)
    token_ids = inputs.input_ids[0].tolist()
    return token_ids, golden.media_logprobs(checkpoint, token_ids, inputs)


class MixedMediaCases:
    """Derive beside the host's other cases, with its engine in the fixture `engine`."""

    def media_logprobs(self, engine: Any, prompt: MixedPrompt) -> tuple[int, list[float]]:
        """Tokens of the prompt, and the log probability of each after the first."""
        raise NotImplementedError

    def known(self, media: Tensor) -> Tensor:
        """Of which tokens after the first the host tells the log probability, bool [len - 1].

        Parameters
        ----------
        media : whether a token is one of a picture or video, bool [len]
        """
        return torch.ones_like(media[1:])

    @pytest.mark.parametrize("order", ORDERS)
    def test_media_in_every_order(self, engine: Any, checkpoint: Path, order: str) -> None:
        prompt = mixed_prompt(order)
        token_ids, right = expected(checkpoint, prompt)
        count, ours = self.media_logprobs(engine, prompt)
        assert count == len(token_ids) > 512
        media = torch.isin(torch.tensor(token_ids), torch.tensor(golden.media_ids(checkpoint)))
        known = self.known(media)
        assert known.sum() > len(token_ids) / 2
        found = torch.tensor(ours)
        assert found.isfinite().all()
        torch.testing.assert_close(found[known], right[known], atol=LOGPROB_ATOL, rtol=0)
