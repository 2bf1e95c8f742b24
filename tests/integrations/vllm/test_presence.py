"""Never silently absent: vLLM's own loader finds us, and what stops us stops the server."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from vllm.config import VllmConfig

from m3_plugin.host.serving import ServerFailed, ServerProcess, free_port, vllm_command
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from tests.integrations.variables import (
    Load,
    check_contradiction,
    check_disabled,
    check_mistakes,
    check_service_links,
)
from tests.integrations.vllm.engine import ENVIRONMENT, HOST
from tests.interpreters import run

LOAD = """
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
from vllm.model_executor.models import ModelRegistry
for name in ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"):
    model = ModelRegistry.models[name]
    print("CLASS", model.module_name, model.class_name)
"""


@pytest.fixture
def load_plugins(tmp_path: Path) -> Load:
    """Run vLLM's plugin loader with these variables and print what serves M3."""

    def load(**environment: str) -> subprocess.CompletedProcess[str]:
        return HOST.run("-c", LOAD, environment={"VLLM_CACHE_ROOT": str(tmp_path), **environment})

    return load


def break_kernels(tmp_path: Path) -> str:
    """A path entry whose `m3_kernels` cannot be imported; the value for PYTHONPATH."""
    package = tmp_path / "broken" / "m3_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('m3_kernels is broken on purpose')\n")
    return str(package.parent)


def test_entry_point_registers_both_architectures_once(tmp_path: Path) -> None:
    result = HOST.interpret("-c", LOAD, environment={"VLLM_CACHE_ROOT": str(tmp_path)})
    assert result.stdout.count("CLASS m3_vllm.model") == 2
    assert (result.stdout + result.stderr).count("m3-plugin 0.") == 1


def test_the_imports_of_these_tests_bring_nothing_of_ours() -> None:
    HOST.interpret("-c", "import sys; assert not [n for n in sys.modules if n.startswith('m3_')]")


def test_disable_gives_the_host_alone_and_says_so(tmp_path: Path, load_plugins: Load) -> None:
    check_disabled(load_plugins, PYTHONPATH=break_kernels(tmp_path))
    check_contradiction(load_plugins)


def test_variables_of_a_cluster_and_mistakes_end_no_other_models_start(load_plugins: Load) -> None:
    check_service_links(load_plugins)
    check_mistakes(load_plugins)


def test_a_mistake_ends_the_construction_of_an_m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is asked of either argument, for a dense M3 too."""
    from m3_vllm.session import worker_session

    config = M3Config.from_hf(released_config())
    monkeypatch.setenv("M3_PLUGIN_KERNEL", "native")
    with pytest.raises(ValueError, match="unknown environment variable M3_PLUGIN_KERNEL;"):
        worker_session(replace(config, msa=None), cast(VllmConfig, None))


def test_impossible_kernels_fall_back_loudly_or_fail_when_required(
    tmp_path: Path, load_plugins: Load
) -> None:
    wish = {"M3_PLUGIN_KERNELS": "native", "CXX": "/nonexistent/compiler"}
    wish["XDG_CACHE_HOME"] = str(tmp_path)
    loud = load_plugins(**wish)
    assert loud.returncode == 0, loud.stderr
    assert "NOT ACTIVE" in loud.stdout + loud.stderr
    required = load_plugins(M3_PLUGIN_REQUIRED="1", **wish)
    assert required.returncode != 0
    assert "NoKernelError" in required.stderr


def test_broken_import_stops_a_server_that_requires_the_plugin(
    tmp_path: Path, constructed_checkpoint: Path
) -> None:
    port = free_port()
    environment = {
        **ENVIRONMENT,
        "PYTHONPATH": break_kernels(tmp_path),
        "VLLM_CACHE_ROOT": str(tmp_path),
    }
    command = vllm_command(constructed_checkpoint, port=port, options=("--enforce-eager",))
    with (
        ServerProcess(
            command, port=port, log=tmp_path / "server.log", environment=environment
        ) as server,
        pytest.raises(ServerFailed, match="broken on purpose"),
    ):
        server.wait_until_ready(timeout_s=600)
    assert server.process.returncode != 0


@pytest.mark.extended
def test_a_start_with_a_gateways_name_is_told_the_repository(tmp_path: Path) -> None:
    """vLLM itself only says that it found nothing."""
    command = vllm_command(Path("minimax/m3"), port=free_port())
    done = run(command, environment={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}, folder=tmp_path)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "m3-plugin: no model 'minimax/m3' here; did you mean MiniMaxAI/MiniMax-M3?" in said
