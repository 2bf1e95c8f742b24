"""Environment variables: typed, and a misspelt one is an error."""

from __future__ import annotations

import pytest

from m3_plugin.settings import Settings, remarks, service_links
from tests.integrations.variables import SERVICE_LINKS


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
    assert settings.index_sharing_from == 200_000
    shared = Settings.from_environment(
        {"M3_PLUGIN_INDEX_SHARING": "scan", "M3_PLUGIN_INDEX_SHARING_FROM": "4096"}
    )
    assert (shared.index_sharing, shared.index_sharing_from) == ("scan", 4096)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"M3_PLUGIN_REQIRED": "1"}, "M3_PLUGIN_REQIRED"),
        ({"M3_PLUGIN_REQUIRED": "maybe"}, "'maybe'"),
        ({"M3_PLUGIN_KERNELS": "cuda"}, "'cuda'"),
        (
            {"M3_PLUGIN_INDEX_KEYS": "int4"},
            "M3_PLUGIN_INDEX_KEYS must be one of auto, int8, planes; got",
        ),
        (
            {"M3_PLUGIN_INDEX_SHARING": "cache"},
            "M3_PLUGIN_INDEX_SHARING must be one of off, scan; got 'cache'",
        ),
        (
            {"M3_PLUGIN_INDEX_SHARING_FROM": "200k"},
            "M3_PLUGIN_INDEX_SHARING_FROM must be a number of tokens; got '200k'",
        ),
    ],
)
def test_mistakes_are_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings.from_environment(environment)


@pytest.mark.parametrize("name", SERVICE_LINKS)
def test_what_a_cluster_sets_is_no_mistake(name: str) -> None:
    environment = {name: SERVICE_LINKS[name], "M3_PLUGIN_REQUIRED": "1"}
    assert Settings.from_environment(environment) == Settings(required=True)
    assert service_links(environment) == (name,)
    (remark,) = remarks((), environment)
    assert remark.startswith(f"ignored: {name}. Kubernetes")


@pytest.mark.parametrize("name", ["M3_PLUGIN_PORTS", "M3_PLUGIN_EXPORT", "M3_PLUGIN_SERVICE"])
def test_names_that_only_resemble_them_are_mistakes(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown environment variable {name};"):
        Settings.from_environment({name: "1"})


def test_every_mistake_is_found_and_the_rest_is_kept() -> None:
    settings, mistakes = Settings.read(
        {"M3_PLUGIN_X": "1", "M3_PLUGIN_TIMINGS": "?", "M3_PLUGIN_KERNELS": "torch"}
    )
    assert settings == Settings(kernels="torch")
    assert [mistake.split()[0] for mistake in mistakes] == ["unknown", "M3_PLUGIN_TIMINGS"]
    assert len(remarks(mistakes, {})) == 2


def test_disabled_nothing_else_is_an_error() -> None:
    given = {"M3_PLUGIN_DISABLE": "1", "M3_PLUGIN_X": "1", "M3_PLUGIN_KERNELS": "cuda"}
    assert Settings.from_environment(given).disable


def test_disabled_and_required_contradict_each_other() -> None:
    given = {"M3_PLUGIN_DISABLE": "1", "M3_PLUGIN_REQUIRED": "1"}
    with pytest.raises(ValueError, match=r"M3_PLUGIN_DISABLE=1 and M3_PLUGIN_REQUIRED=1 contra"):
        Settings.read(given)
