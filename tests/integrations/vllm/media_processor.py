"""Our processor as vLLM's front end builds it, in this process and without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def build(checkpoint: Path) -> Any:
    """An `M3MultiModalProcessor` on a checkpoint's files."""
    from vllm.config import ModelConfig
    from vllm.multimodal.processing.context import InputProcessingContext
    from vllm.tokenizers import cached_tokenizer_from_config

    from m3_vllm.media import M3DummyInputsBuilder, M3MultiModalProcessor, M3ProcessingInfo

    config = ModelConfig(model=str(checkpoint), dtype="float32", max_model_len=8192)
    info = M3ProcessingInfo(InputProcessingContext(config, cached_tokenizer_from_config(config)))
    return M3MultiModalProcessor(info, M3DummyInputsBuilder(info))
