"""What must not stand in a bug report, and what must stay in it."""

from __future__ import annotations

import pytest

from m3_plugin.diagnosis import Report
from m3_plugin.diagnosis.findings import clean

SECRET = "aB3dE5gH7jK9mN1pQ3rS5tU7"
SECRETS = {
    "Hugging Face": f"hf_{SECRET}",
    "OpenAI": f"sk-proj-{SECRET}",
    "GitHub": f"ghp_{SECRET}",
    "GitHub, of an app": f"ghs_{SECRET}",
    "GitHub, fine-grained": f"github_pat_{SECRET}",
    "GitLab": f"glpat-{SECRET}",
    "NVIDIA": f"nvapi-{SECRET}",
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "AWS, for a while": "ASIAIOSFODNN7EXAMPLE",
    "Slack": f"xoxb-{SECRET}",
    "PyPI": f"pypi-{SECRET}",
    "Google": f"AIza{SECRET}",
    "JSON web token": f"eyJhbGciOiJIUzI1NiJ9.{SECRET}.{SECRET}",
    "header": f"Authorization: Bearer {SECRET}",
    "header of a password": f"authorization: Basic {SECRET}==",
    "URL": f"https://user:{SECRET}@index.example.com/simple",
    "URL of a token": f"https://{SECRET}@git.example.com/x.git",
    "variable": f"OPENAI_API_KEY={SECRET}",
    "variable of AWS": f"AWS_SECRET_ACCESS_KEY={SECRET}",
    "variable of a token": f"HF_TOKEN={SECRET}",
    "password": f"PASSWORD={SECRET}",
    "JSON": f'{{"api_key": "{SECRET}"}}',
    "Python": f"{{'password': '{SECRET}'}}",
    "option": f"vllm serve x --api-key {SECRET} --port 1",
    "option with an equals sign": f"--api-key={SECRET}",
    "query": f"https://storage.example.com/x?token={SECRET}&part=1",
}
HARMLESS = [
    "--max-model-len 131072 --max-num-batched-tokens=2048",
    "tokens per request: 1,024; max_tokens=16384, num_tokens: 4096",
    "M3_PLUGIN_KERNELS=triton, VLLM_PLUGINS=m3",
    "unknown key sparse_attention_config.sparse_topk_block: did you mean 'sparse_topk_blocks'?",
    "tensor model.layers.3.self_attn.index_q_proj.weight must be BF16",
    "https://huggingface.co/MiniMaxAI/MiniMax-M3",
    "tokenizer: PreTrainedTokenizerFast, bos_token_id=200034",
    "risk-free, task-specific, disk-backed-storage-of-pages",
]


@pytest.mark.parametrize("name", SECRETS)
def test_common_secrets_are_masked(name: str) -> None:
    text = clean(f"last words: {SECRETS[name]} (exit 1)")
    assert SECRET not in text
    assert "EXAMPLE" not in text
    assert "<" in text
    assert text.startswith("last words: ")
    assert text.endswith(" (exit 1)")


@pytest.mark.parametrize("text", HARMLESS)
def test_words_of_a_diagnosis_stay(text: str) -> None:
    assert clean(text) == text


def test_a_finding_does_nothing_to_a_terminal() -> None:
    report = Report()
    report.add("model", "key\x1b[2J", "a\nm3-plugin serving\x07", advice="\x1b]0;x\x07 \ud800")
    (found,) = report.findings
    assert found.name == "key\\x1b[2J"
    assert found.value == "a\\nm3-plugin serving\\x07"
    assert found.advice == "\\x1b]0;x\\x07 \\ud800"
