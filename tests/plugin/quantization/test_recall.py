"""Recall of the index branch: what is kept chooses the same blocks, what is quantised nearly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m3_plugin.model.config import M3Config
from m3_plugin.quantization.formats import PackedInt4, WeightFormat
from m3_plugin.testing.quantised import (
    RECIPES,
    QuantName,
    Recipe,
    Role,
    quantise_checkpoint,
    reference_checkpoint,
)
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from m3_plugin.testing.recall import index_recall


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("plain") / "x", preset="small")


@pytest.mark.parametrize(
    ("quant", "num_tokens", "least"), [("mxfp8", 8192, 0.9), ("awq", 2048, 1.0)]
)
def test_recall(
    plain: Path, tmp_path: Path, quant: QuantName, num_tokens: int, least: float
) -> None:
    """awq keeps the index branch: not one block may differ. Random weights: a lower bound."""
    quantised = quantise_checkpoint(plain, tmp_path / "q", quant)
    recall = index_recall(plain, quantised, num_tokens=num_tokens)
    assert recall.keys() == {1, 2, 3}
    assert least <= min(recall.values())
    assert max(recall.values()) <= 1.0
    if least < 1.0:
        assert max(recall.values()) < 1.0


def test_the_order_of_caches_by_what_they_choose(plain: Path) -> None:
    planes, bf16, int8, fp8 = (
        sum(index_recall(plain, plain, num_tokens=2048, cached_as=cache).values()) / 3
        for cache in ("planes", "bf16", "int8", "fp8")
    )
    assert 1 >= planes > bf16 > int8 > fp8 > 0.9
    with pytest.raises(ValueError, match="cached as fp32, bf16, fp8, int8, planes; got 'int4'"):
        index_recall(plain, plain, cached_as="int4")


def test_a_quantised_branch_that_should_have_been_kept_shows(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same awq checkpoint with four-bit index projections, read as the numbers it means."""
    weight = PackedInt4(32, symmetric=False)
    formats: dict[Role, WeightFormat] = {**RECIPES["awq"].formats, "index": weight}
    broken = Recipe(formats, "compressed-tensors")
    monkeypatch.setattr("m3_plugin.testing.quantised.RECIPES", {"awq": broken})
    meant = reference_checkpoint(plain, tmp_path / "q", "awq")
    recall = index_recall(plain, meant, num_tokens=2048)
    assert max(recall.values()) < 0.95


def test_a_text_within_the_dense_context_says_nothing(plain: Path) -> None:
    config = M3Config.from_hf(json.loads((plain / "config.json").read_text()))
    assert config.msa is not None
    with pytest.raises(ValueError, match="32 tokens of this model are attended densely"):
        index_recall(plain, plain, num_tokens=config.msa.dense_context)
