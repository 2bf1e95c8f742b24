"""`m3-plugin doctor` without a host: what is wrong is named, with the way out, and not survived."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m3_kernels.index_topk import IndexTopk
from m3_plugin.diagnosis import Finding, Report, device
from m3_plugin.diagnosis.child import ChildFailed, ask
from m3_plugin.diagnosis.findings import clean
from m3_plugin.diagnosis.hosts import HOSTS, examine_hosts, examine_settings
from m3_plugin.diagnosis.model import examine_model
from m3_plugin.model import products
from tests.console import in_one_line
from tests.plugin.broken_ops import Run, break_op
from tests.plugin.cli.schemas import checked

REPOSITORY = Path(__file__).parents[3]
SOURCES = (".", "kernels", "integrations/vllm", "integrations/sglang")


def finding(report: Report, name: str, *, status: str = "failure") -> Finding:
    """The one finding of that name; it must have that status, and advice if it is not ok."""
    (found,) = [f for f in report.findings if f.name == name and f.status == status]
    assert found.advice or status in ("ok", "note")
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from m3_plugin.testing.random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("doctor") / "tiny", preset="kernel")


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def without_hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with all of this one's packages but vLLM and SGLang."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("vllm", "sglang", "_")) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    roots = [str(REPOSITORY / source) for source in SOURCES]
    (site / "sources.pth").write_text("\n".join(roots) + "\n")
    return folder / "bin" / "python"


def run(
    python: Path, *options: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], Report]:
    """`m3-plugin doctor --json` of an environment."""
    done = subprocess.run(
        [str(python), "-P", "-m", "m3_plugin.cli", "doctor", "--json", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environment},
    )
    found = checked("doctor", done.stdout)
    assert all(is_documented(entry["id"]) for entry in found["findings"])
    assert (done.returncode == 0) == found["ok"], done.stderr
    return done, Report([Finding(**entry) for entry in found["findings"]])


def is_documented(identity: str) -> bool:
    """Whether docs/commands.md has a row for an id, words in capitals standing for anything."""
    table = (REPOSITORY / "docs" / "commands.md").read_text().partition("\nIds of `doctor`")[2]
    ids = "\n".join(re.findall(r"^\|([^|]+)", table, re.MULTILINE))
    listed = re.findall(r"`([A-Za-z_.]+)`", ids)
    patterns = [re.sub(r"\b[A-Z]+\b", r"\\w+", entry.replace(".", r"\.")) for entry in listed]
    return any(re.fullmatch(pattern, identity) for pattern in patterns)


def test_without_any_host(without_hosts: Path, checkpoint: Path) -> None:
    done, report = run(without_hosts, "--model", str(checkpoint))
    assert done.returncode == 1
    assert "m3-plugin[vllm]" in finding(report, "installed").advice
    assert "oracle" in finding(report, "self-test", status="ok").value
    assert finding(report, "tensors", status="ok")
    assert [f.name for f in report.findings if f.status == "failure"] == ["installed"]


@pytest.mark.parametrize(
    "command",
    [
        ("demo",),
        ("demo", "--framework", "sglang"),
        ("bench", "serve"),
        ("eval", "needle", "--output", "needle.json"),
    ],
    ids=" ".join,
)
def test_commands_that_start_a_server_need_a_host(
    without_hosts: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [str(without_hosts), "-P", "-m", "m3_plugin.cli", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    said = in_one_line(done.stderr)
    assert "is not installed beside m3-plugin: pip install 'm3-plugin[" in said
    assert list(tmp_path.iterdir()) == []


def test_broken_triton_and_an_absent_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = Report()
    device.examine(report, "cuda")
    assert "libtriton is broken" in finding(report, "Triton").value
    assert "nvidia-smi" in finding(report, "GPU").advice
    # nothing was run on a device that is not there
    assert "self-test" not in [f.name for f in report.findings]
    assert not report.ok


@pytest.mark.parametrize(("variable", "status"), [("auto", "ok"), ("host", "warning")])
def test_products_of_16_bits_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, variable: str, status: str
) -> None:
    """As on a processor for which torch's library has none."""
    monkeypatch.setattr(products, "library_multiplies", lambda dtype: False)
    monkeypatch.setenv("M3_PLUGIN_PRODUCTS", variable)
    found = device.facts("cpu")
    monkeypatch.setattr(device, "ask", lambda *arguments, **options: (found, ""))
    device.examine(report := Report(), "cpu")
    products_found = finding(report, "products of bf16 weights", status=status)
    assert ("float32" in products_found.advice) == (status == "warning")
    assert "lanes" in finding(report, "vectors", status="ok").value


def test_a_host_that_is_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3_plugin.diagnosis.hosts.installed_version", lambda host: None)
    report = Report()
    examine_hosts(report, "sglang")
    assert finding(report, "installed").advice == "pip install 'm3-plugin[sglang]'"


@pytest.mark.parametrize(
    ("variables", "status", "word"),
    [
        ({"M3_PLUGIN_KERNEL": "native"}, "failure", "M3_PLUGIN_KERNELS"),
        ({"M3_PLUGIN_DISABLE": "1"}, "failure", "M3_PLUGIN_DISABLE=1"),
        ({"M3_PLUGIN_REQUIRED": "1"}, "ok", "M3_PLUGIN_REQUIRED=1"),
    ],
)
def test_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], status: str, word: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    report = Report()
    examine_settings(report)
    assert word in finding(report, "variables", status=status).value


def test_a_good_checkpoint_has_no_failures(checkpoint: Path) -> None:
    report = Report()
    assert examine_model(report, str(checkpoint)) is not None
    assert report.ok
    assert "method mtp cannot work" in finding(report, "MTP weights", status="note").advice
    assert "as they are (F32)" in finding(report, "index projections", status="ok").value


def test_a_published_id_needs_no_network() -> None:
    report = Report()
    config = examine_model(report, "MiniMaxAI/MiniMax-M3")
    assert config is not None
    assert config.num_sparse_layers == 57
    assert report.ok


def test_a_gateway_name_is_answered_with_the_published_one() -> None:
    report = Report()
    examine_model(report, "minimax/m3")
    assert "did you mean MiniMaxAI/MiniMax-M3?" in finding(report, "found").value


def test_unreadable_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    report = Report()
    examine_model(report, str(tmp_path))
    assert "cannot read" in finding(report, "found").value
    examine_model(report := Report(), str(tmp_path / "nowhere"))
    assert "nowhere" in finding(report, "found").value


def truncate_shard(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:40])


def remove_shard(folder: Path) -> None:
    min(folder.glob("*.safetensors")).unlink()


def cut_config(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text()[:200])


def more_experts(folder: Path) -> None:
    edit_config(folder, lambda text: text.update(num_local_experts=16))


def edit_config(folder: Path, edit: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["text_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "name", "word"),
    [
        (truncate_shard, "files", "header promises"),
        (cut_header, "files", "ends within its header"),
        (remove_shard, "files", "1 of 3 shards missing"),
        (cut_config, "found", "is not JSON"),
        (more_experts, "tensors", "missing"),
    ],
)
def test_a_half_written_checkpoint(
    damaged: Path, damage: Callable[[Path], None], name: str, word: str
) -> None:
    damage(damaged)
    report = Report()
    examine_model(report, str(damaged))
    assert word in finding(report, name).value


def misspell(text: dict) -> None:
    text["swiglu_limits"] = text.pop("swiglu_limit")


@pytest.mark.parametrize(
    ("edit", "status", "word"),
    [
        (misspell, "failure", "did you mean 'swiglu_limit'?"),
        (lambda text: text.update(num_expert_per_tok=8), "warning", "'num_experts_per_tok'?"),
        (
            lambda text: text["sparse_attention_config"].update(sparse_topk_block=8),
            "failure",
            "did you mean 'sparse_topk_blocks'?",
        ),
        (
            lambda text: text["sparse_attention_config"].update(sharing_group=4),
            "failure",
            "may change which blocks count",
        ),
    ],
)
def test_unknown_config_keys(
    damaged: Path, edit: Callable[[dict], None], status: str, word: str
) -> None:
    edit_config(damaged, edit)
    report = Report()
    examine_model(report, str(damaged))
    assert word in finding(report, "unknown key", status=status).value


def test_keys_of_transformers_are_no_mistakes(damaged: Path) -> None:
    edit_config(damaged, lambda text: text.update(output_attentions=False))
    report = Report()
    examine_model(report, str(damaged))
    assert report.ok
    assert "output_attentions" in finding(report, "other keys", status="note").value


def test_a_config_that_cannot_be_served(damaged: Path) -> None:
    edit_config(damaged, lambda text: text["sparse_attention_config"].pop("sparse_local_block"))
    report = Report()
    examine_model(report, str(damaged))
    assert "sparse_local_block" in finding(report, "config").value


def test_nothing_private_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-node-17")
    text = clean("/home/somebody/x on secret-node-17 with hf_abcdefghijklmnop")
    assert text == "~/x on <host> with <token>"


def test_a_child_that_dies_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(
        "import os, sys\nsys.stderr.write('last words\\n')\nsys.stderr.flush()\nos.abort()\n"
    )
    (tmp_path / "silent.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChildFailed, match="ended with -6"):
        ask("dying")
    with pytest.raises(ChildFailed, match="no answer within 1 s"):
        ask("silent", timeout_s=1)


def test_wrong_kernels_fail_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    from m3_plugin.diagnosis.device import self_test

    def off_by_one(right: Run, call: IndexTopk) -> None:
        right(call)
        call.out.sub_(1).clamp_(min=0)

    break_op(monkeypatch, "index_topk", off_by_one)
    with pytest.raises(RuntimeError, match="native"):
        self_test("cpu")


def test_both_hosts_are_known_by_their_plugin_groups() -> None:
    groups = {host.group for host in HOSTS.values()}
    assert groups == {"vllm.general_plugins", "sglang.srt.plugins"}


def test_rocm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0.51831")
    found = device.facts()
    report = Report()
    monkeypatch.setattr(device, "ask", lambda *arguments, **options: (found, ""))
    device.examine(report)
    assert "ROCm, HIP 7.0.51831" in finding(report, "torch", status="failure").value
    assert "host's own MiniMax-M3" in finding(report, "torch").advice
    assert "ROCm" in finding(report, "choice").value
