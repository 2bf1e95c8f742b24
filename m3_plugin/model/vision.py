"""MiniMax-M3's vision tower and projector: patch rows of images and videos -> text-width features.

A CLIP-like encoder over 14x14 patches of two frames each, with a rotary embedding over time,
height and width, followed by two small MLPs: one per patch, one over each 2x2 block of patches.
Modules are named as in the released checkpoint, so loading it needs no renaming beyond
`CHECKPOINT_PREFIXES`.

Attention never leaves a *segment*: one image, or up to `segment_patches` temporal patches of a
video. vLLM and SGLang cut so, and the released configuration asks for it with
`vision_segment_max_frames`, which counts temporal patches, i.e. pairs of frames. transformers 5.23
does too; up to 5.20 it attends over everything in one call, other images of the prompt included, so
that it is a reference for one segment per call only, and 5.17 lacks the rotation over time.

Numerics: everything is computed in the model's dtype, the patch embedding too, as in transformers:
keeping its weight in the checkpoint's fp32 made no measurable difference to bf16 features. Only the
rotation is applied in fp32, as vLLM and SGLang do; transformers rounds cosines and sines first.

Weights are plain modules, replicated on every tensor-parallel rank (0.87 B parameters, 1.7 GB in
bf16), and every published quantised checkpoint leaves them unquantised. Segments are independent,
and `vision_shares` deals them out to the ranks where a host is asked to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from m3_plugin.model.pixels import PixelScale
from m3_plugin.model.products import attention, linear

__all__ = ["CHECKPOINT_PREFIXES", "M3Vision", "VisionConfig", "split_segments"]

# Checkpoint prefix -> prefix in a model that holds `M3Vision` as `vision_tower`. What is not listed
# here ("vision_tower.vision_model.*") has the same name in both.
CHECKPOINT_PREFIXES = {
    "multi_modal_projector.": "vision_tower.multi_modal_projector.",
    "patch_merge_mlp.": "vision_tower.patch_merge_mlp.",
}

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The fields of M3's configuration that its vision tower and projector depend on."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    text_hidden_size: int
    projector_hidden_size: int
    num_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    segment_patches: int = 4
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Length of one row of pixel values: channels, frames, height, width, flattened."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_length(self) -> int:
        """Patches per feature."""
        return self.spatial_merge_size**2

    @classmethod
    def from_hf(cls, config: Any) -> VisionConfig:
        """Read a top-level M3 configuration, with its parts as mappings or as config objects.

        The released `config.json` and its nested forms are understood, and what transformers makes
        of it (`rope_parameters`, merge sizes at the top of `vision_config`).
        """
        vision, text = _get(config, "vision_config"), _get(config, "text_config")
        if vision is None or text is None:
            raise ValueError("config must have a text_config and a vision_config")
        for holder, key in ((vision, "hidden_act"), (config, "projector_hidden_act")):
            if (activation := _get(holder, key, "gelu")) != "gelu":
                raise ValueError(f"config key {key!r} must be 'gelu'; got {activation!r}")
        top = _get(config, "img_token_compression_config", {})
        merge = _get(vision, "img_token_compression_config", top)
        hidden_size = _require_int(vision, "hidden_size")
        num_heads = _require_int(vision, "num_attention_heads")
        if hidden_size % num_heads:
            raise ValueError(
                f"vision hidden_size must be a multiple of num_attention_heads; "
                f"got {hidden_size} and {num_heads}"
            )
        text_hidden_size = _require_int(text, "hidden_size")
        read = cls(
            hidden_size=hidden_size,
            intermediate_size=_require_int(vision, "intermediate_size"),
            num_layers=_require_int(vision, "num_hidden_layers"),
            num_heads=num_heads,
            text_hidden_size=text_hidden_size,
            projector_hidden_size=_get(config, "projector_hidden_size", text_hidden_size),
            num_channels=_get(vision, "num_channels", cls.num_channels),
            patch_size=_get(vision, "patch_size", cls.patch_size),
            temporal_patch_size=_get(
                vision,
                "temporal_patch_size",
                _get(merge, "temporal_patch_size", cls.temporal_patch_size),
            ),
            spatial_merge_size=_get(
                vision,
                "spatial_merge_size",
                _get(merge, "spatial_merge_size", cls.spatial_merge_size),
            ),
            segment_patches=_get(vision, "vision_segment_max_frames", cls.segment_patches),
            layer_norm_eps=_get(vision, "layer_norm_eps", cls.layer_norm_eps),
            rope_theta=_get(
                _get(vision, "rope_parameters", {}),
                "rope_theta",
                _get(vision, "rope_theta", cls.rope_theta),
            ),
        )
        for key in ("spatial_merge_size", "temporal_patch_size"):
            if (value := _get(top, key, getattr(read, key))) != getattr(read, key):
                raise ValueError(
                    f"config key 'img_token_compression_config.{key}' must be the vision part's "
                    f"{getattr(read, key)}; got {value!r}"
                )
        return read


def split_segments(grids: Sequence[Sequence[int]], *, segment_patches: int) -> list[Grid]:
    """Cut grids [(t, h, w), ...] along t into the units that attention and the rotation's time see.

    Rows of patches are t-major, so the cut changes no row's place.
    """
    return [
        (min(segment_patches, t - start), h, w)
        for t, h, w in grids
        for start in range(0, t, segment_patches)
    ]


class M3Vision(nn.Module):
    """Vision tower and projector.

    `max_patches` bounds the patches, hence the activations, of one pass through the layers. A
    segment is never cut for it, and a segment of a released-size video frame has 12 288 patches.
    `scale` normalises pixels that come as bytes; without it they must come normalised.
    """

    def __init__(
        self, config: VisionConfig, *, max_patches: int = 16384, scale: PixelScale | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.scale = scale
        self.max_patches = max_patches
        self.spatial_merge_size = config.spatial_merge_size
        self.out_hidden_size = config.text_hidden_size
        self.vision_model = _VisionModel(config)
        self.multi_modal_projector = _MLP(
            config.hidden_size, config.projector_hidden_size, config.text_hidden_size
        )
        self.patch_merge_mlp = _MLP(
            config.text_hidden_size * config.merge_length,
            config.projector_hidden_size,
            config.text_hidden_size,
        )

    def check_inputs(self, pixel_values: torch.Tensor, grids: Sequence[Sequence[int]]) -> None:
        """Refuse what `forward` cannot read.

        Raises
        ------
        ValueError : names the argument, the rule and the value.
        """
        _check_inputs(pixel_values, grids, config=self.config)
        if self.scale is None and not pixel_values.is_floating_point():
            raise ValueError(
                "pixel_values must be normalised, for this checkpoint's preprocessor_config.json "
                f"does not say how: got {pixel_values.dtype}"
            )

    def normalised(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Rows of `forward` in floats; bytes are normalised as the checkpoint says."""
        if self.scale is None or pixel_values.dtype != torch.uint8:
            return pixel_values
        return self.scale.normalised(pixel_values)

    def forward(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor | Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Features of any number of images or videos, in order.

        pixel_values: [patches, patch_dim], normalised in any float dtype, or uint8 as decoded;
        grid_thw: [items, 3], patches along time, height and width, on the host if it is a tensor.
        Returns [patches / merge_length, text_hidden_size] in the model's dtype.
        """
        grids = grid_thw.tolist() if isinstance(grid_thw, torch.Tensor) else grid_thw
        self.check_inputs(pixel_values, grids)
        segments = split_segments(grids, segment_patches=self.config.segment_patches)
        features = []
        start = 0
        for chunk in _chunks(segments, max_patches=self.max_patches):
            end = start + sum(t * h * w for t, h, w in chunk)
            hidden = self.vision_model(self.normalised(pixel_values[start:end]), chunk)
            hidden = self.multi_modal_projector(hidden)
            merged = hidden.view(-1, self.config.text_hidden_size * self.config.merge_length)
            features.append(self.patch_merge_mlp(merged))
            start = end
        if not features:
            return self.patch_merge_mlp.linear_2.weight.new_empty(0, self.out_hidden_size)
        return features[0] if len(features) == 1 else torch.cat(features)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """`count` consecutive segments of the same grid: rows [start, start + count * patches)."""

    start: int
    count: int
    grid: Grid

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class _VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        # Spelt as in the checkpoint.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = _Encoder(config)

    def forward(self, pixel_values: torch.Tensor, segments: Sequence[Grid]) -> torch.Tensor:
        runs = _runs(segments)
        cos, sin = _rotation(runs, config=self.config, device=pixel_values.device)
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        return self.encoder(hidden, cos, sin, runs)


class _Linear(nn.Linear):
    """torch's, whose product is ours on CPUs where torch's library has none of 16 bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


class _Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Conv3d(
            config.num_channels,
            config.hidden_size,
            kernel_size=kernel,
            stride=kernel,
            bias=False,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # The kernel covers a whole row, so the convolution is a product with its flat weight.
        weight = self.patch_embedding.weight.flatten(1)
        return linear(pixel_values.to(weight.dtype), weight)


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, runs: Sequence[_Run]
    ) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, runs)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _FeedForward(config)

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, runs: Sequence[_Run]
    ) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), cos, sin, runs)
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Attention(nn.Module):
    """Bidirectional attention within each segment."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = _Linear(config.hidden_size, config.hidden_size)
        self.k_proj = _Linear(config.hidden_size, config.hidden_size)
        self.v_proj = _Linear(config.hidden_size, config.hidden_size)
        self.out_proj = _Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, runs: Sequence[_Run]
    ) -> torch.Tensor:
        query = _rotate(self.q_proj(hidden).unflatten(-1, (-1, self.head_dim)), cos, sin)
        key = _rotate(self.k_proj(hidden).unflatten(-1, (-1, self.head_dim)), cos, sin)
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim))
        outputs = []
        for run in runs:
            # [count * patches, heads, head_dim] -> [count, heads, patches, head_dim]
            q, k, v = (
                x.narrow(0, run.start, run.count * run.patches)
                .unflatten(0, (run.count, run.patches))
                .transpose(1, 2)
                for x in (query, key, value)
            )
            output = attention(q, k, v)
            outputs.append(output.transpose(1, 2).flatten(0, 1).flatten(1))
        return self.out_proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


class _FeedForward(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = _Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = _Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class _MLP(nn.Module):
    def __init__(self, in_size: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.linear_1 = _Linear(in_size, hidden_size)
        self.linear_2 = _Linear(hidden_size, out_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(hidden)))


def _rotation(
    runs: Sequence[_Run], *, config: VisionConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [patches, 1, 3 * frequencies], fp32; time restarts in every segment."""
    # Each axis gets the same even number of channels; what is left of the head is not rotated.
    axis_dim = 2 * (config.head_dim // 3 // 2)
    exponents = torch.arange(0, axis_dim, 2, dtype=torch.float32, device=device) / axis_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = []
    for run in runs:
        positions = _positions(run.grid, merge_size=config.spatial_merge_size, device=device)
        angle = (positions[:, :, None] * frequencies).flatten(1)
        angles.append(angle.repeat(run.count, 1))
    angle = torch.cat(angles).unsqueeze(1)
    return angle.cos(), angle.sin()


def _positions(grid: Grid, *, merge_size: int, device: torch.device) -> torch.Tensor:
    """Patch indices (time, height, width) [patches, 3] in the order of the rows.

    Rows run over time, then over blocks of merge_size x merge_size patches, then within a block.
    """
    t, h, w = grid
    indices = torch.stack(
        torch.meshgrid(
            torch.arange(t, device=device),
            torch.arange(h, device=device),
            torch.arange(w, device=device),
            indexing="ij",
        ),
        dim=-1,
    )
    blocks = indices.view(t, h // merge_size, merge_size, w // merge_size, merge_size, 3)
    return blocks.transpose(2, 3).reshape(-1, 3)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel i against channel i + n for the n rotated pairs; x [patches, heads, dim]."""
    n = cos.shape[-1]
    first, second, rest = x.float().split([n, n, x.shape[-1] - 2 * n], dim=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(rotated, dim=-1).to(x.dtype)


def _runs(segments: Sequence[Grid]) -> list[_Run]:
    runs: list[_Run] = []
    start = 0
    for grid in segments:
        if runs and runs[-1].grid == grid:
            runs[-1] = _Run(start=runs[-1].start, count=runs[-1].count + 1, grid=grid)
        else:
            runs.append(_Run(start=start, count=1, grid=grid))
        start += runs[-1].patches
    return runs


def _chunks(segments: Sequence[Grid], *, max_patches: int) -> Iterator[list[Grid]]:
    chunk: list[Grid] = []
    patches = 0
    for t, h, w in segments:
        if chunk and patches + t * h * w > max_patches:
            yield chunk
            chunk, patches = [], 0
        chunk.append((t, h, w))
        patches += t * h * w
    if chunk:
        yield chunk


def _check_inputs(
    pixel_values: torch.Tensor, grids: Sequence[Sequence[int]], *, config: VisionConfig
) -> None:
    if pixel_values.ndim != 2 or pixel_values.shape[1] != config.patch_dim:
        raise ValueError(
            f"pixel_values must be [patches, {config.patch_dim}]; got {list(pixel_values.shape)}"
        )
    for grid in grids:
        if len(grid) != 3 or min(grid) < 1 or any(n % config.spatial_merge_size for n in grid[1:]):
            raise ValueError(
                "grid_thw must hold (time, height, width) with height and width multiples of "
                f"{config.spatial_merge_size}; got {list(grid)}"
            )
    patches = sum(t * h * w for t, h, w in grids)
    if patches != pixel_values.shape[0]:
        raise ValueError(
            f"grid_thw counts {patches} patches; pixel_values has {pixel_values.shape[0]} rows"
        )


def _get(holder: Any, key: str, default: Any = None) -> Any:
    value = holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)
    return default if value is None else value


def _require_int(holder: Any, key: str) -> int:
    value = _get(holder, key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config key {key!r} must be a positive integer; got {value!r}")
    return value
