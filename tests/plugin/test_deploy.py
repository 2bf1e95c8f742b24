"""Files under deploy/ and the page about them: parsed, and compared with what they speak of."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from typer.main import get_command
from typer.testing import CliRunner

from m3_plugin.cli import app
from m3_plugin.settings import Settings
from tests.deployment import (
    DEPLOY,
    Host,
    absent_instances,
    alerts,
    metric_names,
    plugin_metrics,
    queries,
    sample_name,
    server_arguments,
)

ROOT = DEPLOY.parent
HOSTS = ("vllm", "sglang")


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.mark.parametrize("host", HOSTS)
class TestPod:
    def spec(self, host: str) -> dict[str, Any]:
        pod, _ = documents(f"pod-{host}.yaml")
        return pod["spec"]

    def test_a_service_makes_no_variables_of_ours(self, host: str) -> None:
        assert self.spec(host)["enableServiceLinks"] is False
        _, service = documents(f"pod-{host}.yaml")
        assert service["metadata"]["name"] not in ("m3-plugin", *HOSTS)

    def test_the_service_leads_to_the_server(self, host: str) -> None:
        pod, service = documents(f"pod-{host}.yaml")
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        (port,) = self.spec(host)["containers"][0]["ports"]
        assert service["spec"]["ports"][0]["targetPort"] == port["name"]

    def test_doctor_looks_before_the_server_reads(self, host: str) -> None:
        """The only guard where the plugin is not loaded at all."""
        (doctor,) = self.spec(host)["initContainers"]
        (server,) = self.spec(host)["containers"]
        program, name, *options = doctor["command"]
        command: Any = get_command(app)
        assert program == "m3-plugin"
        known = {o for p in command.commands[name].params for o in p.opts}
        assert {option for option in options if option.startswith("--")} <= known
        # on the same image, cards, files and caches
        for key in ("image", "resources", "volumeMounts", "env"):
            assert doctor[key] == server[key]
        model = options[options.index("--model") + 1]
        assert model in " ".join(server["args"])

    def test_the_weights_have_time_to_be_read(self, host: str) -> None:
        (server,) = self.spec(host)["containers"]
        probe = server["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server[name]["httpGet"]["path"] == "/health"

    def test_mounts_have_volumes(self, host: str) -> None:
        spec = self.spec(host)
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {
            mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]
        }
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("host", HOSTS)
def test_compose_serves_as_the_pod_does(host: str) -> None:
    (compose,) = documents("compose.yaml")
    pod, _ = documents(f"pod-{host}.yaml")
    assert compose["services"][host]["command"] == pod["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(("host", "title"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_the_pod_serves_as_fit_says(host: Host, title: str) -> None:
    """On 8 x H200; files come from the volume, so that they have another name there."""
    options = ["--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "H200", "--tp", "8"]
    asked = [*options, "--max-model-len", "131072", "--json"]
    command = json.loads(CliRunner().invoke(app, ["fit", *asked]).stdout)["commands"][title]
    words = shlex.split(command.replace("\\\n", " "))
    start = next(n for n, word in enumerate(words) if word.startswith("--"))
    printed = re.findall(r"(--\S+)(?: (?!--)(\S+))?", " ".join(words[start:]))
    wanted = {f"{name}={value}" if value else name for name, value in printed}
    named = {f"--model-path={options[1]}", f"--tensor-parallel-size={options[5]}"} & wanted
    assert (wanted - named) <= set(server_arguments(host))


@pytest.mark.parametrize("host", HOSTS)
def test_the_layer_is_on_an_accepted_release(host: str) -> None:
    text = (DEPLOY / f"Dockerfile.{host}").read_text()
    (release,) = re.findall(r"^ARG BASE=\S+:v([\d.]+)$", text, re.MULTILINE)
    source = (ROOT / "integrations" / host / f"m3_{host}" / "compat.py").read_text()
    bounds = re.findall(r'minimum="([\d.]+)",\s+below="([\d.]+)"', source)
    assert any(Version(low) <= Version(release) < Version(below) for low, below in bounds)


@pytest.mark.parametrize("host", HOSTS)
def test_the_image_requires_the_plugin(host: str) -> None:
    text = (DEPLOY / f"Dockerfile.{host}").read_text()
    (line,) = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    variables = dict(word.split("=", 1) for word in line.split())
    assert Settings.from_environment(variables).required
    (group,) = re.findall(r"e\(group='([\w.]+)'\)", text)
    assert f'entry-points."{group}"' in (ROOT / "pyproject.toml").read_text()


def test_every_metric_of_ours_exists() -> None:
    """In alerts, their tests, the dashboard and the pages."""
    files = [*DEPLOY.iterdir(), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {name for file in files for name in metric_names(file.read_text(), "m3_plugin")}
    assert named
    assert {sample_name(name) for name in named} <= plugin_metrics()


def test_each_alert_stands_on_the_page() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    rows = set(re.findall(r"`(M3\w+)`", page))
    assert rows == set(alerts())


def test_alerts_lead_with_the_job_they_are_for() -> None:
    """A rule without it would watch every vLLM of a cluster."""
    for name, rule in alerts().items():
        selectors = re.findall(r"(?:m3_plugin|vllm|sglang):\w+(\{[^}]*\})?", rule["expr"])
        plain = [s for s in selectors if 'job="minimax-m3"' not in s]
        # the right side of `unless` is joined on the job instead
        assert plain == ([""] if "unless on (job, instance)" in rule["expr"] else []), name


def test_the_absence_of_the_plugin_is_noticed() -> None:
    """The rule, worked out on what servers say: with the plugin, hidden, or of another job."""
    ours = 'm3_plugin:info{device="cpu",kernels="native",version="0.1.0"} 1.0\n'
    scraped = {"a:8000": ours, "b:8000": "vllm:num_requests_running 0.0\n", "c:8000": None}
    assert absent_instances(scraped) == {"b:8000"}


def test_promtool_agrees() -> None:
    """Prometheus' own check of the rules, and the rules on made-up series."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine")
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yaml"],
        cwd=DEPLOY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_tests_of_alerts_name_alerts() -> None:
    (found,) = documents("alerts_test.yaml")
    named = {c["alertname"] for test in found["tests"] for c in test["alert_rule_test"]}
    assert named <= set(alerts())


def test_every_panel_asks_for_one_job_and_has_a_place() -> None:
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    places = set()
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        assert panel["description"], panel["title"]
        places.add((panel["gridPos"]["x"], panel["gridPos"]["y"]))
    assert len(places) == len(dashboard["panels"])
    for query in queries():
        assert query.count("{job=") == len(re.findall(r"(?:m3_plugin|vllm|sglang):\w+", query)), (
            query
        )
        assert query.count("(") == query.count(")")


class _Prometheus(BaseHTTPRequestHandler):
    """Answers every range query with one series of three values, refused requests with none."""

    def do_GET(self) -> None:
        series = {"metric": {"instance": "a:8000"}, "values": [[0, "1"], [30, "2"], [60, "3"]]}
        result = [] if "requests_refused" in self.path else [series]
        body = json.dumps({"status": "success", "data": {"result": result}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to say."""


@pytest.fixture
def prometheus() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Prometheus)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_anybody_can_draw_the_dashboard(
    prometheus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = DEPLOY / "draw_dashboard.py"
    spec = importlib.util.spec_from_file_location("draw_dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "draw_dashboard", module)
    spec.loader.exec_module(module)
    target = {"expr": 'm3_plugin:info{job="$job"}', "legendFormat": "{{instance}} x"}
    window = {"start": 0.0, "end": 60.0, "step": 30.0}
    (line,) = module.answers(prometheus, target, job="minimax-m3", **window)
    assert (line.label, line.seconds, line.values) == ("a:8000 x", [-60, -30, 0], [1, 2, 3])
    dashboard = json.loads(module.DASHBOARD.read_text())
    few = [p for p in dashboard["panels"] if p["title"].startswith(("Plugin", "Refused"))]
    (tmp_path / "few.json").write_text(json.dumps({"panels": few}))
    monkeypatch.setattr(module, "DASHBOARD", tmp_path / "few.json")
    output = tmp_path / "dashboard.png"
    # the shell's proxy must not be asked
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    given = ["draw", "--prometheus", prometheus, "--until", "60", "--output", str(output)]
    monkeypatch.setattr("sys.argv", given)
    module.main()
    assert output.read_bytes().startswith(b"\x89PNG")
