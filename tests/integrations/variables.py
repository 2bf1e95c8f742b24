"""What the plugin's variables do when a host loads it, for whatever model; the same for each."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

# as Kubernetes sets them for a Service called m3-plugin with one port, and one with a named port
SERVICE_LINKS = {
    "M3_PLUGIN_SERVICE_HOST": "10.0.0.11",
    "M3_PLUGIN_SERVICE_PORT": "8000",
    "M3_PLUGIN_SERVICE_PORT_HTTP": "8000",
    "M3_PLUGIN_PORT": "tcp://10.0.0.11:8000",
    "M3_PLUGIN_PORT_8000_TCP": "tcp://10.0.0.11:8000",
    "M3_PLUGIN_PORT_8000_TCP_PROTO": "tcp",
    "M3_PLUGIN_PORT_8000_TCP_PORT": "8000",
    "M3_PLUGIN_PORT_8000_TCP_ADDR": "10.0.0.11",
    "M3_PLUGIN_GATEWAY_SERVICE_HOST": "10.0.0.12",
    "M3_PLUGIN_GATEWAY_PORT_53_UDP_ADDR": "10.0.0.12",
}
Load = Callable[..., "CompletedProcess[str]"]


def check_service_links(load: Load) -> None:
    """A cluster's own variables change nothing, and are told of once."""
    done = load(**SERVICE_LINKS, M3_PLUGIN_REQUIRED="1")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("Kubernetes sets them") == 1
    assert "NOT ACTIVE" not in said
    assert said.count("m3-plugin 0.") == 1


def check_mistakes(load: Load) -> None:
    """Another model's server starts in spite of a misspelt variable, and says so."""
    done = load(M3_PLUGIN_KERNEL="native", M3_PLUGIN_STATISTICS="maybe")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "unknown environment variable M3_PLUGIN_KERNEL;" in said
    assert "M3_PLUGIN_STATISTICS must be 0 or 1; got 'maybe'" in said
    assert "A start that serves MiniMax-M3 ends with this" in said


def check_contradiction(load: Load) -> None:
    """Disabled and required: both are named."""
    done = load(M3_PLUGIN_DISABLE="1", M3_PLUGIN_REQUIRED="1")
    assert done.returncode != 0
    assert "M3_PLUGIN_DISABLE=1 and M3_PLUGIN_REQUIRED=1 contradict each other" in done.stderr


def check_disabled(load: Load, **broken: str) -> None:
    """The way back works with whatever else is set, and with a plugin that is broken."""
    done = load(M3_PLUGIN_DISABLE="1", M3_PLUGIN_KERNEL="x", **SERVICE_LINKS, **broken)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "NOT ACTIVE" in said
    assert "M3_PLUGIN_DISABLE=1" in said
    assert "broken on purpose" not in said
