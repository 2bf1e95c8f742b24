"""A newcomer's first hour: wheel, doctor, fit, start, verify, alert, roll back, uninstall.

The walk itself takes minutes and is marked `extended`; it installs the wheel into a fresh virtual
environment that sees a host's libraries, as a layer on the host's image does.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.host import torchvision_ops
from m3_plugin.host.serving import ServerProcess, free_port
from tests.deployment import absent_instances

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900


def printed_command(text: str, host: str) -> str:
    """The command that `fit` printed for a host: the lines below its name."""
    below = text.partition(f"\n{host}\n")[2]
    lines = below.splitlines()
    last = next(n for n, line in enumerate(lines) if not line.endswith("\\"))
    return "\n".join(lines[: last + 1])


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables and words of a shell command."""
    words = shlex.split(command.replace("\\\n", " "))
    variables = [word for word in words if re.match(r"[A-Z_0-9]+=", word)]
    return dict(v.split("=", 1) for v in variables), words[len(variables) :]


@pytest.mark.parametrize(("host", "program"), [("vLLM", "vllm"), ("SGLang", "python")])
def test_fit_prints_a_command_that_can_be_pasted(host: str, program: str) -> None:
    options = ["--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "H200", "--tp", "8"]
    result = CliRunner().invoke(app, ["fit", *options])
    assert result.exit_code == 0, result.output
    _, words = words_of(printed_command(result.output, host))
    assert words[0] == program
    assert "MiniMaxAI/MiniMax-M3-MXFP8" in words


def test_the_readme_asks_for_what_fits() -> None:
    """Its example of `fit`, run; and no other command serves weights."""
    text = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"^m3-plugin fit .*$", text, re.MULTILINE)
    assert CliRunner().invoke(app, shlex.split(line)[1:]).exit_code == 0
    assert "vllm serve" not in text
    assert "launch_server" not in text


def test_what_an_uninstall_leaves_is_listed(tmp_path: Path) -> None:
    listed = (ROOT / "docs" / "install.md").read_text().partition("## Roll back")[2]
    for written in torchvision_ops.install(str(tmp_path)):
        assert Path(written).name in listed
    for name in ("~/.cache/m3-plugin", "modelinfos/m3_vllm-*.json", "~/.triton/cache"):
        assert name in listed
    assert "torchvision_ops --remove" in listed


def host_site_packages(host: str) -> Path:
    """Where this checkout's environment of a host has it."""
    python = ROOT / ".venv" / host / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .venv/{host}: run make test")
    find = f"import importlib.util as u; print(u.find_spec({host!r}).origin)"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip()).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


class Layer:
    """A virtual environment with the wheel, on top of a host's libraries.

    Parameters
    ----------
    folder : where it is made
    host : "vllm" or "sglang"
    """

    def __init__(self, folder: Path, *, wheel: Path, host: str) -> None:
        self.folder = folder
        self.home = folder / "home"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        self.home.mkdir()
        self.python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
        # as a path alone: what the host's own .pth files add, an editable plugin say, is not seen
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        self.site = site
        (site / "host.pth").write_text(f"{host_site_packages(host)}\n")

    def variables(self, **additions: str) -> dict[str, str]:
        """A newcomer's: an empty home, and none of ours but those given."""
        ours = ("M3_PLUGIN_", "VLLM_", "SGLANG_", "PYTHON", "PROMETHEUS_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        path = f"{self.folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        empty = {"XDG_CACHE_HOME": str(self.home / ".cache"), "HOME": str(self.home)}
        return {**kept, **empty, "PATH": path, **additions}

    def run(self, *command: str, **additions: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment away from the checkout; its code may be anything."""
        program = str(self.folder / "venv" / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.home,
            env=self.variables(**additions),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def python(self, *arguments: str) -> str:
        """Output of this environment's interpreter, which must end well."""
        done = self.run("python", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.mark.extended
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("host", ["vllm", "sglang"])
def test_the_wheel_serves_in_a_fresh_environment(host: str, wheel: Path, tmp_path: Path) -> None:
    layer = Layer(tmp_path, wheel=wheel, host=host)
    layer.python("-m", "m3_plugin.host.torchvision_ops", "--install")
    assert layer.run("m3-plugin", "--version").stdout.startswith("m3-plugin 0.")
    group = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}[host]
    script = (
        "from importlib.metadata import entry_points\n"
        f"(point,) = entry_points(group={group!r}, name='m3')\n"
        "register = point.load()\n"
        "import m3_plugin\n"
        "print('FROM', m3_plugin.__file__)\n"
        "register()\n"
    )
    done = layer.run("python", "-c", script, M3_PLUGIN_REQUIRED="1")
    assert done.returncode == 0, done.stderr
    assert f"FROM {layer.site}" in done.stdout
    assert "registered MiniMaxM3SparseForCausalLM" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def layer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return Layer(tmp_path_factory.mktemp("walk"), wheel=wheel, host="vllm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from m3_plugin.testing.constructed import ConstructedCheckpoint

    path = tmp_path_factory.mktemp("checkpoint") / "m3"
    return ConstructedCheckpoint().write(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def other_model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model which is not M3, of no weights: what a server without the plugin can serve here."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("other") / "llama"
    LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((checkpoint / name).read_bytes())
    return path


def exposition(url: str) -> str:
    import httpx

    return httpx.get(f"{url}/metrics", trust_env=False, timeout=60).text


@pytest.fixture
def started(layer: Layer, tmp_path: Path) -> Iterator[Any]:
    """Starts a shell's command with a port of its own and waits for it."""
    servers: list[ServerProcess] = []

    def start(words: list[str], variables: Mapping[str, str]) -> ServerProcess:
        port = free_port()
        program = [str(layer.folder / "venv" / "bin" / words[0]), *words[1:]]
        server = ServerProcess(
            [*program, "--host", "127.0.0.1", "--port", str(port)],
            port=port,
            log=tmp_path / f"{port}.log",
            environment=layer.variables(**variables),
        )
        servers.append(server)
        server.wait_until_ready(timeout_s=TIMEOUT_S)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.mark.extended
@pytest.mark.vllm
@pytest.mark.timeout(2 * TIMEOUT_S)
class TestWalk:
    """In order; each step needs the one before."""

    def test_doctor_says_what_is_missing_and_then_that_it_is_there(
        self, layer: Layer, checkpoint: Path
    ) -> None:
        layer.python("-m", "m3_plugin.host.torchvision_ops", "--install")
        hidden = layer.run("m3-plugin", "doctor", "--json", VLLM_PLUGINS="other")
        assert hidden.returncode == 1, hidden.stderr
        assert "VLLM_PLUGINS" in hidden.stdout
        found = layer.run("m3-plugin", "doctor", "--model", str(checkpoint))
        assert found.returncode == 0, found.stdout + found.stderr

    def test_the_printed_command_serves_and_answers(
        self, layer: Layer, checkpoint: Path, started: Any
    ) -> None:
        import httpx

        from m3_plugin.testing.prompts import needle_prompt

        sized = ("--gpu", "CPU", "--gpu-memory", "8", "--tp", "1", "--max-model-len", "4096")
        fit = layer.run("m3-plugin", "fit", "--model", str(checkpoint), *sized)
        assert fit.returncode == 0, fit.stdout + fit.stderr
        variables, words = words_of(printed_command(fit.stdout, "vLLM"))
        # a start without it shows what a default server says of itself
        variables.pop("PROMETHEUS_MULTIPROC_DIR", None)
        space = {"VLLM_CPU_KVCACHE_SPACE": "1", "M3_PLUGIN_REQUIRED": "1"}
        server = started([*words, "--enforce-eager", "--dtype", "float32"], {**variables, **space})
        log = server.log.read_text()
        assert "serving MiniMax-M3 with 2 MSA and 1 dense attention layers" in log
        assert absent_instances({"a": exposition(server.url)}) == set()
        prompt = needle_prompt(1, num_tokens=2500)
        body = {
            "model": str(checkpoint),
            "prompt": list(prompt.token_ids),
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
        }
        reply = httpx.post(
            f"{server.url}/v1/completions", json=body, trust_env=False, timeout=TIMEOUT_S
        )
        assert reply.json()["choices"][0]["text"] == prompt.expected_text

    def test_after_the_roll_back_the_alert_fires(
        self, layer: Layer, other_model: Path, started: Any
    ) -> None:
        module = "vllm.entrypoints.openai.api_server"
        words = ["python", "-m", module, "--model", str(other_model), "--load-format", "dummy"]
        options = ["--max-model-len", "256", "--enforce-eager"]
        variables = {
            "M3_PLUGIN_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        server = started([*words, *options], variables)
        assert "is NOT ACTIVE" in server.log.read_text()
        assert absent_instances({"a": exposition(server.url)}) == {"a"}

    def test_an_uninstall_leaves_what_is_listed(self, layer: Layer) -> None:
        layer.python("-m", "m3_plugin.host.torchvision_ops", "--remove")
        layer.python("-m", "pip", "uninstall", "--quiet", "--yes", "m3-plugin")
        left = {path.name for path in layer.site.iterdir() if "m3" in path.name}
        assert left == set()
        caches = layer.home / ".cache"
        # both stand in docs/install.md
        ours = {path.relative_to(caches).as_posix() for path in caches.rglob("*m3*")}
        assert all(re.match(r"m3-plugin|vllm/modelinfos/m3_vllm-", name) for name in ours), ours
        gone = layer.run("python", "-c", "import m3_plugin")
        assert "ModuleNotFoundError" in gone.stderr
