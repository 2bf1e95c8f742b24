"""Pictures and videos as people send them: one list of requests, their answers, on both hosts.

The table of docs/media.md is made from this list: `python -m tests.integrations.media_cases`
writes it, `tests/plugin/test_media_table.py` compares it. A host's `test_server.py` sends all of it
to its running server through `MediaCases`. Files are made by code (`media_files.py`).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from PIL import Image

from m3_plugin.host.serving import ServerProcess
from m3_plugin.testing.prompts import colour_rgb, picture_prompt
from tests.integrations import media_files
from tests.integrations.media_files import encoded, jpeg, mkv, mp4

MODEL = "m3"
HOSTS = ("vllm", "sglang")
DOCUMENT = Path(__file__).parents[2] / "docs" / "media.md"
BEGIN, END = "<!-- media cases: begin -->", "<!-- media cases: end -->"

Part = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server must do: answer with a text, or refuse with a 4xx that says why.

    Attributes
    ----------
    text : of the answer; None if the request is refused
        An empty text is any answer.
    reason : part of the reason, as a regular expression
    """

    text: str | None = None
    reason: str = ""

    def in_words(self) -> str:
        """For the table; every refusal is a 4xx."""
        return "4xx" if self.text is None else f"200, {self.text.strip() or 'an answer'}"


@dataclass(frozen=True, kw_only=True)
class MediaCase:
    """One request.

    Attributes
    ----------
    what : for the table
    body : the request's body for a host, without the model
    right : of both hosts
    differs : what a host does instead, and whose difference it is
    """

    name: str
    what: str
    body: Callable[[str], dict[str, Any]]
    right: Answer
    differs: Mapping[str, tuple[Answer, str]] = field(default_factory=dict)

    def answer(self, host: str) -> Answer:
        return self.differs[host][0] if host in self.differs else self.right


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(data: bytes | str, **wishes: Any) -> Part:
    url = data if isinstance(data, str) else data_url(data, "image/png")
    return {"type": "image_url", "image_url": {"url": url, **wishes}}


def video(data: bytes | str, **wishes: Any) -> Part:
    url = data if isinstance(data, str) else data_url(data, "video/mp4")
    return {"type": "video_url", "video_url": {"url": url, **wishes}}


def text(words: str) -> Part:
    return {"type": "text", "text": words}


def question(*parts: Part, ask: int | None = None) -> list[dict[str, Any]]:
    """Messages that ask for the colour of one of the media among these parts."""
    media = [part for part in parts if part.get("type") != "text"]
    kind = "video" if media and all(part.get("type") == "video_url" for part in media) else "image"
    asked = (ask or 0) if len(media) > 1 else None
    prompt = picture_prompt(("red",) * max(len(media), 1), ask=asked, modality=kind)
    return [{"role": "user", "content": [*parts, dict(prompt.content[-1])]}]


def asks(*parts: Part, ask: int | None = None, **more: Any) -> Callable[[str], dict[str, Any]]:
    """A request that asks so, on every host."""
    return lambda host: {"messages": question(*parts, ask=ask), **more}


def plain(colour: str, size: tuple[int, int] = (112, 84), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour_rgb(colour))


def png(colour: str, size: tuple[int, int] = (112, 84)) -> bytes:
    return encoded(plain(colour, size), "PNG")


def frames(colour: str, count: int) -> list[bytes]:
    return [jpeg(colour_rgb(colour))] * count


def frame_list(parts: Sequence[bytes]) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(p).decode() for p in parts)


def animated(kind: str) -> bytes:
    """A second of red, then green."""
    more = [plain("green")]
    options = {"save_all": True, "append_images": more, "duration": 1000}
    if kind == "WEBP":
        options["lossless"] = True
    return encoded(plain("red"), kind, **options)


def palette() -> bytes:
    image = Image.new("P", (112, 84), 0)
    image.putpalette([0, 0, 0] * 256)
    return encoded(image, "PNG", transparency=0)


def sixteen_bits(value: int) -> bytes:
    import numpy as np

    return encoded(Image.fromarray(np.full((84, 112), value, np.uint16)), "PNG")


def turned_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(plain("red", (84, 168)), "JPEG", exif=exif, quality=95)


def lying_mp4() -> bytes:
    """Its first entry of times claims all the frames that 32 bits can."""
    data = mp4(frames("red", 3))
    at = data.index(b"stts") + 12
    return data[:at] + b"\xff" * 4 + data[at + 4 :]


def with_wish(
    data: bytes, wish: Mapping[str, Any], *, colour: str = "red"
) -> Callable[[str], dict[str, Any]]:
    """A video with a wish, where each host takes it: beside the URL, or in `media_io_kwargs`."""

    def body(host: str) -> dict[str, Any]:
        if host == "sglang":
            return {"messages": question(video(data, **wish))}
        return {"messages": question(video(data)), "media_io_kwargs": {"video": dict(wish)}}

    return body


def with_tool_result(*content: Part) -> Callable[[str], dict[str, Any]]:
    """Pictures that a tool returned, the second of two calls, and the question after them."""
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
        for i in range(2)
    ]
    return lambda host: {
        "messages": [
            {"role": "user", "content": " the river"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c0", "content": " the road"},
            {"role": "tool", "tool_call_id": "c1", "content": list(content)},
            *question(),
        ]
    }


def said_by_everyone(words: str) -> list[dict[str, Any]]:
    """Messages in which a system, a user, an assistant and a tool say the same; then a picture."""
    call = {"id": "c0", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    return [
        {"role": "system", "content": words},
        {"role": "user", "content": words},
        {"role": "assistant", "content": words, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c0", "content": words},
        {"role": "user", "content": [text(words), picture(png("red", (56, 56)))]},
    ]


def all_special_tokens(tokenizer: Any) -> str:
    """One text that holds every special token of a tokenizer of transformers."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return "a " + " b ".join(tokens) + " c"


def with_parallel_results(*pictures: Part) -> Callable[[str], dict[str, Any]]:
    """A picture in the result of each of several calls, and the question after them."""
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
        for i in range(len(pictures))
    ]
    results = [
        {"role": "tool", "tool_call_id": f"c{i}", "content": [part]}
        for i, part in enumerate(pictures)
    ]
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    first = {"role": "user", "content": " the river"}
    return lambda host: {"messages": [first, asked, *results, *question()]}


def history(*messages: dict[str, Any], last: Sequence[Part]) -> Callable[[str], dict[str, Any]]:
    return lambda host: {"messages": [*messages, *question(*last)]}


RED, WHITE, BLACK, GREEN = (Answer(text=f" {c}") for c in ("red", "white", "black", "green"))
REFUSED = Answer()
ANSWERED = Answer(text="")
CLIP = mp4(frames("red", 16), fps=4)


def _refused(reason: str) -> Answer:
    return Answer(reason=reason)


def _case(
    name: str,
    what: str,
    body: Callable[[str], dict[str, Any]],
    right: Answer,
    **differs: tuple[Answer, str],
) -> MediaCase:
    return MediaCase(name=name, what=what, body=body, right=right, differs=differs)


def _pictures() -> list[MediaCase]:
    clear = {
        "rgba-red": ("RGBA PNG, red under alpha 0", "RGBA", (255, 0, 0, 0), "PNG"),
        "rgba-black": ("RGBA PNG, black under alpha 0", "RGBA", (0, 0, 0, 0), "PNG"),
        "la": ("LA PNG, black under alpha 0", "LA", (0, 0), "PNG"),
        "webp-alpha": ("WebP, red under alpha 0", "RGBA", (255, 0, 0, 0), "WEBP"),
    }
    cases = [
        _case("png", "PNG", asks(picture(png("red"))), RED),
        _case("jpeg", "JPEG", asks(picture(jpeg(colour_rgb("green")))), GREEN),
    ]
    for name, (what, mode, value, kind) in clear.items():
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(Image.new(mode, (112, 84), value), kind, **options)
        cases.append(_case(name, what, asks(picture(data)), WHITE))
    cmyk = encoded(Image.new("CMYK", (112, 84), (0, 255, 255, 0)), "JPEG", quality=95)
    whole = png("red")
    return [
        *cases,
        _case(
            "palette", "palette PNG, its only colour transparent", asks(picture(palette())), WHITE
        ),
        _case("exif", "JPEG with EXIF orientation 6", asks(picture(turned_by_exif())), RED),
        _case("grey-16", "16-bit grey PNG of value 300", asks(picture(sixteen_bits(300))), BLACK),
        _case(
            "grey-16-white",
            "16-bit grey PNG of value 65,535",
            asks(picture(sixteen_bits(65_535))),
            WHITE,
        ),
        _case("cmyk", "CMYK JPEG", asks(picture(cmyk)), RED),
        _case("gif", "animated GIF: its first frame", asks(picture(animated("GIF"))), RED),
        _case("one-pixel", "1x1", asks(picture(png("red", (1, 1)))), RED),
        _case("strip", "2x400, an aspect of 200", asks(picture(png("red", (2, 400)))), RED),
        _case("thin", "1x201, an aspect beyond 200", asks(picture(png("red", (1, 201)))), REFUSED),
        _case(
            "large",
            "8,000x8,000",
            asks(picture(media_files.flat_png(8000, colour_rgb("red")))),
            RED,
        ),
        _case(
            "bomb",
            "decompression bomb, PNG of 20,000x20,000",
            asks(picture(media_files.bomb())),
            REFUSED,
        ),
        _case("empty-picture", "no bytes", asks(picture("data:image/png;base64,")), REFUSED),
        _case("cut-picture", "truncated PNG", asks(picture(whole[: len(whole) // 2])), REFUSED),
        _case("text-as-picture", "text as a PNG", asks(picture(b"hello" * 9)), REFUSED),
        _case(
            "no-base64",
            "a data URL that is not base64",
            asks(picture("data:image/png;base64,%%%")),
            REFUSED,
        ),
        _case("ftp", "a URL of another scheme", asks(picture("ftp://localhost/a.png")), REFUSED),
        _case(
            "null-url",
            "no URL",
            lambda host: {"messages": question({"type": "image_url"})},
            REFUSED,
        ),
        _case(
            "second-of-two",
            "two pictures, the second asked for",
            asks(picture(png("red")), picture(png("green")), ask=1),
            ANSWERED,
        ),
        _case(
            "same-twice",
            "the same picture twice, the second asked for",
            asks(picture(png("red")), picture(png("red")), ask=1),
            ANSWERED,
        ),
        _case(
            "too-many",
            "three pictures where two are allowed",
            asks(*[picture(png("red"))] * 3),
            REFUSED,
        ),
    ]


def _videos() -> list[MediaCase]:
    clip = mp4(frames("red", 16), fps=4)
    return [
        _case("mp4", "MP4 of 4 s", asks(video(clip)), RED),
        _case("one-frame", "MP4 of one frame", asks(video(mp4(frames("red", 1)))), RED),
        _case("three-frames", "MP4 of three frames", asks(video(mp4(frames("red", 3)))), RED),
        _case("five-frames", "MP4 of five frames", asks(video(mp4(frames("red", 5)))), RED),
        _case(
            "mkv",
            "MKV with a duration",
            asks(video(mkv(frames("red", 4), [0, 1, 2, 3], duration=4.0))),
            RED,
        ),
        _case(
            "mkv-no-duration",
            "MKV without a duration",
            asks(video(mkv(frames("red", 4), [0, 1, 2, 3], duration=None))),
            RED,
        ),
        _case(
            "webm-no-duration",
            "WebM without a duration, as browsers record it",
            asks(video(mkv(frames("red", 4), [0, 1, 2, 3], duration=None, kind=b"webm"))),
            RED,
        ),
        _case(
            "month",
            "MKV of 70 KB that claims 34 days",
            asks(video(media_files.endless_mkv())),
            _refused("86,400"),
            sglang=(RED, "its decoder counts the 81 frames that are there"),
        ),
        _case("empty-video", "no bytes", asks(video("data:video/mp4;base64,")), REFUSED),
        _case(
            "lying-mp4",
            "MP4 whose table claims 4,294,967,295 frames",
            asks(video(lying_mp4())),
            _refused("4,294,967"),
        ),
        _case(
            "lying-avi",
            "AVI whose header claims 4,294,967,295 frames",
            asks(video(media_files.avi(frames("red", 3), claimed=2**32 - 1))),
            _refused("4,294,967"),
        ),
        _case(
            "huge-frames",
            "MP4 whose header claims frames of 16,000x9,000",
            asks(video(mp4(frames("red", 3), size=(16_000, 9000)))),
            _refused("35,389,440"),
        ),
        _case("avi", "AVI", asks(video(media_files.avi(frames("red", 3), claimed=3))), RED),
        _case("zeros", "zeros", asks(video(bytes(64))), REFUSED),
        _case(
            "cut-video",
            "MP4 truncated in its frames",
            asks(video(clip[: len(clip) - 900])),
            RED,
            sglang=(REFUSED, "its decoder opens no such file"),
        ),
        _case("cut-header", "MP4 truncated in its header", asks(video(clip[:200])), REFUSED),
        _case("audio-only", "MP4 with sound only", asks(video(mp4([], handler=b"soun"))), REFUSED),
        _case(
            "rotated",
            "MP4 turned by a phone",
            asks(video(mp4(frames("red", 4), matrix=media_files.QUARTER))),
            RED,
        ),
        _case(
            "gif-video",
            "animated GIF as a video",
            asks(video(animated("GIF"))),
            ANSWERED,
        ),
        _case("webp-video", "animated WebP as a video", asks(video(animated("WEBP"))), ANSWERED),
        _case(
            "frame-list",
            "`data:video/jpeg`, five frames",
            asks(video(frame_list(frames("red", 5)))),
            RED,
        ),
        _case(
            "frame-list-sizes",
            "`data:video/jpeg`, frames of two sizes",
            asks(video(frame_list([jpeg((255, 0, 0)), jpeg((255, 0, 0), size=(56, 56))]))),
            REFUSED,
        ),
    ]


def _wishes() -> list[MediaCase]:
    cases = [
        _case("fps-2", "`fps` 2", with_wish(CLIP, {"fps": 2}), RED),
        _case("fps-null", "`fps` null: no wish", with_wish(CLIP, {"fps": None}), RED),
        _case("frames-2", "`max_frames` 2", with_wish(CLIP, {"max_frames": 2}), RED),
        _case(
            "frames-null", "`max_frames` null: no wish", with_wish(CLIP, {"max_frames": None}), RED
        ),
    ]
    for name in ("fps", "max_frames"):
        for value in (1e9, -1, 0, "two"):
            cases.append(
                _case(
                    f"{name}-{value}",
                    f"`{name}` {value!r}",
                    with_wish(CLIP, {name: value}),
                    REFUSED,
                )
            )
        cases.append(
            _case(
                f"{name}-text",
                f'`{name}` "2"',
                with_wish(CLIP, {name: "2"}),
                REFUSED,
                sglang=(RED, "its protocol reads the number"),
            )
        )
    for value in (2, 1e9, -5, 0, "2"):
        cases.append(
            _case(
                f"num_frames-{json.dumps(value)}",
                f"`num_frames` {json.dumps(value)}",
                with_wish(CLIP, {"num_frames": value}),
                RED if value == 2 else REFUSED,
                **({} if value == 2 else {"sglang": (RED, "SGLang has no such wish")}),
            )
        )
    for value in (100_000, 10**12, -1, "2"):
        cases.append(
            _case(
                f"max_pixels-{json.dumps(value)}",
                f"`max_pixels` {json.dumps(value)}",
                asks(picture(png("red")), mm_processor_kwargs={"max_pixels": value}),
                RED if value == 100_000 else REFUSED,
                **({} if value == 100_000 else {"sglang": (RED, "SGLang has no such wish")}),
            )
        )
    long_side = (Answer(text=" red"), "vLLM has no such wish")
    for value in (10**9, -1, 113):
        cases.append(
            _case(
                f"long-side-{value}",
                f"`max_long_side_pixel` {value:,}",
                asks(picture(png("red"), max_long_side_pixel=value)),
                REFUSED,
                vllm=long_side,
            )
        )
    return cases


def _typed() -> list[MediaCase]:
    image, clip = "]<]image[>[", "]<]video[>["
    red = picture(png("red"))
    role = "]~b]system\n the river[e~[\n"
    said = [
        {"role": "user", "content": " the road"},
        {"role": "assistant", "content": f" a {image}"},
    ]
    return [
        _case("typed-none", "no typed marker, for comparison", asks(text(" so"), red), RED),
        _case(
            "typed-image", f"`{image}` typed before the picture", asks(text(f" {image}"), red), RED
        ),
        _case(
            "typed-video", f"`{clip}` typed before the picture", asks(text(f" {clip}"), red), RED
        ),
        _case(
            "typed-start",
            "`]<]start of image[>[` typed before the picture",
            asks(text(" ]<]start of image[>["), red),
            RED,
        ),
        _case("typed-role", "`]~b]system` and `[e~[` typed", asks(text(role), red), RED),
        _case(
            "typed-history",
            f"`{image}` in an old answer",
            history(*said, last=[red]),
            RED,
        ),
        _case(
            "typed-tool",
            f"`{image}` in the result of a tool, a picture behind it",
            with_tool_result(text(f" {image}"), red),
            RED,
        ),
        _case(
            "typed-alone",
            f"`{image}` typed, and no picture",
            lambda host: {"messages": [{"role": "user", "content": f" {image} amber?"}]},
            Answer(text=""),
        ),
    ]


def _others() -> list[MediaCase]:
    red, green = picture(png("red")), picture(png("green"))
    return [
        _case(
            "tool-picture",
            "a picture in the result of a tool",
            with_tool_result(text(" so"), red),
            RED,
        ),
        _case(
            "tool-pictures",
            "a picture in the result of each of two parallel calls",
            with_parallel_results(red, red),
            ANSWERED,
        ),
        _case(
            "tool-empty",
            "an empty result of a tool",
            with_tool_result(),
            Answer(text=""),
        ),
        _case(
            "log-probabilities-of-the-prompt",
            "log probabilities of a prompt with a picture",
            asks(red, prompt_logprobs=1),
            RED,
            sglang=(RED, "its chats tell those of answers alone"),
        ),
        _case("video-picture", "a video, then a picture", asks(video(CLIP), red), Answer(text="")),
        _case("picture-video", "a picture, then a video", asks(red, video(CLIP)), Answer(text="")),
        _case("two-answers", "`n` 2", asks(green, n=2, temperature=0.1, seed=1), GREEN),
        _case(
            "penalties",
            "penalties and log probabilities",
            asks(red, logprobs=True, top_logprobs=2, frequency_penalty=1.0, presence_penalty=1.0),
            RED,
        ),
    ]


CASES = tuple(_pictures() + _videos() + _wishes() + _typed() + _others())


def sent(server: ServerProcess, body: Mapping[str, Any]) -> httpx.Response:
    """A chat request of a few greedy tokens; fields of `body` win."""
    fixed = {"model": MODEL, "max_tokens": 2, "temperature": 0}
    options = {"chat_template_kwargs": {"thinking_mode": "disabled"}}
    return httpx.post(
        f"{server.url}/v1/chat/completions",
        headers={"content-type": "application/json"},
        # httpx would refuse lone surrogates itself
        content=json.dumps({**fixed, **options, **body}).encode(),
        timeout=300,
    )


def resident_bytes(server: ServerProcess) -> int:
    """Memory of all processes of a server, which has a process group of its own."""
    import psutil

    launcher = psutil.Process(server.process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    return sum(process.memory_info().rss for process in family)


class MediaCases:
    """Derive beside `ServerCases`, whose `server` and `error_message` are used."""

    host: ClassVar[str]

    def error_message(self, body: dict[str, Any]) -> str:
        raise NotImplementedError

    def test_every_case_of_the_table(self, server: ServerProcess) -> None:
        with ThreadPoolExecutor(4) as threads:
            replies = list(threads.map(lambda case: sent(server, case.body(self.host)), CASES))
        wrong = [
            f"{case.name}: {found}"
            for case, reply in zip(CASES, replies, strict=True)
            if (found := self.fault(case, reply)) is not None
        ]
        assert not wrong, "\n".join(wrong)

    @pytest.mark.extended
    def test_no_hostile_request_harms_the_server(self, server: ServerProcess) -> None:
        from tests.integrations.hostile_media import corpus

        before = resident_bytes(server)
        with ThreadPoolExecutor(8) as threads:
            replies = list(threads.map(lambda hostile: sent(server, hostile.body), corpus()))
        codes = zip(corpus(), (reply.status_code for reply in replies), strict=True)
        assert [(one.name, code) for one, code in codes if not 200 <= code < 500] == []
        first = CASES[0]
        assert self.fault(first, sent(server, first.body(self.host))) is None
        # decoders and allocators keep something; a picture of the limit alone would be 500 MB
        assert resident_bytes(server) - before < 1 << 30

    def fault(self, case: MediaCase, reply: httpx.Response) -> str | None:
        """What is wrong with a reply; None if it is right."""
        right = case.answer(self.host)
        if right.text is None:
            if not 400 <= reply.status_code < 500:
                return f"{reply.status_code} instead of a refusal: {reply.text[:300]}"
            reason = self.error_message(reply.json())
            return None if re.search(right.reason, reason) and reason else f"reason {reason!r}"
        if reply.status_code != 200:
            return f"{reply.status_code}: {reply.text[:300]}"
        found = reply.json()
        texts = [choice["message"]["content"] for choice in found["choices"]]
        if right.text and any(text != right.text for text in texts):
            return f"{texts} instead of {right.text!r}"
        return None


# Tokens of prompts of the random checkpoint, which must be the same on both hosts.
TOKENS = {
    "one-pixel": 351,
    "strip": 376,
    "large": 923,
    "mp4": 436,
    "one-frame": 374,
    "three-frames": 405,
    "five-frames": 436,
    "mkv": 405,
    "mkv-no-duration": 405,
    "webm-no-duration": 405,
    "gif-video": 374,
    "webp-video": 374,
    "frame-list": 436,
    "fps-2": 498,
    "fps-null": 436,
    "frames-2": 374,
    "frames-null": 436,
    "typed-none": 362,
    "typed-image": 371,
    "typed-video": 371,
    "typed-start": 378,
    "typed-role": 385,
    "typed-history": 397,
    "typed-tool": 528,
    "typed-alone": 213,
    "tool-picture": 517,
    "tool-empty": 502,
    "video-picture": 438,
    "picture-video": 438,
}


def table() -> str:
    """The table of docs/media.md, from the list."""
    lines = ["| input | vLLM | SGLang |", "|---|---|---|"]
    for case in CASES:
        cells = []
        for host in HOSTS:
            why = f": {case.differs[host][1]}" if host in case.differs else ""
            cells.append(case.answer(host).in_words() + why)
        lines.append(f"| {case.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document_with_table() -> str:
    """docs/media.md with the table as it should be.

    Raises
    ------
    ValueError : the document lacks the marks around the table.
    """
    written = DOCUMENT.read_text()
    before, _, rest = written.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{DOCUMENT} needs {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(document_with_table())
