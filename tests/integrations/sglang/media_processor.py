"""Our processor as SGLang's tokenizer process builds it, in this process and without an engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def build(checkpoint: Path, **options: Any) -> Any:
    """An `M3Processor` on a checkpoint's files; options are those of SGLang's server."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.hf_transformers_utils import get_processor

    from m3_sglang.processors.minimax_m3 import M3Processor

    load_plugins()
    # its fields are made by a decorator that type checkers cannot follow
    given: dict[str, Any] = {"model_path": str(checkpoint), "device": "cpu", **options}
    arguments = ServerArgs(**given)
    arguments.resolve_once()
    publish(arguments, role="tokenizer")
    tokenizer = get_processor(str(checkpoint))
    from sglang.srt.configs.model_config import ModelConfig

    config = ModelConfig.from_server_args(arguments).hf_config
    return M3Processor(config, arguments, tokenizer, "default")


def prepare(processor: Any, prompt: str | list[int], **media: Any) -> Any:
    """What the scheduler would get for a request."""
    return asyncio.run(
        processor.process_mm_data_async(
            image_data=media.get("image"),
            audio_data=media.get("audio"),
            input_text=prompt,
            request_obj=SimpleNamespace(video_data=media.get("video")),
        )
    )
