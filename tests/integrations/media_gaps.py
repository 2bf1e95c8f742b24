"""How long other requests wait while a server prepares a long video or large pictures.

    python -m tests.integrations.media_gaps http://127.0.0.1:8000 --model m3

asks a running server of either host for a stream of text and for its health all the while, first
alone and then beside a video of 600 frames and four pictures of 12 megapixels. It prints the
largest gaps in seconds as JSON, one line per load and repeat. The goal is below one second. Beside
both stands the largest gap of a process that asks nobody: no server can do better there and then.
The server must admit four pictures; it may refuse the video's 123,745 tokens, for that is known
after the work that this measures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import httpx
from PIL import Image

from tests.integrations import media_files
from tests.integrations.media_cases import Part, picture, text, video

# Between two looks at /health, in seconds.
_POLL = 0.05
_TIMEOUT = 600
# A server's first requests do what later ones need not: imports, templates, compiled products.
_WARM_UP_S = 5


def loads() -> dict[str, list[Part]]:
    """What is prepared meanwhile, by name; every frame of the video is looked at."""
    frame = media_files.jpeg((9, 99, 200), size=(640, 480))
    photo = media_files.encoded(Image.effect_noise((4000, 3000), 50).convert("RGB"), "JPEG")
    return {
        "nothing": [],
        "a video of 600 frames": [video(media_files.mp4([frame] * 600, size=(640, 480)))],
        "four pictures of 12 megapixels": [picture(photo)] * 4,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("url", help="of a running server")
    parser.add_argument("--model", default="m3", help="its served model name")
    parser.add_argument("--repeats", type=int, default=3, help="of each load")
    given = parser.parse_args()
    for name, parts in loads().items():
        for _ in range(given.repeats):
            measured = {"beside": name, **measure(given.url, given.model, parts)}
            sys.stdout.write(json.dumps(measured) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
