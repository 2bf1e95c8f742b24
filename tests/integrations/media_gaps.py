"""How long other requests wait while a server prepares a long video or large pictures.

    python -m tests.integrations.media_gaps http://127.0.0.1:8000 --model m3

asks a running server of either host for a stream of text and for its health all the while, first
alone and then beside a video of 600 frames and four pictures of 12 megapixels. It prints the
largest gaps in seconds as JSON. The goal is below one second; other load on the machine counts too.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from PIL import Image

from tests.integrations import media_files
from tests.integrations.media_cases import Part, picture, text, video

# Between two looks at /health, in seconds.
_POLL = 0.05
_TIMEOUT = 600


def loads() -> dict[str, list[Part]]:
    """What is prepared meanwhile, by name; every frame of the video is looked at."""
    frame = media_files.jpeg((9, 99, 200), size=(640, 480))
    photo = media_files.encoded(Image.effect_noise((4000, 3000), 50).convert("RGB"), "JPEG")
    return {
        "nothing": [],
        "a video of 600 frames": [video(media_files.mp4([frame] * 600, size=(640, 480)))],
        "four pictures of 12 megapixels": [picture(photo)] * 4,
    }


def largest_gap(events: Iterator[Any], ended: threading.Event) -> float:
    """Longest time between two events, in seconds, until there are no more or it has `ended`."""
    largest, last = 0.0, time.monotonic()
    for _ in events:
        now = time.monotonic()
        largest, last = max(largest, now - last), now
        if ended.is_set():
            break
    return largest


def streamed(url: str, model: str) -> Iterator[str]:
    """Events of one answer after another, from the first token of each."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": 512,
        "ignore_eos": True,
        "stream": True,
    }
    while True:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=_TIMEOUT
        ) as reply:
            reply.raise_for_status()
            yield from reply.iter_lines()


def healths(url: str) -> Iterator[int]:
    while True:
        yield httpx.get(f"{url}/health", timeout=_TIMEOUT).status_code
        time.sleep(_POLL)


def measure(url: str, model: str, parts: list[Part]) -> dict[str, Any]:
    """Largest gaps while `parts` are answered, and the status and seconds of that."""
    ended = threading.Event()
    gaps: dict[str, float] = {}

    def watch(name: str, events: Callable[[], Iterator[Any]]) -> None:
        gaps[name] = largest_gap(events(), ended)

    watched = {"stream": lambda: streamed(url, model), "health": lambda: healths(url)}
    threads = [threading.Thread(target=watch, args=item) for item in watched.items()]
    for thread in threads:
        thread.start()
    time.sleep(2)
    content = [*parts, text("What is this?")]
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    begin = time.monotonic()
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=_TIMEOUT)
    seconds = time.monotonic() - begin
    ended.set()
    for thread in threads:
        thread.join()
    return {"status": reply.status_code, "seconds": seconds, "largest gaps": gaps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("url", help="of a running server")
    parser.add_argument("--model", default="m3", help="its served model name")
    given = parser.parse_args()
    for name, parts in loads().items():
        measured = {"beside": name, **measure(given.url, given.model, parts)}
        sys.stdout.write(json.dumps(measured) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
