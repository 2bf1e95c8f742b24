"""In a CUDA graph the shared expert and the routed ones are two branches, as in SGLang's own M3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DONE: list[str] = []


class Stream:
    """Of CUDA, as far as its order is observed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Any) -> None:
        DONE.append(f"{self.name} waits for {other.name}")


class Layer(nn.Module):
    """A part of the layer that says when it ran."""

    def __init__(self, name: str, result: Any) -> None:
        super().__init__()
        self.name, self.result = name, result

    def forward(self, *given: Tensor) -> Any:
        DONE.append(self.name)
        return self.result(*given)


@pytest.fixture
def moe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our layer with stubs of its parts; the routed experts may write into what they read."""
    from m3_sglang.moe import M3MoE

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        DONE.append(f"on {stream.name}")
        yield
        DONE.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    made: Any = object.__new__(M3MoE)
    nn.Module.__init__(made)
    made.config = SimpleNamespace(routed_scaling_factor=2.0)
    made.side_stream = Stream("side")
    made.shared_experts = Layer("shared", lambda x: x + 1)
    made.gate = Layer("gate", lambda x: (x, None))
    made.topk = Layer("topk", lambda x, logits: logits)
    made.experts = Layer("experts", lambda x, chosen: x * 3)
    DONE.clear()
    return made


def test_branches_of_a_captured_step(moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from m3_sglang import moe as module

    monkeypatch.setattr(module, "is_capturing", lambda: True)
    assert torch.equal(moe(torch.ones(2, 4)), torch.full((2, 4), 8.0))
    assert DONE == [
        "side waits for main",
        "shared",
        "on side",
        "gate",
        "topk",
        "experts",
        "off side",
        "main waits for side",
    ]


def test_an_eager_step_has_one_stream(moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from m3_sglang import moe as module

    monkeypatch.setattr(module, "is_capturing", lambda: False)
    assert torch.equal(moe(torch.ones(2, 4)), torch.full((2, 4), 8.0))
    assert DONE == ["shared", "gate", "topk", "experts"]


@pytest.mark.every_release
def test_sglang_has_the_stream_and_says_when_it_captures() -> None:
    from sglang.srt import runtime_context

    from m3_sglang.compat import is_capturing, second_stream, speculation_is_tested

    assert second_stream("cpu") is None
    if speculation_is_tested():
        assert callable(runtime_context.get_stream)
        assert not is_capturing()


def test_experts_beside_others_write_nothing_that_these_read() -> None:
    """SGLang's routed experts put their sum in the place of their input unless told not to."""
    import inspect

    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from m3_sglang import moe as module

    assert inspect.signature(FusedMoE.__init__).parameters["inplace"].default is True
    assert "inplace=self.side_stream is None" in inspect.getsource(module.M3MoE.__init__)
