"""The MTP module's config and input, and the refusal of a checkpoint without one."""

from __future__ import annotations

import pytest
import torch

from m3_plugin.checkpoint.names import require_mtp_modules
from m3_plugin.model.mtp import mtp_config, mtp_input
from tests.plugin.model.test_config import HUB, hub


def test_the_draft_is_a_model_of_sparse_routed_layers() -> None:
    config = mtp_config(HUB, num_modules=2)
    assert config.num_hidden_layers == config.num_mtp_modules == 2
    assert config.sparse_layers == config.moe_layers == (True, True)
    assert config.msa is not None
    assert config.hidden_size == 6144


def test_a_draft_checkpoint_of_one_layer_may_keep_the_targets_lists() -> None:
    alone = hub(num_hidden_layers=1)["text_config"] | {"model_type": "minimax_m3_mtp"}
    assert mtp_config(alone, num_modules=1).num_sparse_layers == 1


def test_without_sparse_attention_there_is_no_mtp() -> None:
    text = {key: v for key, v in HUB["text_config"].items() if key != "sparse_attention_config"}
    with pytest.raises(ValueError, match="sparse_attention_config"):
        mtp_config(text, num_modules=1)


def test_quantisation_of_the_whole_reaches_the_draft() -> None:
    config = mtp_config(HUB | {"quantization_config": {"quant_method": "mxfp8"}}, num_modules=1)
    assert config.quantization is not None
    assert config.quantization.method == "mxfp8"


def test_input_is_embedding_then_hidden_state_and_no_embedding_at_position_0() -> None:
    embeddings, hidden = torch.full((3, 2), 5.0), torch.full((3, 2), 7.0)
    positions = torch.tensor([4, 0, 1])
    row = mtp_input(embeddings, hidden, positions, enorm=lambda x: x + 0.5, hnorm=lambda x: x * 10)
    assert row.tolist() == [[5.5, 5.5, 70, 70], [0.5, 0.5, 70, 70], [5.5, 5.5, 70, 70]]


def test_a_nan_embedding_at_position_0_does_not_spread() -> None:
    embeddings = torch.tensor([[float("nan")]])
    row = mtp_input(
        embeddings, torch.ones(1, 1), torch.zeros(1), enorm=lambda x: x, hnorm=lambda x: x
    )
    assert row.tolist() == [[0.0, 1.0]]


def test_a_checkpoint_without_mtp_is_refused_in_one_sentence_that_names_eagle3() -> None:
    assert require_mtp_modules(["model.mtp.layers.0.enorm.weight"], checkpoint="x") == 1
    with pytest.raises(ValueError, match=r"^MiniMaxAI/MiniMax-M3 holds no MTP.*EAGLE3.*\.$"):
        require_mtp_modules(["lm_head.weight"], checkpoint="MiniMaxAI/MiniMax-M3")
