"""What a checkpoint's files hold, from their headers alone: no weight is read, nothing imported."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor. `dtype` is safetensors' name of it, `file` the shard's name."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_checkpoint(folder: Path) -> list[TensorHeader]:
    """All tensors of a checkpoint, of every shard its index names.

    Raises
    ------
    ValueError : no weights, a shard missing or cut short, a tensor stored twice.
    """
    headers: dict[str, TensorHeader] = {}
    for file in shard_files(folder):
        for header in read_headers(file):
            if header.name in headers:
                raise ValueError(
                    f"tensor {header.name} is stored twice, in {headers[header.name].file} and in "
                    f"{header.file}; remove the file that is not part of the checkpoint"
                )
            headers[header.name] = header
    return list(headers.values())


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index if it has one.

    Raises
    ------
    ValueError : no weights, or a file of the index is missing; names the first few.
    """
    named = indexed_tensors(folder)
    files = sorted({folder / name for name in named.values()} or folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors files; is the download complete?")
    missing = [file.name for file in files if not file.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{len(missing)} of {len(files)} shards missing in {folder}: "
            f"{', '.join(missing[:3])}{more}; is the download complete?"
        )
    return files


def read_headers(file: Path) -> Iterator[TensorHeader]:
    """The tensors of one safetensors file.

    Raises
    ------
    ValueError : the file is shorter or longer than its header says, or has no header.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{file.name} ends within its header ({size:,} bytes); download it again"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(
                f"{file.name} has no readable header; is it a safetensors file?"
            ) from None
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(
            f"{file.name} has {size:,} bytes where its header promises {8 + length + end:,}; "
            "download it again"
        )
    for name, entry in tensors.items():
        first, last = entry["data_offsets"]
        yield TensorHeader(name, file.name, entry["dtype"], tuple(entry["shape"]), last - first)


def indexed_tensors(folder: Path) -> dict[str, str]:
    """Tensor -> file as the checkpoint's index has it; nothing without an index.

    Raises
    ------
    ValueError : the index cannot be read.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        return {}
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} cannot be read ({type(error).__name__}); download it again"
        ) from None
