"""Weights that change while an engine serves: parts, buckets, folders, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from m3_plugin.testing.quantised import QuantName
from m3_plugin.testing.random_checkpoint import write_random_checkpoint
from m3_sglang.compat import speculation_is_tested
from tests.integrations.sglang.engine import EngineProcess, checkpoint_tensors, speculation
from tests.integrations.speculation import (
    answer,
    chains_of_eight_phases,
    drafting_checkpoint,
    ids,
)
from tests.integrations.updates import (
    EXPERT,
    FUSED,
    PROMPT,
    QUANTISED,
    QuantisedPair,
    with_nan,
    without_tensor,
)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other numbers under the same names."""
    folder = tmp_path_factory.mktemp("other") / "engine"
    return write_random_checkpoint(folder, preset="engine", seed=5)


@pytest.fixture(scope="module")
def served(
    random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    log = tmp_path_factory.mktemp("log") / "engine.log"
    with EngineProcess(random_checkpoint("engine"), log=log) as engine:
        yield engine


class Answers:
    """Log-probabilities of one prompt, its prefix not cached."""

    def __init__(self, engine: EngineProcess, original: Path) -> None:
        self.engine = engine
        self.original = original
        self.first = self.now()

    def now(self) -> list[float]:
        self.engine.flush()
        return self.engine.prompt_logprobs(PROMPT)

    def back(self) -> None:
        """The original's folder again, bit for bit."""
        success, message = self.engine.update_from_disk(self.original)
        assert success, message
        assert self.now() == self.first


@pytest.fixture
def answers(served: EngineProcess, random_checkpoint: Callable[[str], Path]) -> Iterator[Answers]:
    found = Answers(served, random_checkpoint("engine"))
    yield found
    found.back()


def test_folder_buckets_and_group_agree(answers: Answers, other_checkpoint: Path) -> None:
    engine = answers.engine
    assert engine.update_from_disk(other_checkpoint)[0]
    reloaded = answers.now()
    assert reloaded != answers.first
    answers.back()
    names = sorted(checkpoint_tensors(other_checkpoint), key=lambda name: name[::-1])
    for bucket in (3, len(names)):
        sent = engine.update_from_tensors(other_checkpoint, names, bucket=bucket)
        assert all(success for success, _ in sent), sent
        assert answers.now() == reloaded
        answers.back()
    assert engine.update_from_group(other_checkpoint, names)[0]
    assert answers.now() == reloaded


@pytest.mark.parametrize("name", [FUSED[4], EXPERT])
def test_one_tensor_is_written_and_written_back(
    answers: Answers, other_checkpoint: Path, name: str
) -> None:
    assert answers.engine.update_from_tensors(other_checkpoint, [name], bucket=1)[0][0]
    assert answers.now() != answers.first
    assert answers.engine.update_from_tensors(answers.original, [name], bucket=1)[0][0]
    assert answers.now() == answers.first


def test_a_wrong_shape_is_answered_and_changes_nothing(
    answers: Answers, other_checkpoint: Path
) -> None:
    names = [EXPERT, FUSED[0]]
    (answer,) = answers.engine.update_from_tensors(other_checkpoint, names, bucket=2, cut=FUSED[0])
    assert not answer[0]
    assert "q_proj.weight must have shape [" in answer[1]
    assert answers.now() == answers.first


def test_a_folder_without_one_tensor_is_answered_and_the_old_weights_serve(
    answers: Answers, other_checkpoint: Path, tmp_path: Path
) -> None:
    broken = without_tensor(other_checkpoint, tmp_path / "broken", EXPERT)
    success, message = answers.engine.update_from_disk(broken)
    assert not success
    short = EXPERT.removeprefix("language_model.").removesuffix(".weight")
    assert f"missing 1 tensor(s): {short}" in message
    assert answers.now() == answers.first


def test_weights_that_are_no_numbers_are_answered_and_the_old_ones_serve(
    answers: Answers, other_checkpoint: Path, tmp_path: Path
) -> None:
    broken = with_nan(other_checkpoint, tmp_path / "broken", EXPERT)
    success, message = answers.engine.update_from_disk(broken)
    assert not success
    assert f"{EXPERT} holds 1 values that are NaN" in message
    names = [FUSED[0], EXPERT]
    ((success, message),) = answers.engine.update_from_tensors(broken, names, bucket=2)
    assert not success
    assert f"{EXPERT} holds 1 values that are NaN" in message
    assert answers.now() == answers.first


@pytest.mark.parametrize("form", ["direct", "of.nobody"])
def test_forms_of_buckets_that_pass_names_over_are_answered(
    answers: Answers, other_checkpoint: Path, form: str
) -> None:
    """SGLang ends its scheduler with one it does not know, and writes blindly with `direct`."""
    (answer,) = answers.engine.update_from_tensors(
        other_checkpoint, [FUSED[0]], bucket=1, load_format=form
    )
    assert not answer[0]
    assert (
        f"load_format must be flattened_bucket or left out for MiniMax-M3; got '{form}'"
        in (answer[1])
    )
    assert answers.now() == answers.first


def test_a_folder_that_breaks_while_it_is_read_gives_way_to_the_one_before() -> None:
    """SGLang's own way back would read the broken one again."""
    from m3_sglang.updates import _or_the_folder_before

    read = []

    def load(updater: SimpleNamespace, folder: str, form: str) -> tuple[bool, str]:
        read.append((folder, form))
        updater.model_config.model_path = folder
        if folder == "new":
            raise OSError("input/output error")
        return folder != "nowhere", ""

    updater = SimpleNamespace(model_config=SimpleNamespace(model_path="old"))
    success, message = _or_the_folder_before(load, updater, "new", "auto")
    assert not success
    assert "input/output error; the weights of old serve" in message
    assert read == [("new", "auto"), ("old", "auto")]
    assert _or_the_folder_before(load, updater, "nowhere", "auto") == (False, "")
    assert updater.model_config.model_path == "old"


@pytest.mark.extended
@pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")
def test_drafts_change_with_their_target(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """A module that is always wrong, the right one from disk, and the wrong one in one bucket.

    A folder without MTP weights leaves the module as it is.
    """
    wrong = drafting_checkpoint(tmp_path / "wrong", wrong_every=1)
    right = drafting_checkpoint(tmp_path / "right")
    prompt = chains_of_eight_phases()[0]
    module = [name for name in checkpoint_tensors(wrong) if ".mtp." in name]
    with EngineProcess(wrong, log=tmp_path / "engine.log", **speculation(wrong, steps=3)) as engine:

        def accepted() -> int:
            engine.flush()
            (output,) = engine.generate([ids([prompt])[0]], max_tokens=16, ignore_eos=True)
            assert output.token_ids == answer(prompt, 16)
            return output.num_accepted

        assert accepted() == 0
        assert engine.update_from_disk(right)[0]
        assert (many := accepted()) > 8
        assert engine.update_from_disk(constructed_checkpoint)[0]
        assert accepted() == many
        ((success, message),) = engine.update_from_tensors(wrong, module, bucket=len(module))
        assert success, message
        assert accepted() == 0


@pytest.mark.extended
@pytest.mark.parametrize(("quant", "environment"), QUANTISED)
def test_quantised_weights_change_in_their_stored_format(
    random_checkpoint: Callable[[str], Path],
    other_checkpoint: Path,
    tmp_path: Path,
    quant: QuantName,
    environment: dict[str, str],
) -> None:
    """A whole folder, and the tensors of one expert's matrix in one bucket; back, bit for bit.

    A folder of plain weights is refused by its config.json.
    """
    plain = random_checkpoint("engine")
    pair = QuantisedPair.of(plain, other_checkpoint, tmp_path, quant, names=checkpoint_tensors)
    log = tmp_path / "engine.log"
    with EngineProcess(pair.original, log=log, environment=environment) as engine:
        answers = Answers(engine, pair.original)
        assert engine.update_from_disk(pair.other)[0]
        assert answers.now() != answers.first
        answers.back()
        for source, is_back in ((pair.other, False), (pair.original, True)):
            assert engine.update_from_tensors(source, pair.part, bucket=len(pair.part))[0][0]
            assert (answers.now() == answers.first) == is_back
        success, message = engine.update_from_disk(plain)
        assert not success
        assert "is stored as plain weights" in message
        assert answers.now() == answers.first
