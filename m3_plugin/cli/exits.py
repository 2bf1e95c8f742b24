"""With which code a command ends: the same four, by the same rule, for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NoReturn

import typer
from rich.console import Console


class Exit(IntEnum):
    """Exit codes.

    Attributes
    ----------
    RIGHT : the command did its work, and what it looked at is right
    WRONG_RESULT : it did its work, and the answer is no: wrong numbers, does not fit, not served
    WRONG_CALL : it cannot be carried out as it was typed, anywhere; typer's own errors end so too
    ENVIRONMENT : it could be elsewhere: no such model, device or host here, a library is missing,
        nothing was recorded, a server failed or refused
    """

    RIGHT = 0
    WRONG_RESULT = 1
    WRONG_CALL = 2
    ENVIRONMENT = 3

    @classmethod
    def of(cls, right: bool) -> Exit:
        """The code for a result."""
        return cls.RIGHT if right else cls.WRONG_RESULT


def fail(message: str, status: Exit) -> NoReturn:
    """Say on stderr what is wrong, and end.

    Raises
    ------
    typer.Exit : always.
    """
    # markup off: messages hold paths and answers, which may hold brackets
    Console(stderr=True).print(
        message, style="red", markup=False, highlight=False, soft_wrap=not _to_a_terminal()
    )
    raise typer.Exit(status)


@contextmanager
def environment(*errors: type[Exception]) -> Iterator[None]:
    """End with `Exit.ENVIRONMENT` and the message where one of these errors comes out.

    Raises
    ------
    typer.Exit : in place of the error.
    """
    try:
        yield
    except errors as error:
        fail(_message(error), Exit.ENVIRONMENT)


@contextmanager
def call(option: str, *errors: type[Exception]) -> Iterator[None]:
    """Blame an option for errors that its value alone decides.

    Parameters
    ----------
    option : name of the option, or "" where the message names it

    Raises
    ------
    typer.BadParameter : in place of the error; ends with `Exit.WRONG_CALL`.
    """
    try:
        yield
    except errors as error:
        raise typer.BadParameter(_message(error), param_hint=option or None) from None


def _message(error: Exception) -> str:
    # str() of a KeyError puts quotes around its message
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _to_a_terminal() -> bool:
    return Console(stderr=True).is_terminal
