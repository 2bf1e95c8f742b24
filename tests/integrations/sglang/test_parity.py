"""Random checkpoints against transformers in fp32: the cases of all hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.mixed_media import MixedMediaCases, MixedPrompt
from tests.integrations.parity import ParityCases
from tests.integrations.sglang.engine import EngineProcess


class TestParity(ParityCases, MixedMediaCases):
    """The cases of all hosts."""

    @pytest.fixture(scope="class")
    def engine(self, random_engine: EngineProcess) -> EngineProcess:
        return random_engine

    def dense_rows(self, engine: EngineProcess) -> int:
        return int(engine.metric("m3_plugin:dense_rows_total"))

    def start(self, checkpoint: Path, folder: Path, **options: Any) -> EngineProcess:
        return EngineProcess(checkpoint, log=folder / "engine.log", **options)

    def media_logprobs(self, engine: EngineProcess, prompt: MixedPrompt) -> tuple[int, list[float]]:
        found = engine.prompt_logprobs(
            {
                "prompt": prompt.text,
                "image_data": prompt.images,
                "video_data": [
                    torch.from_numpy(video).permute(0, 3, 1, 2) for video in prompt.videos
                ],
            }
        )
        return len(found) + 1, found

    def known(self, media: Tensor) -> Tensor:
        """SGLang has hashes where M3 has ids of media, and tells the last id's in their places."""
        return ~media[1:]
