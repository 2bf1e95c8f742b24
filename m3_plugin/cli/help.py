"""What `--help` says below the options: examples, variables that matter, exit codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

SETTINGS: Mapping[str, Any] = {"help_option_names": ["-h", "--help"]}
_WRONG_CALL = "the command line is wrong: an unknown option, or a value that cannot be"


@dataclass(frozen=True)
class Notes:
    """The end of one command's help.

    Attributes
    ----------
    summary : what the command answers, in a line of the list of commands
    examples : command lines with what they do
    variables : environment variables that change what the command does, with how
    right, wrong, environment : what exit codes 0, 1 and 3 mean here; "" if it never ends so
    """

    summary: str
    examples: Mapping[str, str]
    right: str
    wrong: str
    environment: str
    variables: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """As it is printed."""
        codes = {0: self.right, 1: self.wrong, 2: _WRONG_CALL, 3: self.environment}
        blocks = [
            ["Examples:", *(f"  {line}\n      {what}" for line, what in self.examples.items())],
            ["Variables:", *_columns(self.variables)] if self.variables else [],
            ["Exit codes:", *_columns({str(code): what for code, what in codes.items() if what})],
        ]
        return "\n\n".join("\n".join(block) for block in blocks if block)


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {what}" for name, what in rows.items()]


class Command(TyperCommand):
    """A command whose epilog keeps its lines, and whose flags show no type."""

    def __init__(self, *args: Any, epilog: str | None = None, **options: Any) -> None:
        # kept from typer, whose releases differ in how they join lines
        super().__init__(*args, **options)
        self.notes = epilog

    def get_params(self, ctx: Any) -> Any:
        """All parameters; a flag's type is "bool", which is nothing to type."""
        return _without_types_of_flags(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """typer's own help, then the notes."""
        super().format_help(ctx, formatter)
        if self.notes:
            typer.echo(f"{self.notes}\n")


class Group(TyperGroup):
    """A group of commands, in the order in which their notes stand below."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, groups among the commands."""
        words = [word for command in NOTES for word in command.split()]
        return sorted(super().list_commands(ctx), key=words.index)

    def get_params(self, ctx: Any) -> Any:
        """As `Command.get_params`."""
        return _without_types_of_flags(super().get_params(ctx))


def _without_types_of_flags(parameters: Any) -> Any:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


_SERVER_FAILED = "no host here, a library is missing, or the server did not start or answer"
_WHICH_PLUGIN = {
    "M3_PLUGIN_DISABLE": "must not be 1: the plugin would stay out of the server",
    "VLLM_PLUGINS, SGLANG_PLUGINS": "if set, must list m3",
}

# in the order of a first hour
NOTES: Mapping[str, Notes] = {
    "doctor": Notes(
        summary="Would M3 be handed to m3-plugin here? If not, why not?",
        examples={
            "m3-plugin doctor": "look at this environment",
            "m3-plugin doctor --model MiniMaxAI/MiniMax-M3-MXFP8 --json > doctor.json": (
                "look at a checkpoint and its room in memory too, for a bug report"
            ),
        },
        variables={
            "M3_PLUGIN_*": "are read as a server would read them; a wrong one is a finding",
            "VLLM_PLUGINS, SGLANG_PLUGINS": "if set, must list m3",
            "CUDA_VISIBLE_DEVICES": "the GPUs that are looked at",
        },
        right="a host here loads the plugin and would hand MiniMax-M3 to it",
        wrong="something keeps it from that; the lines marked FAIL say what",
        environment="",
    ),
    "fit": Notes(
        summary="Does M3 fit on these GPUs, and what do I type?",
        examples={
            "m3-plugin fit --model MiniMaxAI/MiniMax-M3-MXFP8 --gpu H200 --tp 8": (
                "as much context as fits on 8 x H200, and the commands that serve it"
            ),
            "m3-plugin fit --model ./config.json --gpu H100 --max-model-len 131072 --json": (
                "a checkpoint of your own by its config, for requests of 131,072 tokens"
            ),
        },
        variables={"HF_HOME": "where a downloaded checkpoint is looked for; nothing is downloaded"},
        right="at least one request of that length fits",
        wrong="it does not fit; what is missing is printed",
        environment="no such model here, or its config.json cannot be read",
    ),
    "check": Notes(
        summary="Are the kernels right here? Needs no server.",
        examples={
            "m3-plugin check": "every kernel that runs on this machine; minutes",
            "m3-plugin check --device cuda --json > check.json": "the GPU, for a bug report",
        },
        variables={
            "CUDA_VISIBLE_DEVICES": "which GPU is checked: the first that is visible",
            "TRITON_INTERPRET": "1 with --device cpu --family triton: the GPU kernels, interpreted",
        },
        right="every case that ran is right",
        wrong="a kernel gives wrong numbers or ends with an error: do not serve with it",
        environment="no such device here, or the kernels cannot run on it",
    ),
    "eval needle": Notes(
        summary="Is a running server right? Does it find hidden facts?",
        examples={
            "m3-plugin eval needle --url http://localhost:8000 --contexts 4096,65536": (
                "ask the server you run, in plain English"
            ),
            "m3-plugin eval needle --output needle.json --plot needle.png": (
                "serve the checkpoint with known answers on this machine, and ask that"
            ),
        },
        variables={
            "OPENAI_API_KEY": "key of the server at --url, if it wants one",
            **_WHICH_PLUGIN,
        },
        right="every hidden fact was found",
        wrong="at least one was not; the first of them are printed",
        environment=_SERVER_FAILED,
    ),
    "soak": Notes(
        summary="Is a server right under fire? Every answer is judged.",
        examples={
            "m3-plugin soak --url http://localhost:8000 --minutes 60 --output soak.json": (
                "accept the server you run before traffic; the same command goes on with the file"
            ),
            "m3-plugin soak --minutes 20 --speculative --plot soak.png": (
                "a tiny M3 on this machine, drafting for the second half"
            ),
        },
        variables={
            "OPENAI_API_KEY": "key of the server at --url, if it wants one",
            **_WHICH_PLUGIN,
        },
        right="no answer was wrong or lost, and nothing was kept that should be given back",
        wrong="something was; the first findings are printed",
        environment=_SERVER_FAILED,
    ),
    "bench serve": Notes(
        summary="How fast is a server, by length of the prompt?",
        examples={
            "m3-plugin bench serve --contexts 1024,4096 --plot serve.png": (
                "small servers on this machine, with the plugin and without"
            ),
            "m3-plugin bench serve --url http://localhost:8000 --model m3 --tokenizer ./m3": (
                "the server you run"
            ),
        },
        variables={
            "OPENAI_API_KEY": "key of the server at --url, if it wants one",
            **_WHICH_PLUGIN,
        },
        right="measured",
        wrong="",
        environment=_SERVER_FAILED,
    ),
    "bench kernels": Notes(
        summary="How fast are the GPU kernels, beside other kernels?",
        examples={
            "m3-plugin bench kernels --output kernels.json --plot kernels.png": (
                "all workloads on the first GPU, beside the hosts' own kernels"
            ),
            "m3-plugin bench kernels --model H100": (
                "what a model expects there, from the kernels' machine code; needs no GPU"
            ),
        },
        variables={"CUDA_VISIBLE_DEVICES": "which GPU: the first that is visible"},
        right="measured, or modelled",
        wrong="our kernels are wrong on a workload, which was then not timed",
        environment="no GPU here, or a library is missing",
    ),
    "bench cpu": Notes(
        summary="How fast are the CPU kernels, beside dense attention?",
        examples={
            "m3-plugin bench cpu": "8K to 128K tokens, beside dense attention; minutes",
            "m3-plugin bench cpu --peers llama.cpp --llama-cpp ./llama.cpp/build": (
                "llama.cpp's server beside ours, as whole engines"
            ),
        },
        variables={"OMP_NUM_THREADS": "threads, where --threads is 0"},
        right="measured",
        wrong="two implementations disagree, or a peer's answers are wrong, so nothing was timed",
        environment="a library, a host or a peer is missing, or a server did not start",
    ),
    "demo": Notes(
        summary="See a tiny M3 served here and its answers checked.",
        examples={
            "m3-plugin demo": "on the host that is installed; two minutes on a laptop's CPU",
            "m3-plugin demo --framework sglang --speculative --json > demo.json": (
                "on SGLang, without and with drafting"
            ),
        },
        variables=_WHICH_PLUGIN,
        right="every answer is the expected one",
        wrong="at least one answer is wrong",
        environment=_SERVER_FAILED,
    ),
    "blocks": Notes(
        summary="Which blocks of the context did the layers read?",
        examples={
            "m3-plugin blocks ./selection --phase decode --plot blocks.png": (
                "what a server recorded while it generated"
            ),
            "m3-plugin blocks ./selection --phase prefill --json": (
                "what it recorded while it read prompts, as JSON"
            ),
        },
        variables={"M3_PLUGIN_RECORD_BLOCKS": "the folder into which a server records"},
        right="there was something to show",
        wrong="",
        environment="nothing was recorded there, or the files are no recording",
    ),
    "tiny": Notes(
        summary="Write a tiny M3 checkpoint, for tests.",
        examples={
            "m3-plugin tiny ./m3-tiny --gguf": (
                "weights whose answers are known, as a GGUF file too"
            ),
            "m3-plugin tiny ./m3-random --kind random --quant mxfp8 --force": (
                "random weights in MXFP8, in place of an earlier checkpoint"
            ),
        },
        right="the checkpoint is written",
        wrong="",
        environment="a library is missing, or the disk refuses the files",
    ),
    "uninstall-leftovers": Notes(
        summary="Remove what pip uninstall leaves behind.",
        examples={
            "m3-plugin uninstall-leftovers": "list what pip uninstall would leave, remove nothing",
            "m3-plugin uninstall-leftovers --yes": "remove it; then: pip uninstall m3-plugin",
        },
        variables={
            "XDG_CACHE_HOME": "where the compiled kernels lie, in m3-plugin/",
            "VLLM_CACHE_ROOT": "where vLLM keeps facts about model classes",
        },
        right="listed, or removed",
        wrong="",
        environment="something could not be removed",
    ),
}
