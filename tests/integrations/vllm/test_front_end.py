"""`m3_plugin:info` in the `/metrics` of a vLLM that was started without any variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin import __version__
from m3_vllm import front_end
from tests.integrations.vllm.engine import HOST

# What the API server does before its first answer, without an engine: the configuration asks the
# model class which inputs it takes, then the metrics are mounted.
SCRIPT = """
import sys
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.config import ModelConfig
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from vllm.plugins import load_general_plugins

def presence(**options):
    config = ModelConfig(model=sys.argv[1], dtype="float32", max_model_len=1024, **options)
    print("MEDIA", config.supports_multimodal_inputs)
    app = FastAPI()
    attach_router(app)
    lines = TestClient(app).get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("m3_plugin:info{")]

load_general_plugins()
print("PLUGIN", *presence(language_model_only=True))
"""


def test_a_default_server_says_that_the_plugin_serves(
    constructed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so even where no images are served."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    done = HOST.interpret("-c", SCRIPT, constructed_checkpoint, environment={"HF_HUB_OFFLINE": "1"})
    assert "MEDIA False" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PLUGIN ")]
    assert 'device="cpu"' in line
    assert f'version="{__version__}"' in line
    assert line.endswith(" 1.0")


@pytest.mark.parametrize("shared", [False, True])
def test_workers_speak_for_themselves_where_vllm_collects_from_them(
    shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(front_end, "export_presence", lambda kernels, **_: said.append(kernels))
    monkeypatch.setenv("M3_PLUGIN_KERNELS", "torch")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    if shared:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    front_end.export_from_front_end.__wrapped__()
    assert said == ([] if shared else ["torch"])
