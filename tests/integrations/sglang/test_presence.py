"""Never silently absent: SGLang's own loader finds us, and what stops us stops the server."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from m3_plugin.host.serving import free_port, sglang_command
from m3_sglang.options import m3_defaults
from tests.integrations.sglang.engine import ENVIRONMENT, HOST
from tests.integrations.sglang.test_server import OPTIONS
from tests.integrations.variables import (
    Load,
    check_contradiction,
    check_disabled,
    check_mistakes,
    check_service_links,
)
from tests.interpreters import run

LOAD = """
from sglang.srt.plugins import load_plugins
load_plugins()
load_plugins()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, attn_backend_wrapper
from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES
print("CHOICE", "msa" in ATTENTION_BACKEND_CHOICES, "msa" in ATTENTION_BACKENDS)
print("HOOK", hasattr(attn_backend_wrapper, "__wrapped__"))
if MODELS:
    from sglang.srt.models.registry import ModelRegistry
    for name in ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"):
        print("CLASS", ModelRegistry.resolve_model_cls(name)[0].__module__)
"""


@pytest.fixture
def load_plugins() -> Load:
    """Run SGLang's plugin loader with these variables and print what it left behind."""

    def load(**environment: str) -> subprocess.CompletedProcess[str]:
        return HOST.run("-c", LOAD.replace("MODELS", "False"), environment=environment)

    return load


def broken_package(tmp_path: Path, name: str) -> str:
    """A path entry whose package of that name cannot be imported; the value for PYTHONPATH."""
    package = tmp_path / "broken" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise ImportError('{name} is broken on purpose')\n")
    return str(package.parent)


@pytest.mark.every_release
def test_entry_point_registers_everything_once() -> None:
    result = HOST.interpret("-c", LOAD.replace("MODELS", "True"))
    assert "CHOICE True True" in result.stdout
    assert "HOOK True" in result.stdout
    assert result.stdout.count("CLASS m3_sglang.models.minimax_m3") == 2
    assert (result.stdout + result.stderr).count("m3-plugin 0.") == 1


def test_a_users_own_model_package_keeps_its_place(tmp_path: Path) -> None:
    package = tmp_path / "users_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("class TheirModel: ...\nEntryClass = TheirModel\n")
    theirs = "print(ModelRegistry.resolve_model_cls('TheirModel')[0].__module__)"
    result = HOST.interpret(
        "-c",
        LOAD.replace("MODELS", "True") + theirs,
        environment={
            "PYTHONPATH": str(tmp_path),
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "users_models",
        },
    )
    assert result.stdout.count("CLASS m3_sglang.models.minimax_m3") == 2
    assert "users_models.one" in result.stdout


def test_the_imports_of_these_tests_bring_nothing_of_ours() -> None:
    HOST.interpret("-c", "import sys; assert not [n for n in sys.modules if n.startswith('m3_')]")


def test_disable_gives_the_host_alone_and_says_so(tmp_path: Path, load_plugins: Load) -> None:
    result = load_plugins(M3_PLUGIN_DISABLE="1")
    assert "CHOICE False False" in result.stdout
    assert "HOOK False" in result.stdout
    check_disabled(load_plugins, PYTHONPATH=broken_package(tmp_path, "m3_kernels"))
    check_contradiction(load_plugins)


def test_variables_of_a_cluster_and_mistakes_end_no_other_models_start(load_plugins: Load) -> None:
    check_service_links(load_plugins)
    check_mistakes(load_plugins)


def test_a_mistake_ends_a_start_with_an_m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks for our defaults of an M3 alone; nothing else of the arguments counts before."""
    monkeypatch.setenv("M3_PLUGIN_KERNEL", "native")
    with pytest.raises(ValueError, match="unknown environment variable M3_PLUGIN_KERNEL;"):
        m3_defaults(None, None)


def test_broken_import_is_loud_or_fails_when_required(tmp_path: Path, load_plugins: Load) -> None:
    path = broken_package(tmp_path, "m3_kernels")
    loud = load_plugins(PYTHONPATH=path)
    assert loud.returncode == 0, loud.stderr
    assert "NOT ACTIVE" in loud.stdout + loud.stderr
    assert "CHOICE False False" in loud.stdout
    required = load_plugins(PYTHONPATH=path, M3_PLUGIN_REQUIRED="1")
    assert required.returncode != 0
    assert "m3_kernels is broken on purpose" in required.stderr


def test_untested_release_is_refused_with_the_way_to_override(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "version = metadata.version\n"
        "metadata.version = lambda name: '0.6.0' if name == 'sglang' else version(name)\n"
    )
    refused = HOST.run(
        *("-c", LOAD.replace("MODELS", "False")),
        environment={"PYTHONPATH": str(tmp_path), "M3_PLUGIN_REQUIRED": "1"},
    )
    assert refused.returncode != 0
    assert "sglang 0.6.0 is outside the tested window" in refused.stderr
    assert "M3_PLUGIN_ALLOW_UNTESTED=1" in refused.stderr


SABOTAGE = {
    # SGLang passes over an import error in a model package and takes its own class instead
    "model": (
        "        if name == 'm3_sglang.moe':\n            raise ImportError('broken on purpose')\n",
        "m3-plugin is required (M3_PLUGIN_REQUIRED=1): ImportError: broken on purpose",
    ),
    # ... and only logs that a hook's target does not exist
    "hook": (
        "        if name == 'm3_sglang.options':\n"
        "            from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "            apply = HookRegistry._apply_target\n"
        "            def gone(target, hooks):\n"
        "                if target.endswith('attn_backend_wrapper'):\n"
        "                    raise AttributeError(target)\n"
        "                return apply(target, hooks)\n"
        "            HookRegistry._apply_target = gone\n",
        "SGLang did not apply our hook",
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_server_that_is_half_ours_does_not_start(
    tmp_path: Path, constructed_checkpoint: Path, name: str
) -> None:
    sabotage, reason = SABOTAGE[name]
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "class Break(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"{sabotage}"
        "sys.meta_path.insert(0, Break())\n"
    )
    done = launch(constructed_checkpoint, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert reason in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        # left out by SGLANG_PLUGINS nothing of ours runs; SGLang then does not know the name
        (("--attention-backend", "msa"), {"SGLANG_PLUGINS": "another"}, "invalid choice: 'msa'"),
        (("--page-size", "64"), {}, "--page-size must be"),
    ],
    ids=["a plugin that is not allowed", "a page that is not a block"],
)
def test_options_that_cannot_be_served_end_the_start(
    constructed_checkpoint: Path,
    options: tuple[str, ...],
    environment: dict[str, str],
    reason: str,
) -> None:
    done = launch(constructed_checkpoint, *options, **environment)
    assert done.returncode != 0
    assert reason in done.stdout + done.stderr


def launch(checkpoint: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start a server that must end by itself."""
    command = sglang_command(checkpoint, port=free_port(), options=(*OPTIONS, *options))
    module = command.index("sglang.launch_server")
    script = (
        "import runpy, sys\n"
        "from tests.integrations.forked import fork_children\n"
        "fork_children()\n"
        f"sys.argv = {command[module:]!r}\n"
        "runpy.run_module('sglang.launch_server', run_name='__main__')\n"
    )
    return HOST.run("-c", script, environment={**ENVIRONMENT, **environment})


@pytest.mark.extended
def test_a_start_with_a_gateways_name_is_told_the_repository(tmp_path: Path) -> None:
    """SGLang itself only says that it found nothing."""
    command = sglang_command(Path("minimax/m3"), port=free_port(), options=("--device", "cpu"))
    done = run(command, environment={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}, folder=tmp_path)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "m3-plugin: no model 'minimax/m3' here; did you mean MiniMaxAI/MiniMax-M3?" in said
