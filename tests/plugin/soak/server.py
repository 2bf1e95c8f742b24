"""A small HTTP server that behaves as badly as a test wants, on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from m3_plugin.host.children import LOOPBACK

Behaviour = Callable[["Handler", dict[str, Any]], None]
METRICS = "vllm:num_preemptions_total 3.0\nvllm:prefix_cache_hits_total 7.0\n"


class Handler(BaseHTTPRequestHandler):
    """One request; what it does is the server's `behaviour`."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the screen."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.say(200, {"object": "list", "data": [{"id": "m3", "max_model_len": 8192}]})
        elif self.path == "/metrics":
            self.text(200, METRICS + f"vllm:kv_cache_usage_perc {self.server.used}\n")
        else:
            self.say(200, {})

    def do_POST(self) -> None:
        if self.headers.get("transfer-encoding") == "chunked":
            data = b"".join(self._chunks())
        else:
            data = self.rfile.read(int(self.headers["content-length"]))
        self.server.heard.append(data)
        if self.path != "/v1/chat/completions":
            self.say(200, {})
            return
        try:
            body = json.loads(data)
        except ValueError:
            self.say(400, {"error": {"message": "the body is no JSON"}})
            return
        self.server.behaviour(self, body)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def say(self, status: int, body: dict[str, Any]) -> None:
        """Answer in one piece."""
        self.text(status, json.dumps(body))

    def text(self, status: int, words: str) -> None:
        data = words.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, *events: dict[str, Any] | str, end: bool = True, pause_s: float = 0) -> None:
        """Answer event by event; without `end` the connection breaks off."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()
        for event in [*events, "[DONE]"] if end else events:
            words = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {words}\n\n".encode())
            self.wfile.flush()
            time.sleep(pause_s)

    def answer(self, body: dict[str, Any], said: str, *, pause_s: float = 0) -> None:
        """Answer as a host would, streamed or not, as often as is wanted."""
        indices = range(body.get("n", 1))
        usage = {"prompt_tokens": 9, "completion_tokens": body["max_tokens"]}
        if not body.get("stream"):
            choices = [{"index": i, "message": {"content": said}} for i in indices]
            self.say(200, {"choices": choices, "usage": usage})
            return
        events = [
            {"choices": [{"index": i, "delta": {"content": f" {word}"}}]}
            for word in said.split()
            for i in indices
        ]
        self.stream(*events, {"choices": [], "usage": usage}, pause_s=pause_s)


class BadServer(ThreadingHTTPServer):
    """See `serving`. `used` is the share of its cache that it says is held."""

    daemon_threads = True
    # a client that goes away in the middle is part of the game
    handle_error = lambda self, request, client_address: None  # noqa: E731

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__((LOOPBACK, 0), Handler)
        self.behaviour = behaviour
        self.used = 0.0
        self.heard: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}"


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[BadServer]:
    """A server while the context lasts."""
    server = BadServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
