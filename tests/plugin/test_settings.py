"""Environment variables: typed, and a misspelt one is an error."""

from __future__ import annotations

import pytest

from m3_plugin.settings import Settings


def test_defaults() -> None:
    assert Settings.from_environment({}) == Settings(
        disable=False, required=False, allow_untested=False, kernels="auto"
    )


def test_values() -> None:
    settings = Settings.from_environment(
        {"M3_PLUGIN_REQUIRED": "1", "M3_PLUGIN_KERNELS": "torch", "OTHER": "x"}
    )
    assert settings.required
    assert settings.kernels == "torch"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"M3_PLUGIN_REQIRED": "1"}, "M3_PLUGIN_REQIRED"),
        ({"M3_PLUGIN_REQUIRED": "maybe"}, "'maybe'"),
        ({"M3_PLUGIN_KERNELS": "cuda"}, "'cuda'"),
        ({"M3_PLUGIN_INDEX_KEYS": "int4"}, "M3_PLUGIN_INDEX_KEYS must be one of auto, int8; got"),
    ],
)
def test_mistakes_are_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings.from_environment(environment)
