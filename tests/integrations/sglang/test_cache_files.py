"""HiCache's files: K, V and index keys outlive a server, and what is broken is computed again.

Prompts are longer than the sparse layers read, among decoys, so that index keys which are lost or
another's lead to a wrong word.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from m3_plugin.attention.backends import INDEX_KEYS
from m3_plugin.testing.prompts import NeedlePrompt, needle_prompt
from m3_sglang.compat import fleets_are_tested
from tests.integrations.quantised import QuantisedCheckpoints
from tests.integrations.sglang.broken_files import BrokenFiles
from tests.integrations.sglang.engine import (
    Completion,
    EngineDiedError,
    EngineError,
    EngineProcess,
)
from tests.processes import wait_until

PAGE = 128
PROMPTS = [needle_prompt(seed, num_tokens=n) for seed, n in ((81, 2900), (82, 3100))]
FIRST = PROMPTS[0]
# of the first prompt's, whole pages alone
PAGES = 2900 // PAGE
KEYS, INDEX = "kv", "indexer"

pytestmark = pytest.mark.skipif(not fleets_are_tested(), reason="refused on this SGLang")


def start(checkpoint: Path, folder: Path, store: Path, **options: Any) -> EngineProcess:
    return EngineProcess(
        checkpoint,
        log=folder / "engine.log",
        served_model_name="m3",
        chunked_prefill_size=1024,
        enable_hierarchical_cache=True,
        hicache_storage_backend="file",
        hicache_storage_backend_extra_config=json.dumps({"file_storage_path": str(store)}),
        # what is stored is waited for, however slow the disk
        hicache_storage_prefetch_policy="wait_complete",
        **options,
    )


def ask(engine: EngineProcess, prompt: NeedlePrompt) -> Completion:
    (answer,) = engine.generate([list(prompt.token_ids)], max_tokens=prompt.max_tokens)
    return answer


def files(store: Path, kind: str) -> list[Path]:
    """Files of index keys, or of K and V, in the order of the pages."""
    found = [file for file in store.glob("*.bin") if (".indexer_" in file.name) == (kind == INDEX)]
    return sorted(found, key=lambda file: file.stat().st_mtime_ns)


def require_stored(store: Path, pages: int) -> None:
    """Wait until both kinds of so many pages are there: SGLang writes them behind the answer."""
    assert wait_until(lambda: all(len(files(store, kind)) >= pages for kind in (KEYS, INDEX)), 60)


def forget(engine: EngineProcess) -> None:
    """Empty the caches of the engine; its files stay."""
    assert wait_until(engine.flush, 60)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> BrokenFiles:
    return BrokenFiles(tmp_path_factory.mktemp("plugin") / "broken")


@pytest.fixture(scope="module")
def engine(
    constructed_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    store: Path,
    broken: BrokenFiles,
) -> Iterator[EngineProcess]:
    """The second engine of a folder that another one has filled and left."""
    with start(constructed_checkpoint, tmp_path_factory.mktemp("first"), store) as first:
        for prompt in PROMPTS:
            answer = ask(first, prompt)
            assert tuple(answer.token_ids) == prompt.expected_ids
            assert answer.num_cached_tokens < PAGE
        require_stored(store, PAGES + 3100 // PAGE)
    with start(
        constructed_checkpoint,
        tmp_path_factory.mktemp("second"),
        store,
        environment=broken.install(),
    ) as second:
        yield second


@pytest.fixture(scope="module")
def pages(engine: EngineProcess, store: Path) -> dict[str, list[Path]]:
    """Files of both kinds before anything happened to them, the first prompt's first."""
    return {kind: files(store, kind) for kind in (KEYS, INDEX)}


@pytest.mark.extended
def test_a_server_that_starts_finds_the_prefix(engine: EngineProcess) -> None:
    for prompt in PROMPTS:
        answer = ask(engine, prompt)
        assert tuple(answer.token_ids) == prompt.expected_ids
        assert answer.num_cached_tokens >= (len(prompt.token_ids) // PAGE - 1) * PAGE


@pytest.mark.extended
def test_index_keys_are_in_the_files(engine: EngineProcess, pages: dict[str, list[Path]]) -> None:
    """With zeros in their files the needle is not found: the answers above needed them."""
    kept = {file: file.read_bytes() for file in pages[INDEX]}
    for file, content in kept.items():
        file.write_bytes(bytes(len(content)))
    forget(engine)
    answer = ask(engine, FIRST)
    assert answer.num_cached_tokens > 2560
    assert tuple(answer.token_ids) != FIRST.expected_ids
    for file, content in kept.items():
        file.write_bytes(content)
    forget(engine)
    assert tuple(ask(engine, FIRST).token_ids) == FIRST.expected_ids


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.extended
@pytest.mark.parametrize("kind", [KEYS, INDEX])
@pytest.mark.parametrize("harm", [Path.unlink, cut])
def test_what_is_gone_or_cut_is_computed_again(
    engine: EngineProcess,
    pages: dict[str, list[Path]],
    kind: str,
    harm: Callable[[Path], None],
) -> None:
    """One file in the middle of the prompt; of a batch with a file that was cut nothing is used."""
    file = pages[kind][PAGES // 2]
    content = file.read_bytes()
    harm(file)
    forget(engine)
    answer = ask(engine, FIRST)
    assert tuple(answer.token_ids) == FIRST.expected_ids
    assert answer.num_cached_tokens < (PAGES // 2 + 1) * PAGE
    assert (answer.num_cached_tokens > 0) == (harm is Path.unlink)
    forget(engine)
    file.write_bytes(content)


@pytest.mark.extended
@pytest.mark.parametrize("reads", [PAGES // 2, PAGES + PAGES // 2])
def test_a_file_that_vanishes_once_it_was_found(
    engine: EngineProcess, broken: BrokenFiles, reads: int
) -> None:
    """K and V of all pages are read first, then their index keys."""
    forget(engine)
    broken.lose_one(after=reads)
    answer = ask(engine, FIRST)
    assert broken.happened("lose")
    assert tuple(answer.token_ids) == FIRST.expected_ids
    assert 0 < answer.num_cached_tokens < (PAGES // 2 + 1) * PAGE


@pytest.mark.extended
def test_weights_do_not_change_under_the_pages(
    engine: EngineProcess, store: Path, constructed_quantised: QuantisedCheckpoints
) -> None:
    """The last test of this engine. Detached and attached again, the old pages are not found."""
    other = constructed_quantised.reference("mxfp8")
    success, message = engine.update_from_disk(other)
    assert not success
    assert "pages of the old ones go to files" in message
    assert wait_until(engine.detach_files, 60)
    assert engine.update_from_disk(other)[0]
    success, message = engine.attach_files("nixl", store)
    assert not success
    assert "--hicache-storage-backend must be None or file" in message
    assert engine.attach_files("file", store)[0]
    answer = ask(engine, FIRST)
    assert tuple(answer.token_ids) == FIRST.expected_ids
    assert answer.num_cached_tokens == 0


@pytest.mark.extended
def test_a_server_that_is_killed_while_it_writes(
    constructed_checkpoint: Path, tmp_path: Path
) -> None:
    """Half a page lies where no page is looked for; what was whole before it is used."""
    broken, store = BrokenFiles(tmp_path / "plugin"), tmp_path / "store"
    variables = broken.install()
    (tmp_path / "killed").mkdir()
    with start(constructed_checkpoint, tmp_path / "killed", store, environment=variables) as killed:
        # index keys of all pages of a chunk, then K and V
        broken.die(after=12)
        with contextlib.suppress(EngineError, EngineDiedError):
            assert tuple(ask(killed, FIRST).token_ids) == FIRST.expected_ids
        assert wait_until(lambda: broken.happened("die"), 60)
        killed.kill()
    assert (store / ".half.tmp").exists()
    with start(constructed_checkpoint, tmp_path, store, environment=variables) as engine:
        for _ in range(2):
            assert tuple(ask(engine, FIRST).token_ids) == FIRST.expected_ids
            require_stored(store, PAGES)
            forget(engine)
        assert ask(engine, FIRST).num_cached_tokens > 2560


@pytest.mark.extended
def test_rows_that_come_back_are_looked_up(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """Without its index keys no word is answered."""
    store = tmp_path / "store"
    rows = {"M3_PLUGIN_VERIFY_TRANSFER": str(tmp_path / "rows")}
    with start(constructed_checkpoint, tmp_path, store, environment=rows) as engine:
        for _ in range(2):
            assert tuple(ask(engine, FIRST).token_ids) == FIRST.expected_ids
            require_stored(store, PAGES)
            forget(engine)
        for file in files(store, INDEX):
            file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises((EngineError, EngineDiedError)):
            ask(engine, FIRST)
        assert "the index key is not the one that was stored" in engine.log_text()


@pytest.mark.extended
def test_each_rank_keeps_its_own(constructed_checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with start(constructed_checkpoint, tmp_path, store, environment=variables, tp_size=2) as engine:
        assert tuple(ask(engine, FIRST).token_ids) == FIRST.expected_ids
        require_stored(store, 2 * PAGES)
        forget(engine)
        answer = ask(engine, FIRST)
        assert tuple(answer.token_ids) == FIRST.expected_ids
        assert answer.num_cached_tokens > 2560


@pytest.mark.extended
def test_pages_of_another_form_are_not_read(constructed_checkpoint: Path, tmp_path: Path) -> None:
    """The same weights and the same name, with index keys in 8 bits: none of the other's files."""
    store = tmp_path / "store"
    for index_keys in ("auto", "int8"):
        folder = tmp_path / index_keys
        folder.mkdir()
        variables = {"M3_PLUGIN_INDEX_KEYS": index_keys}
        with start(constructed_checkpoint, folder, store, environment=variables) as engine:
            answer = ask(engine, FIRST)
            assert tuple(answer.token_ids) == FIRST.expected_ids
            assert answer.num_cached_tokens == 0
            require_stored(store, PAGES)


def entry(**other: Any) -> SimpleNamespace:
    """A pool's entry as SGLang has it."""
    pool = {"dtype": torch.bfloat16, "layout": "page_first", "page_size": PAGE}
    host = SimpleNamespace(**(pool | {"size_per_token": 512} | other))
    return SimpleNamespace(name="kv", host_pool=host, device_pool=SimpleNamespace(dtype=host.dtype))


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32},
        # as many bytes, in another order
        {"layout": "layer_first"},
        {"size_per_token": 256},
    ],
)
def test_what_decides_the_bytes_of_a_page_is_in_its_name(other: dict[str, Any]) -> None:
    from m3_sglang.cache_files import form

    assert form([entry()]) == form([entry()])
    assert form([entry()]) != form([entry(**other)])
    assert form([entry()]) != form([entry(), entry()])


@pytest.mark.parametrize("index_keys", INDEX_KEYS)
def test_how_index_keys_are_kept_is_in_the_name(
    monkeypatch: pytest.MonkeyPatch, index_keys: str
) -> None:
    from m3_sglang.cache_files import form

    before = form([entry()])
    monkeypatch.setenv("M3_PLUGIN_INDEX_KEYS", index_keys)
    assert form([entry()]) != before


def test_scales_of_a_cache_are_among_the_numbers_that_name_a_page() -> None:
    from m3_plugin.checkpoint.cache_scales import CacheScales
    from m3_sglang.cache_files import numbers_of

    layer: Any = nn.Linear(4, 4)
    model = nn.Sequential(layer)
    assert numbers_of(model).keys() == {"0.weight", "0.bias"}
    layer.cache_scales = CacheScales(k=torch.ones(1))
    assert numbers_of(model).keys() == {"0.weight", "0.bias", "0.k_scale"}
