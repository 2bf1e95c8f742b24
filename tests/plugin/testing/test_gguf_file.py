"""The GGUF file of a test checkpoint: its tensors are the checkpoint's, its words have one reading.

What llama.cpp makes of it is tested in `test_llama_cpp.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.testing.constructed import ConstructedCheckpoint
from m3_plugin.testing.gguf_file import tensor_sources, write_gguf
from m3_plugin.testing.prompts import needle_prompt
from m3_plugin.testing.random_checkpoint import M31_PRESETS, write_random_checkpoint
from tests.console import in_one_line
from tests.plugin.cli.schemas import checked

# By hand, from llama.cpp's table of names: what a layer has, and what of the checkpoint it is.
ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight + 1",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight + 1",
    "attn_k_norm.weight": "self_attn.k_norm.weight + 1",
    "ffn_norm.weight": "post_attention_layernorm.weight + 1",
}
DENSE = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
SPARSE = {
    "indexer.q_proj.weight": "self_attn.index_q_proj.weight",
    "indexer.k_proj.weight": "self_attn.index_k_proj.weight",
    "indexer.q_norm.weight": "self_attn.index_q_norm.weight + 1",
    "indexer.k_norm.weight": "self_attn.index_k_norm.weight + 1",
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
    "ffn_gate_exps.weight": "block_sparse_moe.experts.*.w1.weight",
    "ffn_up_exps.weight": "block_sparse_moe.experts.*.w3.weight",
    "ffn_down_exps.weight": "block_sparse_moe.experts.*.w2.weight",
    "ffn_gate_shexp.weight": "block_sparse_moe.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "block_sparse_moe.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "block_sparse_moe.shared_experts.down_proj.weight",
}
EXPECTED = {
    "token_embd.weight": "language_model.model.embed_tokens.weight",
    "output_norm.weight": "language_model.model.norm.weight + 1",
    "output.weight": "language_model.lm_head.weight",
    **{
        f"blk.{layer}.{name}": f"language_model.model.layers.{layer}.{origin}"
        for layer, kinds in enumerate([DENSE, SPARSE, SPARSE])
        for name, origin in (ATTENTION | kinds).items()
    },
}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "checkpoint"
    # an MTP module, which the architecture has no place for
    ConstructedCheckpoint(topk_blocks=5, mtp=True).write(folder, dtype=request.param)
    write_gguf(folder)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint's safetensors files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def as_torch(tensor: Any) -> Tensor:
    data = torch.from_numpy(tensor.data.copy())
    return data.view(torch.bfloat16) if tensor.tensor_type == GGMLQuantizationType.BF16 else data


def values(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def test_tensors_are_those_of_the_checkpoint(checkpoint: Path) -> None:
    found = {
        tensor.name: as_torch(tensor) for tensor in GGUFReader(checkpoint / "model.gguf").tensors
    }
    assert set(found) == set(EXPECTED)
    source = stored(checkpoint)
    taken = set()
    for name, origin in EXPECTED.items():
        origin, plus, _ = origin.partition(" + 1")
        names = [origin.replace("*", str(e)) for e in range(8)] if "*" in origin else [origin]
        taken.update(names)
        tensors = [source[each].float() + bool(plus) for each in names]
        expected = torch.stack(tensors) if "*" in origin else tensors[0]
        assert found[name].float().equal(expected), name
    text = {name for name in source if name.startswith("language_model.") and ".mtp." not in name}
    assert taken == text


def test_what_is_small_or_decides_is_float32(checkpoint: Path) -> None:
    types = {t.name: t.tensor_type for t in GGUFReader(checkpoint / "model.gguf").tensors}
    float32 = {name for name, kind in types.items() if kind == GGMLQuantizationType.F32}
    wanted = {
        name
        for name in EXPECTED
        if "norm" in name or ".indexer." in name or "gate_inp" in name or "exp_probs" in name
    }
    is_float32 = "float32" in (checkpoint / "config.json").read_text()
    assert float32 == (set(EXPECTED) if is_float32 else wanted)


def test_metadata_are_the_configs(checkpoint: Path) -> None:
    reader = GGUFReader(checkpoint / "model.gguf")
    assert values(reader, "general.architecture") == "minimax-m3"
    found = {
        key.removeprefix("minimax-m3."): values(reader, key)
        for key in reader.fields
        if key.startswith("minimax-m3.")
    }
    vocab_size = found.pop("vocab_size")
    assert found.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert found == {
        "context_length": 1_048_576,
        "embedding_length": 640,
        "block_count": 3,
        "leading_dense_block_count": 1,
        "feed_forward_length": 128,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.indexer.head_count": 4,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 5,
        "attention.indexer.block_size": 128,
        "attention.indexer.local_blocks": 1,
        "rope.dimension_count": 64,
        "rope.freq_base": 5e6,
        "expert_count": 8,
        "expert_used_count": 4,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 128,
        "expert_gating_func": 2,
        "expert_weights_scale": 2.0,
        "expert_weights_norm": True,
    }
    tokens = values(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == len(values(reader, "tokenizer.ggml.token_type")) == vocab_size
    assert tokens[values(reader, "tokenizer.ggml.eos_token_id")] == "[e~["
    assert values(reader, "tokenizer.ggml.add_bos_token") is False
    assert (
        values(reader, "tokenizer.chat_template")
        == (checkpoint / "chat_template.jinja").read_text()
    )


@pytest.fixture(scope="module")
def vocabulary(checkpoint: Path) -> tuple[list[str], list[int], str]:
    """Texts, types and the one merge rule."""
    reader = GGUFReader(checkpoint / "model.gguf")
    (merge,) = values(reader, "tokenizer.ggml.merges")
    texts, types = (values(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    return texts, types, merge


def read_words(text: str, tokens: list[str], types: list[int], merge: str) -> list[int]:
    """Token ids as engines find them: longest user-defined tokens first, then the one merge."""
    merged = merge.replace(" ", "")
    pieces: list[str | int] = [text]
    words = [at for at, kind in enumerate(types) if kind == TokenType.USER_DEFINED]
    for word in sorted(words, key=lambda at: len(tokens[at]), reverse=True):
        cut: list[str | int] = []
        for piece in pieces:
            if isinstance(piece, int):
                cut.append(piece)
                continue
            parts = piece.split(tokens[word])
            cut += [part for both in zip(parts, [word] * len(parts), strict=True) for part in both]
            cut.pop()
        pieces = [piece for piece in cut if piece != ""]
    ids = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
            continue
        # what is left are repetitions of the word that the rule makes
        assert piece.replace(merged.replace("Ġ", " "), "") == ""
        ids += [tokens.index(merged)] * piece.count(" ")
    return ids


@pytest.mark.parametrize("seed", range(3))
def test_a_text_of_words_has_one_reading(
    vocabulary: tuple[list[str], list[int], str], seed: int
) -> None:
    prompt = needle_prompt(seed, num_tokens=3000, topk_blocks=5)
    assert read_words(prompt.text, *vocabulary) == list(prompt.token_ids)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparse_init_block", 1),
        ("sparse_attention_freq", [0, 0, 0]),
        ("sparse_score_type", "lse"),
        ("moe_layer_freq", [0, 1, 0]),
        ("shared_intermediate_size", 256),
        ("swiglu_limit", 5.0),
    ],
)
def test_what_the_format_has_no_words_for_is_refused(
    checkpoint: Path, key: str, value: object
) -> None:
    text_config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    holder = text_config if key in text_config else text_config["sparse_attention_config"]
    assert key in holder
    holder[key] = value
    with pytest.raises(ValueError, match=f"no words for {key}"):
        tensor_sources(text_config)


def test_a_checkpoint_that_is_sparse_everywhere_is_refused(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m31", preset=M31_PRESETS["small"])
    with pytest.raises(ValueError, match=r"no words for sparse_attention_freq \[1, 1, 1, 1\]"):
        write_gguf(folder)


def test_the_command_writes_it_and_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    for options in ([], ["--force"]):
        result = CliRunner().invoke(app, ["tiny", str(folder), "--gguf", "--json", *options])
        assert result.exit_code == 0, result.output
        summary = checked("tiny", result.stdout)
        assert "model.gguf" in summary["files"]
    example = summary["example"]
    prompt = needle_prompt(0, num_tokens=example["num_tokens"])
    assert prompt.dense_answer is not None
    assert example["answer"] == prompt.expected_text.strip()
    assert example["dense_answer"] == prompt.dense_answer.strip()
    random = ["tiny", str(tmp_path / "random"), "--gguf", "--kind", "random", "--preset", "small"]
    result = CliRunner().invoke(app, random)
    assert result.exit_code == 0, result.output
    tensors = GGUFReader(tmp_path / "random" / "model.gguf").tensors
    assert {tensor.tensor_type for tensor in tensors} == {GGMLQuantizationType.F32}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--model", "m3.1"], "sparse before the experts begin"),
        (["--init", "1"], "first blocks that are always read"),
        (["--dense"], "switched off"),
        (["--quant", "mxfp4"], "weights in mxfp4"),
    ],
)
def test_options_that_the_format_has_no_words_for(
    tmp_path: Path, options: list[str], what: str
) -> None:
    result = CliRunner().invoke(app, ["tiny", str(tmp_path / "tiny"), "--gguf", *options])
    assert result.exit_code == 2
    assert what in in_one_line(result.output)
    assert options[0] in result.output
    assert not (tmp_path / "tiny").exists()
