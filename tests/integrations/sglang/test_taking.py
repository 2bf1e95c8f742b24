"""Which class SGLang builds depends on the config, not on the architecture's name alone."""

from __future__ import annotations

import pytest

from m3_plugin.model.released import released_config
from tests.integrations.foreign import FOREIGN, changed, write
from tests.integrations.sglang.engine import ENVIRONMENT, HOST
from tests.interpreters import answered

ASK = """
import json, os, sys
from types import SimpleNamespace
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.configs.model_config import ModelConfig, ModelImpl
from sglang.srt.managers import multimodal_processor as media
from sglang.srt.model_loader.utils import get_model_architecture
from sglang.srt.utils.hf_transformers_utils import get_config
from m3_sglang import registration

def processor_class(hf_config):
    return next(
        (cls for model, cls in media.PROCESSOR_MAPPING.items()
         if model.__name__ in hf_config.architectures), None)

def import_processors(package, overwrite=False):
    # of all of SGLang's, the one that counts
    from sglang.srt.multimodal.processors import minimax_m3_vl
    for model in minimax_m3_vl.MiniMaxM3VLProcessor.models:
        for known in list(media.PROCESSOR_MAPPING):
            if known.__name__ == model.__name__:
                del media.PROCESSOR_MAPPING[known]
        media.PROCESSOR_MAPPING[model] = minimax_m3_vl.MiniMaxM3VLProcessor

media.import_processors(registration.PROCESSOR_PACKAGE, overwrite=True)
media.import_processors = import_processors
server = SimpleNamespace(moe_runner_backend="auto", device="cpu")
for required, folder in map(str.split, sys.argv[1:]):
    os.environ["M3_PLUGIN_REQUIRED"] = required
    config = get_config(folder, trust_remote_code=False)
    runner = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    asked = SimpleNamespace(hf_config=config, model_impl=ModelImpl.AUTO, quantization=None)
    answer = {"weights": registration.weight_defaults(server, config)}
    try:
        answer["model"] = get_model_architecture(asked)[0].__module__
        answer["media"] = registration.choose_media_processor(processor_class, config).__module__
        answer["backend"] = answer["model"].startswith("m3_sglang") or (
            registration.wrap_attention_backend(lambda *_: "SGLang's own", runner, "chosen"))
    except ValueError as error:
        answer["model"] = f"refused: {error}"
    print("ANSWER", json.dumps(answer), flush=True)
assert hasattr(media.get_mm_processor, "__wrapped__")
# what SGLang writes into a config is no reason to leave it alone
folder = sys.argv[1].split()[1]
os.environ["M3_PLUGIN_REQUIRED"] = "1"
written = ModelConfig(folder, context_length=8192)
assert written.hf_config.context_len == 8192
print("CONFIGURED", get_model_architecture(written)[0].__module__)
"""
REQUIRED = "text_config.sparse_attention_config.sparse_score_type"
M3 = {
    "model": "m3_sglang.models.minimax_m3",
    "media": "m3_sglang.processors.minimax_m3",
    "backend": True,
    "weights": {},
}
THEIRS = {
    "model": "sglang.srt.models.minimax_m3_vl",
    "media": "sglang.srt.multimodal.processors.minimax_m3_vl",
    "backend": "SGLang's own",
    "weights": {},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict], str]:
    """What SGLang would use for each config, and all that was said; one interpreter."""
    folder = tmp_path_factory.mktemp("configs")
    asked = {"m3": ("1", released_config())}
    asked |= {path: ("0", changed(path, value)) for path, value in FOREIGN.items()}
    foreign = changed(REQUIRED, FOREIGN[REQUIRED])
    asked["required"] = ("1", foreign)
    asked["draft"] = ("0", foreign | {"architectures": ["MiniMaxM3MTP"]})
    files = [
        f"{required} {write(folder / name, config)}" for name, (required, config) in asked.items()
    ]
    done = HOST.interpret("-c", ASK, *files, environment=ENVIRONMENT)
    return dict(zip(asked, answered(done), strict=True)), done.stdout + done.stderr


def test_m3_is_taken(answers: tuple[dict[str, dict], str]) -> None:
    assert answers[0]["m3"] == M3


def test_what_sglang_writes_into_a_config_changes_nothing(
    answers: tuple[dict[str, dict], str],
) -> None:
    assert f"CONFIGURED {M3['model']}" in answers[1]


@pytest.mark.parametrize("path", FOREIGN)
def test_a_foreign_key_leaves_the_model_to_sglang(
    answers: tuple[dict[str, dict], str], path: str
) -> None:
    found, said = answers
    assert found[path] == THEIRS
    key = path.rpartition(".")[2]
    assert any("stands aside" in line and key in line for line in said.splitlines())


def test_a_required_plugin_refuses_instead(answers: tuple[dict[str, dict], str]) -> None:
    model = answers[0]["required"]["model"]
    assert model.startswith("refused")
    assert "M3_PLUGIN_REQUIRED=1" in model
    assert "sparse_score_type" in model


def test_what_sglang_has_no_class_for_is_refused(answers: tuple[dict[str, dict], str]) -> None:
    model = answers[0]["draft"]["model"]
    assert "SGLang has no class of its own" in model
    assert "sparse_score_type" in model
