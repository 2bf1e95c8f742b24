"""Checked steps under vLLM: ids of requests, which vLLM tells its model runner alone."""

from __future__ import annotations

from types import SimpleNamespace

from m3_vllm.compat import requests_of_step


class Runner:
    """Holds its batch as vLLM's first model runner does."""

    def __init__(self, *names: str) -> None:
        self.input_batch = SimpleNamespace(req_ids=list(names))

    def execute_model(self) -> tuple[str, ...]:
        return forward()


def forward() -> tuple[str, ...]:
    """Stands for the model, which is called by either."""
    return requests_of_step()


def test_ids_are_those_of_the_runner_that_calls() -> None:
    assert Runner("a", "b").execute_model() == ("a", "b")


def test_ids_of_a_batch_that_is_passed_on() -> None:
    """As in vLLM's second model runner."""

    def run(input_batch: SimpleNamespace) -> tuple[str, ...]:
        return forward()

    assert run(SimpleNamespace(req_ids=["c"])) == ("c",)


def test_nobody_knows() -> None:
    assert forward() == ()
