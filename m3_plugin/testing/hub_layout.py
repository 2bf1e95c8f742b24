"""Everything of MiniMaxAI/MiniMax-M3's repository layout except the numbers in the tensors.

The config keys, tensor names, tensor dtypes, shard index, tokenizer and processor files that the
test checkpoints of this package share. Whatever loads the published repository loads these.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3_plugin.checkpoint.headers import DSPARK_FOLDER, INDEX_FILE

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

IMAGE_TOKEN = "]<]image[>["
VIDEO_TOKEN = "]<]video[>["
VISION_START_TOKEN = "]<]start of image[>["
VISION_END_TOKEN = "]<]end of image[>["
BOS_TOKEN = "]~!b["
TURN_TOKEN = "]~b]"
EOS_TOKEN = "[e~["
THINK_START_TOKEN = "<mm:think>"
THINK_END_TOKEN = "</mm:think>"

# In the order of the published ids; the published vocabulary puts them behind 200,000 merges,
# a small one puts them first.
SPECIAL_TOKENS = (
    "]!p~[",
    TURN_TOKEN,
    EOS_TOKEN,
    "]!d~[",
    "]<]speech[>[",
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    "]<]start of speech[>[",
    "]<]end of speech[>[",
    VISION_START_TOKEN,
    VISION_END_TOKEN,
    "]<]start of video[>[",
    "]<]end of video[>[",
    BOS_TOKEN,
)
# Added but not special: they survive `skip_special_tokens=True`, which the parsers need.
MARKER_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "]<]minimax[>[",
    THINK_START_TOKEN,
    THINK_END_TOKEN,
)

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_COMPRESSION = {
    "image_token_compression_method": "patch_merge",
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@dataclass(frozen=True, kw_only=True)
class CheckpointShape:
    """Sizes of an M3 checkpoint; field names are those of config.json where it has one.

    The first `num_dense_layers` layers have a dense MLP and, unless `sparse_everywhere`, dense
    attention; all others have sparse attention and routed experts. MiniMax-M3 is so without
    `sparse_everywhere`, M3.1 with it.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    block_size: int
    topk_blocks: int
    vocab_size: int
    num_dense_layers: int = 1
    index_dim: int = 128
    dense_intermediate_size: int = 256
    intermediate_size: int = 128
    shared_intermediate_size: int = 128
    num_local_experts: int = 8
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 2.0
    max_position_embeddings: int = 1_048_576
    vision_num_heads: int = 2
    vision_head_dim: int = 80
    vision_intermediate_size: int = 320
    vision_num_layers: int = 2
    projector_hidden_size: int = 128
    num_mtp_modules: int = 0
    sparse_everywhere: bool = False
    num_init_blocks: int = 0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if not 0 <= self.num_dense_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_dense_layers must be within 0..{self.num_hidden_layers}, "
                f"got {self.num_dense_layers}"
            )

    @property
    def vision_hidden_size(self) -> int:
        return self.vision_num_heads * self.vision_head_dim

    @property
    def dense_context(self) -> int:
        """Tokens up to which sparse attention equals dense attention."""
        return self.topk_blocks * self.block_size

    def is_sparse(self, layer: int) -> bool:
        return self.sparse_everywhere or self.is_routed(layer)

    def is_routed(self, layer: int) -> bool:
        return layer >= self.num_dense_layers


def hub_config(
    shape: CheckpointShape,
    *,
    dtype: torch.dtype,
    token_ids: Mapping[str, int],
    use_sparse_attention: bool = True,
) -> dict[str, Any]:
    """config.json with the published keys; `token_ids` maps the special tokens to their ids.

    `use_sparse_attention=False` gives the same model with every layer dense.
    """
    layers = range(shape.num_hidden_layers)
    routed = [int(shape.is_routed(i)) for i in layers]
    per_layer = [int(shape.is_sparse(i)) for i in layers]
    attention = per_layer if use_sparse_attention else [0] * shape.num_hidden_layers
    dtype_name = str(dtype).removeprefix("torch.")
    text_config = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "attention_output_gate": False,
        "bos_token_id": token_ids[BOS_TOKEN],
        "eos_token_id": token_ids[EOS_TOKEN],
        "dense_intermediate_size": shape.dense_intermediate_size,
        "head_dim": shape.head_dim,
        "hidden_act": "swigluoai",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "moe_layer_freq": routed,
        "n_shared_experts": 1,
        "num_attention_heads": shape.num_attention_heads,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "num_local_experts": shape.num_local_experts,
        **_mtp_keys(shape),
        "partial_rotary_factor": 0.5,
        "qk_norm_type": "per_head",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "rotary_dim": shape.head_dim // 2,
        "routed_scaling_factor": shape.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": shape.shared_intermediate_size,
        "sparse_attention_config": {
            "use_sparse_attention": use_sparse_attention,
            "sparse_attention_freq": attention,
            "sparse_num_index_heads": shape.num_key_value_heads,
            "sparse_index_dim": shape.index_dim,
            "sparse_block_size": shape.block_size,
            "sparse_topk_blocks": shape.topk_blocks,
            "sparse_init_block": shape.num_init_blocks,
            "sparse_local_block": 1,
            "sparse_score_type": "max",
            "sparse_disable_index_value": per_layer,
        },
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": shape.vocab_size,
    }
    vision_config = {
        "hidden_act": "gelu",
        "hidden_size": shape.vision_hidden_size,
        "image_size": 2016,
        "img_token_compression_config": dict(_COMPRESSION),
        "intermediate_size": shape.vision_intermediate_size,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": shape.vision_num_heads,
        "num_channels": 3,
        "num_hidden_layers": shape.vision_num_layers,
        "patch_size": 14,
        "position_embedding_type": "rope",
        "rope_mode": "3d",
        "rope_theta": 10000.0,
        "torch_dtype": dtype_name,
        "vision_segment_max_frames": 4,
    }
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "image_seq_length": 576,
        "image_token_index": token_ids[IMAGE_TOKEN],
        "img_token_compression_config": dict(_COMPRESSION),
        "multimodal_projector_bias": True,
        "num_reward_heads": 0,
        "process_image_mode": "dynamic_res",
        "projector_hidden_act": "gelu",
        "projector_hidden_size": shape.projector_hidden_size,
        "text_config": text_config,
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name,
        "transformers_version": "4.52.4",
        "video_token_index": token_ids[VIDEO_TOKEN],
        "vision_config": vision_config,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _mtp_keys(shape: CheckpointShape) -> dict[str, int]:
    """M3's config says 7 and 1 although its checkpoint holds no module; M3.1's says nothing."""
    if shape.sparse_everywhere and not shape.num_mtp_modules:
        return {}
    return {
        "num_mtp_modules": shape.num_mtp_modules or 7,
        "num_nextn_predict_layers": shape.num_mtp_modules or 1,
    }


def tensor_shapes(shape: CheckpointShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published tensor names with their shapes, in the order of the published index."""
    D = shape.hidden_size
    yield "language_model.model.embed_tokens.weight", (shape.vocab_size, D)
    for i in range(shape.num_hidden_layers):
        layer = f"language_model.model.layers.{i}."
        yield from _layer_shapes(
            shape, layer, is_sparse=shape.is_sparse(i), is_routed=shape.is_routed(i)
        )
    yield "language_model.model.norm.weight", (D,)
    yield "language_model.lm_head.weight", (shape.vocab_size, D)

    V = shape.vision_hidden_size
    tower = "vision_tower.vision_model."
    yield tower + "embeddings.patch_embedding.weight", (V, 3, 2, 14, 14)
    yield from _weight_and_bias(tower + "pre_layrnorm", (V,))
    for i in range(shape.vision_num_layers):
        layer = f"{tower}encoder.layers.{i}."
        yield from _weight_and_bias(layer + "layer_norm1", (V,))
        yield from _weight_and_bias(layer + "layer_norm2", (V,))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _weight_and_bias(f"{layer}self_attn.{name}", (V, V))
        yield from _weight_and_bias(layer + "mlp.fc1", (shape.vision_intermediate_size, V))
        yield from _weight_and_bias(layer + "mlp.fc2", (V, shape.vision_intermediate_size))
    P = shape.projector_hidden_size
    yield from _weight_and_bias("multi_modal_projector.linear_1", (P, V))
    yield from _weight_and_bias("multi_modal_projector.linear_2", (D, P))
    yield from _weight_and_bias("patch_merge_mlp.linear_1", (P, 4 * D))
    yield from _weight_and_bias("patch_merge_mlp.linear_2", (D, P))

    # Last, so that a seed gives the same target with and without them.
    for i in range(shape.num_mtp_modules):
        module = f"language_model.model.mtp.layers.{i}."
        yield module + "enorm.weight", (D,)
        yield module + "hnorm.weight", (D,)
        yield module + "eh_proj.weight", (D, 2 * D)
        layer = module + "transformer_layer."
        yield from _layer_shapes(shape, layer, is_sparse=True, is_routed=True)
        yield module + "final_layernorm.weight", (D,)


def _layer_shapes(
    shape: CheckpointShape, layer: str, *, is_sparse: bool, is_routed: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of one decoder layer whose names begin with `layer`."""
    D = shape.hidden_size
    q_size = shape.num_attention_heads * shape.head_dim
    kv_size = shape.num_key_value_heads * shape.head_dim
    yield layer + "input_layernorm.weight", (D,)
    yield layer + "post_attention_layernorm.weight", (D,)
    yield layer + "self_attn.q_proj.weight", (q_size, D)
    yield layer + "self_attn.k_proj.weight", (kv_size, D)
    yield layer + "self_attn.v_proj.weight", (kv_size, D)
    yield layer + "self_attn.o_proj.weight", (D, q_size)
    yield layer + "self_attn.q_norm.weight", (shape.head_dim,)
    yield layer + "self_attn.k_norm.weight", (shape.head_dim,)
    if is_sparse:
        index_size = shape.num_key_value_heads * shape.index_dim
        yield layer + "self_attn.index_q_proj.weight", (index_size, D)
        yield layer + "self_attn.index_k_proj.weight", (shape.index_dim, D)
        yield layer + "self_attn.index_q_norm.weight", (shape.index_dim,)
        yield layer + "self_attn.index_k_norm.weight", (shape.index_dim,)
    if not is_routed:
        I = shape.dense_intermediate_size
        yield layer + "mlp.gate_proj.weight", (I, D)
        yield layer + "mlp.up_proj.weight", (I, D)
        yield layer + "mlp.down_proj.weight", (D, I)
        return
    moe = layer + "block_sparse_moe."
    yield moe + "gate.weight", (shape.num_local_experts, D)
    yield moe + "e_score_correction_bias", (shape.num_local_experts,)
    for e in range(shape.num_local_experts):
        I = shape.intermediate_size
        yield f"{moe}experts.{e}.w1.weight", (I, D)
        yield f"{moe}experts.{e}.w3.weight", (I, D)
        yield f"{moe}experts.{e}.w2.weight", (D, I)
    I = shape.shared_intermediate_size
    yield moe + "shared_experts.gate_proj.weight", (I, D)
    yield moe + "shared_experts.up_proj.weight", (I, D)
    yield moe + "shared_experts.down_proj.weight", (D, I)


def _weight_and_bias(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name + ".weight", shape
    yield name + ".bias", shape[:1]


def is_float32_tensor(name: str) -> bool:
    """Whether the published checkpoint stores this tensor in F32 whatever the others are in."""
    return name.endswith(
        (".block_sparse_moe.gate.weight", ".e_score_correction_bias", ".patch_embedding.weight")
    )


# Says that a folder was made here; `_is_ours` says which files in it.
MARKER = ".m3-plugin-checkpoint"
# The same checkpoint once more (`m3_plugin.testing.gguf_file`).
GGUF_FILE = "model.gguf"
_WRITTEN = frozenset(
    {
        MARKER,
        GGUF_FILE,
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
    }
)
# M3.1's draft model (`m3_plugin.testing.dspark`).
DSPARK_SHARD = "model-dspark-00001.safetensors"
DSPARK_FILES = frozenset({"config.json", INDEX_FILE, DSPARK_SHARD})
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def prepare_folder(path: str | Path, *, force: bool) -> Path:
    """Make `path` an empty folder. One that holds files is refused unless `force` empties it.

    Raises
    ------
    FileExistsError : it holds files, and `force` is not given, or it or one of them was not written
        here; nothing is deleted then.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} exists and is not a folder")
    held = sorted(folder.iterdir()) if folder.exists() else []
    if held and not force:
        raise FileExistsError(
            f"{folder} is not empty; choose another folder or replace it with --force"
        )
    if held and not (folder / MARKER).is_file():
        # Only an earlier checkpoint of ours is emptied, never a real one or what lies at a mistyped
        # path.
        raise FileExistsError(
            f"{folder} was not written by m3-plugin (it has no {MARKER}), so it is not replaced; "
            "delete it yourself, or choose another folder"
        )
    if foreign := [file.name for file in held if not _is_ours(file)]:
        raise FileExistsError(
            f"{folder} also holds {', '.join(foreign[:3])}, which m3-plugin did not write, so it "
            "is not replaced; move that away, or choose another folder"
        )
    for file in held:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("m3-plugin wrote this checkpoint and may replace it\n")
    return folder


def _is_ours(file: Path) -> bool:
    """Whether an entry of a marked folder is one of those that are written here."""
    if file.name == DSPARK_FOLDER and file.is_dir() and not file.is_symlink():
        return all(inner.is_file() and inner.name in DSPARK_FILES for inner in file.iterdir())
    named = file.name in _WRITTEN or _SHARD.fullmatch(file.name) is not None
    return named and file.is_file() and not file.is_symlink()


def write_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    num_shards: int = 3,
) -> None:
    """Write all files of a checkpoint into the existing `folder`.

    `tensors` holds every name of `tensor_shapes`; they are stored in `dtype`, except those which
    the published checkpoint keeps in F32.
    """
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config["text_config"]["bos_token_id"],
            "do_sample": True,
            "eos_token_id": config["text_config"]["eos_token_id"],
            "temperature": 1.0,
            "top_k": 40,
            "top_p": 0.95,
            "transformers_version": "4.52.4",
        },
    )
    _write_shards(folder, tensors, dtype=dtype, num_shards=num_shards)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": BOS_TOKEN,
            "eos_token": EOS_TOKEN,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["text_config"]["max_position_embeddings"],
            "processor_class": "MiniMaxM3VLProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    shutil.copyfile(Path(__file__).with_name("chat_template.jinja"), folder / "chat_template.jinja")
    vision = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(_CLIP_MEAN),
        "image_std": list(_CLIP_STD),
        "merge_size": 2,
        "patch_size": 14,
        "processor_class": "MiniMaxM3VLProcessor",
        "rescale_factor": 1 / 255,
        "resample": 3,
        "temporal_patch_size": 2,
    }
    per_layer = config["text_config"]["sparse_attention_config"]["sparse_attention_freq"]
    # M3.1 caps sides; M3 bounds the area
    sizes: dict[str, Any] = {"max_pixels": 451_584}
    if all(per_layer):
        sizes = {"size": [672, 672], "img_token_compression_config": _COMPRESSION}
    _write_json(
        folder / "preprocessor_config.json",
        vision | sizes | {"image_processor_type": "MiniMaxM3VLImageProcessor"},
    )
    _write_json(
        folder / "video_preprocessor_config.json",
        vision
        | {
            "do_sample_frames": False,
            "fps": 1.0,
            "max_frames": 768,
            "max_pixels": 602_112,
            "min_frames": 4,
            "min_pixels": 3_136,
            "video_processor_type": "MiniMaxM3VLVideoProcessor",
        },
    )
    _write_json(folder / "processor_config.json", {"processor_class": "MiniMaxM3VLProcessor"})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_shards(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype, num_shards: int
) -> None:
    import torch
    from safetensors.torch import save_file

    names = list(tensors)
    per_shard = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    total_size = 0
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        shard = {}
        for name in names[i * per_shard : (i + 1) * per_shard]:
            stored = torch.float32 if is_float32_tensor(name) else dtype
            shard[name] = tensors[name].to(stored).contiguous()
            weight_map[name] = file
            total_size += shard[name].nbytes
        save_file(shard, folder / file, metadata={"format": "pt"})
        # save_file leaves it to its owner alone, unlike the files beside it.
        (folder / file).chmod((folder / "config.json").stat().st_mode)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def byte_level_tokenizer(*, words: Sequence[str] = (), pattern: str) -> Tokenizer:
    """Byte-level BPE in which each of `words` is one token and any other text falls to bytes.

    Ids: special tokens, markers, 256 bytes, then `words` in the given order. `pattern` cuts text
    into pieces; a word becomes one token where it is a whole piece, which needs no merge rules.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # ByteLevel's own table from bytes to printable characters.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    char_of = {byte: chr(byte) for byte in printable}
    char_of |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    entries = [*SPECIAL_TOKENS, *MARKER_TOKENS]
    entries += [char_of[byte] for byte in range(256)]
    entries += ["".join(char_of[byte] for byte in word.encode()) for word in words]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    if len(vocabulary) != len(entries):
        repeated = sorted({entry for entry in entries if entries.count(entry) > 1})
        raise ValueError(f"words must be distinct and longer than one byte, repeated: {repeated}")

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in MARKER_TOKENS])
    return tokenizer
