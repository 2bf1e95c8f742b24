"""The released model as a rank of a GPU server builds it, and its share of the caches.

`building.py` does it on the meta device, with SGLang's own loader, groups, configurator and pools;
`drafting.py` its draft workers.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from m3_plugin.model.released import released_config
from tests.integrations.sglang.building import SERVERS
from tests.integrations.sglang.drafting import METHODS, STEPS
from tests.integrations.sglang.engine import HOST

GIB = 2**30
PAGE = 128


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Report of `building.py`."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "config.json").write_text(json.dumps(released_config()))
    found: dict[str, Any] = HOST.report("tests.integrations.sglang.building", folder, folder=folder)
    return found


@pytest.fixture(scope="module")
def found(built: dict[str, Any]) -> dict[str, Any]:
    """Server -> what its first rank is and caches."""
    servers: dict[str, Any] = built["servers"]
    assert len(servers) == len(SERVERS)
    assert {name: each for name, each in servers.items() if "error" in each} == {}
    return servers


@pytest.mark.parametrize(
    ("server", "kv_heads", "item", "index_item"),
    [
        ("H100: tp 1", 4, 2, 2),
        ("H100: tp 2", 2, 2, 2),
        ("H100: tp 4", 1, 2, 2),
        ("H100: tp 8", 1, 2, 2),
        # index keys in e4m3 on SM90 alone
        ("H100: tp 8 --kv-cache-dtype fp8_e4m3", 1, 1, 1),
        ("B200: tp 8 --kv-cache-dtype fp8_e4m3", 1, 1, 2),
        ("B200: tp 4", 1, 2, 2),
    ],
)
def test_pools_of_a_rank(
    found: dict[str, Any], server: str, kv_heads: int, item: int, index_item: int
) -> None:
    """K and V of this rank's heads in all layers, and the one index key of each MSA layer."""
    rank = found[server]
    token = 60 * 2 * kv_heads * 128 * item + 57 * 128 * index_item
    # SGLang's pools have a page more, where padded rows are written
    assert rank["pool_bytes"] == (rank["tokens"] + PAGE) * token
    slots = rank["tokens"] + PAGE
    assert rank["shapes"] == [[slots, kv_heads, 128], [slots, 1, 128]]
    assert rank["tokens"] % PAGE == 0
    assert rank["pool"] == "MiniMaxSparseKVPool"


def test_caches_and_workspace_fill_the_budget_and_no_more(found: dict[str, Any]) -> None:
    """What SGLang may keep beside the weights, of which our hook leaves the workspace's part."""
    for name, rank in found.items():
        free = rank["budget"] - rank["pool_bytes"] - rank["kept"]
        token = rank["pool_bytes"] // (rank["tokens"] + PAGE)
        # the page for padded rows is beyond the budget; a little is kept for pictures
        assert -PAGE * token <= free < GIB // 4, name
        assert rank["workspace"] <= rank["kept"] + 2**20, name
        assert rank["workspace"] < (2 * GIB if "tp 1" in name else GIB), name


def test_weights_are_shared_out(found: dict[str, Any]) -> None:
    """428 B parameters in bf16; what every rank holds whole is the tower and the routers."""
    whole = found["H100: tp 1"]["weights"]
    assert 790 < whole / GIB < 800
    for ranks in (2, 4, 8):
        part = found[f"H100: tp {ranks}"]["weights"]
        assert whole / ranks < part < whole / ranks + 3 * GIB
    assert {rank["layers"] for rank in found.values()} == {60}


@pytest.fixture(scope="module", params=METHODS)
def drafts(request: pytest.FixtureRequest, built: dict[str, Any]) -> dict[int, Any]:
    """Drafted tokens -> target and draft worker of one method (`drafting.py`)."""
    made = {steps: built["drafts"][f"{request.param} {steps}"] for steps in STEPS}
    assert {steps: each for steps, each in made.items() if "error" in each} == {}
    return made


def test_draft_workers(drafts: dict[int, Any]) -> None:
    """Our module with our backends, or the head that was named with SGLang's own."""
    for steps, each in drafts.items():
        ours = each["draft"] == "MiniMaxM3MTP"
        assert ours or each["draft"] == "LlamaForCausalLMEagle3"
        backend = "M3AttentionBackend" if ours else "FlashAttentionBackend"
        # the extend step's, which drafts the first token, and one for each further token
        assert set(each["backends"]) == {backend}
        assert len(each["backends"]) == steps
        assert each["decode_rows"] == steps + 1


def test_what_drafts_share_with_the_target(drafts: dict[int, Any]) -> None:
    """Requests, slots, scratch and embedding; the module its head too. Plans are apart."""
    for each in drafts.values():
        ours = each["draft"] == "MiniMaxM3MTP"
        assert each["requests_shared"]
        assert each["scratch_shared"]
        assert each["plans_apart"]
        assert each["embedding_shared"]
        # a head has a vocabulary of its own
        assert each["head_shared"] is ours
        assert each["pool"] == ("MiniMaxSparseKVPool" if ours else "MHATokenToKVPool")
        # of 8 ranks: one of 4 KV heads of M3, 8 of the head's 64
        assert each["keys"] == [each["slots"], 1 if ours else 8, 128]


def test_drafts_are_captured(drafts: dict[int, Any]) -> None:
    """Verified chains, the extend step, and all further tokens of a draft in one graph."""
    for steps, each in drafts.items():
        sizes = [2, 1]
        chain = {"sizes": sizes, "rows": steps + 1}
        assert each["graphs"] == {
            "verify": chain,
            "extend": chain,
            "draft": {"sizes": sizes, "rows": 1} if steps > 1 else None,
        }
