"""Which class vLLM's registry answers with depends on the config, not on the name alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3_plugin.model.released import released_config
from tests.integrations.foreign import FOREIGN, changed, write
from tests.integrations.vllm.engine import ENVIRONMENT, HOST
from tests.interpreters import answered

ASK = """
import json, sys
from types import SimpleNamespace
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models import registry
from vllm.transformers_utils.config import get_config
from m3_plugin.settings import Settings
from m3_vllm.registration import ARCHITECTURES
from m3_vllm.registry import choose_by_config
# whether a class can be imported on this machine is not asked
registry._LazyRegisteredModel.load_model_cls = lambda self: self

def answer(folder, models):
    config = get_config(folder, trust_remote_code=False)
    asked = SimpleNamespace(hf_config=config, model_impl="auto", convert_type="none")
    try:
        found, _ = models.resolve_model_cls(config.architectures, asked)
        return found.module_name
    except ValueError as error:
        return f"refused: {error}"

for folder in sys.argv[1:]:
    print("ANSWER", json.dumps(answer(folder, ModelRegistry)), flush=True)
bare = type(ModelRegistry)({})
choose_by_config(bare, architectures=ARCHITECTURES, settings=Settings())
print("ANSWER", json.dumps(answer(sys.argv[-1], bare)), flush=True)
choose_by_config(ModelRegistry, architectures=ARCHITECTURES, settings=Settings(required=True))
print("ANSWER", json.dumps(answer(sys.argv[-1], ModelRegistry)), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """Modules of the classes for each config, and all that was said; one interpreter."""
    folder = tmp_path_factory.mktemp("configs")
    asked = {"m3": released_config()}
    asked |= {path: changed(path, value) for path, value in FOREIGN.items()}
    files = [write(folder / name, config) for name, config in asked.items()]
    environment = {**ENVIRONMENT, "M3_PLUGIN_REQUIRED": "0"}
    done = HOST.interpret("-c", ASK, *files, environment=environment)
    names = [*asked, "unknown to vLLM", "required"]
    return dict(zip(names, answered(done), strict=True)), done.stdout + done.stderr


def test_m3_is_taken(answers: tuple[dict[str, str], str]) -> None:
    assert answers[0]["m3"] == "m3_vllm.model"


@pytest.mark.parametrize("path", FOREIGN)
def test_a_foreign_key_leaves_the_model_to_vllm(
    answers: tuple[dict[str, str], str], path: str
) -> None:
    found, said = answers
    assert found[path] == "vllm.models.minimax_m3"
    key = path.rpartition(".")[2]
    assert any("stands aside" in line and key in line for line in said.splitlines())


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("unknown to vLLM", "vLLM has no class of its own"),
        ("required", "M3_PLUGIN_REQUIRED=1 is set"),
    ],
)
def test_refused_where_nobody_else_may(
    answers: tuple[dict[str, str], str], case: str, why: str
) -> None:
    answer = answers[0][case]
    assert answer.startswith("refused")
    assert why in answer
    assert list(FOREIGN)[-1] in answer


CONFIGURE = """
import sys
from vllm.config import ModelConfig
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models import ModelRegistry
found = ModelConfig(model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True)
print("CLASS", ModelRegistry.resolve_model_cls(found.architectures, found)[0].__module__)
"""


@pytest.mark.extended
@pytest.mark.parametrize("foreign", [False, True])
def test_vllms_own_model_config_comes_to_the_same(tmp_path: Path, foreign: bool) -> None:
    """No stand-in for the config object, and classes imported."""
    path = "text_config.sparse_attention_config.sparse_selection_rule"
    config = changed(path, FOREIGN[path]) if foreign else released_config()
    result = HOST.run(
        *("-c", CONFIGURE, write(tmp_path / "model", config)),
        environment={**ENVIRONMENT, "M3_PLUGIN_REQUIRED": "0"},
    )
    said = result.stdout + result.stderr
    assert ("stands aside" in said) is foreign
    assert ("CLASS m3_vllm.model" in said) is not foreign
