"""Images and videos of a request -> what M3 sees, token for token as transformers prepares it.

transformers' own `MiniMaxM3VLProcessor` makes the pixel values; this module lays the placeholder
tokens out as that processor does, on the token ids vLLM works with:

    image   start, N x image token, end                                N = h * w / 4
    video   per temporal patch (a pair of frames):
            "]<]12.0 seconds[>[" as plain text, start, N x video token, end

with grid (t, h, w) in 14x14 patches. Both use the image's start and end tokens; the vocabulary's
own pair for videos is used by nobody. Time stamps need the frame rate and the frames' indices,
which vLLM's video loaders report; without them there are none. A video stays one item of grid
(t, h, w) here; cutting it into attention segments is the vision tower's business.

Video frames are resized unless asked otherwise. transformers does not resize them by default, but
then fails on every frame size that is not a multiple of 28. Where it accepts, resizing changes
nothing as long as a frame's area is within the video processor's min_pixels (56x56) and max_pixels
(896x672); beyond that, resizing keeps a request within what the engine has reserved. For
transformers' default, pass `mm_processor_kwargs={"videos_kwargs": {"do_resize": False}}`.

One step before us differs from transformers for every model: vLLM lays transparent images over
white, where transformers drops the alpha channel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.models.minimax_m3_vl.processing_minimax_m3_vl import MiniMaxM3VLProcessor
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageSize, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoBackend

from m3_plugin.host.metrics import count_refused_request
from m3_plugin.model.vision import M3Vision
from m3_vllm.front_end import export_from_front_end

# vLLM's own M3 registers a video loader for the same processor when it is imported, which the host
# may do late (warm-up, drafting); imported first, it cannot replace ours. A release without it has
# nothing to replace with.
with contextlib.suppress(ImportError):
    import vllm.models.minimax_m3.common.mm_preprocess  # noqa: F401

__all__ = [
    "M3DummyInputsBuilder",
    "M3MultiModalMixin",
    "M3MultiModalProcessor",
    "M3ProcessingInfo",
    "M3VideoLoader",
    "PatchGeometry",
]

# MiniMax's service refuses videos of more pixels, counted over all frames after resizing.
_MAX_VIDEO_PIXELS = 301_056_000
# Beyond this aspect ratio transformers refuses an image.
_MAX_ASPECT = 200
_PLACEHOLDERS = {
    "image": MiniMaxM3VLProcessor.IMAGE_TOKEN,
    "video": MiniMaxM3VLProcessor.VIDEO_TOKEN,
}


def _refuse(modality: str) -> ValueError:
    count_refused_request(modality)
    if modality == "audio":
        return ValueError("MiniMax-M3 has no audio tower: send images or videos")
    return ValueError(f"MiniMax-M3 takes images and videos; got {modality!r}")


@dataclass(frozen=True, kw_only=True)
class PatchGeometry:
    """How one of transformers' two vision processors turns pixels into tokens.

    Sides are rounded to multiples of `factor`, the area is brought between `min_pixels` and
    `max_pixels`, and each `factor` x `factor` square of what comes out is one token.
    """

    factor: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, processor: Any) -> PatchGeometry:
        # The bounds are edges of `size` where the processor has them, else attributes.
        size = getattr(processor, "size", None)
        return cls(
            factor=processor.patch_size * processor.merge_size,
            temporal_patch_size=processor.temporal_patch_size,
            min_pixels=_entry(size, "shortest_edge") or processor.min_pixels,
            max_pixels=_entry(size, "longest_edge") or processor.max_pixels,
        )

    @property
    def max_tokens(self) -> int:
        """Bound of the tokens of an image, or of one temporal patch of a video."""
        area = self.max_pixels / self.factor**2
        # No side shrinks below one factor, so that a long strip may keep more than the area.
        strip = math.sqrt(_MAX_ASPECT * area)
        # Enlarging rounds both sides up.
        least = self.min_pixels / self.factor**2
        enlarged = least + math.sqrt(_MAX_ASPECT * least) + math.sqrt(least / _MAX_ASPECT) + 1
        return max(math.floor(area), math.ceil(strip), math.floor(enlarged))

    @property
    def largest(self) -> ImageSize:
        """A size with as many tokens as `max_pixels` has room for, near to a square."""
        units = max(self.max_pixels // self.factor**2, 1)
        short = max(n for n in range(1, math.isqrt(units) + 1) if units % n == 0)
        if units // short > short * _MAX_ASPECT:
            short = math.isqrt(units)
        return ImageSize(width=units // short * self.factor, height=short * self.factor)

    def pairs(self, num_frames: int) -> int:
        """Temporal patches of a video; an odd last frame is repeated."""
        return -(-num_frames // self.temporal_patch_size)


def _entry(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)


class M3ProcessingInfo(BaseProcessingInfo):
    """What vLLM may expect of M3's inputs: modalities, processor, upper bounds of token counts.

    The API server makes one even for a server without images and videos, so it says there that the
    plugin serves.
    """

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ctx)
        export_from_front_end()

    def get_hf_processor(self, **kwargs: object) -> MiniMaxM3VLProcessor:
        return self.ctx.get_hf_processor(MiniMaxM3VLProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(_PLACEHOLDERS)

    def get_data_parser(self) -> MultiModalDataParser:
        # With metadata beside the frames, time stamps survive vLLM's processor cache.
        return _DataParser(
            video_needs_metadata=True,
            expected_hidden_size=self._get_expected_hidden_size(),
        )

    def parse_mm_data(
        self, mm_data: MultiModalDataDict, *, validate: bool = True
    ) -> MultiModalDataItems:
        for modality in mm_data:
            if modality not in _PLACEHOLDERS:
                raise _refuse(modality)
        return super().parse_mm_data(mm_data, validate=validate)

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality not in _PLACEHOLDERS:
            raise _refuse(modality)
        super().validate_num_items(modality, num_items)

    def image_geometry(self) -> PatchGeometry:
        geometry = PatchGeometry.of(self.get_hf_processor().image_processor)
        # A bound configured for images alone does not reach the processor's own settings.
        kwargs = self.ctx.get_merged_mm_kwargs({}).get("images_kwargs") or {}
        bound = _entry(kwargs.get("size"), "longest_edge") or kwargs.get("max_pixels")
        return replace(geometry, max_pixels=bound or geometry.max_pixels)

    def video_geometry(self) -> PatchGeometry:
        geometry = PatchGeometry.of(self.get_hf_processor().video_processor)
        kwargs = self.ctx.get_merged_mm_kwargs({}).get("videos_kwargs") or {}
        return replace(geometry, max_pixels=kwargs.get("max_pixels") or geometry.max_pixels)

    def max_video_frames(self, seq_len: int, *, num_videos: int = 1) -> int:
        """Frames of the longest video of the largest size that a prompt of `seq_len` has room for.

        At least one temporal patch, and at most what MiniMax's service accepts: vLLM refuses a
        longer video with a message instead of reserving gigabytes for it.
        """
        geometry = self.video_geometry()
        size = geometry.largest
        room = seq_len // max(num_videos, 1) // geometry.max_tokens
        most = _MAX_VIDEO_PIXELS // (size.width * size.height) // geometry.temporal_patch_size
        return max(min(room, most), 1) * geometry.temporal_patch_size

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        video = self.video_geometry()
        frames = self.max_video_frames(seq_len, num_videos=mm_counts.get("video", 1))
        return {
            "image": self.image_geometry().max_tokens,
            "video": video.pairs(frames) * video.max_tokens,
        }


class M3DummyInputsBuilder(BaseDummyInputsBuilder[M3ProcessingInfo]):
    """The largest inputs, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(
            text * mm_counts.get(modality, 0) for modality, text in _PLACEHOLDERS.items()
        )

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        num_images, num_videos = mm_counts.get("image", 0), mm_counts.get("video", 0)
        image = self.info.image_geometry().largest
        video = self.info.video_geometry().largest
        return {
            "image": self._get_dummy_images(
                width=image.width,
                height=image.height,
                num_images=num_images,
                overrides=mm_options.get("image"),
            ),
            "video": self._get_dummy_videos(
                width=video.width,
                height=video.height,
                num_frames=self.info.max_video_frames(seq_len, num_videos=num_videos),
                num_videos=num_videos,
                overrides=mm_options.get("video"),
            ),
        }


class _DataParser(MultiModalDataParser):
    """vLLM's parser, for videos that may come without metadata."""

    def _get_video_with_metadata(self, video: Any) -> Any:
        frames, metadata = super()._get_video_with_metadata(video)
        return frames, metadata or {}


@dataclass(frozen=True, kw_only=True)
class _VideoTime:
    """When the frames of a video were shown, as far as that is known."""

    fps: float | None
    frames_indices: Sequence[int] | None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> _VideoTime:
        # Loaders report a rate of 0 for a container without one.
        fps = metadata.get("fps") or None
        indices = metadata.get("frames_indices")
        known = indices is not None and len(indices) > 0
        return cls(fps=fps, frames_indices=indices if known else None)

    def stamp(self, frame: int) -> str | None:
        """The text before the temporal patch that starts with the given frame."""
        if self.fps is None or self.frames_indices is None:
            return None
        index = self.frames_indices[min(frame, len(self.frames_indices) - 1)]
        return f"]<]{index / self.fps:.1f} seconds[>["


@dataclass(frozen=True, kw_only=True)
class _TokenIds:
    """The added tokens that images and videos are written with."""

    image: int
    video: int
    start: int
    end: int

    @classmethod
    def of(cls, processor: MiniMaxM3VLProcessor) -> _TokenIds:
        ids: dict[str, Any] = {
            "image": processor.image_token_id,
            "video": processor.video_token_id,
            "start": processor.vision_start_token_id,
            "end": processor.vision_end_token_id,
        }
        if missing := [name for name, token in ids.items() if not isinstance(token, int)]:
            raise ValueError(f"the tokenizer lacks MiniMax-M3's tokens for {', '.join(missing)}")
        return cls(**ids)


class M3MultiModalProcessor(BaseMultiModalProcessor[M3ProcessingInfo]):
    """Runs transformers' processor on the items vLLM has not cached and lays out their tokens."""

    def _get_hf_mm_inputs(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]):
        hf_inputs = super()._get_hf_mm_inputs(mm_items, hf_kwargs)
        videos = hf_inputs.hf_data.get("videos")
        if isinstance(videos, Sequence) and videos:
            times = [_VideoTime.of(metadata) for _, metadata in videos]
            hf_inputs.hf_data["videos"] = [frames for frames, _ in videos]
            hf_inputs.hf_data["video_metadata"] = [
                {
                    "total_num_frames": len(frames),
                    "fps": time.fps,
                    "frames_indices": time.frames_indices,
                }
                for (frames, _), time in zip(videos, times, strict=True)
            ]
        return hf_inputs

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        videos = hf_data.get("videos")
        if not isinstance(videos, Sequence):
            return super()._call_hf_processor(hf_data, hf_kwargs)
        hf_kwargs = self._with_video_defaults(hf_kwargs)
        outputs = super()._call_hf_processor(hf_data, hf_kwargs)
        pairs = [self.info.video_geometry().pairs(len(frames)) for frames in videos]
        outputs["video_grid_thw"] = _join_segments(outputs["video_grid_thw"], pairs)
        return outputs

    def _with_video_defaults(self, hf_kwargs: Mapping[str, object]) -> Mapping[str, object]:
        configured = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        videos_kwargs = dict(configured.get("videos_kwargs") or {})
        if configured.get("do_sample_frames") or videos_kwargs.get("do_sample_frames"):
            raise ValueError(
                "do_sample_frames must be false: frames are sampled when a video is loaded "
                "(media_io_kwargs), and the prompt's time stamps are those of the loaded frames"
            )
        if "do_resize" in configured or "do_resize" in videos_kwargs:
            return hf_kwargs
        return {**hf_kwargs, "videos_kwargs": {**videos_kwargs, "do_resize": True}}

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = {}
        for modality, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            grid_thw = hf_inputs.get(grid)
            patches = torch.empty(0, dtype=torch.long) if grid_thw is None else grid_thw.prod(-1)
            fields[pixels] = MultiModalFieldConfig.flat_from_sizes(modality, patches)
            fields[grid] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        tokenizer = self.info.get_tokenizer()
        ids = _TokenIds.of(processor)
        merge_length = processor.image_processor.merge_size**2
        frames_per_patch = processor.video_processor.temporal_patch_size

        def image_tokens(item: int) -> PromptUpdateDetails:
            t, h, w = _grid(out_mm_kwargs["image"][item]["image_grid_thw"].data)
            full = [ids.start, *[ids.image] * (t * h * w // merge_length), ids.end]
            return PromptUpdateDetails.select_token_id(full, ids.image)

        def video_tokens(item: int) -> PromptUpdateDetails:
            t, h, w = _grid(out_mm_kwargs["video"][item]["video_grid_thw"].data)
            _, metadata = mm_items["video"][item]
            time = _VideoTime.of(metadata)
            patch = [ids.start, *[ids.video] * (h * w // merge_length), ids.end]
            full: list[int] = []
            for pair in range(t):
                stamp = time.stamp(pair * frames_per_patch)
                if stamp is not None:
                    full += tokenizer.encode(stamp, add_special_tokens=False)
                full += patch
            return PromptUpdateDetails.select_token_id(full, ids.video)

        return [
            PromptReplacement(modality="image", target=[ids.image], replacement=image_tokens),
            PromptReplacement(modality="video", target=[ids.video], replacement=video_tokens),
        ]

    def _apply_prompt_updates(self, token_ids, mm_prompt_updates):
        if mm_prompt_updates.get("video"):
            token_ids, updates = self._write_first_stamps(token_ids, mm_prompt_updates["video"])
            mm_prompt_updates = {**mm_prompt_updates, "video": updates}
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)

    def _write_first_stamps(self, token_ids, updates):
        """Move each video's first time stamp out of its placeholder and into the text before it.

        A time stamp is plain text, so the tokenizer may merge its beginning with the text before
        it ("Look: ]<]0.0"), as it does in transformers, which inserts stamps before it tokenizes.
        All later stamps follow an end token, across which nothing merges.
        """
        tokenizer = self.info.get_tokenizer()
        ids = _TokenIds.of(self.info.get_hf_processor())
        places = [i for i, token in enumerate(token_ids) if token == ids.video]
        if len(places) != len(updates):
            # Left to vLLM, which tells the user.
            return token_ids, updates
        added = frozenset(tokenizer.get_added_vocab().values())
        prompt: list[int] = []
        moved = []
        done = 0
        for place, candidates in zip(places, updates, strict=True):
            full = candidates[0].content.full
            stamp, rest = full[: full.index(ids.start)], full[full.index(ids.start) :]
            prompt += token_ids[done:place]
            if stamp:
                begin = next((i for i in range(len(prompt), 0, -1) if prompt[i - 1] in added), 0)
                prompt[begin:] = _extend_text(tokenizer, prompt[begin:], stamp)
            prompt.append(ids.video)
            done = place + 1
            details = PromptUpdateDetails.select_token_id(rest, ids.video)
            moved.append([replace(update, content=details) for update in candidates])
        return prompt + list(token_ids[done:]), moved


def _extend_text(tokenizer: Any, text: list[int], suffix: list[int]) -> list[int]:
    """Tokens of two pieces of plain text as if they had been tokenized together."""
    if not text:
        return suffix
    written = tokenizer.decode(text, skip_special_tokens=False)
    if tokenizer.encode(written, add_special_tokens=False) != text:
        # Token ids that this tokenizer would not produce are the caller's choice.
        return text + suffix
    whole = written + tokenizer.decode(suffix, skip_special_tokens=False)
    return tokenizer.encode(whole, add_special_tokens=False)


def _grid(value: object) -> tuple[int, int, int]:
    assert isinstance(value, torch.Tensor)
    t, h, w = value.tolist()
    return t, h, w


def _join_segments(grid_thw: torch.Tensor, pairs: Sequence[int]) -> torch.Tensor:
    """One grid (t, h, w) per video [videos, 3], from one or several per video along time.

    Some transformers releases report each attention segment as a grid of its own; `pairs` holds
    the temporal patches of the whole videos. The rows of pixel values are the same either way.
    """
    segments = iter(grid_thw.tolist())
    joined = []
    for whole in pairs:
        t, h, w = next(segments)
        while t < whole:
            more, *size = next(segments)
            if size != [h, w]:
                break
            t += more
        if t != whole:
            raise ValueError(f"grids {grid_thw.tolist()} do not make up videos of {pairs} pairs")
        joined.append([t, h, w])
    if next(segments, None) is not None:
        raise ValueError(f"grids {grid_thw.tolist()} are more than videos of {pairs} pairs")
    return torch.tensor(joined, dtype=grid_thw.dtype)


@VIDEO_LOADER_REGISTRY.register("m3_plugin", video_processor="MiniMaxM3VLVideoProcessor")
class M3VideoLoader(VideoBackend):
    """Frames at 1 per second, or `fps` of `media_io_kwargs`, and always the last one.

    Each frame is the first one at least 1/fps seconds after the one before, as in the frame
    extraction the model was tuned with (which SGLang follows; vLLM's own loader drops the last
    frame). More than `max_frames` are thinned out evenly. vLLM always passes a frame count, 32 if
    the user sets none, so that it cannot be told from a wish and is ignored.
    """

    max_frames = 768

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = -1,
        fps: int = 1,
        max_duration: int = 300,
        frame_recovery: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        return super().load_bytes(
            data,
            num_frames=num_frames,
            fps=fps,
            max_duration=max_duration,
            frame_recovery=frame_recovery,
            **kwargs,
        )

    @classmethod
    def compute_frames_index_to_sample(cls, source: Any, target: Any, **kwargs: Any) -> list[int]:
        total, source_fps = source.total_frames_num, source.original_fps
        if total <= 0 or source_fps <= 0 or target.fps <= 0:
            return [0] if total > 0 else []
        # A little less than the interval: 30 frames at 30.0 fps are one second apart.
        interval = (1.0 / target.fps - 1e-4) * source_fps
        indices = [0]
        while (following := max(math.ceil(indices[-1] + interval), indices[-1] + 1)) < total:
            indices.append(following)
        if indices[-1] != total - 1:
            indices.append(total - 1)
        if len(indices) > cls.max_frames:
            kept = np.linspace(0, len(indices) - 1, cls.max_frames).round().astype(int)
            indices = [indices[i] for i in kept]
        return indices


class M3MultiModalMixin(SupportsMultiModal):
    """vLLM's multi-modal interface for a model that holds an `M3Vision` as `vision_tower`."""

    vision_tower: M3Vision

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality not in _PLACEHOLDERS:
            raise _refuse(modality)
        return _PLACEHOLDERS[modality]

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Features of the items of one or both modalities, [tokens, hidden] each, in order."""
        embeddings: list[torch.Tensor] = []
        # The order of the keywords is that of the modalities in the prompt.
        for name in kwargs:
            if name == "pixel_values":
                embeddings += self._embed(kwargs[name], kwargs["image_grid_thw"])
            elif name == "pixel_values_videos":
                embeddings += self._embed(kwargs[name], kwargs["video_grid_thw"])
        return tuple(embeddings)

    def _embed(self, pixel_values: object, grid_thw: object) -> tuple[torch.Tensor, ...]:
        if not isinstance(pixel_values, torch.Tensor) or not isinstance(grid_thw, torch.Tensor):
            raise TypeError(
                "pixel values and grids must be tensors; "
                f"got {type(pixel_values).__name__} and {type(grid_thw).__name__}"
            )
        features = self.vision_tower(pixel_values, grid_thw)
        merge_length = self.vision_tower.config.merge_length
        return features.split((grid_thw.prod(-1) // merge_length).tolist())
