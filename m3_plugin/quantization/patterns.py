"""Regular expressions out of a stranger's config: only those that end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from m3_plugin.untrusted import shown

MAX_LENGTH = 500
# Each may be tried again for each of the others, a repetition once per letter of a name. Published
# patterns have up to four.
MAX_REPEATS = 5
MAX_CHOICES = 8

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression that a name of a module is soon compared with.

    A repetition within a repetition may take longer than a life on a name of twenty letters, and
    cannot be interrupted.

    Raises
    ------
    ValueError : no regular expression, too long, or one that may not end.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(_refusal(pattern, f"at most {MAX_LENGTH} characters"))
    try:
        expression = re.compile(pattern)
        choices = list(_choices(_parser.parse(pattern)))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(_refusal(pattern, f"a regular expression ({error})")) from None
    except _NestedError:
        raise ValueError(_refusal(pattern, "without a repetition of a repetition")) from None
    if len(choices) > MAX_CHOICES or sum(choices) > MAX_REPEATS:
        rule = f"of at most {MAX_REPEATS} repetitions, {MAX_CHOICES} with options and alternatives"
        raise ValueError(_refusal(pattern, rule))
    return expression


def _refusal(pattern: str, rule: str) -> str:
    return (
        f"config key 'quantization_config' holds a pattern that must be {rule}; got "
        f"{shown(pattern)}; write it simpler"
    )


class _NestedError(Exception):
    """What is repeated has choices of its own."""


def _choices(parsed: Iterable[tuple[Any, Any]], *, repeated: bool = False) -> Iterator[bool]:
    """For each place where matching may go on in several ways, whether it is a repetition.

    Raises
    ------
    _NestedError : such a place within a repetition.
    """
    for operation, argument in parsed:
        name = str(operation)
        if name in (*_REPEATS, "BRANCH", "GROUPREF", "GROUPREF_EXISTS"):
            if repeated:
                raise _NestedError
            yield name in _REPEATS and argument[1] > 1
        if name in _REPEATS:
            _, most, body = argument
            yield from _choices(body, repeated=repeated or most > 1)
        else:
            for inner in _bodies(argument):
                yield from _choices(inner, repeated=repeated)


def _bodies(argument: Any) -> Iterator[Any]:
    """Every sequence of operations within an operation's argument."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            if isinstance(part, _parser.SubPattern | list | tuple):
                yield from _bodies(part)
