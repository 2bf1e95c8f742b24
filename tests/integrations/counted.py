"""Launches of a step, counted: torch's operations on the meta device, Triton's, and stand-ins.

An operation of torch that is neither a view nor an allocation is a launch on a GPU. A host's own
kernels have no build here: stand-ins take their names, and count themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from m3_kernels.testing.specialisations import recorded
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from tests.plugin.attention.specialisations import (
    CPU,
    DIM,
    DTYPE,
    HEADS,
    RULES,
    TRITON,
    Step,
    layer,
    run,
)

STEPS = {
    "decode": Step([1, 1, 1], table_width=16),
    "verify of 3 drafted tokens": Step([4, 4, 4], table_width=16),
    "a chunk of a prompt": Step([300], table_width=16),
    "a chunk and two that decode": Step([1, 300, 1], table_width=16),
}
ONCE_PER_STEP = ("work_plan_kernel",)


def ours(arch: int, step: Step) -> Counter[str]:
    """Launches of one layer; those that serve all layers of a step are not among them."""
    shape = LayerShape(HEADS, 1, DIM, 64, DTYPE, DTYPE, DTYPE)
    workspace = allocate_workspace(
        replace(RULES, num_local_blocks=1), shape, StepCapacity(4, 512, 4096, 4), device=CPU
    )
    session = MSASession(RULES, kernels=TRITON, scale=1.0, workspace=workspace)
    with recorded(arch) as launches:
        run(session, step, layer(DTYPE, "LBNHC"), fused_index=True)
    found = Counter(name for name, _ in launches)
    assert all(found.pop(name) == 1 for name in ONCE_PER_STEP)
    return found


@dataclass(frozen=True)
class Parts:
    """Launches of a dense layer, of an MSA layer, and of all that a step does once."""

    dense: int
    msa: int
    once: int

    @property
    def step(self) -> int:
        """Of all 60 layers."""
        return 3 * self.dense + 57 * self.msa + self.once


# Operations of torch that launch nothing beside those that it calls views.
_NO_LAUNCH = ("empty", "_unsafe_view", "_reshape_alias", "detach")


class Launches(TorchDispatchMode):
    """Within: the names of what is launched, in order, those of stand-ins among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not func.is_view and not any(word in name for word in _NO_LAUNCH):
            self.names.append(name)
        return func(*args, **kwargs or {})

    def __enter__(self) -> Launches:
        _counting.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _counting.pop()
        super().__exit__(*error)


_counting: list[Launches] = []


def stand_in(name: str, result: Callable[..., Any] = lambda *args, **kwargs: None) -> Any:
    """A kernel that cannot run here: counts as one launch, and returns what `result` makes."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        made = result(*args, **kwargs)
        if _counting:
            _counting[-1].names.append(name)
        return made

    return launch


def shortened(released: dict[str, Any], layers: int) -> dict[str, Any]:
    """The released config with its first layers alone: three dense ones, then MSA with experts.

    Of the tower's layers two are left.
    """
    text: dict[str, Any] = dict(released["text_config"])
    whole = text["num_hidden_layers"]

    def cut(value: Any) -> Any:
        return value[:layers] if isinstance(value, list) and len(value) == whole else value

    text = {key: cut(value) for key, value in text.items()}
    text["num_hidden_layers"] = layers
    sparse = text["sparse_attention_config"]
    text["sparse_attention_config"] = {key: cut(value) for key, value in sparse.items()}
    tower = {**released["vision_config"], "num_hidden_layers": 2}
    return {**released, "text_config": text, "vision_config": tower}


def untuned() -> AbstractContextManager[Any]:
    """Within, Triton tunes nothing: that would launch a kernel many times before it counts."""
    from triton.runtime.autotuner import Autotuner

    def first_configuration(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        return tuner.fn.run(*args, **kwargs, **tuner.configs[0].all_kwargs())

    return mock.patch.object(Autotuner, "run", first_configuration)
