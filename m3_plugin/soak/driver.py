"""Asks a server over HTTP, many requests at a time, as clients good and bad would."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from m3_plugin.host.children import is_loopback
from m3_plugin.soak.judging import FAULTS, Model, Reply, Verdict, body_of, is_streamed, judge
from m3_plugin.soak.mixture import Mixture, Request
from m3_plugin.soak.needles import Needles, Prompt

_PIECES = 20
_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Outcome:
    """One request after it.

    Attributes
    ----------
    detail : what is wrong, in words
    beside : numbers of the requests that were under way when it began
    seconds : until its last byte; first_s until its first word, None where there was none
    """

    number: int
    kind: str
    verdict: Verdict
    detail: str
    status: int
    seconds: float
    first_s: float | None
    prompt_tokens: int
    completion_tokens: int
    beside: tuple[int, ...]

    @property
    def is_fault(self) -> bool:
        """Whether no server may do that."""
        return self.verdict in FAULTS


class Driver:
    """Clients of one server.

    Parameters
    ----------
    url : of the server, without "/v1"
    model : what it serves
    mixture, needles : what is asked
    concurrency : requests at a time
    timeout_s : a request without an end by then is lost
    reset_path : what empties the prefix cache, "" where nothing does
    """

    def __init__(
        self,
        url: str,
        model: Model,
        *,
        mixture: Mixture,
        needles: Needles,
        concurrency: int,
        timeout_s: float,
        api_key: str | None = None,
        reset_path: str = "",
    ) -> None:
        self.url = url
        self.model = model
        self.mixture = mixture
        self.needles = needles
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.reset_path = reset_path
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._under_way: set[int] = set()

    async def drive(
        self,
        seconds: float,
        *,
        first: int,
        on_outcome: Callable[[Outcome], None],
        alive: Callable[[], bool],
    ) -> int:
        """Keep requests under way for so long, then let them end.

        Parameters
        ----------
        first : number of the first request
        on_outcome : told of each request when it has ended
        alive : whether it makes sense to go on; asked after a fault

        Returns
        -------
        The number of the request that would have come next.
        """
        upcoming = first
        end = 0.0
        stopped = False

        async def client(http: httpx.AsyncClient) -> None:
            nonlocal upcoming, stopped
            while time.monotonic() < end and not stopped:
                number, upcoming = upcoming, upcoming + 1
                outcome = await self.ask(http, self.mixture.request(number))
                on_outcome(outcome)
                if outcome.is_fault and not alive():
                    stopped = True

        async with self._http() as http:
            end = time.monotonic() + seconds
            await asyncio.gather(*(client(http) for _ in range(self.concurrency)))
        return upcoming

    async def all_at_once(self, numbers: tuple[int, ...]) -> list[Outcome]:
        """Ask these requests at the same time, however many they are."""
        async with self._http() as http:
            asked = (self.ask(http, self.mixture.request(number)) for number in numbers)
            return list(await asyncio.gather(*asked))

    async def probe(self) -> None:
        """One small request whose answer nobody judges."""
        word = {"role": "user", "content": "x"}
        body = {"model": self.model.name, "messages": [word], "max_tokens": 1}
        async with self._http() as http:
            with suppress(httpx.HTTPError):
                await http.post(_PATH, json=body, timeout=self.timeout_s)

    async def ask(self, http: httpx.AsyncClient, request: Request) -> Outcome:
        """Ask one request and judge the answer."""
        beside = tuple(sorted(self._under_way))
        self._under_way.add(request.number)
        has_answer = not request.must_be_refused and request.kind != "reset"
        # making a prompt of 32K words takes long enough to be felt by those who are waiting
        prompt = await asyncio.to_thread(self.needles.prompt, request) if has_answer else None
        reply = Reply()
        start = time.perf_counter()
        first_s: list[float] = []

        def heard() -> None:
            if not first_s:
                first_s.append(time.perf_counter() - start)

        try:
            async with asyncio.timeout(self.timeout_s):
                await self._exchange(http, request, prompt, reply, heard)
        except TimeoutError:
            reply.status, reply.reason = 0, f"no end within {self.timeout_s:.0f} s"
        except (httpx.HTTPError, OSError) as error:
            reply.finished = False
            reply.reason = f"{type(error).__name__}: {error}"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reply.finished = False
            reply.reason = f"what came is no answer of this protocol: {error!r}"
        finally:
            self._under_way.discard(request.number)
        verdict, detail = judge(request, prompt, reply)
        return Outcome(
            number=request.number,
            kind=request.kind,
            verdict=verdict,
            detail=detail,
            status=reply.status,
            seconds=round(time.perf_counter() - start, 3),
            first_s=round(first_s[0], 3) if first_s else None,
            prompt_tokens=reply.usage.get("prompt_tokens", 0),
            completion_tokens=reply.usage.get("completion_tokens", 0),
            beside=beside,
        )

    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=30),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency),
            trust_env=not is_loopback(self.url),
            # reading the certificates of all the world takes longer than a request
            verify=self.url.startswith("https:"),
        )

    async def _exchange(
        self,
        http: httpx.AsyncClient,
        request: Request,
        prompt: Prompt | None,
        reply: Reply,
        heard: Callable[[], None],
    ) -> None:
        """Post, and read into `reply`; a client that leaves is cut off here."""
        if request.kind == "reset":
            answer = await http.post(self.reset_path)
            reply.status, reply.reason, reply.finished = answer.status_code, answer.text, True
            return
        body = body_of(request, prompt, self.model)
        content: Any = _dribbled(body, request.pause_s) if request.kind == "dribble" else body
        try:
            limit = request.leave_after_s if request.kind == "abort" else None
            async with (
                asyncio.timeout(limit),
                http.stream("POST", _PATH, content=content) as answer,
            ):
                reply.status = answer.status_code
                if answer.status_code != httpx.codes.OK or not is_streamed(request):
                    _read_whole(await answer.aread(), reply)
                    heard()
                else:
                    await _read_events(answer, request, reply, heard)
        except TimeoutError:
            # of ours: that of `ask` comes as a cancellation
            reply.left = True


async def _dribbled(body: bytes, pause_s: float) -> AsyncIterator[bytes]:
    """A body in pieces, as from a client on a bad line."""
    size = max(1, -(-len(body) // _PIECES))
    for begin in range(0, len(body), size):
        yield body[begin : begin + size]
        await asyncio.sleep(pause_s)


def _read_whole(data: bytes, reply: Reply) -> None:
    """A reply in one piece: an answer or a refusal."""
    try:
        found = json.loads(data)
    except ValueError:
        reply.reason = data[:400].decode(errors="replace")
        return
    if reply.status != httpx.codes.OK:
        reply.reason = _reason_in(found)
        return
    for choice in found.get("choices", ()):
        reply.said[choice["index"]] = choice["message"].get("content") or ""
    _note_usage(found.get("usage"), reply)
    reply.finished = True


def _reason_in(found: Any) -> str:
    """The words of a refusal, wherever a host puts them."""
    if not isinstance(found, dict):
        return str(found)
    error = found.get("error", found)
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or found.get("detail") or found)


async def _read_events(
    answer: httpx.Response, request: Request, reply: Reply, heard: Callable[[], None]
) -> None:
    """A reply as server-sent events, to their end."""
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            reply.finished = not reply.reason
            return
        event = json.loads(data)
        if "error" in event or event.get("object") == "error":
            # an error in a stream comes after its 200; it is as lost as a broken connection
            reply.reason = f"in the stream: {_reason_in(event)}"
            continue
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                heard()
                index = choice["index"]
                reply.said[index] = reply.said.get(index, "") + text
        _note_usage(event.get("usage"), reply)
        if request.pause_s:
            await asyncio.sleep(request.pause_s)


def _note_usage(usage: dict[str, Any] | None, reply: Reply) -> None:
    for name in ("prompt_tokens", "completion_tokens"):
        if usage and isinstance(usage.get(name), int):
            reply.usage[name] = usage[name]
