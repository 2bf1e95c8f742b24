"""A CUDA graph on a CPU: what a captured step read, by address, and whether it is still there.

A graph keeps addresses and no tensor. So memory that was freed after the capture is read all the
same on a replay, and what lies there then is anybody's. Here that is an error which names the read.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from m3_kernels.implementations import Op

# A kernel by the name under which a step calls it, beside the ops that a session binds. All run in
# plain torch, whatever the family; what that family would read is recorded with the rest.
PLAN = "m3_plugin.attention.workspace.fill_work_plan"


class FreedMemoryError(AssertionError):
    """A replayed step reads memory that nobody owns."""


@dataclasses.dataclass(frozen=True)
class Address:
    """A tensor as a graph knows it."""

    storage: StorageWeakRef
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    reader: str

    @classmethod
    def of(cls, tensor: Tensor, *, reader: str) -> Address:
        storage = StorageWeakRef(tensor.untyped_storage())
        shape, offset = tuple(tensor.shape), int(tensor.storage_offset())
        return cls(storage, tensor.dtype, shape, tensor.stride(), offset, reader)

    def tensor(self) -> Tensor:
        """The tensor, if its memory has an owner."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise FreedMemoryError(
                f"{self.reader} reads {self.dtype} {list(self.shape)}, which nobody owns any more"
            )
        found = torch.empty(0, dtype=self.dtype)
        return found.set_(storage, self.offset, self.shape, self.stride)


@dataclasses.dataclass(frozen=True)
class _Launch:
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    out: Any


# graphs being captured, one at most
_RECORDING: list[RecordedGraph] = []


class RecordedGraph:
    """Records a step's operations and kernels, and runs them again on what lies there then."""

    def __init__(self) -> None:
        self._launches: list[_Launch] = []
        # what the step allocated is the graph's own, as its private pool is
        self._own: dict[int, Tensor] = {}

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record what runs within."""
        with _Recorder(self):
            _RECORDING.append(self)
            try:
                yield
            finally:
                _RECORDING.pop()

    def replay(self) -> None:
        """Run the step again.

        Raises
        ------
        FreedMemoryError : the step reads memory that nobody owns.
        """
        for launch in self._launches:
            out = launch.function(*_found(launch.args), **_found(launch.kwargs))
            for kept, new in zip(_tensors(launch.out), _tensors(out), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any, *, name: str) -> Any:
        """Run one operation and keep how to run it again."""
        noted = self._noted(args, name), self._noted(kwargs, name)
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        out = function(*args, **kwargs)
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in known:
                self._own[tensor.untyped_storage().data_ptr()] = tensor
        self._launches.append(_Launch(function, *noted, self._noted(out, name)))
        return out

    def _noted(self, value: Any, name: str) -> Any:
        def note(tensor: Tensor) -> Tensor | Address:
            own = tensor.untyped_storage().data_ptr() in self._own
            return tensor if own else Address.of(tensor, reader=name)

        return _converted(value, Tensor, note)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.graph.record(func, args, kwargs or {}, name=str(func))


def record_kernels(patch: pytest.MonkeyPatch, *others: str) -> None:
    """Let our kernels run in plain torch, and be recorded where a graph is being captured.

    Parameters
    ----------
    others : kernels that an adapter launches by itself, as the names under which it does
    """
    for name in (PLAN, *others):
        patch.setattr(name, functools.partial(_launch, pkgutil.resolve_name(name)))
    bound = Op.bound

    def recorded(op: Op[Any], name: str) -> Callable[[Any], None]:
        return functools.partial(_launch_op, bound(op, "reference"), op.name)

    patch.setattr(Op, "bound", recorded)


def _launch_op(run: Callable[[Any], None], name: str, call: Any) -> None:
    if not _RECORDING:
        run(call)
        return
    with _disable_current_modes():
        _RECORDING[-1].record(run, (call,), {}, name=name)


def _launch(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not _RECORDING:
        return _in_plain_torch(kernel, *args, **kwargs)
    run = functools.partial(_in_plain_torch, kernel)
    with _disable_current_modes():
        return _RECORDING[-1].record(run, args, kwargs, name=kernel.__name__)


def _in_plain_torch(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs["backend"] = "reference"
    for given in ("plan", "workspace", "prefill"):
        kwargs.pop(given, None)
    return kernel(*args, **kwargs)


def _found(value: Any) -> Any:
    return _converted(value, Address, Address.tensor)


def _tensors(value: Any) -> list[Any]:
    """Tensors and addresses in a value, in order."""
    found: list[Any] = []

    def add(each: Any) -> Any:
        found.append(each)
        return each

    _converted(value, (Tensor, Address), add)
    return found


def _converted(value: Any, kind: Any, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, (list, tuple)):
        parts = [_converted(each, kind, convert) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _converted(each, kind, convert) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Address)):
        copy = object.__new__(type(value))
        for field in dataclasses.fields(value):
            converted = _converted(getattr(value, field.name), kind, convert)
            object.__setattr__(copy, field.name, converted)
        return copy
    return value
