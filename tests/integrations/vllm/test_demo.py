"""The main job on this host."""

from tests.integrations.demo import check_demo


def test_demo_answers_everything_right() -> None:
    check_demo("vllm", speculative=True)
