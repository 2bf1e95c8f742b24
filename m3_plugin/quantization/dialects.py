"""`quantization_config` of every published MiniMax-M3 checkpoint, read into one meaning.

Each exporter has its own keys for the same three things: which linear weights are stored how, which
are left alone, and whether the KV cache has scales. Every dialect becomes a `Quantization`; what
none of them can express (embedding, norms, router, vision) is never quantised in an M3 checkpoint.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

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
    Plain,
    WeightFormat,
)
from m3_plugin.quantization.patterns import compiled
from m3_plugin.untrusted import printable, shown

KEY = "quantization_config"
# All of a model's names take about a second.
MATCHING_SECONDS = 60
PLAIN = Plain()

# The linear weights of the text model and of its MTP modules; everything else is stored plain by
# every exporter.
_LINEAR = re.compile(
    r"model\.mtp\.layers\.\d+\.eh_proj$"
    r"|model\.(layers\.\d+|mtp\.layers\.\d+\.transformer_layer)\.("
    r"self_attn\.(index_)?[qk]_proj|self_attn\.[vo]_proj"
    r"|(mlp|block_sparse_moe\.shared_experts)\.(gate|up|down)_proj"
    r"|block_sparse_moe\.experts\.\d+\.w[123]"
    r")$"
)
_INDEX = re.compile(r"\.self_attn\.index_[qk]_proj$")
_UNQUANTISED_BITS = 16
# any will do: the lists of no published config tell routed experts apart
_AN_EXPERT = "model.layers.3.block_sparse_moe.experts.0.w1"


@dataclass(frozen=True)
class Names:
    """A set of modules as a config writes it: names, globs, or regular expressions ("re:...").

    A name without wildcard also means all that is below it, and may be any run of whole components:
    "gate" is `block_sparse_moe.gate` and not `gate_proj`.
    """

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if pattern.startswith("re:"):
                compiled(pattern[3:])

    @cached_property
    def _plain(self) -> dict[int, frozenset[str]]:
        """Names without wildcard by their number of components: a table of all experts is long."""
        by_length: dict[int, set[str]] = {}
        for pattern in self.patterns:
            if not _is_wild(pattern):
                by_length.setdefault(pattern.count(".") + 1, set()).add(pattern)
        return {length: frozenset(names) for length, names in by_length.items()}

    @cached_property
    def _wild(self) -> tuple[re.Pattern[str], ...]:
        """Globs and regular expressions, both matched from the start of a name."""
        return tuple(
            compiled(pattern[3:]) if pattern.startswith("re:") else re.compile(translate(pattern))
            for pattern in self.patterns
            if _is_wild(pattern)
        )

    @cached_property
    def _spent(self) -> list[float]:
        """Seconds that comparing took so far."""
        return [0.0]

    def __contains__(self, module: object) -> bool:
        """Whether the set holds a module, named relative to the text model."""
        assert isinstance(module, str)
        spellings = (
            f"language_model.{module}",
            f"model.language_model.{module}",
            # transformers 5 says model.language_model.layers
            f"model.language_model.{module.removeprefix('model.')}",
        )
        if self._wild:
            began = time.perf_counter()
            found = any(p.match(name) for p in self._wild for name in (module, *spellings))
            self._spent[0] += time.perf_counter() - began
            if self._spent[0] > MATCHING_SECONDS:
                raise ValueError(
                    f"config key '{KEY}' holds patterns that take over {MATCHING_SECONDS} s to be "
                    f"compared with the model's names: {shown(self.patterns)}; write them simpler"
                )
            if found:
                return True
        return any(
            ".".join(parts[first : first + length]) in names
            # every run of the module's own name is a run of these
            for parts in (name.split(".") for name in spellings)
            for length, names in self._plain.items()
            for first in range(len(parts) - length + 1)
        )


def _is_wild(pattern: str) -> bool:
    return pattern.startswith("re:") or "*" in pattern or "?" in pattern or "[" in pattern


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint's config says about its weights.

    Attributes
    ----------
    method : `quant_method` as published
    rules : formats by module, the first that holds a module counts
    kept : modules the exporter was told to leave alone
    kv_scales : the config promises scales for an fp8 KV cache
    keeps_head : the output head is left alone although no list says so
    """

    method: str
    rules: tuple[tuple[Names, WeightFormat], ...]
    kept: Names = Names()
    kv_scales: bool = False
    keeps_head: bool = False

    def format_of(self, module: str) -> WeightFormat:
        """How the weight of a module (named relative to the text model) is stored."""
        is_head = module == "lm_head" and not self.keeps_head
        if not (is_head or _LINEAR.match(module)) or module in self.kept:
            return PLAIN
        for names, weight in self.rules:
            if module in names:
                return weight
        return PLAIN

    @property
    def of_experts(self) -> WeightFormat:
        """How the routed experts are stored, which are nearly all of the weights."""
        return self.format_of(_AN_EXPERT)

    @property
    def has_own_experts(self) -> bool:
        """Whether MXFP8 weights stand beside NVFP4 experts under one method, as in M3.1."""
        return self.method == "mxfp8" and isinstance(self.of_experts, Nvfp4)

    def __str__(self) -> str:
        """For people: the method and the formats in use."""
        formats = dict.fromkeys(weight.name for _, weight in self.rules)
        return f"{self.method} ({', '.join(formats)})"


def is_linear(module: str) -> bool:
    """Whether a module of the text model has a weight which some exporter quantises."""
    return module == "lm_head" or _LINEAR.match(module) is not None


def is_index_projection(module: str) -> bool:
    """Whether a module is one of the two projections of the index branch."""
    return _INDEX.search(module) is not None


def read_quantization(config: Mapping[str, Any] | None) -> Quantization | None:
    """Read a `quantization_config` of any dialect; None for an unquantised checkpoint.

    Raises
    ------
    ValueError : a method or an option no codec exists for; names key, rule and value.
    """
    if not config:
        return None
    method = config.get("quant_method")
    if method is None and ("quant_algo" in config or "quantization" in config):
        # ModelOpt's hf_quant_config.json has no quant_method
        method = "modelopt"
    readers: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
        "mxfp8": _read_mxfp8,
        "modelopt": _read_modelopt,
        "quark": _read_quark,
        "compressed-tensors": _read_compressed_tensors,
        "gptq": _read_gptq,
        "auto-round": _read_auto_round,
        "fp8": _read_fp8,
    }
    _require(method in tuple(readers), "quant_method", f"one of {', '.join(readers)}", method)
    quantization = readers[str(method)](config)
    _require_known(config, _KNOWN[str(method)])
    return quantization


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Keys of each method that are read here, or that say how the weights were found and how activations
# may be quantised: neither is part of what is stored. A key on no list may be, and is refused.
_KNOWN: Mapping[str, frozenset[str]] = {
    "mxfp8": _keys(
        """
        activation_scheme fmt scale_fmt weight_block_size ignored_layers modules_to_not_convert
        moe_quant_algo moe_quant_format group_size kv_cache_quant_algo attention_quant_algo
        index_k_quant_type
        """
    ),
    "fp8": _keys(
        "activation_scheme fmt scale_fmt weight_block_size ignored_layers modules_to_not_convert"
    ),
    "modelopt": _keys(
        """
        quant_algo kv_cache_quant_algo kv_cache_scheme producer quantized_layers ignore
        exclude_modules group_size quantization config_groups
        """
    ),
    "quark": _keys(
        """
        quant_mode export global_quant_config layer_quant_config layer_type_quant_config
        kv_cache_quant_config algo_config exclude version
        """
    ),
    "compressed-tensors": _keys(
        """
        format quantization_status version global_compression_ratio kv_cache_scheme config_groups
        ignore
        """
    ),
    "gptq": _keys(
        """
        bits group_size desc_act sym lm_head checkpoint_format pack_dtype meta dynamic
        modules_to_not_convert damp_percent true_sequential static_groups quantizer
        """
    ),
    "auto-round": _keys(
        """
        autoround_version bits data_type group_size sym desc_act iters packing_format
        block_name_to_quantize extra_config act_bits act_data_type act_dynamic act_group_size
        act_sym lr minmax_lr nsamples seqlen batch_size low_gpu_mem_usage enable_quanted_input
        enable_minmax_tuning amp gradient_accumulate_steps scale_dtype super_bits super_group_size
        """
    ),
}
# What hosts add to any of them.
_ADDED = _keys(
    "quant_method packed_modules_mapping quantization_config_file total_num_heads "
    "total_num_kv_heads"
)


def _require_known(config: Mapping[str, Any], known: frozenset[str]) -> None:
    for key, value in config.items():
        says_nothing = value is None or value in ({}, [], (), "")
        _require(
            says_nothing or key in known | _ADDED,
            key,
            f"left out, as nothing is known of it ({config.get('quant_method')} has "
            f"{', '.join(sorted(known))})",
            value,
        )


def _read_mxfp8(config: Mapping[str, Any]) -> Quantization:
    """MiniMax's own releases: MXFP8 throughout (M3), or beside NVFP4 routed experts (M3.1)."""
    block = config.get("weight_block_size")
    _require(block in (None, [1, MX_GROUP]), "weight_block_size", f"[1, {MX_GROUP}]", block)
    scale = config.get("scale_fmt")
    _require(scale in (None, "ue8m0"), "scale_fmt", "'ue8m0'", scale)
    # static scales of activations would be tensors that no one here reads
    scheme = config.get("activation_scheme")
    _require(scheme in (None, "dynamic"), "activation_scheme", "'dynamic'", scheme)
    kept = _names(config, _kept_key(config))
    return Quantization("mxfp8", (*_own_expert_rules(config), *_everything(Mxfp8())), kept)


def _own_expert_rules(config: Mapping[str, Any]) -> tuple[tuple[Names, WeightFormat], ...]:
    """What M3.1 says of its routed experts, whose format is not that of the other weights.

    What it says of attention and caches is how the model was trained; what a cache holds is the
    operator's choice. A value that is none of M3.1's is another model's.
    """
    algorithm, stored = config.get("moe_quant_algo"), config.get("moe_quant_format")
    if algorithm is None and stored is None:
        for key in _OF_OWN_EXPERTS:
            value = config.get(key)
            _require(value is None, key, "left out without moe_quant_algo", value)
        return ()
    told = {
        "moe_quant_algo": (str(algorithm).upper(), "NVFP4", algorithm),
        "moe_quant_format": (stored, _NVFP4_STORED, stored),
    }
    # a value that is there says more than one that is not
    for key in sorted(told, key=lambda key: told[key][2] is None):
        found, wanted, value = told[key]
        _require(found == wanted, key, f"'{wanted}'", value)
    for key, allowed in _OF_OWN_EXPERTS.items():
        value = config.get(key)
        spelt = value.lower() if isinstance(value, str) else value
        _require(spelt in (None, allowed), key, f"{allowed!r} or left out", value)
    return ((_ROUTED_EXPERTS, _COMPRESSED_NVFP4),)


def _read_fp8(config: Mapping[str, Any]) -> Quantization:
    """Blocks of e4m3 as DeepSeek and MiniMax-M2 publish them, or one scale per tensor."""
    fmt = config.get("fmt", "e4m3")
    _require(fmt in ("e4m3", "float8_e4m3fn"), "fmt", "'e4m3'", fmt)
    block = config.get("weight_block_size")
    weight: WeightFormat = Fp8()
    if block is not None:
        ok = isinstance(block, Sequence) and len(block) == 2 and all(_is_size(b) for b in block)
        _require(ok, "weight_block_size", "two positive integers", block)
        weight = Fp8Block(*block)
    return Quantization("fp8", _everything(weight), _names(config, _kept_key(config)))


def _kept_key(config: Mapping[str, Any]) -> str:
    """Exporters of the fp8 family say either."""
    return "ignored_layers" if config.get("ignored_layers") else "modules_to_not_convert"


def _read_modelopt(config: Mapping[str, Any]) -> Quantization:
    """ModelOpt: one algorithm for all, or a table of layers (MIXED_PRECISION)."""
    if "quantization" in config:
        config = _mapping(config, "quantization")
    algorithm = str(config.get("quant_algo", "")).upper()
    kept = _names(config, "ignore" if "ignore" in config else "exclude_modules")
    cache = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")
    if algorithm != "MIXED_PRECISION":
        rules = _everything(_modelopt_format(algorithm, config, key="quant_algo"))
        return Quantization("modelopt", rules, kept, kv_scales=cache is not None)
    by_format: dict[WeightFormat, list[str]] = {}
    for name, layer in _mapping(config, "quantized_layers").items():
        key = f"quantized_layers.{name}"
        _require(isinstance(layer, Mapping), key, "a mapping", layer)
        weight = _modelopt_format(str(layer.get("quant_algo", "")).upper(), layer, key=key)
        by_format.setdefault(weight, []).append(name)
    _require(bool(by_format), "quantized_layers", "a table of layers", {})
    rules = tuple((Names(tuple(names)), weight) for weight, names in by_format.items())
    return Quantization("modelopt", rules, kept, kv_scales=cache is not None)


def _modelopt_format(algorithm: str, config: Mapping[str, Any], *, key: str) -> WeightFormat:
    formats: dict[str, WeightFormat] = {
        "NVFP4": Nvfp4(),
        "W4A16_NVFP4": Nvfp4(),
        "MXFP8": Mxfp8(scale="weight_scale"),
        "FP8": Fp8(),
        "FP8_PER_CHANNEL_PER_TOKEN": Fp8(per_row=True),
    }
    _require(algorithm in formats, key, f"one of {', '.join(formats)}", algorithm)
    group = config.get("group_size")
    wanted = {"nvfp4": NVFP4_GROUP, "mxfp8": MX_GROUP}.get(formats[algorithm].name)
    _require(
        group in (None, wanted) or wanted is None,
        f"{key}.group_size",
        f"{wanted} for {algorithm}",
        group,
    )
    return formats[algorithm]


def _read_quark(config: Mapping[str, Any]) -> Quantization:
    """AMD Quark: one scheme for all, others for some layers."""
    rules: list[tuple[Names, WeightFormat]] = []
    for name, scheme in (_mapping(config, "layer_quant_config") or {}).items():
        rules.append((Names((name,)), _quark_format(scheme, key=f"layer_quant_config.{name}")))
    scheme = config.get("global_quant_config")
    if scheme:
        rules += _everything(_quark_format(scheme, key="global_quant_config"))
    cache = _mapping(config, "kv_cache_quant_config")
    return Quantization("quark", tuple(rules), _names(config, "exclude"), kv_scales=bool(cache))


def _quark_format(scheme: Any, *, key: str) -> WeightFormat:
    key = f"{key}.weight"
    weight = scheme.get("weight") if isinstance(scheme, Mapping) else None
    # a list of one: Quark writes either
    weight = weight[0] if isinstance(weight, Sequence) and len(weight) == 1 else weight
    _require(isinstance(weight, Mapping), key, "a mapping", weight)
    assert isinstance(weight, Mapping)
    dtype, scheme_name = str(weight.get("dtype")), str(weight.get("qscheme"))
    if dtype == "fp4":
        group, scale = weight.get("group_size"), weight.get("scale_format")
        _require(group == MX_GROUP, f"{key}.group_size", str(MX_GROUP), group)
        _require(scale == "e8m0", f"{key}.scale_format", "'e8m0'", scale)
        return Mxfp4()
    rows = {"per_tensor": False, "per_channel": True}
    _require(dtype == "fp8_e4m3", f"{key}.dtype", "'fp4' or 'fp8_e4m3'", dtype)
    _require(scheme_name in rows, f"{key}.qscheme", f"one of {', '.join(rows)}", scheme_name)
    return Fp8(per_row=rows[scheme_name])


def _read_compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    """compressed-tensors (llm-compressor): W4A16, AWQ, NVFP4, MXFP4, MXFP8 and FP8."""
    rules: list[tuple[Names, WeightFormat]] = []
    for name, group in _mapping(config, "config_groups").items():
        key = f"config_groups.{name}"
        _require(isinstance(group, Mapping), key, "a mapping", group)
        weight = _compressed_format(
            _mapping(group, "weights", prefix=f"{key}."),
            stored=group.get("format") or config.get("format"),
            key=f"{key}.weights",
        )
        targets = _strings(group.get("targets"), key=f"{key}.targets")
        if "Linear" in targets:
            rules += _everything(weight)
        else:
            rules.append((Names(targets), weight))
    # the most special targets first: a group for all linear layers is the rest
    rules.sort(key=lambda rule: rule[0] == _ALL)
    return Quantization(
        "compressed-tensors",
        tuple(rules),
        _names(config, "ignore"),
        kv_scales=bool(config.get("kv_cache_scheme")),
    )


def _compressed_format(weights: Mapping[str, Any], *, stored: Any, key: str) -> WeightFormat:
    bits, kind, group = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    strategy = weights.get("strategy")
    if stored == "pack-quantized":
        _require((bits, kind) == (4, "int"), key, "4-bit integers", f"{bits}-bit {kind}")
        _require(strategy in ("group", "channel"), f"{key}.strategy", "group or channel", strategy)
        return PackedInt4(
            group if strategy == "group" else None,
            symmetric=bool(weights.get("symmetric", True)),
            # "static" reorders before groups are formed and leaves no trace in the file
            act_order=weights.get("actorder") in ("group", True),
        )
    if stored == _NVFP4_STORED:
        return _COMPRESSED_NVFP4
    if stored == "mxfp4-pack-quantized":
        return Mxfp4(weight="weight_packed")
    if stored == "mxfp8-quantized":
        return Mxfp8(scale="weight_scale")
    if stored == "float-quantized":
        _require((bits, kind) == (8, "float"), key, "8-bit floats", f"{bits}-bit {kind}")
        if strategy == "block":
            block = weights.get("block_structure")
            ok = isinstance(block, Sequence) and len(block) == 2 and all(_is_size(b) for b in block)
            _require(ok, f"{key}.block_structure", "two positive integers", block)
            assert block is not None
            return Fp8Block(*block, scale="weight_scale")
        rows = {"tensor": False, "channel": True}
        _require(str(strategy) in rows, f"{key}.strategy", "tensor, channel or block", strategy)
        return Fp8(per_row=rows[str(strategy)])
    _require(
        False,
        "format",
        "pack-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp8-quantized "
        "or float-quantized",
        stored,
    )
    raise AssertionError


def _read_gptq(config: Mapping[str, Any]) -> Quantization:
    kept = []
    for pattern, override in (_mapping(config, "dynamic") or {}).items():
        # "-:" leaves a module alone; "+:" would give it other bits or groups
        _require(pattern.startswith("-:"), f"dynamic.{pattern}", "an exclusion ('-:')", override)
        kept.append(f"re:{pattern.removeprefix('-:')}")
    version = config.get("checkpoint_format", "gptq")
    _require(version in ("gptq", "gptq_v2"), "checkpoint_format", "'gptq' or 'gptq_v2'", version)
    offset = 0 if version == "gptq_v2" else 1
    return Quantization(
        "gptq",
        _everything(_gptq_format(config, symmetric=config.get("sym", True), offset=offset)),
        Names((*kept, *_names(config, "modules_to_not_convert").patterns)),
        keeps_head=not config.get("lm_head", False),
    )


def _read_auto_round(config: Mapping[str, Any]) -> Quantization:
    packing = config.get("packing_format", "auto_round:auto_gptq")
    _require(
        packing in ("auto_round:auto_gptq", "auto_gptq"),
        "packing_format",
        "'auto_round:auto_gptq'",
        packing,
    )
    kept = []
    for name, layer in (_mapping(config, "extra_config") or {}).items():
        bits = layer.get("bits") if isinstance(layer, Mapping) else None
        left_alone = isinstance(bits, int) and bits >= _UNQUANTISED_BITS
        _require(left_alone, f"extra_config.{name}.bits", "16 or more", bits)
        kept.append(f"re:{name}" if re.search(r"[\\\[\]()|^$+]|\.\*", name) else name)
    return Quantization(
        "auto-round",
        _everything(_gptq_format(config, symmetric=config.get("sym", True), offset=1)),
        Names(tuple(kept)),
        keeps_head=True,
    )


def _gptq_format(config: Mapping[str, Any], *, symmetric: Any, offset: int) -> GptqInt4:
    bits, group = config.get("bits"), config.get("group_size")
    _require(bits == 4, "bits", "4", bits)
    _require(group == -1 or _is_size(group), "group_size", "-1 or a positive integer", group)
    return GptqInt4(
        None if group == -1 else group,
        symmetric=bool(symmetric),
        act_order=bool(config.get("desc_act", False)),
        stored_zero_offset=offset,
    )


_ALL = Names(("*",))
_ROUTED_EXPERTS = Names(("*.block_sparse_moe.experts.*",))
_NVFP4_STORED = "nvfp4-pack-quantized"
_COMPRESSED_NVFP4 = Nvfp4(
    weight="weight_packed",
    global_scale="weight_global_scale",
    input_scale="input_global_scale",
    divides=True,
)
# Keys beside `moe_quant_algo`, each with the one value known of it.
_OF_OWN_EXPERTS: Mapping[str, object] = {
    "group_size": NVFP4_GROUP,
    "kv_cache_quant_algo": "fp8",
    "attention_quant_algo": "fp8",
    "index_k_quant_type": "nvfp4",
}


def _everything(weight: WeightFormat) -> tuple[tuple[Names, WeightFormat], ...]:
    return ((_ALL, weight),)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _names(config: Mapping[str, Any], key: str) -> Names:
    return Names(_strings(config.get(key) or (), key=key))


def _strings(value: object, *, key: str) -> tuple[str, ...]:
    ok = isinstance(value, Sequence) and not isinstance(value, str)
    ok = ok and all(isinstance(entry, str) for entry in value)  # type: ignore[union-attr]
    _require(ok, key, "a list of names", value)
    return tuple(value)  # type: ignore[arg-type]


def _mapping(config: Mapping[str, Any], key: str, *, prefix: str = "") -> Mapping[str, Any]:
    value = config.get(key) or {}
    _require(isinstance(value, Mapping), prefix + key, "a mapping", value)
    return value


def _require(ok: bool, key: str, rule: str, value: object) -> None:
    if not ok:
        raise ValueError(
            f"config key '{KEY}.{printable(key)}' must be {rule}; got {shown(value)}. "
            "M3_PLUGIN_DISABLE=1 leaves the checkpoint to the host's own model"
        )
