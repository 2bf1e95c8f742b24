"""Weights that change while an engine serves: parts, buckets, folders, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m3_plugin.testing.quantised import QuantName
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from tests.integrations.updates import (
    EXPERT,
    FUSED,
    PROMPT,
    QUANTISED,
    QuantisedPair,
    with_nan,
    without_tensor,
)
from tests.integrations.vllm.engine import EngineError, EngineProcess
from tests.integrations.vllm.updating_worker import read


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other numbers under the same names."""
    folder = tmp_path_factory.mktemp("other") / "engine"
    return write_random_checkpoint(folder, preset="engine", seed=5)


@pytest.fixture(scope="module")
def served(random_checkpoint: Callable[[str], Path]) -> Iterator[EngineProcess]:
    worker = "tests.integrations.vllm.updating_worker.UpdatingWorker"
    options = {"worker_extension_cls": worker, "enable_prompt_embeds": True}
    with EngineProcess(random_checkpoint("engine"), **options) as engine:
        yield engine


class Answers:
    """Log-probabilities of one prompt, its prefix not cached."""

    def __init__(self, engine: EngineProcess, original: Path) -> None:
        self.engine = engine
        self.original = str(original)
        self.first = self.now()

    def now(self) -> list[float]:
        assert self.engine.flush()
        return self.engine.prompt_logprobs(PROMPT)

    def back(self) -> None:
        """The original's folder again, bit for bit."""
        self.engine.rpc("reload_weights", None, self.original)
        assert self.now() == self.first


@pytest.fixture
def answers(served: EngineProcess, random_checkpoint: Callable[[str], Path]) -> Iterator[Answers]:
    found = Answers(served, random_checkpoint("engine"))
    yield found
    found.back()


def test_a_reload_of_the_same_folder_gives_the_same_bits(answers: Answers) -> None:
    answers.back()
    answers.engine.rpc("load_directly", answers.original)
    assert answers.now() == answers.first


def test_folder_and_buckets_of_any_size_agree(answers: Answers, other_checkpoint: Path) -> None:
    answers.engine.rpc("reload_weights", None, str(other_checkpoint))
    reloaded = answers.now()
    assert reloaded != answers.first
    answers.back()
    answers.engine.rpc("update_in_buckets", str(other_checkpoint), 1)
    assert answers.now() == reloaded
    answers.back()
    answers.engine.rpc("update_in_buckets", str(other_checkpoint), 50)
    assert answers.now() == reloaded


def test_a_part_of_the_layers_changes_them_alone(answers: Answers, other_checkpoint: Path) -> None:
    answers.engine.rpc("load_directly", str(other_checkpoint), FUSED)
    changed = answers.now()
    assert changed != answers.first
    answers.engine.rpc("load_directly", answers.original, FUSED)
    assert answers.now() == answers.first


@pytest.mark.parametrize("name", [FUSED[0], EXPERT])
def test_part_of_a_packed_layer_is_refused_by_name(
    answers: Answers, other_checkpoint: Path, name: str
) -> None:
    short = name.removeprefix("language_model.")
    with pytest.raises(EngineError, match=rf"{short} is part of .*takes whole; send "):
        answers.engine.rpc("load_directly", str(other_checkpoint), [name])
    assert answers.now() == answers.first


def test_a_session_that_lacks_a_part_says_so_and_keeps_that_layer(
    answers: Answers, other_checkpoint: Path
) -> None:
    with pytest.raises(EngineError, match=r"experts\.\d+\.w\d\.weight is part of .*experts"):
        answers.engine.rpc("update_in_buckets", str(other_checkpoint), 20, EXPERT)
    assert answers.now() != answers.first


def test_a_wrong_shape_changes_nothing(answers: Answers) -> None:
    with pytest.raises(EngineError, match=r"q_proj\.weight must have shape \[.*got \["):
        answers.engine.rpc("load_misshapen", answers.original, FUSED[0])
    assert answers.now() == answers.first


def test_a_folder_without_one_tensor_is_refused_and_the_old_weights_serve(
    answers: Answers, other_checkpoint: Path, tmp_path: Path
) -> None:
    broken = without_tensor(other_checkpoint, tmp_path / "broken", EXPERT)
    short = EXPERT.removeprefix("language_model.").removesuffix(".weight")
    with pytest.raises(EngineError, match=rf"missing 1 tensor\(s\): {short}"):
        answers.engine.rpc("reload_weights", None, str(broken))
    assert answers.now() == answers.first


def test_weights_that_are_no_numbers_are_refused_and_the_old_ones_serve(
    answers: Answers, other_checkpoint: Path, tmp_path: Path
) -> None:
    """In a folder before its first tensor is written; in a bucket, too."""
    broken = with_nan(other_checkpoint, tmp_path / "broken", EXPERT)
    said = f"{EXPERT} holds 1 values that are NaN"
    with pytest.raises(EngineError, match=said):
        answers.engine.rpc("reload_weights", None, str(broken))
    assert answers.now() == answers.first
    with pytest.raises(EngineError, match=said):
        answers.engine.rpc("load_directly", str(broken), [*FUSED, EXPERT])
    assert answers.now() == answers.first


def test_embeddings_of_a_prompt_serve_as_its_tokens_do(
    served: EngineProcess, random_checkpoint: Callable[[str], Path]
) -> None:
    """`--enable-prompt-embeds`, beyond the budget."""
    table = read(str(random_checkpoint("engine")))["language_model.model.embed_tokens.weight"]
    (by_tokens,) = served.generate([PROMPT], max_tokens=6)
    (by_rows,) = served.generate([{"prompt_embeds": table[PROMPT].clone()}], max_tokens=6)
    assert by_rows.token_ids == by_tokens.token_ids


@pytest.mark.extended
@pytest.mark.parametrize(("quant", "environment"), QUANTISED)
def test_quantised_weights_change_in_their_stored_format(
    random_checkpoint: Callable[[str], Path],
    other_checkpoint: Path,
    tmp_path: Path,
    quant: QuantName,
    environment: dict[str, str],
) -> None:
    """A whole folder, and back to the same bits; of stored bytes also one matrix of an expert.

    A folder of plain weights is refused by its config.json.
    """
    plain = random_checkpoint("engine")
    pair = QuantisedPair.of(plain, other_checkpoint, tmp_path, quant, names=read)
    worker = "tests.integrations.vllm.updating_worker.UpdatingWorker"
    with EngineProcess(
        pair.original, worker_extension_cls=worker, environment=environment
    ) as engine:
        answers = Answers(engine, pair.original)
        engine.rpc("reload_weights", None, str(pair.other))
        changed = answers.now()
        assert all(map(math.isfinite, changed))
        assert changed != answers.first
        answers.back()
        if not environment:
            for source, is_back in ((pair.other, False), (pair.original, True)):
                engine.rpc("load_directly", str(source), pair.part)
                assert (answers.now() == answers.first) == is_back
        with pytest.raises(EngineError, match="is stored as plain weights"):
            engine.rpc("reload_weights", None, str(plain))
        assert answers.now() == answers.first
