"""Tiny quantised checkpoints in the published tensor names, dtypes and config keys.

Weights are rounded to nearest, four-bit integers on the scale of least squared error, which is less
than good quantisers do. Beside the stored tensors stand the numbers they mean, worked out before
packing: a reference that shares nothing with the codecs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from m3_plugin.checkpoint.names import MTP_PREFIX, TEXT_PREFIX, is_mtp_tensor
from m3_plugin.quantization.formats import (
    MX_GROUP,
    NVFP4_GROUP,
    Fp8,
    Fp8Block,
    GptqInt4,
    Mxfp4,
    Mxfp8,
    Nvfp4,
    PackedInt4,
    WeightFormat,
)
from m3_plugin.testing.hub_layout import prepare_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

QuantName = Literal[
    "mxfp8", "mxfp8-nvfp4", "nvfp4", "mxfp4", "w4a16", "awq", "gptq", "auto-round", "fp8"
]
Role = Literal["attention", "index", "mlp", "shared", "experts", "drafting"]

_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"\.self_attn\.index_[qk]_proj$"), "index"),
    (re.compile(r"\.self_attn\.[qkvo]_proj$"), "attention"),
    (re.compile(r"\.experts\.\d+\.w[123]$"), "experts"),
    (re.compile(r"\.shared_experts\.\w+_proj$"), "shared"),
    (re.compile(r"layers\.\d+\.mlp\.(gate|up|down)_proj$"), "mlp"),
    (re.compile(r"\.eh_proj$"), "drafting"),
)
# Columns per scale in the four-bit integer recipes; published ones use 32 or 128, and 32 divides
# every size of the tiny checkpoints.
_INT4_GROUP = 32
# Steps over which a four-bit recipe may spread a group's range; 14 are all that are symmetric.
_INT4_STEPS = tuple(range(14, 7, -1))
_E4M3_MAX = 448.0
_E2M1_MAX = 6.0


def role_of(module: str) -> Role | None:
    """What a linear module is for; None for everything no exporter quantises."""
    if not module.startswith(("model.layers.", MTP_PREFIX)):
        return None
    return next((role for pattern, role in _ROLES if pattern.search(module)), None)


@dataclass(frozen=True)
class Recipe:
    """One published way to quantise M3: formats by role (absent: left alone), and its config.

    With `keeps_drafts` the MTP modules are left alone, whatever the role; with `gate_like_up` an
    expert's w1 and w3 share the scale of the tensor.
    """

    formats: Mapping[Role, WeightFormat]
    method: Literal["mxfp8", "modelopt", "quark", "compressed-tensors", "gptq", "auto-round", "fp8"]
    keeps_drafts: bool = False
    gate_like_up: bool = False

    def format_of(self, module: str) -> WeightFormat | None:
        if self.keeps_drafts and is_mtp_tensor(module):
            return None
        role = role_of(module)
        return None if role is None else self.formats.get(role)


def _all(weight: WeightFormat) -> dict[Role, WeightFormat]:
    roles: tuple[Role, ...] = ("attention", "index", "mlp", "shared", "experts", "drafting")
    return dict.fromkeys(roles, weight)


def _but_index(weight: WeightFormat) -> dict[Role, WeightFormat]:
    return {role: fmt for role, fmt in _all(weight).items() if role != "index"}


RECIPES: Mapping[QuantName, Recipe] = MappingProxyType(
    {
        "mxfp8": Recipe(_all(Mxfp8()), "mxfp8"),
        "mxfp8-nvfp4": Recipe(
            {
                **_all(Mxfp8()),
                "experts": Nvfp4(
                    weight="weight_packed",
                    global_scale="weight_global_scale",
                    input_scale="input_global_scale",
                    divides=True,
                ),
            },
            "mxfp8",
            gate_like_up=True,
        ),
        "nvfp4": Recipe(
            {**_but_index(Mxfp8(scale="weight_scale")), "experts": Nvfp4()}, "modelopt"
        ),
        "mxfp4": Recipe({"experts": Mxfp4()}, "quark"),
        "w4a16": Recipe(_but_index(PackedInt4(_INT4_GROUP, symmetric=True)), "compressed-tensors"),
        "awq": Recipe(_but_index(PackedInt4(_INT4_GROUP, symmetric=False)), "compressed-tensors"),
        "gptq": Recipe(_but_index(GptqInt4(_INT4_GROUP, symmetric=False, act_order=True)), "gptq"),
        "auto-round": Recipe(_but_index(GptqInt4(_INT4_GROUP, symmetric=True)), "auto-round"),
        "fp8": Recipe(_all(Fp8Block()), "fp8"),
    }
)


@dataclass(frozen=True)
class Quantised:
    """A weight after rounding: `parts` as stored, by suffix; `values` are what they mean, fp32."""

    parts: dict[str, Tensor]
    values: Tensor


def quantise_checkpoint(
    source: str | Path,
    target: str | Path,
    quant: QuantName,
    *,
    keep_drafts: bool = False,
    force: bool = False,
) -> Path:
    """Write the plain checkpoint in `source` quantised into the folder `target`.

    `keep_drafts` leaves MTP modules unquantised and says so in config.json.

    Raises
    ------
    ValueError : unknown recipe, or sizes its format cannot hold.
    FileExistsError : `target` holds files and `force` was not given.
    """
    recipe = replace(_recipe(quant), keeps_drafts=keep_drafts)
    return _rewrite(Path(source), prepare_folder(target, force=force), recipe, stored=True)


def reference_checkpoint(source: str | Path, target: str | Path, quant: QuantName) -> Path:
    """Write what `quantise_checkpoint` means as a plain fp32 checkpoint, not by unpacking it."""
    return _rewrite(Path(source), prepare_folder(target, force=False), _recipe(quant), stored=False)


def _recipe(quant: QuantName) -> Recipe:
    if quant not in RECIPES:
        raise ValueError(f"quant must be one of {', '.join(RECIPES)}; got {quant!r}")
    return RECIPES[quant]


def _rewrite(source: Path, target: Path, recipe: Recipe, *, stored: bool) -> Path:
    import json
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    weight_map: dict[str, str] = {}
    modules = []
    shards = sorted(source.glob("*.safetensors"))
    peaks: dict[str, float] = {}
    if recipe.gate_like_up:
        for shard in shards:
            for name, tensor in load_file(shard).items():
                pair = _gate_up_pair(name)
                peaks[pair] = max(peaks.get(pair, 0.0), float(tensor.abs().max()))
    for shard in shards:
        tensors = {}
        for name, tensor in load_file(shard).items():
            module = name.removesuffix(".weight")
            weight = recipe.format_of(module.removeprefix(TEXT_PREFIX))
            modules.append(module)
            if weight is None:
                tensors[name] = tensor if stored else tensor.float()
                continue
            peak = peaks.get(_gate_up_pair(name))
            if isinstance(weight, Nvfp4) and peak is not None:
                result = quantise_nvfp4(weight, tensor.float(), peak=peak)
                result.parts[weight.input_scale] = _input_scale(module)
            else:
                result = quantise(weight, tensor.float())
            if stored:
                tensors |= {f"{module}.{s}": part for s, part in result.parts.items()}
            else:
                tensors[name] = result.values
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, target / shard.name, metadata={"format": "pt"})
        (target / shard.name).chmod(shard.stat().st_mode)
        weight_map |= dict.fromkeys(tensors, shard.name)
    for file in source.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, target)
    total = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((target / "config.json").read_text())
    if stored:
        config["quantization_config"] = quantization_config(recipe, modules)
    else:
        config["torch_dtype"] = config["text_config"]["torch_dtype"] = str(torch.float32)[6:]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def quantization_config(recipe: Recipe, modules: list[str]) -> dict[str, Any]:
    """The exporter's section of config.json for a checkpoint with these modules."""
    text = [module for module in modules if module.startswith(TEXT_PREFIX)]
    formats = {m: recipe.format_of(m.removeprefix(TEXT_PREFIX)) for m in text}
    linear = [m for m in text if role_of(m.removeprefix(TEXT_PREFIX))]
    kept = [m for m in linear if formats[m] is None]
    always = [m for m in text if m.endswith(("lm_head", "embed_tokens", "block_sparse_moe.gate"))]
    builders = {
        "mxfp8": _mxfp8_config,
        "modelopt": _modelopt_config,
        "quark": _quark_config,
        "compressed-tensors": _compressed_config,
        "gptq": _gptq_config,
        "auto-round": _auto_round_config,
        "fp8": _fp8_config,
    }
    return builders[recipe.method](formats, kept, always)


_Formats = Mapping[str, WeightFormat | None]
_VISION = ["vision_tower", "multi_modal_projector", "patch_merge_mlp"]


def _mxfp8_config(formats: _Formats, kept: list[str], always: list[str]) -> dict[str, Any]:
    own_experts = {
        "moe_quant_algo": "NVFP4",
        "moe_quant_format": "nvfp4-pack-quantized",
        "group_size": NVFP4_GROUP,
        "kv_cache_quant_algo": "FP8",
        "attention_quant_algo": "FP8",
        "index_k_quant_type": "nvfp4",
    }
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [1, MX_GROUP],
        "ignored_layers": [*always, *kept, *_VISION],
    } | (own_experts if any(isinstance(f, Nvfp4) for f in formats.values()) else {})


def _modelopt_config(formats: _Formats, kept: list[str], always: list[str]) -> dict[str, Any]:
    entries = {
        "nvfp4": {"quant_algo": "NVFP4", "group_size": NVFP4_GROUP},
        "mxfp8": {"quant_algo": "MXFP8", "group_size": MX_GROUP},
    }
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "producer": {"name": "modelopt"},
        "quantized_layers": {m: entries[fmt.name] for m, fmt in formats.items() if fmt},
        "ignore": [*always, *kept, *(f"{name}*" for name in _VISION)],
    }


def _quark_config(formats: _Formats, kept: list[str], always: list[str]) -> dict[str, Any]:
    values = {
        "dtype": "fp4",
        "qscheme": "per_group",
        "group_size": MX_GROUP,
        "ch_axis": -1,
        "scale_format": "e8m0",
        "symmetric": None,
        "is_dynamic": False,
    }
    return {
        "quant_method": "quark",
        "export": {
            "kv_cache_group": [],
            "pack_method": "reorder",
            "weight_format": "real_quantized",
        },
        "global_quant_config": {
            "weight": values,
            "input_tensors": values | {"is_dynamic": True},
            "bias": None,
            "output_tensors": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "exclude": [*always, *kept],
    }


def _compressed_config(formats: _Formats, kept: list[str], always: list[str]) -> dict[str, Any]:
    weight = next(fmt for fmt in formats.values() if isinstance(fmt, PackedInt4))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": weight.group_size,
                    "symmetric": weight.symmetric,
                    "actorder": None,
                    "dynamic": False,
                },
            }
        },
        "ignore": [
            *always,
            "re:.*self_attn[.]index_[qk]_proj$",
            *filter(is_mtp_tensor, kept),
            *(f"re:{n}.*" for n in _VISION),
        ],
        "kv_cache_scheme": None,
    }


def _gptq_config(formats: _Formats, kept: list[str], always: list[str]) -> dict[str, Any]:
    weight = next(fmt for fmt in formats.values() if isinstance(fmt, GptqInt4))
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": weight.group_size,
        "sym": weight.symmetric,
        "desc_act": weight.act_order,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {
            "-:.*index_[qk]_proj": {},
            "-:.*block_sparse_moe[.]gate$": {},
            **{f"-:{re.escape(name)}$": {} for name in kept if is_mtp_tensor(name)},
        },
    }


def _auto_round_config(formats: _Formats, kept: list[str], always: list[str]) -> dict[str, Any]:
    weight = next(fmt for fmt in formats.values() if isinstance(fmt, GptqInt4))
    return {
        "quant_method": "auto-round",
        "bits": 4,
        "data_type": "int",
        "group_size": weight.group_size,
        "sym": weight.symmetric,
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": "language_model.model.layers,language_model.model.mtp.layers",
        "extra_config": {name: {"bits": 16, "data_type": "float"} for name in [*always, *kept]},
    }


def _fp8_config(formats: _Formats, kept: list[str], always: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [*always, *kept, *_VISION],
    }


@singledispatch
def quantise(weight: WeightFormat, values: Tensor) -> Quantised:
    """Round fp32 [rows, columns] to nearest and store it.

    Raises
    ------
    TypeError : no rounding is written for the format.
    ValueError : sizes the format cannot hold.
    """
    raise TypeError(f"no rounding for {type(weight).__name__}")


@quantise.register(Mxfp8)
def _(weight: Mxfp8, values: Tensor) -> Quantised:
    groups, exponents = _mx_groups(weight, values, largest=_E4M3_MAX)
    rounded = _to_e4m3(groups * (-exponents).exp2()[..., None])
    meaning = rounded.float() * exponents.exp2()[..., None]
    parts = {"weight": rounded.flatten(-2), weight.scale: _stored_exponents(exponents)}
    return Quantised(parts, meaning.flatten(-2))


@quantise.register(Mxfp4)
def _(weight: Mxfp4, values: Tensor) -> Quantised:
    groups, exponents = _mx_groups(weight, values, largest=_E2M1_MAX)
    codes, rounded = _to_e2m1(groups * (-exponents).exp2()[..., None])
    meaning = rounded * exponents.exp2()[..., None]
    parts = {
        weight.weight: _pack_bytes(codes.flatten(-2)),
        weight.scale: _stored_exponents(exponents),
    }
    return Quantised(parts, meaning.flatten(-2))


@quantise.register(Nvfp4)
def _(weight: Nvfp4, values: Tensor) -> Quantised:
    return quantise_nvfp4(weight, values, peak=float(values.abs().max()))


def quantise_nvfp4(weight: Nvfp4, values: Tensor, *, peak: float) -> Quantised:
    """`quantise` with the scale of a tensor, or of several, whose largest magnitude is `peak`."""
    import torch

    weight.parts(*values.shape)
    groups = values.unflatten(-1, (-1, NVFP4_GROUP))
    factor = torch.tensor([peak / (_E2M1_MAX * _E4M3_MAX)]).clamp(min=1e-30)
    scales = _to_e4m3(groups.abs().amax(-1) / _E2M1_MAX / factor)
    unit = scales.float() * factor
    codes, rounded = _to_e2m1(torch.where(unit[..., None] > 0, groups / unit[..., None], 0.0))
    parts = {
        weight.weight: _pack_bytes(codes.flatten(-2)),
        "weight_scale": scales,
        weight.global_scale: 1 / factor if weight.divides else factor,
    }
    return Quantised(parts, (rounded * unit[..., None]).flatten(-2))


@quantise.register(PackedInt4)
def _(weight: PackedInt4, values: Tensor) -> Quantised:
    import torch

    weight.parts(*values.shape)
    group = weight.group_size or values.shape[1]
    scales, zeros, codes = _round_int4(
        values, group=group, symmetric=weight.symmetric, dtype=torch.bfloat16
    )
    parts = {
        "weight_packed": _pack_words(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor(values.shape, dtype=torch.int64),
    }
    if not weight.symmetric:
        parts["weight_zero_point"] = _pack_words(zeros.T).T
    return Quantised(parts, _int4_meaning(codes, zeros, scales, group=group))


@quantise.register(GptqInt4)
def _(weight: GptqInt4, values: Tensor) -> Quantised:
    import torch

    weight.parts(*values.shape)
    columns = values.shape[1]
    group = weight.group_size or columns
    order = torch.arange(columns)
    if weight.act_order:
        # the columns of the largest weights form the first groups
        order = values.abs().amax(0).argsort(descending=True, stable=True)
    scales, zeros, codes = _round_int4(
        values[:, order], group=group, symmetric=weight.symmetric, dtype=torch.float16
    )
    meaning = _int4_meaning(codes, zeros, scales, group=group)
    back = order.argsort()
    parts = {
        "qweight": _pack_words(codes[:, back]).T,
        "qzeros": _pack_words((zeros - weight.stored_zero_offset).T),
        "scales": scales.T,
        "g_idx": (back // group).int(),
    }
    return Quantised(parts, meaning[:, back])


@quantise.register(Fp8Block)
def _(weight: Fp8Block, values: Tensor) -> Quantised:
    import torch

    rows, columns = values.shape
    scales = torch.zeros(weight.parts(rows, columns)[weight.scale].shapes[0])
    rounded = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    meaning = torch.zeros(rows, columns)
    for i, r in enumerate(range(0, rows, weight.block_rows)):
        for j, c in enumerate(range(0, columns, weight.block_columns)):
            block = (slice(r, r + weight.block_rows), slice(c, c + weight.block_columns))
            scales[i, j] = (values[block].abs().max() / _E4M3_MAX).clamp(min=1e-12)
            rounded[block] = _to_e4m3(values[block] / scales[i, j])
            meaning[block] = rounded[block].float() * scales[i, j]
    return Quantised({"weight": rounded, weight.scale: scales}, meaning)


@quantise.register(Fp8)
def _(weight: Fp8, values: Tensor) -> Quantised:
    largest = values.abs().amax(-1, keepdim=True) if weight.per_row else values.abs().max()
    scale = (largest / _E4M3_MAX).clamp(min=1e-12)
    rounded = _to_e4m3(values / scale)
    return Quantised({"weight": rounded, "weight_scale": scale}, rounded.float() * scale)


def _gate_up_pair(name: str) -> str:
    """The same for an expert's w1 and w3, whose products one kernel makes."""
    return re.sub(r"(\.experts\.\d+)\.w[13]\.", r"\1.w13.", name)


def _input_scale(module: str) -> Tensor:
    """What MiniMax stores of activations: a constant for w2; nothing reads w1's and w3's."""
    import torch

    return torch.tensor([16.0 if module.endswith(".w2") else 1.0])


def _mx_groups(weight: WeightFormat, values: Tensor, *, largest: float) -> tuple[Tensor, Tensor]:
    """Columns in groups of 32, and per group the smallest exponent that saturates nothing."""
    import torch

    weight.parts(*values.shape)
    groups = values.unflatten(-1, (-1, MX_GROUP))
    peak = groups.abs().amax(-1)
    exponents = torch.where(peak > 0, (peak / largest).log2().ceil(), 0.0)
    return groups, exponents.clamp(-126, 127)


def _stored_exponents(exponents: Tensor) -> Tensor:
    import torch

    return (exponents + 127).to(torch.uint8)


def _to_e4m3(values: Tensor) -> Tensor:
    import torch

    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def _to_e2m1(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and values of the nearest e2m1 numbers."""
    import torch

    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    middles = (table[1:] + table[:-1]) / 2
    magnitude = torch.bucketize(values.abs().contiguous(), middles)
    negative = values < 0
    rounded = torch.where(negative, -table[magnitude], table[magnitude])
    return (magnitude + 8 * negative).to(torch.uint8), rounded


def _pack_bytes(codes: Tensor) -> Tensor:
    return codes[..., 0::2] + codes[..., 1::2] * 16


def _round_int4(
    values: Tensor, *, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [rows, groups] in `dtype`, zero points and codes in 0..15 as int64.

    Each group takes the scale of least squared error among those that spread its range over fewer
    steps than there are: what lies on a coarser grid stays on it.
    """
    import torch

    groups = values.unflatten(-1, (-1, group))
    steps = torch.tensor(_INT4_STEPS)[:, None, None]
    if symmetric:
        scales = (2 * groups.abs().amax(-1) / steps).clamp(min=1e-5).to(dtype)
        zeros = torch.full(scales.shape, 8)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / steps).clamp(min=1e-5).to(dtype)
        # stored less one by GPTQ, so at least one
        zeros = (-low / scales.float()).round().clamp(1, 15).long()
    unit = scales.float()[..., None]
    codes = ((groups / unit).round().long() + zeros[..., None]).clamp(0, 15)
    error = ((codes - zeros[..., None]) * unit - groups).square().sum(-1)
    best = error.argmin(0, keepdim=True)
    chosen = codes.gather(0, best[..., None].expand(-1, -1, -1, group))
    return scales.gather(0, best)[0], zeros.gather(0, best)[0], chosen[0].flatten(-2)


def _int4_meaning(codes: Tensor, zeros: Tensor, scales: Tensor, *, group: int) -> Tensor:
    steps = codes.unflatten(-1, (-1, group)) - zeros[..., None]
    return (steps.float() * scales.float()[..., None]).flatten(-2)


def _pack_words(codes: Tensor) -> Tensor:
    """Codes 0..15 [r, n] to int32 [r, n / 8], the first in the lowest bits."""
    import torch
    from torch.nn.functional import pad

    codes = pad(codes, (0, -codes.shape[-1] % 8))
    weights = 16 ** torch.arange(8)
    words = (codes.unflatten(-1, (-1, 8)) * weights).sum(-1)
    # the highest bit of a word is an int32's sign
    return torch.where(words >= 2**31, words - 2**32, words).int()
