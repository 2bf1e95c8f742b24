"""How long other requests wait while a server prepares a long video or large pictures.

    python -m tests.integrations.media_gaps --framework vllm [--chunk 512]
    python -m tests.integrations.media_gaps --url http://127.0.0.1:8000 --model m3

asks a server of either host, its own or a running one, for a stream of text and for its health all
the while, first alone and then beside a video of 600 frames and four pictures of 12 megapixels. It
prints the largest gaps in seconds as JSON, one line per load and repeat, after one with the load of
the machine at the start. The goal is below one second. Beside both stands the largest gap of a
process that asks nobody: no server can do better there and then. A running server must admit four
pictures; it may refuse the video's 123,745 tokens, as the own one does, for that is known after the
work that this measures. As many tokens of text as the pictures have tell what the text model alone
keeps a stream waiting for. A step embeds the pictures that it reaches: `--chunk` bounds its tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from random import randrange
from typing import Any

import httpx
from PIL import Image

from m3_plugin.cli.hosts import HOSTS, MODEL_NAME, host_to_start
from m3_plugin.host.serving import ServerProcess, free_port
from m3_plugin.testing.constructed import ConstructedCheckpoint
from tests.integrations import media_files
from tests.integrations.media_cases import Part, picture, text, video

# Between two looks at /health, in seconds.
_POLL = 0.05
_TIMEOUT = 600
# A server's first requests do what later ones need not: imports, templates, compiled products.
_WARM_UP_S = 5
# Those of four pictures of 12 megapixels.
_TOKENS_OF_PICTURES = 4 * (567 + 2)


def loads() -> dict[str, list[Part]]:
    """What is prepared meanwhile, by name, in no cache; every frame of the video is looked at."""
    frame = media_files.jpeg((9, 99, randrange(256)), size=(640, 480))
    noise = (Image.effect_noise((4000, 3000), 50).convert("RGB") for _ in range(4))
    # of two tokens each, a blank and a digit, in no cache
    numbers = " ".join(str(randrange(10)) for _ in range(_TOKENS_OF_PICTURES // 2))
    photos = [media_files.encoded(image, "JPEG") for image in noise]
    return {
        "nothing": [],
        f"{_TOKENS_OF_PICTURES} tokens of text": [text(numbers)],
        "a video of 600 frames": [video(media_files.mp4([frame] * 600, size=(640, 480)))],
        "four pictures of 12 megapixels": [picture(photo) for photo in photos],
    }


def chat(model: str, parts: list[Part], **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": parts}], **options}


def streamed(client: httpx.Client, model: str) -> Iterator[str]:
    """Events of one answer after another, one for each token, said or special."""
    body = chat(
        model,
        [text("Count.")],
        max_tokens=512,
        ignore_eos=True,
        skip_special_tokens=False,
        temperature=0,
        stream=True,
    )
    while True:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            yield from reply.iter_lines()


def answers(client: httpx.Client, path: str) -> Iterator[int]:
    while True:
        yield client.get(path).raise_for_status().status_code
        time.sleep(_POLL)


def healths(client: httpx.Client, model: str) -> Iterator[int]:
    """SGLang's takes a second by itself: it waits for a token of the scheduler."""
    return answers(client, "/health")


def lists(client: httpx.Client, model: str) -> Iterator[int]:
    """What the HTTP process answers alone."""
    return answers(client, "/v1/models")


def pauses(client: httpx.Client, model: str) -> Iterator[None]:
    while True:
        yield
        time.sleep(_POLL)


WATCHED = {"stream": streamed, "health": healths, "models": lists, "machine": pauses}


def watch(name: str, url: str, model: str, events: Connection) -> None:
    """Sends the time of every event; a process of its own, so that it waits for the server only."""
    with httpx.Client(base_url=url, timeout=_TIMEOUT) as client:
        for _ in WATCHED[name](client, model):
            events.send(time.monotonic())


def largest_gap(times: list[float], begin: float, end: float) -> float:
    """Largest time between two events of which some lies within `begin` to `end`, in seconds."""
    pairs = itertools.pairwise(times)
    return max(after - before for before, after in pairs if after > begin and before < end)


def measure(url: str, model: str, parts: list[Part]) -> dict[str, Any]:
    """Largest gaps while `parts` are answered, and the status and seconds of that."""
    body = json.dumps(chat(model, [*parts, text("What is this?")], max_tokens=1)).encode()
    processes = multiprocessing.get_context("spawn")
    ears = {}
    for name in WATCHED:
        ears[name], mouth = processes.Pipe(duplex=False)
        processes.Process(target=watch, args=(name, url, model, mouth), daemon=True).start()
        ears[name].recv()
    time.sleep(_WARM_UP_S)
    begin = time.monotonic()
    reply = httpx.post(
        f"{url}/v1/chat/completions",
        content=body,
        headers={"content-type": "application/json"},
        timeout=_TIMEOUT,
    )
    end = time.monotonic()
    gaps = {}
    for name, ear in ears.items():
        times = [ear.recv()]
        while times[-1] < end:
            times.append(ear.recv())
        gaps[name] = round(largest_gap(times, begin, end), 3)
    for child in multiprocessing.active_children():
        child.terminate()
        child.join()
    found = {"status": reply.status_code, "seconds": round(end - begin, 3), "largest gaps": gaps}
    return found if reply.is_success else found | {"error": reply.text[:300]}


@contextmanager
def own_server(framework: str, *, log: Path | None, chunk: int | None) -> Iterator[str]:
    """Address of a server of the constructed checkpoint that admits four pictures.

    Parameters
    ----------
    chunk : most tokens of a step; None for the usual ones
    """
    pictures = {
        "vllm": ("--limit-mm-per-prompt", '{"image": 4, "video": 1}'),
        "sglang": ("--limit-mm-data-per-request", '{"image": 4, "video": 1}'),
    }
    bound = {"vllm": "--max-num-batched-tokens", "sglang": "--chunked-prefill-size"}[framework]
    chunked = () if chunk is None else (bound, str(chunk))
    host = host_to_start(framework)
    with tempfile.TemporaryDirectory(prefix="m3-plugin-gaps-") as folder:
        scratch = Path(folder)
        checkpoint = ConstructedCheckpoint().write(scratch / "checkpoint")
        port = free_port()
        with ServerProcess(
            host.command(checkpoint, port, (*host.options, *pictures[framework], *chunked)),
            port=port,
            log=log or scratch / "server.log",
            environment=host.environment(scratch),
        ) as server:
            server.wait_until_ready()
            yield server.url


def print_line(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--url", help="of a running server")
    asked.add_argument("--framework", choices=sorted(HOSTS), help="starts a server of its own")
    parser.add_argument("--model", help="served model name of a running server", default="m3")
    parser.add_argument("--log", type=Path, help="of an own server")
    parser.add_argument("--chunk", type=int, help="most tokens of an own server's step")
    parser.add_argument("--repeats", type=int, default=3, help="of each load")
    given = parser.parse_args()
    print_line({"load of the machine": os.getloadavg()[0], "processors": os.cpu_count()})
    if given.url:
        print_gaps(given.url, given.model, repeats=given.repeats)
    else:
        with own_server(given.framework, log=given.log, chunk=given.chunk) as url:
            print_gaps(url, MODEL_NAME, repeats=given.repeats)


def print_gaps(url: str, model: str, *, repeats: int) -> None:
    """One line for each load and repeat."""
    for _ in range(repeats):
        for name, parts in loads().items():
            print_line({"beside": name, **measure(url, model, parts)})


if __name__ == "__main__":
    main()
