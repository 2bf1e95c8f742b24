"""Pictures and videos through the real engine: prompts and features as transformers makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m3_plugin.testing.prompts import PicturePrompt, colour_rgb, picture_prompt
from tests.integrations import golden
from tests.integrations.sglang.engine import EngineProcess


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint("engine")


def noise_image(width: int, height: int) -> Any:
    from PIL import Image

    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(3))
    return Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("size", [(120, 90), (28, 28), (1000, 700)])
def test_image_tokens_equal_transformers(
    random_engine: EngineProcess, checkpoint: Path, size: tuple[int, int], as_ids: bool
) -> None:
    """Prompt length and greedy tokens; 1000x700 is shrunk by transformers' area rule."""
    from transformers import AutoProcessor

    image = noise_image(*size)
    processor = AutoProcessor.from_pretrained(checkpoint)
    text = "the old man ]<]image[>[ and the sea" + " of words" * 400
    inputs = processor(text=text, images=[image], return_tensors="pt")
    token_ids = inputs.pop("input_ids")[0].tolist()
    inputs.pop("attention_mask")
    expected = golden.greedy(checkpoint, token_ids, num_tokens=6, **inputs)
    prompt = {"input_ids": processor.tokenizer(text).input_ids} if as_ids else {"prompt": text}
    (ours,) = random_engine.generate(
        [{**prompt, "image_data": [image]}], max_tokens=6, ignore_eos=True
    )
    assert ours.num_prompt_tokens == len(token_ids) > 512
    assert ours.token_ids == expected


def test_pictures_are_part_of_the_cached_prefix(random_engine: EngineProcess) -> None:
    """The same text about another picture must not be served from the first one's pages."""
    text = "]<]image[>[" + " of words" * 300
    first, second = noise_image(112, 112), noise_image(84, 112).resize((112, 112))
    random_engine.flush()
    outputs = [
        random_engine.generate([{"prompt": text, "image_data": [image]}], max_tokens=1)[0]
        for image in (first, second, first)
    ]
    assert outputs[0].num_cached_tokens == outputs[1].num_cached_tokens == 0
    assert outputs[2].num_cached_tokens >= 512


def request(prompt: PicturePrompt) -> dict[str, Any]:
    from PIL import Image

    if prompt.modality == "image":
        images = [
            Image.new("RGB", (112 + 28 * i, 84), colour_rgb(colour))
            for i, colour in enumerate(prompt.colours)
        ]
        return {"prompt": prompt.text, "image_data": images}
    frames = [
        torch.tensor(colour_rgb(colour), dtype=torch.uint8).view(1, 3, 1, 1).expand(8, 3, 56, 84)
        for colour in prompt.colours
    ]
    return {"prompt": prompt.text, "video_data": frames}


@pytest.mark.every_release
@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("colour", ["red", "cyan", "black"])
def test_colour_of_one_picture(
    constructed_engine: EngineProcess, modality: str, colour: str
) -> None:
    prompt = picture_prompt((colour,), modality=modality)
    (output,) = constructed_engine.generate([request(prompt)], max_tokens=prompt.max_tokens)
    assert tuple(output.token_ids) == prompt.expected_ids


def video_file(path: Path, frames: torch.Tensor, *, fps: int) -> Path:
    """Write uncompressed YUV4MPEG2, which needs no encoder.

    Parameters
    ----------
    frames : uint8 [n, 3, height, width]
    """
    height, width = frames.shape[2:]
    red, green, blue = frames.float().unbind(1)
    planes = torch.stack(
        [
            16 + 0.257 * red + 0.504 * green + 0.098 * blue,
            128 - 0.148 * red - 0.291 * green + 0.439 * blue,
            128 + 0.439 * red - 0.368 * green - 0.071 * blue,
        ],
        dim=1,
    )
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip C444\n".encode())
        for frame in planes.round().to(torch.uint8):
            file.write(b"FRAME\n" + frame.numpy().tobytes())
    return path


@pytest.mark.parametrize("colours", [("red",), ("cyan",)])
def test_colour_of_a_video_file(
    constructed_engine: EngineProcess,
    constructed_checkpoint: Path,
    tmp_path: Path,
    colours: tuple[str, ...],
) -> None:
    """SGLang decodes 3.5 s at 4 frames per second; frames of seconds 0 to 3 and the last are seen.

    Their time stamps are written into the prompt, as transformers' processor does.
    """
    from transformers import AutoProcessor

    prompt = picture_prompt(colours, modality="video")
    colour = torch.tensor(colour_rgb(colours[0]), dtype=torch.uint8)
    frames = colour.view(1, 3, 1, 1).expand(14, 3, 56, 84)
    path = video_file(tmp_path / "video.y4m", frames, fps=4)
    (output,) = constructed_engine.generate(
        [{"prompt": prompt.text, "video_data": str(path)}], max_tokens=prompt.max_tokens
    )
    assert tuple(output.token_ids) == prompt.expected_ids
    indices = [0, 4, 8, 12, 13]
    inputs = AutoProcessor.from_pretrained(constructed_checkpoint)(
        text=prompt.text,
        videos=[frames[indices]],
        video_metadata=[{"total_num_frames": 14, "fps": 4.0, "frames_indices": indices}],
        videos_kwargs={"do_sample_frames": False},
        return_tensors="pt",
    )
    assert output.num_prompt_tokens == inputs.input_ids.shape[1]


@pytest.mark.parametrize("ask", [0, 1, 2])
def test_one_of_several_pictures(constructed_engine: EngineProcess, ask: int) -> None:
    prompt = picture_prompt(("green", "magenta", "yellow"), ask=ask)
    (output,) = constructed_engine.generate([request(prompt)], max_tokens=prompt.max_tokens)
    assert tuple(output.token_ids) == prompt.expected_ids


def test_picture_beyond_the_block_budget(constructed_engine: EngineProcess) -> None:
    prompt = picture_prompt(("blue",), num_filler_tokens=1500)
    (output,) = constructed_engine.generate([request(prompt)], max_tokens=prompt.max_tokens)
    assert tuple(output.token_ids) == prompt.expected_ids
