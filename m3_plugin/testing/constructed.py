"""A MiniMax-M3 checkpoint whose weights are set by hand so that its answers are known.

The model looks words up in its context: "amber means cedar" somewhere, "amber?" at the end, and it
says " cedar", then what cedar means, and so on. The sparse layers find each fact only if the index
branch selects its block for the right GQA group, and the context holds decoys that win as soon as
one block too many is seen. docs/constructed-checkpoint.md explains the construction and which wrong
word means which bug; this module is the construction itself.

Every token carries its meaning in sub-spaces of the residual stream that are plain ranges of
channels (`_OWN` ... below), so a projection matrix is a list of "channel -> channel, factor".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m3_plugin.testing.hub_layout import (
    EOS_TOKEN,
    IMAGE_TOKEN,
    THINK_END_TOKEN,
    THINK_START_TOKEN,
    VIDEO_TOKEN,
    CheckpointShape,
    byte_level_tokenizer,
    hub_config,
    prepare_folder,
    tensor_shapes,
    write_checkpoint,
)
from m3_plugin.testing.vocabulary import (
    CODE_SIZE,
    NUM_CLASSES,
    NUM_GROUPS,
    NUM_KINDS,
    PATTERN,
    VOCABULARY,
    Word,
)

if TYPE_CHECKING:
    import torch

# Sub-spaces of the residual stream: first channel of each. The first four hold one word code each,
# in the 16 channels of the word's class.
_CODES = NUM_CLASSES * CODE_SIZE
_OWN = 0  # the word this token is, or asks for
_PREV = _OWN + _CODES  # the key under which this token can be found
_OUT = _PREV + _CODES  # what the sparse attention layers found
_FINAL = _OUT + _CODES  # what the experts made of it; the head reads words from here
_IMAGE_CODE = _FINAL + _CODES  # the colour an image token shows (by colour, not by code)
# Flags, one channel each.
_ONE = _IMAGE_CODE + CODE_SIZE  # 1 in every token
_WORD = _ONE + 1  # may be the value of a fact, so it looks one and two tokens back
_FILL = _ONE + 2  # everything without a role: what heads with nothing to do attend to
_QUESTION = _ONE + 3
_ASK = _ONE + 4  # ends the generation prompt: takes over the word of the question
_LABEL = _ONE + 5  # "first", "second", ...: names the pictures that follow
_IMAGE = _ONE + 6
_PLAIN = _ONE + 7  # key in lower case
_DECOY = _ONE + 8  # key capitalised
_KEY_PLAIN = _ONE + 9  # the key of this fact is in lower case
_KEY_DECOY = _ONE + 10  # the key of this fact is capitalised
_LANTERN = _ONE + 11
_CANDLE = _ONE + 12
_MIRROR = _ONE + 13
_MEANS = _ONE + 14
_AFTER_MEANS = _ONE + 15  # the word right before this one is "means"
_NEXT_EOS = _ONE + 16
_NEXT_THINK_END = _ONE + 17
_NOTHING = _ONE + 18  # brings every embedding to the same length
_SCRATCH = _ONE + 19  # written by MLPs that must run but must not matter
_HIDDEN = 640

# Squared length of every embedding; with 640 channels the first RMSNorm then divides by 0.5.
_EMBEDDING_ENERGY = 160.0
_RMS = math.sqrt(_EMBEDDING_ENERGY / _HIDDEN)

_HEAD = 128
_ROTARY = 64
_THETA = 5_000_000.0
# Head channels: word codes in the 64 that RoPE leaves alone, so that they match at any distance.
_UNROTATED = 64
# Rotated pair 0 of a key: takes length away from the rest of the key, never meets a query. Its two
# channels are for how strong a fact is and for what is no fact at all.
_BALLAST = 0
_NO_FACT = _ROTARY // 2
# Pair 31 rotates by 0.33 rad over a million tokens: the lanterns' score fades by 5 % at most.
_SLOW = 31

# Rotated pairs 1..10 of an index key: a mirror's score is the mean of cos(distance * frequency).
_FAST = range(1, 11)

# Rotated pairs that together tell a near block from any farther one, over 780 tokens and more.
_NEAR = range(10, 19)

# Sparse layers, index branch. A searching query is (word, lantern, mirror) = (1.75, 1, 1), an idle
# one (0, 1, 1), both then brought to the same length. Products before that, from the top: lantern
# 0.99, searched fact 0.8, decoy 0.7, candle 0.6, mirror below 0.5 where prompts put it (0.98
# without RoPE), any other fact below 0.25; while idle the same without facts. Afterwards a candle
# scores more while idle (0.42) than the fact while searching (0.36): heads must not be pooled.
_INDEX_WORD = 1.75
_INDEX_FACT = 0.8 / _INDEX_WORD
_INDEX_DECOY = 0.7 / _INDEX_WORD
_INDEX_CANDLE = 0.6
_INDEX_LANTERN = 2.0
_INDEX_REST = 0.2
# Sparse layers, main branch, as cosines before the query's own factor: decoy 0.98, fact 0.71,
# filler 0.45, other facts up to 0.25.
_MAIN_FACT = 0.7071
_MAIN_FILL = 0.45
_MAIN_REST = 0.2
_MAIN_NORM = 5.0
_INDEX_QUERY_NORM = 2.0
_INDEX_KEY_NORM = 0.5
_FIRST_LAYER_NORM = 8.0

# A word's logit when found is about 60; _NOWHERE of that wins against anything worse than 60 %.
_WORD_LOGIT = 60.0
_NOWHERE = 0.6


def _code_channels(space: int, word: Word) -> list[int]:
    start = space + word.class_index * CODE_SIZE
    return list(range(start, start + CODE_SIZE))


def _class_channels(space: int, kind: int, group: int) -> range:
    start = space + (kind * NUM_GROUPS + group) * CODE_SIZE
    return range(start, start + CODE_SIZE)


def _frequency(pair: int) -> float:
    return _THETA ** (-2.0 * pair / _ROTARY)


def _ballast_for(cosine: float) -> float:
    """Length that leaves `cosine` of a unit-length content when added at a right angle to it."""
    return math.sqrt(1.0 / cosine**2 - 1.0)


@dataclass(frozen=True, kw_only=True)
class ConstructedCheckpoint:
    """The constructed checkpoint with one choice: how many blocks a query may see.

    Attributes
    ----------
    topk_blocks : blocks of 128 tokens per query and GQA group, the query's own one included; 4 lets
        prompts of 1.2K tokens pass the budget, 16 is the published value
    use_sparse_attention : False declares every layer dense in config.json with the same weights;
        the model then gives the `dense_answer` of prompts with decoys
    sparse_everywhere : the layer that gathers chooses its blocks too, as M3.1's first layers do
    num_init_blocks : first blocks that are always read, within `topk_blocks`
    mtp : add an MTP module that looks up the same facts as the target, so that every token it
        drafts after the first word of an answer is accepted
    mtp_wrong_every : 0, or of how many words of a chain the module gets one wrong: 1 (whatever it
        drafts), 2 or 8 (hops alternate between two kinds and visit 8 classes in turn)
    """

    topk_blocks: int = 4
    use_sparse_attention: bool = True
    sparse_everywhere: bool = False
    num_init_blocks: int = 0
    mtp: bool = False
    mtp_wrong_every: int = 0

    def __post_init__(self) -> None:
        if self.mtp_wrong_every not in (0, 1, NUM_KINDS, NUM_CLASSES):
            raise ValueError(
                f"mtp_wrong_every must be 0, 1, {NUM_KINDS} or {NUM_CLASSES}, "
                f"got {self.mtp_wrong_every}"
            )
        if self.mtp_wrong_every and not self.mtp:
            raise ValueError("mtp_wrong_every says how wrong an MTP module is; it needs mtp=True")
        least = 3 + self.num_init_blocks
        if self.topk_blocks < least:
            # Own block, one block with a lantern, the searched block, and what is forced.
            raise ValueError(f"topk_blocks must be at least {least}, got {self.topk_blocks}")

    @property
    def shape(self) -> CheckpointShape:
        return CheckpointShape(
            hidden_size=_HIDDEN,
            num_hidden_layers=3,
            num_attention_heads=2 * NUM_GROUPS,
            num_key_value_heads=NUM_GROUPS,
            head_dim=_HEAD,
            block_size=128,
            topk_blocks=self.topk_blocks,
            vocab_size=-(-(VOCABULARY.size + 3) // 64) * 64,
            dense_intermediate_size=128,
            intermediate_size=128,
            shared_intermediate_size=128,
            num_local_experts=NUM_CLASSES,
            vision_num_heads=4,
            vision_intermediate_size=128,
            num_mtp_modules=int(self.mtp),
            sparse_everywhere=self.sparse_everywhere,
            num_init_blocks=self.num_init_blocks,
        )

    def write(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        num_shards: int = 3,
        force: bool = False,
    ) -> Path:
        """Write the checkpoint in the published layout; returns the folder.

        `dtype` defaults to bfloat16. A folder with files in it is refused unless `force`.
        """
        import torch

        dtype = torch.bfloat16 if dtype is None else dtype
        folder = prepare_folder(path, force=force)
        tokenizer = byte_level_tokenizer(words=VOCABULARY.texts, pattern=PATTERN)
        config = hub_config(
            self.shape,
            dtype=dtype,
            token_ids=tokenizer.get_vocab(),
            use_sparse_attention=self.use_sparse_attention,
        )
        write_checkpoint(
            folder,
            config=config,
            tensors=self.tensors(),
            tokenizer=tokenizer,
            dtype=dtype,
            num_shards=num_shards,
        )
        return folder

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors in float32 under their published names."""
        import torch

        shape = self.shape
        tensors = {name: torch.zeros(size) for name, size in tensor_shapes(shape)}
        generator = torch.Generator().manual_seed(0)
        tensors["language_model.model.embed_tokens.weight"][:] = _embeddings(shape.vocab_size)
        _head(tensors["language_model.lm_head.weight"])
        for i in range(shape.num_hidden_layers):
            layer = {
                name.removeprefix(f"language_model.model.layers.{i}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"language_model.model.layers.{i}.")
            }
            if i == 0:
                _gathering_attention(layer)
                if shape.is_sparse(i):
                    _choose_nearest(layer)
                _idle_mlp(layer, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", generator)
                continue
            _lookup_attention(layer, kind=i - 1)
            if i == 1:
                _idle_experts(layer, shape.num_local_experts, generator)
            else:
                _answering_experts(layer, shape.num_local_experts)
        _vision(tensors, generator)
        _scatter_norms(tensors, shape.num_hidden_layers, generator)
        if self.mtp:
            _mtp_module(tensors, shape, wrong_every=self.mtp_wrong_every, generator=generator)
        return tensors


def _embeddings(vocab_size: int) -> torch.Tensor:
    """[vocab_size, hidden]; rows beyond the tokenizer's ids are zero."""
    import torch

    table = torch.zeros(vocab_size, _HIDDEN)
    v = VOCABULARY
    rows = table[: v.size]
    rows[:, _ONE] = 1.0
    rows[:, _FILL] = 1.0

    def role(token_id: int, *flags: int, word: Word | None = None) -> None:
        rows[token_id, _FILL] = 0.0
        for flag in flags:
            rows[token_id, flag] = 1.0
        if word is not None:
            rows[token_id, _code_channels(_OWN, word)] = torch.tensor(word.code).float()

    for word in v.keys:
        role(word.id, _WORD, _PLAIN, word=word)
        assert word.decoy_id is not None
        role(word.decoy_id, _WORD, _DECOY, word=word)
    for word in (*v.treasures, *v.colours):
        role(word.id, _WORD, _NEXT_EOS, word=word)
    for word in v.ordinals:
        role(word.id, _WORD, _LABEL, word=word)
    for word in (*v.keys, *v.ordinals, v.picture):
        assert word.question_id is not None
        # A question also looks two tokens back, where a filler stands: otherwise it would find
        # itself and become a fact about itself.
        role(word.question_id, _WORD, _QUESTION, word=word)
    role(v.video_question_id, _WORD, _QUESTION, word=v.picture)
    role(v.assistant_id, _ASK)
    role(v.id_of(THINK_END_TOKEN), _ASK)
    rows[v.id_of(THINK_START_TOKEN), _NEXT_THINK_END] = 1.0
    rows[v.nowhere_id, _NEXT_EOS] = 1.0
    rows[v.lantern_id, _LANTERN] = 1.0
    rows[v.candle_id, _CANDLE] = 1.0
    rows[v.mirror_id, _MIRROR] = 1.0
    rows[v.id_of(" means"), _MEANS] = 1.0
    for token in (IMAGE_TOKEN, VIDEO_TOKEN):
        # Replaced by what the vision tower sees; a host that forgets to gets a token without role.
        rows[v.id_of(token), _FILL] = 1.0
    rows[:, _NOTHING] = (_EMBEDDING_ENERGY - rows.square().sum(-1)).sqrt()
    return table


def _head(head: torch.Tensor) -> None:
    """Words are read from _FINAL, which holds a found code at about the size of _ONE."""
    import torch

    v = VOCABULARY
    for word in (*v.keys, *v.treasures, *v.colours, *v.ordinals):
        code = torch.tensor(word.code).float()
        head[word.id, _code_channels(_FINAL, word)] = code * (_WORD_LOGIT / CODE_SIZE)
    # The final norm sees _ONE at the same scale as everything else, so this is a threshold.
    head[v.nowhere_id, _ONE] = _NOWHERE * _WORD_LOGIT
    head[v.id_of(EOS_TOKEN), _NEXT_EOS] = 4.0 * _WORD_LOGIT
    head[v.id_of(THINK_END_TOKEN), _NEXT_THINK_END] = 4.0 * _WORD_LOGIT


def _gathering_attention(layer: dict[str, torch.Tensor]) -> None:
    """Dense layer 0: tokens collect what they need to know from others. Head 2g serves group g.

    Group 0 and 1: the word two tokens back becomes the key of this token (code, and its case);
    head 3 notes whether "means" stands between, without which it is no fact.
    Group 2: the end of the generation prompt takes over the word of the question.
    Group 3: image tokens take the nearest label before them as a second key.
    """
    q = layer["self_attn.q_proj.weight"].view(2 * NUM_GROUPS, _HEAD, _HIDDEN)
    k = layer["self_attn.k_proj.weight"].view(NUM_GROUPS, _HEAD, _HIDDEN)
    v = layer["self_attn.v_proj.weight"].view(NUM_GROUPS, _HEAD, _HIDDEN)
    o = layer["self_attn.o_proj.weight"].view(_HIDDEN, 2 * NUM_GROUPS, _HEAD)
    layer["self_attn.q_norm.weight"].fill_(_FIRST_LAYER_NORM - 1.0)
    layer["self_attn.k_norm.weight"].fill_(_FIRST_LAYER_NORM - 1.0)
    first, second, third = _UNROTATED, _UNROTATED + 1, _UNROTATED + 2

    # "Two tokens back" is a phase: sum over 16 frequencies of cos((distance - 2) * frequency).
    # Tokens that are no word attend to themselves, whose value is zero.
    for head, distance in ((0, 2), (2, 2), (3, 1)):
        for pair in range(16):
            angle = distance * _frequency(pair)
            k[head // 2, pair, _ONE] = 1.0
            q[head, pair, _ONE] = 1.0
            q[head, pair, _WORD] = math.cos(angle) - 1.0
            q[head, pair + _ROTARY // 2, _WORD] = -math.sin(angle)
    for channel in range(_CODES):
        v[0, channel, _OWN + channel] = 1.0
        o[_PREV + channel, 0, channel] = _RMS
    for channel, (source, target) in enumerate([(_PLAIN, _KEY_PLAIN), (_DECOY, _KEY_DECOY)]):
        v[1, channel, source] = 1.0
        o[target, 2, channel] = _RMS
    v[1, 2, _MEANS] = 1.0
    o[_AFTER_MEANS, 3, 2] = _RMS

    # Question and answer prompt meet by flag; all frequencies in phase prefer the nearest question.
    q[4, first, _ASK] = 1.0
    q[4, second, [_ONE, _ASK]] = q.new_tensor([1.0, -1.0])
    k[2, first, _QUESTION] = 1.0
    k[2, second, _FILL] = 1.0
    for pair in range(_ROTARY // 2):
        q[4, pair, _ASK] = 0.4 / math.sqrt(_ROTARY // 2)
        k[2, pair, _ONE] = 0.4 / math.sqrt(_ROTARY // 2)
    for channel in range(_CODES):
        v[2, channel, _OWN + channel] = 1.0
        o[_OWN + channel, 4, channel] = _RMS

    # -sin(distance * frequency 12) falls over the first 500 tokens: the nearest label wins.
    q[6, first, _IMAGE] = 1.0
    q[6, second, [_ONE, _IMAGE]] = q.new_tensor([1.0, -0.8])
    q[6, 12 + _ROTARY // 2, _IMAGE] = 1.0
    k[3, first, _LABEL] = 1.0
    k[3, second, _FILL] = 1.0
    k[3, 12, _ONE] = 0.5
    # Words that are no label have little else in their key: ballast keeps them from winning.
    k[3, third, [_ONE, _WORD, _LABEL]] = k.new_tensor([1.0, 2.0, -2.0])
    label = VOCABULARY.ordinals[0]
    for channel, source in enumerate(_code_channels(_OWN, label)):
        v[3, channel, source] = 1.0
        o[_PREV - _OWN + source, 6, channel] = _RMS


def _choose_nearest(layer: dict[str, torch.Tensor]) -> None:
    """Index branch of a gathering layer: the nearest blocks, by phases that all agree there."""
    for name in ("index_q", "index_k"):
        heads = layer[f"self_attn.{name}_proj.weight"].view(-1, _HEAD, _HIDDEN)
        heads[:, _NEAR, _ONE] = 1.0


def _lookup_attention(layer: dict[str, torch.Tensor], *, kind: int) -> None:
    """Sparse layer: tokens whose word is of `kind` find the fact with that key and take its value.

    The word's group decides which index head, KV head and pair of query heads do it; the three
    other groups attend to fillers, whose value is zero.
    """
    q = layer["self_attn.q_proj.weight"].view(2 * NUM_GROUPS, _HEAD, _HIDDEN)
    k = layer["self_attn.k_proj.weight"].view(NUM_GROUPS, _HEAD, _HIDDEN)
    v = layer["self_attn.v_proj.weight"].view(NUM_GROUPS, _HEAD, _HIDDEN)
    o = layer["self_attn.o_proj.weight"].view(_HIDDEN, 2 * NUM_GROUPS, _HEAD)
    index_q = layer["self_attn.index_q_proj.weight"].view(NUM_GROUPS, _HEAD, _HIDDEN)
    index_k = layer["self_attn.index_k_proj.weight"]
    layer["self_attn.q_norm.weight"].fill_(_MAIN_NORM - 1.0)
    layer["self_attn.k_norm.weight"].fill_(_MAIN_NORM - 1.0)
    layer["self_attn.index_q_norm.weight"].fill_(_INDEX_QUERY_NORM - 1.0)
    layer["self_attn.index_k_norm.weight"].fill_(_INDEX_KEY_NORM - 1.0)
    # Makes the length of a code 1.
    unit = 1.0 / math.sqrt(CODE_SIZE)

    for group in range(NUM_GROUPS):
        place = _UNROTATED + group * CODE_SIZE
        # Another group's place: a head that reads the wrong group's keys finds nothing in them.
        fill_place = _UNROTATED + (group + 2) % NUM_GROUPS * CODE_SIZE
        own = _class_channels(_OWN, kind, group)
        prev = _class_channels(_PREV, kind, group)
        for i in range(CODE_SIZE):
            index_q[group, place + i, own[i]] = _INDEX_WORD * unit
            index_k[place + i, prev[i]] = unit
            k[group, place + i, prev[i]] = unit
            for head in (2 * group, 2 * group + 1):
                q[head, place + i, own[i]] = unit
        index_q[group, _SLOW, _ONE] = 1.0
        index_q[group, _FAST, _ONE] = 1.0 / math.sqrt(len(_FAST))
        for head in (2 * group, 2 * group + 1):
            q[head, fill_place, _ONE] = _MAIN_FILL
        k[group, fill_place, _FILL] = 1.0
        _weigh_down(k[group], _MAIN_REST, plain=_ballast_for(_MAIN_FACT))

        # Each of the group's two heads carries the values of one kind; each group shifts its
        # channels differently, so that values of another group read as other words.
        shifted = [(channel + 2 * CODE_SIZE * group) % _CODES for channel in range(_CODES)]
        for channel in range(_CODES):
            v[group, shifted[channel], _OWN + channel] = 1.0
            head = 2 * group + channel // (_CODES // 2)
            o[_OUT + channel, head, shifted[channel]] = _RMS
        for i, colour in enumerate(VOCABULARY.colours):
            channels = [shifted[channel] for channel in _code_channels(0, colour)]
            v[group, channels, _IMAGE_CODE + i] = v.new_tensor(colour.code)

    index_k[_SLOW, _LANTERN] = _INDEX_LANTERN
    index_k[_SLOW, _CANDLE] = _INDEX_REST / _ballast_for(_INDEX_CANDLE)
    index_k[_FAST, _MIRROR] = 1.0 / math.sqrt(len(_FAST))
    _weigh_down(
        index_k,
        _INDEX_REST,
        plain=_ballast_for(_INDEX_FACT),
        decoy=_ballast_for(_INDEX_DECOY),
    )


def _weigh_down(
    keys: torch.Tensor, rest: float, *, plain: float, decoy: float | None = None
) -> None:
    """Set the ballast rows of a key projection: of plain facts, of decoys and of all the rest."""
    keys[_BALLAST, _ONE] = rest
    keys[_BALLAST, _KEY_PLAIN] = plain - rest
    keys[_BALLAST, _KEY_DECOY] = 0.0 if decoy is None else decoy - rest
    # A key without "means" before the value is no fact; the three flags cancel exactly.
    keys[_NO_FACT, [_KEY_PLAIN, _KEY_DECOY]] = 16.0
    keys[_NO_FACT, _AFTER_MEANS] = -16.0


# In a SwiGLU-OAI unit whose gate is clamped, a pair of units with up = +x and -x gives 14 x.
_GATE = 8.0
_PAIR_GAIN = 2.0 * 7.0


def _answering_experts(layer: dict[str, torch.Tensor], num_experts: int) -> None:
    """MoE of the last layer: copies a found code from _OUT to _FINAL.

    Expert c knows the codes of class c only, and only their even channels; the shared expert does
    the odd ones of all classes. Half a code is less than `_NOWHERE` asks for.
    """
    router = layer["block_sparse_moe.gate.weight"]
    bias = layer["block_sparse_moe.e_score_correction_bias"]
    # The class that was found gets a sigmoid of nearly 1, so nearly all of the renormalised weight.
    routed_scaling = 2.0
    for expert in range(num_experts):
        first = expert * CODE_SIZE
        # The first place of every code is +1: it tells the class.
        router[expert, _OUT + first] = 8.0
        router[expert, _ONE] = -4.0
        bias[expert] = 0.01 * expert
        _copy_units(
            layer,
            f"block_sparse_moe.experts.{expert}.",
            ("w1", "w3", "w2"),
            channels=range(first, first + CODE_SIZE, 2),
            gain=1.0 / routed_scaling,
        )
    _copy_units(
        layer,
        "block_sparse_moe.shared_experts.",
        ("gate_proj", "up_proj", "down_proj"),
        channels=range(1, _CODES, 2),
        gain=1.0,
    )


def _copy_units(
    layer: dict[str, torch.Tensor],
    prefix: str,
    names: tuple[str, str, str],
    *,
    channels: range,
    gain: float,
) -> None:
    gate, up, down = (layer[f"{prefix}{name}.weight"] for name in names)
    for i, channel in enumerate(channels):
        for unit, sign in ((2 * i, 1.0), (2 * i + 1, -1.0)):
            gate[unit, _ONE] = _GATE
            up[unit, _OUT + channel] = sign
            down[_FINAL + channel, unit] = sign * gain * _RMS / _PAIR_GAIN


def _idle_experts(
    layer: dict[str, torch.Tensor], num_experts: int, generator: torch.Generator
) -> None:
    """MoE of the first sparse layer: random experts that write where nobody reads."""
    import torch

    router = layer["block_sparse_moe.gate.weight"]
    router[:] = torch.randn(router.shape, generator=generator) * 0.1
    bias = layer["block_sparse_moe.e_score_correction_bias"]
    bias[:] = torch.randn(bias.shape, generator=generator) * 0.1
    for expert in range(num_experts):
        name = f"block_sparse_moe.experts.{expert}."
        _idle_mlp(layer, name + "w1", name + "w3", name + "w2", generator)
    name = "block_sparse_moe.shared_experts."
    _idle_mlp(layer, name + "gate_proj", name + "up_proj", name + "down_proj", generator)


def _idle_mlp(
    layer: dict[str, torch.Tensor], gate: str, up: str, down: str, generator: torch.Generator
) -> None:
    import torch

    for name in (gate, up):
        weight = layer[name + ".weight"]
        weight[:] = torch.randn(weight.shape, generator=generator) * 0.15
    weight = layer[down + ".weight"]
    scratch = weight[_SCRATCH:]
    scratch[:] = torch.randn(scratch.shape, generator=generator) * 0.002


# The module's two lookups share places of the keys; the second kind's codes get these signs, after
# which no two codes of different kinds overlap more than two of one kind.
_SECOND_KIND_SIGNS = (-1, 1, -1, 1, 1, -1, 1, -1, -1, 1, -1, 1, 1, 1, 1, 1)
# Channels of the module's stream that mean something else than in the target's. What a position's
# token is stands in front of _OUT, so small that it does not count as found.
_KEY_ONE = _MEANS
_VALUE_SCALE = 0.01
# A normalised target state is about 1.5 times the stream that the embedding begins.
_STATE_SCALE = 0.65
# How loud a found word and a wrong one are; the end of an answer (4 words' worth) outdoes both.
_FOUND = 1.2
_WRONG = 3.0


def _mtp_module(
    tensors: dict[str, torch.Tensor],
    shape: CheckpointShape,
    *,
    wrong_every: int,
    generator: torch.Generator,
) -> None:
    """MTP module 0: looks up the word of the next token among the facts of the target's states.

    A target state holds its token's word and key, as the target's first layer gathered them. The
    module's keys and values are made of those, its queries of the next token's embedding, and one
    sparse layer serves both kinds of words, so it finds what the target will find one step later.
    Colours come from the next token's embedding: without image embeddings it finds no picture.
    """
    prefix = "language_model.model.mtp.layers.0."
    layer_prefix = prefix + "transformer_layer."
    module = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    layer = {
        n.removeprefix(layer_prefix): t for n, t in tensors.items() if n.startswith(layer_prefix)
    }
    _drafting_attention(layer)
    _answering_experts(layer, shape.num_local_experts)

    embedding, state = module["eh_proj.weight"].split(_HIDDEN, dim=1)
    copied = [_ONE, _NEXT_THINK_END, _NOTHING]
    copied += [*range(_OWN, _OWN + _CODES), *range(_IMAGE_CODE, _IMAGE_CODE + CODE_SIZE)]
    if wrong_every != 1:
        copied.append(_NEXT_EOS)
    embedding[copied, copied] = _RMS
    flags = [_FILL, _KEY_PLAIN, _KEY_DECOY, _AFTER_MEANS, _LANTERN, _CANDLE, _MIRROR]
    flags += range(_PREV, _PREV + _CODES)
    state[flags, flags] = _STATE_SCALE
    state[_KEY_ONE, _ONE] = _STATE_SCALE
    own = range(_OWN, _OWN + _CODES)
    state[range(_OUT, _OUT + _CODES), own] = _STATE_SCALE * _VALUE_SCALE
    _mistakes(embedding, wrong_every=wrong_every)

    # The head undoes the target's norm: so do the module's last norm and, for the state, its first.
    norm = tensors["language_model.model.norm.weight"]
    module["final_layernorm.weight"][:] = norm
    module["hnorm.weight"][:] = 1.0 / (1.0 + norm) - 1.0
    _scatter_norm(module["enorm.weight"], [embedding], generator)
    _scatter_layer_norms(layer, generator)


def _drafting_attention(layer: dict[str, torch.Tensor]) -> None:
    """The lookup of both kinds in one layer, keys and values from the target's state."""
    import torch

    second = {name: torch.zeros_like(tensor) for name, tensor in layer.items()}
    _lookup_attention(second, kind=1)
    _lookup_attention(layer, kind=0)
    signs = torch.tensor(_SECOND_KIND_SIGNS).float()
    for name, heads, space in (
        ("q_proj", 2 * NUM_GROUPS, _OWN),
        ("k_proj", NUM_GROUPS, _PREV),
        ("index_q_proj", NUM_GROUPS, _OWN),
        ("index_k_proj", 1, _PREV),
    ):
        name = f"self_attn.{name}.weight"
        first_code = space + NUM_GROUPS * CODE_SIZE
        codes = slice(first_code, first_code + NUM_GROUPS * CODE_SIZE)
        weight, other = (t[name].view(heads, _HEAD, _HIDDEN) for t in (layer, second))
        places = slice(_UNROTATED, _HEAD)
        weight[:, places, codes] = other[:, places, codes] * signs.repeat(NUM_GROUPS)[:, None]
        if space == _PREV:
            weight[..., _KEY_ONE] = weight[..., _ONE]
            weight[..., _ONE] = 0.0
    v = layer["self_attn.v_proj.weight"]
    v[:, _OUT : _OUT + _CODES] = v[:, _OWN : _OWN + _CODES] * (_FOUND / _VALUE_SCALE)
    v[:, _OWN : _OWN + _CODES] = 0.0
    v[:, _IMAGE_CODE : _IMAGE_CODE + CODE_SIZE] *= _FOUND


def _mistakes(embedding: torch.Tensor, *, wrong_every: int) -> None:
    """Let the module say a word that no prompt's answer has, for one in `wrong_every` words."""
    said = VOCABULARY.ordinals[-1]
    channels = _code_channels(_FINAL, said)
    code = embedding.new_tensor(said.code)
    if wrong_every == 1:
        embedding[channels, _ONE] = _WRONG * code * _RMS
    elif wrong_every:
        # The first place of every code is +1: it tells the class of the word to look up.
        for word_class in range(NUM_CLASSES - NUM_CLASSES // wrong_every, NUM_CLASSES):
            embedding[channels, _OWN + word_class * CODE_SIZE] = _WRONG * code * _RMS


def _scatter_norms(
    tensors: dict[str, torch.Tensor], num_layers: int, generator: torch.Generator
) -> None:
    """Give the norms in front of projections weights -1/2, 0 and 1 and take them back behind.

    The model stays the same, exactly so in bfloat16, but only if the norms multiply by 1 + w.
    """
    for i in range(num_layers):
        prefix = f"language_model.model.layers.{i}."
        layer = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        _scatter_layer_norms(layer, generator)
    head = tensors["language_model.lm_head.weight"]
    _scatter_norm(tensors["language_model.model.norm.weight"], [head], generator)


def _scatter_layer_norms(layer: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    for norm, readers in (
        ("input_layernorm.weight", ("q_proj", "k_proj", "v_proj")),
        ("post_attention_layernorm.weight", ("gate_proj", "up_proj", ".w1", ".w3", ".gate")),
    ):
        behind = [t for n, t in layer.items() if n.removesuffix(".weight").endswith(readers)]
        _scatter_norm(layer[norm], behind, generator)


def _scatter_norm(
    norm: torch.Tensor, readers: list[torch.Tensor], generator: torch.Generator
) -> None:
    import torch

    draw = torch.randint(-1, 2, norm.shape, generator=generator)
    factor = torch.exp2(draw.float())
    norm[:] = factor - 1.0
    for reader in readers:
        reader /= factor


# Pure colours after CLIP normalisation have one sign pattern of (r, g, b) each.
_SIGNS = {
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "cyan": (-1, 1, 1),
    "magenta": (1, -1, 1),
    "white": (1, 1, 1),
    "black": (-1, -1, -1),
}


def _vision(tensors: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Patches of a pure colour become image tokens with that colour's channel of _IMAGE_CODE set.

    The patch embedding takes the mean of each colour; the ViT layers add nothing; the projector
    compares with the sign pattern of each colour and the merge MLP takes the majority of 4 patches.
    """
    import torch

    tower = "vision_tower.vision_model."
    conv = tensors[tower + "embeddings.patch_embedding.weight"]
    width = conv.shape[0]
    mean = 1.0 / conv[0, 0].numel()
    for colour in range(3):
        # With both signs the mean is zero, which LayerNorm then has nothing to subtract from.
        conv[colour, colour] = mean
        conv[colour + 3, colour] = -mean
    tensors[tower + "pre_layrnorm.weight"].fill_(1.0)
    for name, tensor in tensors.items():
        if not name.startswith(tower + "encoder."):
            continue
        if "layer_norm" in name:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        elif not ("out_proj" in name or "fc2" in name):
            tensor[:] = torch.randn(tensor.shape, generator=generator) * 0.05

    # LayerNorm brings (r, g, b, -r, -g, -b) to length sqrt(width); a pure colour's components along
    # its own sign pattern then sum to about 1.7 of this unit, with one sign wrong below 0.9.
    unit = math.sqrt(width / 2.0)
    project = tensors["multi_modal_projector.linear_1.weight"]
    for i, colour in enumerate(VOCABULARY.colours):
        signs = _SIGNS[colour.text.strip()]
        project[i, :3] = project.new_tensor(signs) / 2.0
        project[i, 3:6] = project.new_tensor(signs) / -2.0
        tensors["multi_modal_projector.linear_1.bias"][i] = -1.25 * unit
        tensors["multi_modal_projector.linear_2.weight"][i, i] = 1.0 / (0.45 * unit)

    merge = tensors["patch_merge_mlp.linear_1.weight"].view(-1, 4, _HIDDEN)
    merge_bias = tensors["patch_merge_mlp.linear_1.bias"]
    out = tensors["patch_merge_mlp.linear_2.weight"]
    slope = 80.0
    for i in range(len(VOCABULARY.colours)):
        # The difference of two GELUs is 0 below the first threshold and constant above the second.
        for step, (threshold, sign) in enumerate([(0.55, 1.0), (0.65, -1.0)]):
            unit_index = 2 * i + step
            merge[unit_index, :, i] = slope / 4.0
            merge_bias[unit_index] = -slope * threshold
            out[_IMAGE_CODE + i, unit_index] = sign / (0.1 * slope)
    out_bias = tensors["patch_merge_mlp.linear_2.bias"]
    picture = VOCABULARY.picture
    out_bias[_code_channels(_PREV, picture)] = out_bias.new_tensor(picture.code)
    for flag in (_ONE, _IMAGE, _KEY_PLAIN, _AFTER_MEANS):
        out_bias[flag] = 1.0
    # One channel of _IMAGE_CODE comes on top.
    out_bias[_NOTHING] = math.sqrt(_EMBEDDING_ENERGY - float(out_bias.square().sum()) - 1.0)
