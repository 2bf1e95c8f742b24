"""llama.cpp's own server as a peer: found where it was built, started, and asked what it reads.

A build of any release has the server; nothing of llama.cpp is linked, stored or changed. Whether
its sparse attention is on depends on how it is started, and one line of its log is the only sign of
that. So it is asked first what only the right blocks answer.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m3_plugin.cli.bench.report import GateError
from m3_plugin.cli.host_metrics import openai_client
from m3_plugin.host.children import LOOPBACK, child_environment
from m3_plugin.host.serving import ServerFailed, ServerProcess, free_port

SERVER = "llama-server"
NEEDLE_TOKENS = 1536
_ROOM = 256
_VERSION = re.compile(r"^version: (.+)$", re.MULTILINE)
_ABOUT_MSA = re.compile(r"^.*\bMSA\b.*$", re.MULTILINE)

Attention = Literal["msa", "dense"]


@dataclass(frozen=True)
class Variant:
    """One way to start the server.

    Attributes
    ----------
    options : beside those that say where and what to serve, for how long a context, on how many
        threads
    wanted : the attention it is started for; None where it is what it is
    """

    options: tuple[str, ...]
    wanted: Attention | None = None

    @property
    def name(self) -> str:
        """As reports call it."""
        return " ".join(("llama.cpp", *self.options)) if self.options else "llama.cpp, defaults"


# MSA needs flash attention, and one sequence or a cache that sequences do not share.
VARIANTS = (Variant(("-fa", "on", "-np", "1"), wanted="msa"), Variant(()))


def find_server(path: Path) -> Path:
    """The server's executable at a path: itself, or in a folder of executables, or in a build.

    Raises
    ------
    LookupError : there is none.
    """
    for candidate in (path, path / SERVER, path / "bin" / SERVER):
        if candidate.is_file():
            return candidate
    raise LookupError(
        f"{path} is no {SERVER} and holds none, nor does its bin/; build llama.cpp "
        f"(cmake --build BUILD --target {SERVER}) and give that folder"
    )


def version_of(server: Path) -> str:
    """What the server says of its release.

    Raises
    ------
    LookupError : it cannot be started, or says nothing of the kind.
    """
    try:
        done = subprocess.run(
            [server, "--version"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=child_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LookupError(f"{server} --version: {error}; is it built for this machine?") from None
    said = done.stderr + done.stdout
    found = _VERSION.search(said)
    if found is None:
        raise LookupError(
            f"{server} --version names no version, so it is no server of llama.cpp: {said[-200:]!r}"
        )
    return found[1].strip()


@contextmanager
def started(
    server: Path, model: Path, variant: Variant, *, context: int, threads: int, log: Path
) -> Iterator[ServerProcess]:
    """The server of one GGUF file while the context lasts.

    Parameters
    ----------
    context : tokens of one request, answer included
    threads : as many as the engines beside it have

    Raises
    ------
    ServerFailed : it did not start; where the release has no MiniMax-M3, says so.
    """
    port = free_port()
    command = [
        *(str(server), "--model", str(model)),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--ctx-size", str(context + _ROOM), "--threads", str(threads)),
        # a build may have a GPU
        *("--n-gpu-layers", "0"),
        *variant.options,
    ]
    with ServerProcess(command, port=port, log=log) as process:
        try:
            process.wait_until_ready(timeout_s=300)
        except ServerFailed as failure:
            if "unknown model architecture" in failure.args[0]:
                raise ServerFailed(
                    f"{server} knows no model architecture minimax-m3: take a release of llama.cpp "
                    "that has src/models/minimax-m3.cpp"
                ) from None
            raise
        yield process


def attention_of(process: ServerProcess, variant: Variant) -> Attention:
    """What a server of the constructed checkpoint attends, told from its answer.

    Raises
    ------
    GateError : the answer is neither that of MSA nor of dense attention, or not the wanted one.
    """
    from m3_plugin.testing.prompts import needle_prompt

    prompt = needle_prompt(0, num_tokens=NEEDLE_TOKENS)
    assert prompt.dense_answer is not None
    client = openai_client(process.url, timeout_s=600)
    reply = client.completions.create(
        model="m3",
        prompt=list(prompt.token_ids),
        max_tokens=prompt.max_tokens,
        temperature=0,
    )
    answer = reply.choices[0].text.strip()
    meaning: dict[str, Attention] = {
        prompt.expected_text.strip(): "msa",
        prompt.dense_answer.strip(): "dense",
    }
    found = meaning.get(answer)
    if found is None or variant.wanted not in (None, found):
        what = "as dense attention does" if found == "dense" else "as neither attention does"
        told = "".join(f"\n{line.strip()}" for line in _ABOUT_MSA.findall(process.log.read_text()))
        raise GateError(
            f"{variant.name} answers {answer!r} to a prompt of {NEEDLE_TOKENS:,} tokens, {what}; "
            f"right is {prompt.expected_text.strip()!r}. MSA needs flash attention (-fa on) and "
            f"one sequence (-np 1)" + (f"; its log:{told}" if told else "")
        )
    return found
