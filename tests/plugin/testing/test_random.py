"""Random checkpoints load completely, in every preset, in what reads the published repository."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from m3_plugin.host.torchvision_ops import declare_missing_ops
from m3_plugin.testing.hub_layout import is_float32_tensor, tensor_shapes
from m3_plugin.testing.random_checkpoint import PRESETS, write_random_checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("small"), preset="small")


def load_model(folder, dtype=torch.float32) -> Any:
    declare_missing_ops()
    from transformers import MiniMaxM3SparseForConditionalGeneration

    return MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )


def load_processor(folder):
    declare_missing_ops()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_maps_every_tensor(preset, tmp_path):
    folder = write_random_checkpoint(tmp_path / preset, preset=preset)
    model, info = load_model(folder)
    assert not any(info.values()), info
    config = model.config.text_config
    shape = PRESETS[preset]
    assert config.layer_types.count("minimax_m3_sparse") == shape.num_hidden_layers - 1
    assert config.index_topk_blocks == shape.topk_blocks
    rotary = model.model.language_model.rotary_emb.inv_freq
    assert 2 * rotary.numel() == shape.head_dim // 2


def test_logits_need_the_selection(small, tmp_path):
    """Beyond the budget of blocks the dense variant of the same weights answers differently."""
    dense_folder = write_random_checkpoint(
        tmp_path / "dense", preset="small", use_sparse_attention=False
    )
    sparse, _ = load_model(small)
    dense, _ = load_model(dense_folder)
    shape = PRESETS["small"]
    ids = torch.randint(30, 400, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (sparse(ids).logits - dense(ids).logits).abs().amax(-1)[0]
    assert difference[: shape.dense_context].max() < 1e-4
    assert difference[shape.dense_context :].mean() > 0.1


def test_branches_stay_small_against_the_stream(small):
    model, _ = load_model(small)
    sizes = {}

    def record(name):
        def hook(_module, _args, output):
            tensor = output[0] if isinstance(output, tuple) else output
            sizes[name] = float(tensor.square().mean().sqrt())

        return hook

    for i, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.register_forward_hook(record(f"attention {i}"))
        layer.mlp.register_forward_hook(record(f"mlp {i}"))
    with torch.no_grad():
        model(torch.randint(30, 400, (1, 100), generator=torch.Generator().manual_seed(2)))
    assert len(sizes) == 8
    assert all(0.05 < size < 0.4 for size in sizes.values()), sizes


def test_files_are_reproducible_and_typed(tmp_path):
    from safetensors.torch import load_file

    folders = [
        write_random_checkpoint(tmp_path / name, preset="small", seed=3, dtype=torch.bfloat16)
        for name in ("a", "b")
    ]
    for file in sorted(folders[0].iterdir()):
        assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name
    index = json.loads((folders[0] / "model.safetensors.index.json").read_text())
    stored = {}
    for file in sorted(set(index["weight_map"].values())):
        stored |= load_file(folders[0] / file)
    assert {name: tuple(t.shape) for name, t in stored.items()} == dict(
        tensor_shapes(PRESETS["small"])
    )
    for name, tensor in stored.items():
        expected = torch.float32 if is_float32_tensor(name) else torch.bfloat16
        assert tensor.dtype == expected, name
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())


def test_picture_and_video_through_the_processor(small):
    import numpy as np
    from PIL import Image

    model, _ = load_model(small)
    processor = load_processor(small)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 84, 112, 3), dtype=np.uint8)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": " look"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(
        text=[text], images=[Image.fromarray(pixels[0])], videos=[pixels], return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_index) == 6 * 8 // 4
    assert ids.count(model.config.video_token_index) == 3 * 6 * 8 // 4
    with torch.no_grad():
        seen = model(**inputs).logits[0, -1]
        for key in ("pixel_values", "pixel_values_videos"):
            other = dict(inputs) | {key: inputs[key].flip(0)}
            assert (model(**other).logits[0, -1] - seen).abs().max() > 1e-3, key


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_force_deletes_only_what_was_written_here(tmp_path, kind):
    folder = write_random_checkpoint(tmp_path / "x", preset="small")
    before = sorted(folder.iterdir())
    added = folder / {"file": "notes.txt", "folder": "adapter", "link": "tokenizer.model"}[kind]
    if kind == "file":
        added.write_text("keep me")
    elif kind == "folder":
        added.mkdir()
    else:
        (tmp_path / "elsewhere").write_text("keep me")
        added.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=f"also holds {added.name}"):
        write_random_checkpoint(folder, preset="small", force=True)
    assert sorted(folder.iterdir()) == sorted([*before, added])
    added.rmdir() if kind == "folder" else added.unlink()
    (folder / "model-00001-of-00099.safetensors").touch()
    write_random_checkpoint(folder, preset="small", force=True)
    assert sorted(folder.iterdir()) == before


def test_folder_with_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_random_checkpoint(tmp_path, preset="small")
    with pytest.raises(FileExistsError, match="was not written by m3-plugin"):
        write_random_checkpoint(tmp_path, preset="small", force=True)
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    (tmp_path / "config.json").write_text("{}")
    # a checkpoint of somebody's, or a project that has such a file
    with pytest.raises(FileExistsError, match="was not written by m3-plugin"):
        write_random_checkpoint(tmp_path, preset="small", force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    with pytest.raises(ValueError, match="preset must be one of small, kernel, engine"):
        write_random_checkpoint(tmp_path / "x", preset="huge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_attention_heads must be a multiple"):
        dataclasses.replace(PRESETS["small"], num_attention_heads=7)


@pytest.fixture(scope="module")
def tokenizer(small):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small)


class TestChatTemplate:
    def render(self, tokenizer, messages, **options):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )

    @pytest.mark.parametrize(
        ("mode", "ending"),
        [("enabled", "<mm:think>"), ("disabled", "</mm:think>"), ("adaptive", "")],
    )
    def test_thinking_mode_ends_the_prompt(self, tokenizer, mode, ending):
        text = self.render(tokenizer, [{"role": "user", "content": "hi"}], thinking_mode=mode)
        assert text.endswith("]~b]user\nhi[e~[\n]~b]ai\n" + ending)
        assert f"Current thinking mode: {mode}." in text
        assert text.startswith("]~!b[]~b]system\n")

    def test_tools_and_results(self, tokenizer):
        tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
        arguments = {"a": 1, "b": {"c": "x"}, "d": [True, None], "e": None}
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        text = self.render(
            tokenizer,
            [
                {"role": "system", "content": "Be terse."},
                {"role": "user", "content": "go"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "3"},
                {"role": "tool", "content": [{"type": "text", "text": "4"}]},
            ],
            tools=[tool],
        )
        ns = "]<]minimax[>["
        assert "]~b]developer\nBe terse.\n\n# Tools\n" in text
        assert '<tool>{"name": "add"' in text
        assert (
            f'</mm:think>{ns}<tool_call>\n{ns}<invoke name="add">{ns}<a>1{ns}</a>'
            f"{ns}<b>{ns}<c>x{ns}</c>{ns}</b>"
            f"{ns}<d>{ns}<item>true{ns}</item>{ns}<item>null{ns}</item>{ns}</d>"
            f"{ns}</invoke>\n{ns}</tool_call>[e~["
        ) in text
        assert "]~b]tool\n<response>3</response>\n<response>4</response>[e~[\n" in text

    def test_text_survives_the_tokenizer(self, tokenizer):
        text = "Any text, any script: naïve 数 \n\n\t  x=1;  ]<]minimax[>[<tool_call> the water"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_tokens_to_ids(" the".replace(" ", "Ġ")) in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.vllm
def test_vllm_reads_config_and_processor(small):
    pytest.importorskip("vllm")
    declare_missing_ops()
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.processors.minimax_m3 import MiniMaxVLProcessor

    config = get_config(small, trust_remote_code=False)
    assert type(config).__name__ == "MiniMaxM3Config"
    assert config.text_config.sparse_attention_config["sparse_topk_blocks"] == 4
    processor = MiniMaxVLProcessor.from_pretrained(small)
    assert processor.image_processor.max_pixels == 451_584
    assert processor.image_token_id == config.image_token_index
