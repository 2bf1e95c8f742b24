"""Images and videos of a request -> what M3 sees, token for token as transformers prepares it.

transformers' own `MiniMaxM3VLProcessor` makes the pixel values; this module lays the placeholder
tokens out as that processor does, on the token ids vLLM works with (`m3_plugin.model.media` has the
layout). A video stays one item of grid (t, h, w) here; cutting it into attention segments is the
vision tower's business.

Video frames are resized unless asked otherwise. transformers does not resize them by default, but
then fails on every frame size that is not a multiple of 28. Where it accepts, resizing changes
nothing as long as a frame's area is within the video processor's min_pixels (56x56) and max_pixels
(896x672); beyond that, resizing keeps a request within what the engine has reserved. For
transformers' default, pass `mm_processor_kwargs={"videos_kwargs": {"do_resize": False}}`.
MiniMax-M3.1's pictures and frames have another rule (`m3_plugin.model.resizing`).

One step before us differs from transformers for every model: vLLM lays transparent images over
white, where transformers drops the alpha channel.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.minimax_m3_vl.processing_minimax_m3_vl import MiniMaxM3VLProcessor
from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import (
    MiniMaxM3VLVideoProcessor,
)
from vllm.config import ModelConfig, VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
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
from vllm.multimodal.video_decoders.base import VideoSourceMetadata
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from m3_plugin.host.metrics import count_refused_request
from m3_plugin.host.side_caps import as_served
from m3_plugin.host.video_pieces import frames_of_pairs, frames_of_patches
from m3_plugin.model.config import M3Config
from m3_plugin.model.containers import Animation, with_times
from m3_plugin.model.media import (
    MAX_ASPECT,
    MAX_FRAMES,
    MAX_VIDEO_PIXELS,
    MediaTokens,
    find_places,
    fitted_size,
    is_16_bit_grey,
    join_segments,
    modality_error,
    pieces_of,
    reading_media,
    require_areas,
    require_frame_limit,
    require_frame_pixels,
    require_plausible_header,
    require_video_fps,
    require_video_pixels,
    sampled_frames,
    time_stamp,
    upright_rgb,
    with_stamp,
)
from m3_plugin.model.pixels import PixelScale
from m3_plugin.model.resizing import FILE, SideCaps, by_pillow, require_no_area, resize_rule
from m3_plugin.model.vision import M3Vision
from m3_plugin.model.vision_shares import VisionRanks, shared_features
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

# What `VideoMediaIO` passes as `num_frames` when nobody asks for a number.
_NO_WISH = 32
# A video of more pixels is not held at the size of its frames.
_MAX_HELD_PIXELS = 64_000_000
# Frames in a row that OpenCV may fail to read before a stream counts as ended.
_MAX_MISSED = 256
_FRAME_AREA = {
    "factor": MiniMaxM3VLVideoProcessor.patch_size * MiniMaxM3VLVideoProcessor.merge_size,
    "least": MiniMaxM3VLVideoProcessor.min_pixels,
    "most": MiniMaxM3VLVideoProcessor.max_pixels,
}
# Of a modality: pixels in floats, pixels in bytes, and grids. vLLM joins items of several requests,
# which must not make floats of bytes: items whose fields differ stay apart.
_FIELDS = {
    "image": ("pixel_values", "pixel_bytes", "image_grid_thw"),
    "video": ("pixel_values_videos", "pixel_bytes_videos", "video_grid_thw"),
}
_PLACEHOLDERS = {
    "image": MiniMaxM3VLProcessor.IMAGE_TOKEN,
    "video": MiniMaxM3VLProcessor.VIDEO_TOKEN,
}


def _refuse(modality: str) -> ValueError:
    count_refused_request(modality)
    return modality_error(modality)


@dataclass(frozen=True, kw_only=True)
class PatchGeometry:
    """How one of transformers' two vision processors turns pixels into tokens.

    Sides are rounded to multiples of `factor`, the area is brought between `min_pixels` and
    `max_pixels` or, if there are `caps`, each side below one of them; and each `factor` x `factor`
    square of what comes out is one token.
    """

    factor: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    caps: SideCaps | None = None

    @classmethod
    def of(cls, processor: Any) -> PatchGeometry:
        # The bounds are edges of `size` where the processor has them, else attributes.
        size = getattr(processor, "size", None)
        return cls(
            factor=processor.patch_size * processor.merge_size,
            temporal_patch_size=processor.temporal_patch_size,
            min_pixels=_entry(size, "shortest_edge") or processor.min_pixels,
            max_pixels=_entry(size, "longest_edge") or processor.max_pixels,
            caps=getattr(processor, "caps", None),
        )

    @property
    def max_tokens(self) -> int:
        """Bound of the tokens of an image, or of one temporal patch of a video."""
        if self.caps is not None:
            return self.caps.height * self.caps.width // self.factor**2
        area = self.max_pixels / self.factor**2
        # No side shrinks below one factor, so that a long strip may keep more than the area.
        strip = math.sqrt(MAX_ASPECT * area)
        # Enlarging rounds both sides up.
        least = self.min_pixels / self.factor**2
        enlarged = least + math.sqrt(MAX_ASPECT * least) + math.sqrt(least / MAX_ASPECT) + 1
        return max(math.floor(area), math.ceil(strip), math.floor(enlarged))

    @property
    def largest(self) -> ImageSize:
        """A size with as many tokens as there is room for, near to a square if area is bounded."""
        if self.caps is not None:
            return ImageSize(width=self.caps.width, height=self.caps.height)
        units = max(self.max_pixels // self.factor**2, 1)
        short = max(n for n in range(1, math.isqrt(units) + 1) if units % n == 0)
        if units // short > short * MAX_ASPECT:
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
        # loaders know no model, and a process has one; a fault ends what first wants a processor
        with contextlib.suppress(ValueError):
            M3VideoLoader.caps = self.rule

    @cached_property
    def rule(self) -> SideCaps | None:
        """How pictures and frames get their size; None for M3's rule, which is transformers'.

        Raises
        ------
        ValueError : the checkpoint names a rule that is not its model's.
        """
        model = self.ctx.model_config
        file = get_hf_file_to_dict(FILE, model.model, revision=model.revision)
        return resize_rule(file or {}, M3Config.from_hf(model.hf_config.to_dict()))

    def get_hf_processor(self, **kwargs: object) -> MiniMaxM3VLProcessor:
        """Raises ValueError, which names the file, for a checkpoint without processor files."""
        try:
            processor = self.ctx.get_hf_processor(MiniMaxM3VLProcessor, **kwargs)
        except OSError as error:
            raise ValueError(
                f"{self.ctx.model_config.model} lacks what pictures and videos are prepared by, "
                f"its preprocessor_config.json ({error}): copy it from the original repository, "
                "or serve text alone with --language-model-only"
            ) from error
        return as_served(processor, rule=self.rule, scale=pixel_scale(self.ctx.model_config))

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
        most = MAX_VIDEO_PIXELS // (size.width * size.height) // geometry.temporal_patch_size
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
    """vLLM's parser, for 16-bit greys, and for videos that may come without metadata."""

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, (Image.Image, MediaWithBytes)):
            data = [data]
        if isinstance(data, (list, tuple)):
            data = [_scaled_grey(item) for item in data]
        return super()._parse_image_data(data)

    def _get_video_with_metadata(self, video: Any) -> Any:
        frames, metadata = super()._get_video_with_metadata(video)
        return frames, metadata or {}


class M3MultiModalProcessor(BaseMultiModalProcessor[M3ProcessingInfo]):
    """Runs transformers' processor on the items vLLM has not cached and lays out their tokens."""

    def _get_hf_mm_inputs(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]):
        hf_inputs = super()._get_hf_mm_inputs(mm_items, hf_kwargs)
        videos = hf_inputs.hf_data.get("videos")
        if isinstance(videos, Sequence) and videos:
            hf_inputs.hf_data["videos"] = [frames for frames, _ in videos]
            hf_inputs.hf_data["video_metadata"] = [
                {"total_num_frames": len(frames), **_times(metadata)} for frames, metadata in videos
            ]
        return hf_inputs

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        self._require_bounds(hf_kwargs)
        videos = hf_data.get("videos")
        loaded: list[DecodedFrames] = []
        if isinstance(videos, Sequence):
            hf_kwargs = self._with_video_defaults(hf_kwargs)
            loaded = [frames for frames in videos if DecodedFrames.owns(frames)]
            hf_data = {**hf_data, "videos": [_channels_first(frames) for frames in videos]}
        in_place = isinstance(videos, Sequence) and len(loaded) == len(videos)
        outputs = self._call_processor(hf_data, hf_kwargs, in_place=in_place)
        for frames in loaded:
            frames.note_patches(outputs["pixel_values_videos"])
        if isinstance(videos, Sequence):
            pairs = [self.info.video_geometry().pairs(len(frames)) for frames in videos]
            outputs["video_grid_thw"] = join_segments(outputs["video_grid_thw"], pairs)
        for pixels, as_bytes, _ in _FIELDS.values():
            if pixels in outputs and outputs[pixels].dtype == torch.uint8:
                outputs[as_bytes] = outputs.pop(pixels)
        return outputs

    def _call_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object], *, in_place: bool
    ) -> BatchFeature:
        """As vLLM does it, but that `in_place`, which is no setting, makes no other processor."""
        processor = self.info.get_hf_processor(**hf_kwargs)
        if in_place:
            configured = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
            videos_kwargs = configured.get("videos_kwargs") or {}
            hf_kwargs = {**hf_kwargs, "videos_kwargs": {**videos_kwargs, "in_place": True}}
        return self.info.ctx.call_hf_processor(processor, hf_data, hf_kwargs)

    def _require_bounds(self, hf_kwargs: Mapping[str, object]) -> None:
        configured = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        scopes = (configured, configured.get("images_kwargs"), configured.get("videos_kwargs"))
        for scope in scopes:
            if self.info.rule is not None:
                require_no_area(scope or (), option="mm_processor_kwargs")
            require_areas(scope)

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
        for modality, (pixels, as_bytes, grid) in _FIELDS.items():
            grid_thw = hf_inputs.get(grid)
            patches = torch.empty(0, dtype=torch.long) if grid_thw is None else grid_thw.prod(-1)
            for name in (pixels, as_bytes):
                fields[name] = MultiModalFieldConfig.flat_from_sizes(modality, patches)
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
        ids = MediaTokens.of(processor)
        merge_length = processor.image_processor.merge_size**2
        frames_per_patch = processor.video_processor.temporal_patch_size

        def image_tokens(item: int) -> PromptUpdateDetails:
            t, h, w = _grid(out_mm_kwargs["image"][item]["image_grid_thw"].data)
            full = ids.run(ids.image, t * h * w // merge_length)
            return PromptUpdateDetails.select_token_id(full, ids.image)

        def video_tokens(item: int) -> PromptUpdateDetails:
            t, h, w = _grid(out_mm_kwargs["video"][item]["video_grid_thw"].data)
            _, metadata = mm_items["video"][item]
            times = _times(metadata)
            patch = ids.run(ids.video, h * w // merge_length)
            full: list[int] = []
            for pair in range(t):
                stamp = time_stamp(pair * frames_per_patch, **times)
                if stamp is not None:
                    full += tokenizer.encode(stamp, add_special_tokens=False)
                full += patch
            return PromptUpdateDetails.select_token_id(full, ids.video)

        return [
            PromptReplacement(modality="image", target=[ids.image], replacement=image_tokens),
            PromptReplacement(modality="video", target=[ids.video], replacement=video_tokens),
        ]

    def _apply_prompt_updates(self, token_ids, mm_prompt_updates):
        """Collapse what came expanded, write first stamps into the text; the rest is vLLM's."""
        tokenizer = self.info.get_tokenizer()
        ids = MediaTokens.of(self.info.get_hf_processor())
        updates = {
            name: list(mm_prompt_updates.get(name) or ()) for name in mm_prompt_updates or ()
        }
        fulls = {
            name: [candidates[0].content.full for candidates in items]
            for name, items in updates.items()
        }
        places = find_places(
            token_ids,
            ids,
            images=[pieces_of(full, ids) for full in fulls.get("image", ())],
            videos=[pieces_of(full, ids) for full in fulls.get("video", ())],
            decode=partial(tokenizer.decode, skip_special_tokens=False),
        )
        stamped = partial(
            with_stamp,
            added=frozenset(tokenizer.get_added_vocab().values()),
            encode=partial(tokenizer.encode, add_special_tokens=False),
            decode=partial(tokenizer.decode, skip_special_tokens=False),
        )
        prompt: list[int] = []
        videos = []
        done = 0
        for place in places:
            prompt += token_ids[done : place.begin]
            done = place.end
            if place.token == ids.video:
                candidates = updates["video"][len(videos)]
                full = candidates[0].content.full
                stamp, rest = full[: full.index(ids.start)], full[full.index(ids.start) :]
                if not place.expanded:
                    prompt = stamped(prompt, stamp)
                details = PromptUpdateDetails.select_token_id(rest, ids.video)
                videos.append([replace(update, content=details) for update in candidates])
            prompt.append(place.token)
        if videos:
            mm_prompt_updates = {**mm_prompt_updates, "video": videos}
        return super()._apply_prompt_updates(prompt + list(token_ids[done:]), mm_prompt_updates)


class DecodedFrames(np.ndarray):
    """Frames [n, height, width, 3] of a long video, made by its loader for one request.

    Their patches take their memory, for which there is room. Whoever reads them once more gets
    them back, in new memory.
    """

    room: np.ndarray | None = None
    cut = False

    @classmethod
    def of(cls, room: np.ndarray, count: int) -> DecodedFrames:
        """The first `count` frames of `room`."""
        frames = room[:count].view(cls)
        frames.room = room
        return frames

    @classmethod
    def owns(cls, frames: Any) -> TypeGuard[DecodedFrames]:
        """Whether these are such frames, all of them; a part of them is an array as any other."""
        return isinstance(frames, cls) and frames.room is not None

    def channels_first(self) -> torch.Tensor:
        """The frames [n, 3, height, width]."""
        assert self.room is not None
        memory = torch.from_numpy(self.room)
        if self.cut:
            height, width = self.shape[1:3]
            return frames_of_patches(memory, height=height, width=width)[: len(self)]
        return memory[: len(self)].permute(0, 3, 1, 2)

    def note_patches(self, patches: torch.Tensor) -> None:
        """Whether these lie where the frames were."""
        self.cut = self.cut or patches.data_ptr() == self.ctypes.data


def _channels_first(frames: Any) -> Any:
    """Decoded frames [n, height, width, 3] as transformers wants them, without its copy."""
    if DecodedFrames.owns(frames):
        return frames.channels_first()
    decoded = isinstance(frames, np.ndarray) and frames.ndim == 4 and frames.dtype == np.uint8
    # what has few rows or columns may be meant either way, as transformers decides
    if not decoded or frames.shape[-1] != 3 or frames.shape[1] in (1, 3):
        return frames
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _times(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Rate and frame indices of a loaded video, None where its loader did not know them."""
    indices = metadata.get("frames_indices")
    known = indices is not None and len(indices) > 0
    return {"fps": metadata.get("fps") or None, "frames_indices": indices if known else None}


def _grid(value: object) -> tuple[int, int, int]:
    assert isinstance(value, torch.Tensor)
    t, h, w = value.tolist()
    return t, h, w


def _scaled_grey(item: Any) -> Any:
    """A 16-bit grey picture scaled to 8 bits; vLLM's loader clips it, so that it is read again."""
    if isinstance(item, MediaWithBytes) and isinstance(item.media, Image.Image):
        with contextlib.suppress(OSError):
            if is_16_bit_grey(opened := Image.open(io.BytesIO(item.original_bytes))):
                return replace(item, media=upright_rgb(opened))
    elif isinstance(item, Image.Image) and is_16_bit_grey(item):
        return upright_rgb(item)
    return item


@VIDEO_LOADER_REGISTRY.register("m3_plugin", video_processor="MiniMaxM3VLVideoProcessor")
class M3VideoLoader(VideoBackend):
    """Frames at 1 per second, or `fps` of `media_io_kwargs`, and always the last one.

    Each frame is the first one at least 1/fps seconds after the one before, as in the frame
    extraction the model was tuned with (which SGLang follows; vLLM's own loader drops the last
    frame). More than `max_frames` are thinned out evenly; a wish for `num_frames` is one for
    `max_frames`, except 32, which vLLM passes when there is no wish.

    With OpenCV, frames that would fill memory are shrunk as they are decoded, to the size to which
    the video processor brings them by default: transformers', or `caps` if there are any.
    """

    caps: ClassVar[SideCaps | None] = None

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int | None = -1,
        fps: float | None = 1,
        max_duration: int = 300,
        frame_recovery: bool = False,
        *,
        max_frames: int | None = MAX_FRAMES,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        # null is no wish, as on SGLang
        rate: Any = require_video_fps(1 if fps is None else fps)
        max_frames = MAX_FRAMES if max_frames is None else max_frames
        num_frames = -1 if num_frames is None else num_frames
        if num_frames not in (-1, _NO_WISH):
            max_frames = num_frames
        require_frame_limit(max_frames)
        require_plausible_header(data)
        if (animation := Animation.of(data)) is not None:
            return cls._of_animation(animation, fps=rate, max_frames=max_frames)
        data = with_times(data) or data
        with reading_media(RuntimeError):
            frames, metadata = super().load_bytes(
                data,
                num_frames=num_frames,
                fps=rate,
                max_duration=max_duration,
                frame_recovery=frame_recovery,
                max_frames=max_frames,
                **kwargs,
            )
        if len(frames) == 0 and metadata["total_num_frames"] == 1:
            # vLLM looks for the end first, from which OpenCV finds no way back in such a file
            cap = OpenCVVideoBackendMixin.open_video_capture(data)
            frames, metadata["frames_indices"] = cls.read_frames(cap, [0], 1)
        if len(frames) == 0:
            raise ValueError("no frame of the video could be decoded")
        return frames, metadata

    @classmethod
    def _of_animation(
        cls, animation: Animation, *, fps: float, max_frames: int
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames [n, height, width, 3] of an animated GIF or WebP, one after the other."""
        total, rate = len(animation), animation.avg_fps
        indices = sampled_frames(total, fps=rate, wanted_fps=fps, max_frames=max_frames)
        height, width = animation.frame_shape
        size = fitted_size(height, width, **_FRAME_AREA)
        require_video_pixels(len(indices), *size)
        shrink = len(indices) * height * width > _MAX_HELD_PIXELS
        frame_shape = (*(size if shrink else (height, width)), 3)
        room = np.empty((frames_of_pairs(len(indices)), *frame_shape), dtype=np.uint8)
        for place, index in enumerate(indices):
            (frame,) = animation.get_frames_at([index])
            room[place] = _resized(frame, size) if shrink else frame
        source = VideoSourceMetadata(total, rate, total / rate)
        frames = DecodedFrames.of(room, len(indices)) if shrink else room[: len(indices)]
        return frames, cls.create_hf_metadata(source, indices, "pillow")

    @classmethod
    def compute_frames_index_to_sample(
        cls, source: Any, target: Any, *, max_frames: int = MAX_FRAMES, **kwargs: Any
    ) -> list[int]:
        return sampled_frames(
            source.total_frames_num,
            fps=source.original_fps,
            wanted_fps=target.fps,
            max_frames=max_frames,
        )

    @classmethod
    def read_frames(
        cls,
        cap: Any,
        frame_idx: list[int],
        total_frames_num: int,
        *,
        frame_recovery: bool = False,
    ) -> tuple[np.ndarray, list[int]]:
        """Frames [n, height, width, 3] and their indices, in the memory of what is kept.

        What vLLM does here, but that reading ends where the stream does, whatever its header
        claims. With `frame_recovery` a frame that cannot be decoded is replaced by the next one.
        """
        import cv2

        height = int(cap.get(cv2.CAP_PROP_FRAME_HEIGHT))
        width = int(cap.get(cv2.CAP_PROP_FRAME_WIDTH))
        require_frame_pixels(height, width)
        size = cls._frame_size(height, width)
        require_video_pixels(len(frame_idx), *size)
        shrink = len(frame_idx) * height * width > _MAX_HELD_PIXELS
        room = np.empty((0, *size, 3), dtype=np.uint8)
        memory: Any = None
        valid: list[int] = []
        wanted = iter(frame_idx)
        target = next(wanted, None)
        index = missed = 0
        while target is not None and missed < _MAX_MISSED:
            grabbed = cap.grab()
            missed = 0 if grabbed else missed + 1
            if index >= target:
                # into the memory of the frame before, of which nothing is needed any more
                decoded, frame = cap.retrieve(memory) if grabbed else (False, np.empty(0))
                usable = decoded and frame.size > 0
                if usable:
                    memory = frame
                    # colours change their order where there are fewer pixels
                    shown = cls._resized(frame, size) if shrink else frame
                    if not valid:
                        # a frame may be turned against what the header says
                        room = np.empty(
                            (frames_of_pairs(len(frame_idx)), *shown.shape), dtype=np.uint8
                        )
                    room[len(valid)] = cv2.cvtColor(shown, cv2.COLOR_BGR2RGB)
                    valid.append(index)
                while (usable or not frame_recovery) and target is not None and target <= index:
                    target = next(wanted, None)
            index += 1
        frames = DecodedFrames.of(room, len(valid)) if shrink else room[: len(valid)]
        return frames, valid

    @classmethod
    def _frame_size(cls, height: int, width: int) -> tuple[int, int]:
        """Height and width that the video processor gives a frame by default."""
        if cls.caps is not None:
            return cls.caps.size(height, width)
        return fitted_size(height, width, **_FRAME_AREA)

    @classmethod
    def _resized(cls, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A frame [height, width, 3] of its other size, equal to the processor's to the bit.

        Each colour is resized for itself, in whatever order they come.
        """
        return _resized(frame, size) if cls.caps is None else by_pillow(frame, size)


def _resized(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame [height, width, 3] of another size, equal to transformers' resizing to the bit."""
    from torchvision.transforms.v2 import functional

    pixels = torch.from_numpy(frame).permute(2, 0, 1)
    resized = functional.resize(
        pixels, list(size), interpolation=functional.InterpolationMode.BICUBIC, antialias=True
    )
    return resized.permute(1, 2, 0).contiguous().numpy()


def pixel_scale(model_config: ModelConfig) -> PixelScale | None:
    """What a checkpoint's pixels are normalised with, as front end and engine read it."""
    # a fault of the file ends what first wants a processor, and no server of text
    with contextlib.suppress(ValueError):
        model = model_config.model
        return PixelScale.read(get_hf_file_to_dict(FILE, model, revision=model_config.revision))
    return None


def vision_ranks(vllm_config: VllmConfig) -> VisionRanks | None:
    """The ranks among which pictures are shared out; None where each encodes all of them."""
    multimodal = vllm_config.model_config.multimodal_config
    size = get_tensor_model_parallel_world_size()
    if multimodal is None or multimodal.mm_encoder_tp_mode != "data" or size == 1:
        return None
    return VisionRanks(
        rank=get_tensor_model_parallel_rank(),
        size=size,
        gather=lambda features: tensor_model_parallel_all_gather(features, dim=0),
    )


class M3MultiModalMixin(SupportsMultiModal):
    """vLLM's multi-modal interface for a model that holds an `M3Vision` as `vision_tower`."""

    vision_tower: M3Vision
    # a tower on each rank anyway; with `--mm-encoder-tp-mode data` each encodes its part
    supports_encoder_tp_data = True
    vision_ranks: VisionRanks | None = None

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
            for pixels, as_bytes, grid in _FIELDS.values():
                if name in (pixels, as_bytes):
                    embeddings += self._embed(kwargs[name], kwargs[grid])
        return tuple(embeddings)

    def _embed(self, pixel_values: object, grid_thw: object) -> tuple[torch.Tensor, ...]:
        if not isinstance(pixel_values, torch.Tensor) or not isinstance(grid_thw, torch.Tensor):
            raise TypeError(
                "pixel values and grids must be tensors; "
                f"got {type(pixel_values).__name__} and {type(grid_thw).__name__}"
            )
        if self.vision_ranks is None:
            features = self.vision_tower(pixel_values, grid_thw)
        else:
            features = shared_features(
                self.vision_tower, pixel_values, grid_thw, ranks=self.vision_ranks
            )
        merge_length = self.vision_tower.config.merge_length
        return features.split((grid_thw.prod(-1) // merge_length).tolist())
