"""Parts of layers that vLLM keeps in the checkpoint's order, as it does on a GPU; no engine.

vLLM's own layer-wise reload runs on a small module whose fused parameter no kernel has packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from m3_plugin.checkpoint.loading import WeightLoader
from m3_plugin.checkpoint.names import tensor_shape
from m3_plugin.model.config import M3Config
from m3_vllm.updates import ServedWeights

ATTENTION = "model.layers.0.self_attn"
PARTS = [f"{ATTENTION}.{part}" for part in ("k_proj", "v_proj")]


class Fused(nn.Module):
    """One parameter of two projections, and a norm."""

    def __init__(self, config: M3Config) -> None:
        super().__init__()
        self.rows = tensor_shape(config, PARTS[0])[0]
        self.weight = nn.Parameter(torch.zeros(2 * self.rows, config.hidden_size))
        self.weight.weight_loader = self.load_part  # type: ignore[attr-defined]

    def load_part(self, param: Tensor, loaded_weight: Tensor, part: int) -> None:
        param.data.narrow(0, part * self.rows, self.rows).copy_(loaded_weight)


@pytest.fixture
def root(random_checkpoint: Callable[[str], Path]) -> Any:
    file = random_checkpoint("engine") / "config.json"
    config = M3Config.from_hf(json.loads(file.read_text()))
    root: Any = nn.Module()
    root.model = nn.Module()
    root.model.layers = nn.ModuleList([nn.Module()])
    root.model.layers[0].self_attn = nn.Module()
    root.model.layers[0].self_attn.kv_proj = Fused(config)

    def loader() -> WeightLoader:
        return WeightLoader(
            root,
            config=config,
            expected=frozenset(PARTS),
            fused={"k_proj": ("kv_proj", 0), "v_proj": ("kv_proj", 1)},
            experts=(),
            default_loader=lambda *given: None,
        )

    host: Any = SimpleNamespace(model="no folder", dtype=torch.float32, quantization=None)
    root.served = ServedWeights(root, text=loader, model_config=host)
    root.host = host
    record_metadata_for_reloading(root)
    root.shape = tensor_shape(config, PARTS[0])
    root.served.load(
        [(f"{name}.weight", torch.full(root.shape, 1.0 + i)) for i, name in enumerate(PARTS)]
    )
    root.served.process_weights_after_loading(torch.float32)
    return root


def halves(root: Any) -> list[float]:
    """The one number that each projection is filled with."""
    rows = [half.unique() for half in root.model.layers[0].self_attn.kv_proj.weight.data.chunk(2)]
    assert all(len(values) == 1 for values in rows)
    return [float(values) for values in rows]


def part(root: Any, index: int, value: float) -> tuple[str, Tensor]:
    return f"{PARTS[index]}.weight", torch.full(root.shape, value)


def test_one_projection_of_a_fused_layer_leaves_the_other(root: Any) -> None:
    address = root.model.layers[0].self_attn.kv_proj.weight.data_ptr()
    assert halves(root) == [1, 2]
    root.served.load([part(root, 1, 5.0)])
    assert halves(root) == [1, 5]
    assert root.model.layers[0].self_attn.kv_proj.weight.data_ptr() == address


def test_a_session_places_what_is_left_over_at_its_end(root: Any) -> None:
    initialize_layerwise_reload(root)
    bucket = [part(root, 0, 7.0)]
    root.served.load(bucket)
    bucket[0][1].fill_(0)
    finalize_layerwise_reload(root, root.host)
    assert halves(root) == [7, 2]


def test_packed_it_must_come_whole(root: Any) -> None:
    root.served.packed = frozenset({f"{ATTENTION}.kv_proj.weight"})
    with pytest.raises(
        ValueError, match=r"v_proj\.weight is part of .*kv_proj.*k_proj\.weight too"
    ):
        root.served.load([part(root, 1, 5.0)])
    assert halves(root) == [1, 2]
    root.served.load([part(root, 1, 5.0), part(root, 0, 4.0)])
    assert halves(root) == [4, 5]


def test_a_refusal_within_a_session_ends_it_with_the_old_weights(root: Any) -> None:
    initialize_layerwise_reload(root)
    root.served.load([part(root, 0, 7.0)])
    with pytest.raises(ValueError, match="must have shape"):
        root.served.load([(f"{PARTS[1]}.weight", torch.zeros(3))])
    assert halves(root) == [1, 2]
