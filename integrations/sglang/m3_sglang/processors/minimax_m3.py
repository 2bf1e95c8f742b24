"""Images and videos of a request -> what M3 sees, token for token as transformers prepares it.

SGLang's own processor sizes images by their long side (up to 2,016 pixels); this one runs
transformers' `MiniMaxM3VLProcessor`, which bounds the area. A prompt given as text goes through it
whole. A prompt given as token ids keeps them, and only its placeholders are replaced:

    image   start, N x image token, end                                N = h * w / 4
    video   per temporal patch (a pair of frames):
            "]<]12.0 seconds[>[" as plain text, start, N x video token, end

with grid (t, h, w) in 14x14 patches. Time stamps need frame rate and frame indices; a video that
comes as frames has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import (
    BaseMultimodalProcessor,
    MultimodalSpecialTokens,
)
from torch import Tensor
from transformers.models.minimax_m3_vl.processing_minimax_m3_vl import MiniMaxM3VLProcessor

from m3_plugin.host.metrics import count_refused_request
from m3_sglang.models.minimax_m3 import MiniMaxM3SparseForConditionalGeneration

MAX_FRAMES = 768


class M3Processor(BaseMultimodalProcessor):
    """Loads media with SGLang, prepares them and the prompt with transformers."""

    models: ClassVar = [MiniMaxM3SparseForConditionalGeneration]
    # ids come from our own layout, also for prompts given as ids: SGLang must not lay them out anew
    preserve_processor_input_ids = True
    gpu_image_decode = False

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        # what SGLang built from the checkpoint sizes images differently; its tokenizer stays
        processor = MiniMaxM3VLProcessor.from_pretrained(
            server_args.model_path, revision=server_args.revision
        )
        processor.tokenizer = getattr(_processor, "tokenizer", processor.tokenizer)
        super().__init__(hf_config, server_args, processor, *args, **kwargs)
        self.ids = TokenIds(processor)
        tokens = MultimodalSpecialTokens(
            image_token=processor.IMAGE_TOKEN,
            image_token_id=self.ids.image,
            video_token=processor.VIDEO_TOKEN,
            video_token_id=self.ids.video,
        )
        tokens.build(processor)
        # SGLang's own attribute may be None; this one is not
        self.mm_tokens = self.media_tokens = tokens

    async def process_mm_data_async(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_data: list | None,
        audio_data: list | None,
        input_text: str | list[int],
        request_obj: Any,
        **kwargs: Any,
    ) -> MultimodalProcessorOutput:
        """Everything the scheduler needs to know about a request with media.

        Raises
        ------
        ValueError : audio, or media and placeholders that do not match.
        """
        if audio_data:
            count_refused_request("audio")
            raise ValueError("MiniMax-M3 has no audio tower: send images or videos")
        loaded = await self.load_mm_data(
            prompt=input_text,  # pyright: ignore[reportArgumentType]  (SGLang tests for a list)
            image_data=image_data,
            video_data=request_obj.video_data,
            multimodal_tokens=self.media_tokens,
        )
        videos = [video_frames(video) for video in loaded.videos or ()]
        loaded.videos = [frames for frames, _ in videos]
        items, input_ids, _ = self.process_and_combine_mm_data(
            loaded,
            self.media_tokens,
            video_metadata=[metadata for _, metadata in videos],
            prompt=input_text,
        )
        return MultimodalProcessorOutput(
            input_ids=input_ids.tolist(),
            mm_items=items,
            im_start_id=self.ids.start,
            im_end_id=self.ids.end,
            im_token_id=self.ids.image,
            video_token_id=self.ids.video,
        )

    def process_mm_data(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_text: str,
        images: list | None = None,
        videos: list | None = None,
        audios: list | None = None,
        *,
        video_metadata: Sequence[dict[str, Any]] = (),
        prompt: str | list[int],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Called back by SGLang with the media it loaded; returns ids, pixel values and grids."""
        processor: Any = self._processor
        media: dict[str, Any] = {}
        if images:
            media |= {"images": images, "images_kwargs": dict(self.image_config)}
        if videos:
            # transformers takes frame sizes that are multiples of 28 only, unless it resizes them
            video_kwargs = {"do_resize": True, "do_sample_frames": False, **self.video_config}
            media |= {
                "videos": videos,
                "video_metadata": list(video_metadata),
                "videos_kwargs": video_kwargs,
            }
        # for ids, a text of placeholders only: pixel values do not depend on the prompt
        as_text = isinstance(prompt, str)
        text = (
            prompt
            if as_text
            else processor.IMAGE_TOKEN * len(images or ())
            + processor.VIDEO_TOKEN * len(videos or ())
        )
        result = dict(processor(text=[text], return_tensors="pt", **media))
        if videos:
            pairs = [-(-len(frames) // _pair(processor)) for frames in videos]
            result["video_grid_thw"] = join_segments(result["video_grid_thw"], pairs)
        if not as_text:
            assert isinstance(prompt, list)
            result["input_ids"] = torch.tensor([self._lay_out(prompt, result, video_metadata)])
        return {
            name: result[name]
            for name in (
                "input_ids",
                "pixel_values",
                "image_grid_thw",
                "pixel_values_videos",
                "video_grid_thw",
            )
            if name in result
        }

    def _lay_out(
        self, prompt: list[int], result: dict[str, Any], video_metadata: Sequence[dict[str, Any]]
    ) -> list[int]:
        """Replace each placeholder of a prompt given as ids by the tokens of its item."""
        merge_length = self._processor.image_processor.merge_size**2
        images = iter(result.get("image_grid_thw", torch.empty(0, 3)).tolist())
        videos = iter(
            zip(
                result.get("video_grid_thw", torch.empty(0, 3)).tolist(),
                video_metadata,
                strict=True,
            )
        )
        ids: list[int] = []
        for token in prompt:
            if token == self.ids.image:
                t, h, w = _next_item(images, "image")
                ids += self.ids.run(self.ids.image, t * h * w // merge_length)
            elif token == self.ids.video:
                (t, h, w), metadata = _next_item(videos, "video")
                for pair in range(t):
                    stamp = time_stamp(pair * _pair(self._processor), metadata)
                    if stamp is not None:
                        ids += self._tokenizer.encode(stamp, add_special_tokens=False)
                    ids += self.ids.run(self.ids.video, h * w // merge_length)
            else:
                ids.append(token)
        if next(images, None) is not None or next(videos, None) is not None:
            raise ValueError("more images or videos than placeholders in the prompt")
        return ids


class TokenIds:
    """The added tokens that images and videos are written with."""

    def __init__(self, processor: Any) -> None:
        self.image = int(processor.image_token_id)
        self.video = int(processor.video_token_id)
        self.start = int(processor.vision_start_token_id)
        self.end = int(processor.vision_end_token_id)

    def run(self, token: int, count: int) -> list[int]:
        """`count` media tokens between start and end."""
        return [self.start, *[token] * count, self.end]


def _next_item(items: Iterator[Any], modality: str) -> Any:
    item = next(items, None)
    if item is None:
        raise ValueError(f"more {modality} placeholders in the prompt than {modality}s sent")
    return item


def _pair(processor: Any) -> int:
    return processor.video_processor.temporal_patch_size


def time_stamp(frame: int, metadata: dict[str, Any]) -> str | None:
    """The text before the temporal patch that starts with `frame`; None if times are unknown."""
    fps, indices = metadata.get("fps"), metadata.get("frames_indices")
    if not fps or not indices:
        return None
    return f"]<]{indices[min(frame, len(indices) - 1)] / fps:.1f} seconds[>["


def video_frames(video: Any) -> tuple[Tensor, dict[str, Any]]:
    """Frames [n, channels, height, width] of a loaded video, and when they were shown.

    Parameters
    ----------
    video : SGLang's decoder, or frames as a tensor [n, channels, height, width]
    """
    if isinstance(video, torch.Tensor):
        return video, {"total_num_frames": len(video), "fps": None, "frames_indices": None}
    indices = sampled_frames(len(video), fps=video.avg_fps)
    # not as a tensor, for which SGLang pins memory even where there is no accelerator
    frames = torch.as_tensor(video.get_frames_at(indices)).permute(0, 3, 1, 2)
    return frames, {
        "total_num_frames": len(video),
        "fps": video.avg_fps,
        "frames_indices": indices,
    }


def sampled_frames(total: int, *, fps: float, wanted_fps: float = 1.0) -> list[int]:
    """Indices of the frames M3 looks at: one per second, each the first at least that much later.

    The last frame is always among them, as in the extraction the model was tuned with; more than
    `MAX_FRAMES` are thinned out evenly.
    """
    if total <= 0 or fps <= 0:
        raise ValueError(f"a video needs frames and a frame rate; got {total} and {fps}")
    # A little less than the interval: 30 frames at 30.0 fps are one second apart.
    interval = (1.0 / wanted_fps - 1e-4) * fps
    indices = [0]
    while (following := max(math.ceil(indices[-1] + interval), indices[-1] + 1)) < total:
        indices.append(following)
    if indices[-1] != total - 1:
        indices.append(total - 1)
    if len(indices) > MAX_FRAMES:
        kept = torch.linspace(0, len(indices) - 1, MAX_FRAMES, dtype=torch.float64).round().long()
        indices = [indices[i] for i in kept.tolist()]
    return indices


def join_segments(grid_thw: Tensor, pairs: Sequence[int]) -> Tensor:
    """One grid (t, h, w) per video [videos, 3], from one or several per video along time.

    Some transformers releases report each attention segment as a grid of its own; `pairs` holds
    the temporal patches of the whole videos. The rows of pixel values are the same either way.
    """
    segments = iter(grid_thw.tolist())
    joined = []
    for whole in pairs:
        t, h, w = next(segments)
        while t < whole:
            t += next(segments)[0]
        joined.append([t, h, w])
    return torch.tensor(joined, dtype=grid_thw.dtype)
