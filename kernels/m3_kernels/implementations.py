"""An op and its implementations: what each takes of caches, and how one is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import torch

from m3_kernels.capability import Backend, Implementation, implementation_for
from m3_kernels.paged import EVERYTHING, IndexPages, KVPages, Stored


class OpCall(Protocol):
    """One call of an op, checked: all that an implementation gets."""

    @property
    def device(self) -> torch.device: ...

    @property
    def pages(self) -> tuple[KVPages | IndexPages, ...]:
        """What it reads or writes of caches."""
        ...


C = TypeVar("C", bound=OpCall, contravariant=True)


@dataclass(frozen=True)
class Runs:
    """One implementation of an op.

    Attributes
    ----------
    function : "module:name" within the op's package; it is given the call alone. Imported when it
        is first used, for Triton and a C++ compiler need not be here
    stored : what it takes of caches
    """

    function: str
    stored: Stored = EVERYTHING


@dataclass(frozen=True, eq=False)
class Op(Generic[C]):
    """An op and what runs it.

    Attributes
    ----------
    name : of the op and of its package in `m3_kernels`
    implementations : by the name that the public function's `backend` takes
    """

    name: str
    implementations: Mapping[Implementation, Runs]

    def run(self, call: C, *, backend: Backend) -> None:
        """Run a call by an implementation of this name, or by the best one for its device.

        Raises
        ------
        NotImplementedError : nothing can run on this device, or not with these dtypes
        ValueError : no such backend
        """
        name = implementation_for(self.name, backend=backend, device_type=call.device.type)
        if name == "native" and backend == "auto" and name not in self.implementations:
            name = "torch"
        self.bound(name)(call)

    @cache  # noqa: B019 - ops live as long as the process
    def bound(self, name: Implementation) -> Callable[[C], None]:
        """The function that runs calls from now on, for callers that have chosen already.

        It raises NotImplementedError for pages that the implementation does not take.

        Raises
        ------
        NotImplementedError : the op has no such implementation
        """
        if name not in self.implementations:
            known = ", ".join(repr(str(known)) for known in self.implementations)
            raise NotImplementedError(f"{self.name} has no {name!r} implementation; use {known}")
        runs = self.implementations[name]
        module, _, attribute = runs.function.partition(":")
        function = getattr(importlib.import_module(f"m3_kernels.{self.name}.{module}"), attribute)
        if runs.stored == EVERYTHING:
            return function

        def run(call: Any) -> None:
            for pages in call.pages:
                reason = pages.refusal(runs.stored)
                if reason is not None:
                    raise NotImplementedError(f"{self.name}: backend {name!r} {reason}")
            function(call)

        return run
