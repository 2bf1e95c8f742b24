"""The constructed checkpoint answers as promised, and each broken selection gives its wrong word.

transformers' own model is the judge here, so everything stays below 2.6K tokens; beyond that the
margins are evaluated.
"""

import json
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from m3_plugin.host.torchvision_ops import declare_missing_ops
from m3_plugin.testing.constructed import ConstructedCheckpoint
from m3_plugin.testing.margins import needle_margins
from m3_plugin.testing.prompts import (
    COLOURS,
    colour_rgb,
    min_needle_tokens,
    needle_prompt,
    picture_prompt,
)
from m3_plugin.testing.vocabulary import MAX_CODE_OVERLAP, NOWHERE, VOCABULARY, codes
from tests.plugin.cli.schemas import checked

EOS = "[e~["


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ConstructedCheckpoint().write(tmp_path_factory.mktemp("constructed"))


def load_model(folder, dtype=torch.float32) -> Any:
    declare_missing_ops()
    from transformers import MiniMaxM3SparseForConditionalGeneration

    return MiniMaxM3SparseForConditionalGeneration.from_pretrained(folder, dtype=dtype)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def processor(folder):
    declare_missing_ops()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def answer(model, tokenizer, inputs, max_tokens):
    """Greedy continuation as text."""
    inputs = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


def answer_to(model, tokenizer, prompt):
    inputs = {"input_ids": torch.tensor([prompt.token_ids])}
    return answer(model, tokenizer, inputs, prompt.max_tokens)


class TestPrompts:
    @pytest.mark.parametrize("seed", range(20))
    def test_layout_holds_for_every_shift(self, seed):
        """Marked tokens of different zones are in different blocks wherever blocks begin."""
        prompt = needle_prompt(seed, num_tokens=min_needle_tokens(hops=5) + 7 * seed, hops=5)
        assert prompt.candle_position is not None
        assert prompt.mirror_position is not None
        zones = [
            *[(position,) for position in prompt.needle_positions],
            *[(position,) for position in prompt.lantern_positions],
            (prompt.candle_position,),
            (prompt.mirror_position,),
            prompt.decoy_positions,
            (len(prompt.token_ids) - 1,),
        ]
        zones.sort()
        assert all(b[0] - a[-1] >= 128 for a, b in pairwise(zones))
        assert prompt.needle_blocks(offset=300) == tuple(
            (position + 300) // 128 for position in prompt.needle_positions
        )

    @pytest.mark.parametrize("seed", range(5))
    def test_text_and_ids_are_the_same_prompt(self, seed, processor):
        prompt = needle_prompt(seed, num_tokens=3000, distractors=11)
        assert len(prompt.token_ids) == 3000
        encoded = processor.tokenizer.encode(prompt.text, add_special_tokens=False)
        assert encoded == list(prompt.token_ids)
        assert processor.tokenizer.decode(encoded) == prompt.text
        answer_ids = processor.tokenizer.encode(prompt.expected_text + EOS)
        assert answer_ids == list(prompt.expected_ids)
        assert prompt.text.count(" means") >= 4 + 3 * 7 + 11

    def test_every_group_of_both_layers_is_asked(self):
        assert len(set(needle_prompt(2, num_tokens=4000, hops=8).groups)) == 8

    def test_facts_stand_once(self):
        prompt = needle_prompt(4, num_tokens=4000, distractors=40)
        tokens = prompt.text.split()
        keys = [tokens[i - 1] for i, token in enumerate(tokens) if token == "means"]
        plain = [key for key in keys if key.islower()]
        assert len(plain) == len(set(plain))

    def test_without_decoys_any_length_will_do(self):
        prompt = needle_prompt(0, num_tokens=60, decoys=False)
        assert len(prompt.token_ids) == 60
        assert prompt.dense_answer is None
        assert prompt.candle_position is None

    def test_wrong_arguments_are_named(self):
        with pytest.raises(ValueError, match="num_tokens must be at least 1318"):
            needle_prompt(0, num_tokens=600)
        with pytest.raises(ValueError, match=r"hops must be within 1\.\.72, got 0"):
            needle_prompt(0, hops=0)
        with pytest.raises(ValueError, match="got 'pink'"):
            picture_prompt(["pink"])
        with pytest.raises(ValueError, match="ask must name one"):
            picture_prompt(["red", "blue"])
        with pytest.raises(ValueError, match="topk_blocks must be at least 3, got 2"):
            ConstructedCheckpoint(topk_blocks=2)

    def test_codes_of_a_class_barely_overlap(self):
        table = torch.tensor(codes()).float()
        overlap = (table @ table.T - 16 * torch.eye(len(table))).abs().max()
        assert overlap <= MAX_CODE_OVERLAP
        seen = [(word.class_index, word.code) for word in VOCABULARY.words]
        assert len(seen) == len(set(seen))


class TestTextAnswers:
    @pytest.mark.parametrize("seed", range(2))
    def test_chain_is_followed(self, seed, model, processor):
        prompt = needle_prompt(seed)
        assert answer_to(model, processor.tokenizer, prompt) == prompt.expected_text + EOS

    def test_chain_is_followed_in_bfloat16(self, folder, processor):
        model = load_model(folder, torch.bfloat16)
        for seed in (2, 3):
            prompt = needle_prompt(seed, num_tokens=1100, hops=2)
            assert answer_to(model, processor.tokenizer, prompt) == prompt.expected_text + EOS

    @pytest.mark.parametrize(
        ("mode", "start"), [("adaptive", ""), ("disabled", ""), ("enabled", "</mm:think>")]
    )
    def test_chat_gives_the_answer_as_content(self, mode, start, model, processor):
        prompt = needle_prompt(5, num_tokens=1100, hops=2)
        inputs = processor.tokenizer.apply_chat_template(
            prompt.messages(),
            add_generation_prompt=True,
            thinking_mode=mode,
            return_dict=True,
            return_tensors="pt",
        )
        said = answer(model, processor.tokenizer, inputs, prompt.max_tokens + 1)
        assert said == start + prompt.expected_text + EOS

    def test_second_turn(self, model, processor):
        """The newest question counts, and words in a row, as in an answer, are no facts."""
        prompt = needle_prompt(7, num_tokens=1330)
        words = prompt.expected_text.split()
        messages = [
            *prompt.messages(),
            {"role": "assistant", "content": prompt.expected_text},
            {"role": "user", "content": f" and then , follow {words[1]}? only the words please ."},
        ]
        inputs = processor.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        said = answer(model, processor.tokenizer, inputs, prompt.max_tokens)
        assert said == "".join(" " + word for word in words[2:]) + EOS

    def test_short_prompt_without_decoys(self, model, processor):
        prompt = needle_prompt(6, num_tokens=90, decoys=False)
        assert answer_to(model, processor.tokenizer, prompt) == prompt.expected_text + EOS

    def test_answer_survives_sampling(self, model):
        """The published generation_config samples; the answer must not depend on luck."""
        prompt = needle_prompt(0)
        with torch.no_grad():
            logits = model(torch.tensor([prompt.token_ids]), logits_to_keep=1).logits[0, -1]
        assert logits.softmax(-1)[prompt.expected_ids[0]] > 1 - 1e-6

    def test_declared_dense_gives_the_decoys(self, tmp_path, processor):
        dense = ConstructedCheckpoint(use_sparse_attention=False).write(tmp_path / "dense")
        config = json.loads((dense / "config.json").read_text())["text_config"]
        assert config["sparse_attention_config"]["sparse_attention_freq"] == [0, 0, 0]
        prompt = needle_prompt(0, num_tokens=1320)
        said = answer_to(load_model(dense), processor.tokenizer, prompt)
        assert said == f"{prompt.dense_answer}{EOS}"
        assert prompt.dense_answer != prompt.expected_text

    def test_budget_of_sixteen_blocks(self, folder, processor):
        prompt = needle_prompt(1, num_tokens=2500, hops=1, topk_blocks=16)
        model = load_model(folder)
        model.config.text_config.index_topk_blocks = 16
        for layer in model.model.language_model.layers[1:]:
            layer.self_attn.indexer.topk_blocks = 16
        assert answer_to(model, processor.tokenizer, prompt) == prompt.expected_text + EOS


class TestPictures:
    def ask(self, model, processor, prompt, size=(84, 112), frames=6):
        import numpy as np
        from PIL import Image

        text = processor.apply_chat_template(prompt.messages(), add_generation_prompt=True)
        if prompt.modality == "image":
            data = {"images": [Image.new("RGB", size, colour_rgb(c)) for c in prompt.colours]}
        else:
            shape = (frames, *size, 3)
            data = {
                "videos": [np.full(shape, colour_rgb(c), dtype=np.uint8) for c in prompt.colours]
            }
        inputs = processor(text=[text], return_tensors="pt", **data)
        return answer(model, processor.tokenizer, inputs, prompt.max_tokens)

    @pytest.mark.parametrize("modality", ["image", "video"])
    @pytest.mark.parametrize("colour", COLOURS)
    def test_colour_of_one(self, colour, modality, model, processor):
        prompt = picture_prompt([colour], modality=modality)
        assert self.ask(model, processor, prompt) == prompt.expected_text + EOS

    @pytest.mark.parametrize(("ask", "size"), [(0, (56, 56)), (1, (280, 252)), (2, (140, 84))])
    def test_one_of_several(self, ask, size, model, processor):
        prompt = picture_prompt(["white", "magenta", "green"], ask=ask)
        assert self.ask(model, processor, prompt, size) == prompt.expected_text + EOS

    @pytest.mark.parametrize("ask", range(2))
    def test_one_of_two_videos(self, ask, model, processor):
        prompt = picture_prompt(["yellow", "black"], ask=ask, modality="video")
        assert self.ask(model, processor, prompt, (56, 84), 4) == prompt.expected_text + EOS

    def test_picture_beyond_the_budget_in_bfloat16(self, folder, processor):
        prompt = picture_prompt(["blue", "red"], ask=0, num_filler_tokens=900)
        model = load_model(folder, torch.bfloat16)
        assert self.ask(model, processor, prompt) == prompt.expected_text + EOS

    def test_grey_is_no_colour(self, model, processor):
        from PIL import Image

        prompt = picture_prompt(["red"])
        text = processor.apply_chat_template(prompt.messages(), add_generation_prompt=True)
        inputs = processor(
            text=[text], images=[Image.new("RGB", (84, 84), (200, 90, 90))], return_tensors="pt"
        )
        assert answer(model, processor.tokenizer, inputs, 2) in (NOWHERE + EOS, " red" + EOS)


@contextmanager
def broken_indexer(model, **wrong):
    """The model with transformers' indexer replaced by one with these things wrong."""
    indexers = [layer.self_attn.indexer for layer in model.model.language_model.layers[1:]]
    memory = {}
    for indexer in indexers:
        indexer.forward = partial(select_blocks, indexer, wrong, memory)
    try:
        yield
    finally:
        for indexer in indexers:
            del indexer.forward


def select_blocks(indexer, wrong, memory, hidden_states, position_embeddings, cache, position_ids):
    """Block ids [batch, heads, queries, count] of one prefill without cached tokens."""
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as hf

    if wrong.get("share_layers") and "ids" in memory:
        return memory.pop("ids")
    batch, num_queries, _ = hidden_states.shape
    query = indexer.q_proj(hidden_states).view(batch, num_queries, -1, indexer.head_dim)
    key = indexer.k_proj(hidden_states).view(batch, num_queries, 1, indexer.head_dim)
    if not wrong.get("no_norm"):
        query, key = indexer.q_norm(query), indexer.k_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    if not wrong.get("no_rope"):
        query, key = hf.apply_rotary_pos_emb(query, key, *position_embeddings)
    if wrong.get("no_keys"):
        key = torch.zeros_like(key)
    scores = query.float() @ key.float().transpose(-1, -2)
    future = torch.arange(key.shape[2]) > position_ids[:, None, :, None]
    scores = F.pad(
        scores.masked_fill(future, -torch.inf), (0, -key.shape[2] % 128), value=-torch.inf
    ).unflatten(-1, (-1, 128))
    pool = wrong.get("pool", "max")
    if pool == "max":
        blocks = scores.amax(-1)
    elif pool == "lse":
        blocks = (scores / indexer.head_dim**0.5).logsumexp(-1)
    else:
        seen = ~scores.isinf()
        blocks = scores.masked_fill(~seen, 0.0).sum(-1) / seen.sum(-1).clamp(1)
        blocks = blocks.masked_fill(~seen.any(-1), -torch.inf)
    collapse = wrong.get("collapse")
    if collapse is not None:
        pooled = {
            "max": blocks.amax(1, keepdim=True),
            "mean": blocks.mean(1, keepdim=True),
            "first": blocks[:, :1],
        }[collapse]
        blocks = pooled.expand_as(blocks).clone()
    blocks = blocks.roll(wrong.get("roll", 0), 1)
    own = (position_ids // 128)[:, None, :, None].expand(-1, blocks.shape[1], -1, -1)
    if not wrong.get("no_local"):
        blocks.scatter_(-1, own, torch.inf)
    if wrong.get("sink"):
        blocks[..., 0] = torch.inf
    count = indexer.topk_blocks + wrong.get("more", 0)
    best, ids = blocks.topk(min(count, blocks.shape[-1]), -1)
    memory["ids"] = ids.masked_fill(best == -torch.inf, -1)
    return memory["ids"]


RIGHT, DECOY, LOST, OTHER = "right", "decoy", "lost", "other"


@pytest.fixture(scope="module")
def two_kinds():
    """A prompt whose first hop is found by the first sparse layer, and its second by the second."""
    return needle_prompt(0, num_tokens=1100, hops=2)


def first_words(model, prompt):
    """What the model makes of hop 0 and, the right word given, of hop 1, in one forward pass."""
    ids = torch.tensor([[*prompt.token_ids, prompt.expected_ids[0]]])
    with torch.no_grad():
        said = model(ids, logits_to_keep=2, use_cache=True).logits[0].argmax(-1).tolist()
    decoys = [prompt.token_ids[position] for position in prompt.decoy_positions]
    return [
        RIGHT
        if token == prompt.expected_ids[hop]
        else LOST
        if token == VOCABULARY.nowhere_id
        else DECOY
        if token in decoys
        else OTHER
        for hop, token in enumerate(said)
    ]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({}, [RIGHT, RIGHT]),
        ({"more": -1}, [LOST, LOST]),
        ({"more": 1}, [DECOY, DECOY]),
        ({"more": 1000}, [DECOY, DECOY]),
        ({"no_local": True}, [DECOY, DECOY]),
        ({"sink": True}, [LOST, LOST]),
        ({"pool": "mean"}, [DECOY, DECOY]),
        ({"pool": "lse"}, [DECOY, DECOY]),
        ({"collapse": "max"}, [LOST, LOST]),
        ({"collapse": "mean"}, [LOST, LOST]),
        ({"collapse": "first"}, [LOST, LOST]),
        ({"roll": 1}, [LOST, LOST]),
        ({"no_rope": True}, [LOST, LOST]),
        ({"share_layers": True}, [RIGHT, LOST]),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) or "correct"
        if isinstance(value, dict)
        else ""
    ),
)
def test_wrong_selection_gives_the_wrong_word(wrong, expected, model, two_kinds):
    with broken_indexer(model, **wrong):
        assert first_words(model, two_kinds) == expected


@pytest.mark.parametrize("wrong", ["no_norm", "no_keys"])
def test_wrong_index_keys_give_wrong_words(wrong, model, two_kinds):
    """Which word depends on ties and seeds; that one is wrong does not."""
    with broken_indexer(model, **{wrong: True}):
        assert first_words(model, two_kinds) != [RIGHT, RIGHT]


def roll_heads(name, heads):
    def edit(attention):
        weight = attention.get_submodule(name).weight
        rolled = weight.view(heads, -1, weight.shape[-1]).roll(1, 0)
        weight.data = rolled.reshape(weight.shape)

    return edit


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (roll_heads("indexer.q_proj", 4), {LOST}),
        (roll_heads("k_proj", 4), {LOST}),
        (roll_heads("v_proj", 4), {LOST, OTHER}),
        (roll_heads("q_proj", 4), {LOST, OTHER}),
    ],
    ids=["index heads", "KV heads", "values", "query heads"],
)
def test_groups_that_are_mixed_up(edit, expected, folder, two_kinds):
    model = load_model(folder)
    for layer in model.model.language_model.layers[1:]:
        edit(layer.self_attn)
    words = first_words(model, two_kinds)
    assert set(words) <= expected, words


def test_index_heads_tiled_over_query_heads(model, two_kinds, monkeypatch):
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLIndexer

    correct = MiniMaxM3VLIndexer.build_block_mask

    def tiled(self, ids, *args):
        return correct(self, ids.repeat(1, 2, 1, 1), *args)

    monkeypatch.setattr(MiniMaxM3VLIndexer, "build_block_mask", tiled)
    assert LOST in first_words(model, two_kinds)


def test_norms_without_the_one(model, two_kinds, monkeypatch):
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLRMSNorm

    def plain(self, x):
        scale = x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return (x.float() * scale * self.weight.float()).type_as(x)

    monkeypatch.setattr(MiniMaxM3VLRMSNorm, "forward", plain)
    assert first_words(model, two_kinds) == [LOST, LOST]


def test_experts_that_are_mixed_up(folder, two_kinds):
    model = load_model(folder)
    gate = model.model.language_model.layers[2].mlp.gate
    gate.weight.data = gate.weight.data.roll(1, 0)
    assert first_words(model, two_kinds) == [LOST, LOST]


@pytest.mark.parametrize(("num_tokens", "topk_blocks"), [(4096, 4), (4096, 16), (131_072, 16)])
def test_margins_at_length(num_tokens, topk_blocks):
    checkpoint = ConstructedCheckpoint(topk_blocks=topk_blocks)
    prompt = needle_prompt(7, num_tokens=num_tokens, hops=4, topk_blocks=topk_blocks)
    for hop in needle_margins(checkpoint, prompt):
        assert hop.rank == topk_blocks
        assert hop.selected_margin > 0.09
        assert hop.above_margin > 0.15
        assert hop.sparse_margin > 50
        assert hop.dense_margin > 50


class TestCommand:
    def run(self, *args):
        import typer
        from typer.testing import CliRunner

        from m3_plugin.cli.tiny import tiny

        app = typer.Typer()
        app.command()(tiny)
        return CliRunner().invoke(app, [str(arg) for arg in args])

    def test_constructed_with_summary(self, tmp_path):
        result = self.run(tmp_path / "c", "--topk", 8, "--json")
        assert result.exit_code == 0, result.output
        summary = checked("tiny", result.stdout)
        assert summary["topk_blocks"] == 8
        assert summary["sparse_layers"] == 2
        assert summary["dtype"] == "bfloat16"
        assert set(summary["example"]) == {"num_tokens", "question", "answer", "dense_answer"}
        config = json.loads((tmp_path / "c" / "config.json").read_text())
        sparse = config["text_config"]["sparse_attention_config"]
        assert sparse["sparse_topk_blocks"] == 8

    def test_random_for_people(self, tmp_path):
        result = self.run(tmp_path / "r", "--kind", "random", "--preset", "small", "--dense")
        assert result.exit_code == 0, result.output
        assert "random MiniMax-M3 checkpoint" in result.stdout
        assert "small, seed 0" in result.stdout

    def test_refusals_name_what_is_wrong(self, tmp_path):
        (tmp_path / "notes.txt").write_text("")
        result = self.run(tmp_path)
        assert result.exit_code == 2
        assert "is not empty" in result.stderr.replace("\n", " ")
        result = self.run(tmp_path / "x", "--preset", "small")
        assert result.exit_code == 2
        assert "--preset" in result.stderr
        result = self.run(tmp_path / "x", "--topk", 1)
        assert result.exit_code == 2
        assert "topk_blocks must be at least 3, got 1" in result.stderr.replace("\n", " ")
