"""Sizes against the published ones, against real tensors, and what `m3-plugin fit` says of them."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from m3_plugin.checkpoint.headers import read_checkpoint
from m3_plugin.checkpoint.names import text_modules
from m3_plugin.cli import app
from m3_plugin.cli.fit import commands_for
from m3_plugin.cli.hosts import HOSTS
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import find_gpu, find_model, released_config, suggest
from m3_plugin.quantization.formats import GptqInt4, PackedInt4
from m3_plugin.sizing.cache_bytes import cache_bytes_per_token
from m3_plugin.sizing.fit import Weights, fit, text_weights, vision_weights, weight_bytes
from m3_plugin.testing.quantised import RECIPES, QuantName, quantization_config
from m3_plugin.testing.random_checkpoint import PRESETS, write_random_checkpoint
from tests.console import in_one_line
from tests.plugin.cli.schemas import checked
from tests.plugin.model.test_config import HUB

runner = CliRunner()
RELEASED = M3Config.from_hf(released_config())
GIB = 2**30


def released_weights(model: str, tp_size: int = 1) -> Weights:
    config = find_model(model).config
    return weight_bytes(M3Config.from_hf(config), config, tp_size=tp_size)


def test_the_bundled_config_is_the_released_one() -> None:
    assert M3Config.from_hf(HUB) == RELEASED


def test_published_payload_to_the_byte() -> None:
    assert released_weights("MiniMaxAI/MiniMax-M3").total == 854_172_958_720


@pytest.mark.parametrize(
    ("model", "gigabytes"), [("MiniMaxAI/MiniMax-M3-MXFP8", 444), ("nvidia/MiniMax-M3-NVFP4", 250)]
)
def test_published_quantised_sizes(model: str, gigabytes: int) -> None:
    assert released_weights(model).total / 1e9 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_of_a_written_checkpoint_is_counted(tmp_path: Path, preset: str) -> None:
    import torch

    folder = write_random_checkpoint(tmp_path / "tiny", preset=preset, dtype=torch.bfloat16)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    parsed = M3Config.from_hf(config)
    computed = weight_bytes(parsed, config, tp_size=1)
    assert computed.total == computed.per_rank == stored(folder)


def stored(folder: Path) -> int:
    return sum(header.num_bytes for header in read_checkpoint(folder))


def test_a_rank_holds_its_share_and_whole_copies_of_the_rest() -> None:
    size = {"ranks": 0, "kv heads": 0, "none": 0}
    for weight in (*text_weights(RELEASED), *vision_weights(released_config())):
        size[weight.split] += weight.copies * math.prod(weight.shape) * weight.plain_bytes
    assert sum(size.values()) == 854_172_958_720
    # one KV head's share is the least: four of them, whatever the ranks
    kept = size["none"] + size["kv heads"] // 4
    for tp_size in (4, 8, 16):
        weights = released_weights("MiniMaxAI/MiniMax-M3", tp_size)
        assert weights.per_rank == kept + size["ranks"] // tp_size
    hidden, kv_width, layers = 6144, 512, 60
    index_q = 57 * 512 * hidden
    assert size["kv heads"] == 2 * (2 * layers * kv_width * hidden + index_q)


def test_the_budget_is_spent_in_whole_pages() -> None:
    weights = released_weights("MiniMaxAI/MiniMax-M3-MXFP8", 8)
    cache = cache_bytes_per_token(RELEASED, tp_size=8)
    room = 10 * 128 * cache.total + 17
    memory = math.ceil((weights.per_rank + 2 * GIB + room) / 0.5)
    found = fit(
        RELEASED,
        weights,
        memory=memory,
        utilization=0.5,
        reserve=2 * GIB,
        tp_size=8,
        kv_dtype="bf16",
        index_dtype="bf16",
        context=129,
    )
    assert found.tokens == found.longest_context == 1280
    # 129 tokens own two pages
    assert found.requests == 5


def invoke(*options: str):
    return runner.invoke(app, ["fit", *options])


def as_json(*options: str) -> dict:
    return checked("fit", invoke(*options, "--json").stdout)


def test_one_million_tokens_at_tp4_take_the_published_cache() -> None:
    options = ("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "B200", "--tp", "4")
    for kv, index, gigabytes in (("bf16", "bf16", 47.51), ("fp8", "bf16", 31.41)):
        cache = ("--kv-cache-dtype", kv, "--index-cache-dtype", index)
        found = as_json(*options, *cache, "--max-model-len", "1048576")
        per_request = found["fit"]["bytes_per_token"] * 1_048_576 / 1e9
        assert per_request == pytest.approx(gigabytes, abs=0.005)
        assert found["fit"]["requests"] == int(found["fit"]["tokens"] // 1_048_576)


def test_fewer_bytes_per_token_fit_more() -> None:
    found = as_json("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "h100")
    tokens = [found["fit"]["tokens"]] + [entry["tokens"] for entry in found["alternatives"]]
    assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("host", ["vLLM", "SGLang"])
def test_commands_carry_the_numbers(host: str) -> None:
    options = ("--gpu", "H200", "--max-model-len", "131072")
    found = as_json("--model", "MiniMaxAI/MiniMax-M3-MXFP8", *options)
    words = shlex.split(found["commands"][host].replace("\\\n", " "))
    length = {"vLLM": "--max-model-len", "SGLang": "--context-length"}[host]
    ranks = {"vLLM": "--tensor-parallel-size", "SGLang": "--tp"}[host]
    assert words[words.index(length) + 1] == "131072"
    assert words[words.index(ranks) + 1] == "8"
    assert "MiniMaxAI/MiniMax-M3-MXFP8" in words
    parser = {"vLLM": "minimax_m3", "SGLang": "minimax-m3"}[host]
    assert words[words.index("--reasoning-parser") + 1] == parser


def test_no_command_promises_a_cache_that_is_not_stored() -> None:
    model = ("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--kv-cache-dtype", "fp8")
    options = (*model, "--gpu", "H200", "--index-cache-dtype", "fp8")
    assert as_json(*options)["commands"] == {}
    cpu = as_json(*model, "--gpu", "CPU", "--gpu-memory", "2000", "--tp", "1")
    assert cpu["commands"] == {}
    result = invoke(*options)
    assert result.exit_code == 0
    assert "index keys in bf16 or int8" in in_one_line(result.output)
    assert "vllm serve" not in result.output


def test_index_keys_in_two_planes_are_for_cpus() -> None:
    model = ("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--index-cache-dtype", "planes")
    cpu = as_json(*model, "--gpu", "CPU", "--gpu-memory", "2000", "--tp", "1")
    assert all("M3_PLUGIN_INDEX_KEYS=planes" in c for c in cpu["commands"].values())
    assert cpu["commands"].keys() == {"vLLM", "SGLang"}
    assert cpu["fit"]["cache"]["index"] == 57 * 258
    assert as_json(*model, "--gpu", "H200")["commands"] == {}


def test_int8_index_keys_are_asked_for_by_their_variable() -> None:
    model = ("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--index-cache-dtype", "int8")
    machines = (("--gpu", "H200"), ("--gpu", "CPU", "--gpu-memory", "2000", "--tp", "1"))
    for machine in machines:
        found = as_json(*model, *machine)
        assert found["commands"].keys() == {"vLLM", "SGLang"}
        for command in found["commands"].values():
            words = shlex.split(command.replace("\\\n", " "))
            assert "M3_PLUGIN_INDEX_KEYS=int8" in words
            assert "--index-cache-dtype" not in words
        # 57 layers of 128 numbers and a scale
        assert found["fit"]["cache"]["index"] == 57 * 130


@pytest.mark.parametrize(("gpu", "dtype"), [("H200", "fp8_e4m3"), ("A100-80GB", "fp8_e5m2")])
def test_commands_ask_for_an_8_bit_cache_the_chip_can_read(gpu: str, dtype: str) -> None:
    model = ("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", gpu)
    narrow = as_json(*model, "--kv-cache-dtype", "fp8")["commands"]
    assert all(f"--kv-cache-dtype {dtype} " in command for command in narrow.values())
    assert narrow.keys() == {"vLLM", "SGLang"}
    assert all("cache-dtype" not in command for command in as_json(*model)["commands"].values())


def test_sglang_is_given_the_share_of_weights_and_cache_alone() -> None:
    found = as_json("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "H200", "--reserve", "10")
    words = shlex.split(found["commands"]["SGLang"].replace("\\\n", " "))
    static = float(words[words.index("--mem-fraction-static") + 1])
    memory = find_gpu("H200").memory_mib * 2**20
    assert static * memory <= 0.9 * memory - 10 * GIB < (static + 0.01) * memory


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    result = invoke("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "H100")
    assert result.exit_code == 1
    assert "per rank too little for the weights alone" in result.output
    assert "vllm serve" not in result.output
    long = invoke(
        *("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "H100", "--max-model-len", "1048576")
    )
    assert long.exit_code == 1
    found = as_json("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "H100")
    assert f"--max-model-len to {found['fit']['longest_context']}" in in_one_line(long.output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "H300"), "--gpu must be one of"),
        (("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "A100"), "A100-40GB or A100-80GB"),
        (("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "CPU"), "--gpu-memory"),
        (("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "H200", "--tp", "3"), "tp_size"),
        (
            ("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "H200", "--kv-cache-dtype", "int3"),
            "--kv-cache-dtype must be one of",
        ),
        (
            ("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "H200", "--max-model-len", "2000000"),
            "1,048,576",
        ),
    ],
)
def test_mistakes_are_named(options: tuple[str, ...], message: str) -> None:
    result = invoke(*options)
    assert result.exit_code == 2
    assert message in in_one_line(result.output)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("minimax/m3", "did you mean MiniMaxAI/MiniMax-M3?"),
        ("somebody/llama", "not a folder with a config.json"),
    ],
)
def test_a_model_that_is_not_here(model: str, message: str) -> None:
    result = invoke("--model", model, "--gpu", "H200")
    assert result.exit_code == 3
    assert message in in_one_line(result.output)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ('{"text_config": {"num_', "is not JSON"),
        ("\x00", "is not JSON"),
        ("[1]", "must hold a JSON object"),
        ("{}", "config key 'num_hidden_layers' must be"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    result = invoke("--model", str(tmp_path), "--gpu", "H200")
    assert result.exit_code == 3
    assert message in in_one_line(result.output)


def test_a_card_of_any_size(tmp_path: Path) -> None:
    found = as_json("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "mine", "--gpu-memory", "200")
    assert found["machine"]["memory"] == 200 * GIB
    cpu = as_json(
        *("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "cpu", "--tp", "1", "--gpu-memory", "1500")
    )
    assert "VLLM_CPU_KVCACHE_SPACE=" in cpu["commands"]["vLLM"]


def test_a_local_folder_wins_over_a_suggestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "minimax" / "m3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(released_config()))
    monkeypatch.chdir(tmp_path)
    assert find_model("minimax/m3").folder == Path("minimax/m3")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("minimax/m3", "MiniMaxAI/MiniMax-M3"),
        ("minimax-m3", "MiniMaxAI/MiniMax-M3"),
        ("minimax/minimax-m3", "MiniMaxAI/MiniMax-M3"),
        ("minimaxai/minimax-m3", "MiniMaxAI/MiniMax-M3"),
        ("minimax/m3-mxfp8", "MiniMaxAI/MiniMax-M3-MXFP8"),
        ("nvidia/minimax-m3-nvfp4", "nvidia/MiniMax-M3-NVFP4"),
        ("minimax/m3.1", "MiniMaxAI/MiniMax-M3.1-Flash"),
        ("m3.1", "MiniMaxAI/MiniMax-M3.1-Flash"),
        ("minimax/minimax-m3.1-flash", "MiniMaxAI/MiniMax-M3.1-Flash"),
        ("minimax/MiniMax_M3_1-Flash", "MiniMaxAI/MiniMax-M3.1-Flash"),
        ("minimax/m3.2", None),
        ("minimax-m2", None),
    ],
)
def test_names_people_type(name: str, meant: str | None) -> None:
    assert suggest(name) == meant


def exported(quant: QuantName) -> dict[str, Any]:
    """What an exporter writes into the released config.json; int4 in groups of 128."""
    modules = [f"language_model.{module}" for module in text_modules(RELEASED)]
    recipe = RECIPES[quant]
    formats = {
        role: replace(weight, group_size=128)
        if isinstance(weight, PackedInt4 | GptqInt4)
        else weight
        for role, weight in recipe.formats.items()
    }
    return quantization_config(replace(recipe, formats=formats), modules)


@pytest.mark.parametrize(
    ("quant", "gigabytes", "vllm", "sglang"),
    [
        ("mxfp8", 444, "asks for SM80", "weight-only"),
        ("nvfp4", 250, "asks for SM75", "asks for SM80"),
        ("mxfp4", 247, "asks for SM70", "asks for SM70"),
        ("w4a16", 226, "asks for SM70", "asks for SM70"),
        ("awq", 227, "asks for SM70", "asks for SM70"),
        ("gptq", 228, "asks for SM60", "asks for SM80"),
        ("auto-round", 227, "asks for SM60", "asks for SM60"),
        ("fp8", 431, "asks for SM75", "asks for SM80"),
    ],
)
def test_every_dialect_has_its_size_and_a_way_to_run(
    tmp_path: Path, quant: QuantName, gigabytes: int, vllm: str, sglang: str
) -> None:
    """Sizes are those of the table in docs/quantisation.md."""
    config = released_config() | {"quantization_config": exported(quant)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--model", str(tmp_path), "--max-model-len", "131072")
    found = as_json(*options, "--gpu", "H100")
    assert found["weights"]["total"] / 1e9 == pytest.approx(gigabytes, abs=0.6)
    assert found["dequantised"]["total"] == 854_172_958_720
    assert vllm in found["weights_run"]["vLLM"]
    assert sglang in found["weights_run"]["SGLang"]
    # a card of unknown kind, and none
    assert as_json(*options, "--gpu", "X", "--gpu-memory", "80")["weights_run"] == {}
    cpu = as_json(*options, "--gpu", "CPU", "--gpu-memory", "2000", "--tp", "1")
    # the recipe of gptq reorders columns
    ours = "M3_PLUGIN_DEQUANTIZE=1" if quant == "gptq" else "this plugin's CPU kernels"
    assert ours in cpu["weights_run"]["SGLang"]
    assert ours in cpu["weights_run"]["vLLM"]


def test_plain_weights_run_as_they_are() -> None:
    found = as_json("--model", "MiniMaxAI/MiniMax-M3", "--gpu", "B300")
    assert found["weights_run"] == {"vLLM": "as stored", "SGLang": "as stored"}
    assert found["dequantised"] is None
    blackwell = as_json("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "B200")
    assert "its own mxfp8 method (asks for SM100)" in blackwell["weights_run"]["SGLang"]


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))


def test_commands_can_be_typed_as_they_stand(tmp_path: Path) -> None:
    model = ("--model", "MiniMaxAI/MiniMax-M3-MXFP8")
    cpu = ("--gpu", "CPU", "--gpu-memory", "2000", "--tp", "1")
    for machine in (("--gpu", "H100"), cpu):
        found = as_json(*model, *machine)
        # it is not on this machine
        assert found["download"] == "hf download MiniMaxAI/MiniMax-M3-MXFP8"
        for command in found["commands"].values():
            assert {"M3_PLUGIN_REQUIRED=1", "HF_HUB_OFFLINE=1"} <= set(words_of(command))
        # what workers count is in no other metrics
        assert "PROMETHEUS_MULTIPROC_DIR=$(mktemp -d)" in words_of(found["commands"]["vLLM"])
        assert "--enable-metrics" in words_of(found["commands"]["SGLang"])
    (tmp_path / "config.json").write_text(json.dumps(released_config()))
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        here = as_json("--model", name, "--gpu", "H200")
        assert here["download"] is None
        assert all(str(tmp_path) in words_of(command) for command in here["commands"].values())


def test_a_host_that_widens_weights_is_given_the_numbers_of_those(tmp_path: Path) -> None:
    """GPTQ with reordered columns is held in 16 bits on a CPU: 795 GiB in place of 212."""
    config = released_config() | {"quantization_config": exported("gptq")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ("--model", str(tmp_path), "--gpu", "CPU", "--tp", "1")
    roomy = as_json(*model, "--gpu-memory", "1000")
    words = words_of(roomy["commands"]["vLLM"])
    assert "M3_PLUGIN_DEQUANTIZE=1" in words
    left = 0.9 * 1000 - 6 - roomy["dequantised"]["per_rank"] / GIB
    assert f"VLLM_CPU_KVCACHE_SPACE={int(left)}" in words
    length = int(words[words.index("--max-model-len") + 1])
    assert length * roomy["fit"]["bytes_per_token"] <= left * GIB
    assert length < roomy["fit"]["longest_context"]
    tight = as_json(*model, "--gpu-memory", "800")
    assert tight["fits"]
    assert tight["commands"].keys() == set()
    assert any("no command for vLLM" in remark for remark in tight["remarks"])
    stored = as_json("--model", "MiniMaxAI/MiniMax-M3-MXFP8", *model[2:], "--gpu-memory", "512")
    assert stored["fits"]
    assert stored["commands"].keys() == {"vLLM", "SGLang"}
    assert not any("DEQUANTIZE" in command for command in stored["commands"].values())


def test_media_are_left_out_or_their_profile_is() -> None:
    model = ("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "H200")
    for options, expected in (
        (("--max-model-len", "131072"), "--skip-mm-profiling"),
        (("--max-model-len", "32768"), ""),
        (("--max-model-len", "131072", "--text-only"), "--language-model-only"),
    ):
        found = as_json(*model, *options)
        media = {"--skip-mm-profiling", "--language-model-only"}
        given = media & set(words_of(found["commands"]["vLLM"]))
        assert given == ({expected} if expected else set())
        assert not media & set(words_of(found["commands"]["SGLang"]))
        assert [expected in remark for remark in found["remarks"]] == [True] * bool(expected)


def test_what_demo_recommends_fits_the_machine_it_names() -> None:
    commands = commands_for("MiniMaxAI/MiniMax-M3-MXFP8", "H100", tp_size=8, context=131_072)
    options = ("--gpu", "H100", "--tp", "8", "--max-model-len", "131072")
    assert commands == as_json("--model", "MiniMaxAI/MiniMax-M3-MXFP8", *options)["commands"]
    assert commands.keys() == {host.title for host in HOSTS.values()}


def test_tokens_of_all_requests_are_told_from_those_of_one() -> None:
    told = invoke("--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--gpu", "B200").output
    assert "tokens of all requests together" in told
    assert "longest single request" in told
    assert "requests of 1,048,576 tokens at once" in told


def test_decoding_on_a_cpu_is_bounded_by_the_bytes_of_a_step(tmp_path: Path) -> None:
    """NVFP4 experts in 512 GiB; per token 4 of 128 experts, and what 60 layers read of caches."""
    config = released_config() | {"quantization_config": exported("nvfp4")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    machine = ("--gpu", "CPU", "--gpu-memory", "512", "--tp", "1", "--bandwidth", "400")
    found = as_json("--model", str(tmp_path), *machine, "--max-model-len", "131072")
    assert found["fits"]
    decode = found["decode"]
    experts, shared = (57 * n * 3 * 3072 * 6144 for n in (4, 1))
    attention, dense = 60 * (2 * 8192 + 2 * 512) * 6144, 3 * 3 * 12_288 * 6144
    head, index = 200_064 * 6144 * 2, 57 * (4 + 1) * 128 * 6144 * 2
    parts = experts * 9 / 16 + (shared + attention + dense) * 33 / 32 + head + index
    # norms and the router are left
    assert decode["weights"] == pytest.approx(parts, rel=0.01)
    layer = 2 * 4 * 128 * 2
    assert decode["cache"] == (3 * 131_072 + 57 * 2048) * layer + 131_072 * 57 * 256
    speed = 400e9 / (decode["weights"] + decode["cache"])
    assert decode["tokens_per_second"] == pytest.approx(speed)
    plain = as_json("--model", "MiniMaxAI/MiniMax-M3", *machine[:3], "2000", *machine[4:])
    assert plain["decode"]["weights"] > 2.3 * decode["weights"]
