"""What a checkpoint's files hold, from their headers alone: no weight is read, nothing imported.

A checkpoint is a stranger's: whatever its index and headers say, the answer is a tensor list or a
`ValueError`, in time and memory that their own size bounds.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3_plugin.untrusted import MAX_JSON_BYTES, parse_json, read_json, shown

INDEX_FILE = "model.safetensors.index.json"
# Where M3.1's repository has a draft model with a config of its own.
DSPARK_FOLDER = "dspark"
# Of a tensor; the longest of M3's has about 90. File systems end at 255 for a file.
_MAX_NAME = 500
_MAX_FILE_NAME = 255
# bits per element; safetensors' F4 packs two of them
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ",), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}


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


def read_draft(folder: Path) -> list[TensorHeader]:
    """The tensors of the DSpark model beside a checkpoint, of which no host here reads any.

    Raises
    ------
    ValueError : it is there and cannot be read.
    """
    draft = folder / DSPARK_FOLDER
    return read_checkpoint(draft) if draft.is_dir() else []


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index if it has one.

    Raises
    ------
    ValueError : no weights, or a file of the index is missing or none; names the first few.
    """
    named = indexed_tensors(folder)
    names = {*named.values()} or {file.name for file in folder.glob("*.safetensors")}
    if strange := [name for name in names if not _is_shard_name(name)]:
        raise ValueError(f"{folder} holds a file of an unprintable name: {shown(min(strange))}")
    files = sorted(folder / name for name in names)
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
    size, header = _read_header(file)
    for name, entry in header.items():
        if name != "__metadata__":
            yield _tensor(name, entry, file=file.name, size=size)


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of tensors behind the header, and the header; both fit each other."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        # a pipe would be waited for
        raise ValueError(f"{file.name} is no file; is it a safetensors file?")
    size = found.st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{file.name} ends within its header ({size:,} bytes); download it again"
            )
        if length > MAX_JSON_BYTES:
            raise ValueError(
                f"{file.name} must have a header of at most {MAX_JSON_BYTES:,} bytes; it says "
                f"{length:,}; is it a safetensors file?"
            )
        try:
            header = parse_json(stream.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{file.name} has no readable header; is it a safetensors file?")
    behind = size - 8 - length
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    ends = (_offsets(entry) for entry in tensors)
    end = max((offsets[1] for offsets in ends if offsets is not None), default=0)
    if end != behind and all(_offsets(entry) is not None for entry in tensors):
        raise ValueError(
            f"{file.name} has {size:,} bytes where its header promises {8 + length + end:,}; "
            "download it again"
        )
    return behind, header


def _tensor(name: str, entry: Any, *, file: str, size: int) -> TensorHeader:
    """One entry of a header, if it says what safetensors says of a tensor within `size` bytes."""
    _require_name(name, file)
    offsets = _offsets(entry)
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    dtype = entry.get("dtype") if isinstance(entry, Mapping) else None
    # more dimensions than any tensor, and a product of many of them is slow
    is_shape = isinstance(shape, list) and len(shape) <= 16 and all(map(_is_count, shape))
    if not isinstance(shape, list) or not is_shape:
        raise ValueError(_unreadable(name, file, "shape", shape, "a list of lengths"))
    if not isinstance(dtype, str):
        raise ValueError(_unreadable(name, file, "dtype", dtype, "a name"))
    if offsets is None or offsets[1] > size:
        given = entry.get("data_offsets")
        raise ValueError(
            _unreadable(name, file, "data_offsets", given, f"[first, last] within {size:,} bytes")
        )
    stored = offsets[1] - offsets[0]
    if (bits := _BITS.get(dtype)) is not None and 8 * stored != math.prod(shape) * bits:
        rule = f"what {dtype} of shape {shown(shape)} takes"
        raise ValueError(_unreadable(name, file, "bytes", stored, rule))
    return TensorHeader(name, file, dtype, tuple(shape), stored)


def _unreadable(name: str, file: str, key: str, value: object, rule: str) -> str:
    return f"{key} of tensor {name} in {file} must be {rule}; got {shown(value)}; download it again"


def _offsets(entry: Any) -> tuple[int, int] | None:
    """First byte and the one after the last, None if the entry has none that make sense."""
    given = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if not isinstance(given, list) or len(given) != 2 or not all(map(_is_count, given)):
        return None
    first, last = given
    return (first, last) if first <= last else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def indexed_tensors(folder: Path) -> dict[str, str]:
    """Tensor -> file as the checkpoint's index has it; nothing without an index.

    Raises
    ------
    ValueError : the index cannot be read, or names something else than safetensors files beside it.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        return {}
    try:
        content = read_json(index)
    except (OSError, ValueError) as error:
        raise ValueError(f"{index} cannot be read ({error}); download it again") from None
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict):
        raise ValueError(f"{index} cannot be read (no table weight_map); download it again")
    for tensor, file in named.items():
        _require_name(tensor, INDEX_FILE)
        if not isinstance(file, str) or not _is_shard_name(file):
            raise ValueError(
                f"{index} must name safetensors files of its own folder; for tensor {tensor} got "
                f"{shown(file)}"
            )
    return named


def _require_name(tensor: str, file: str) -> None:
    if len(tensor) > _MAX_NAME or not tensor.isprintable():
        raise ValueError(
            f"{file} must name tensors in at most {_MAX_NAME} printable characters; got "
            f"{shown(tensor)}"
        )


def _is_shard_name(name: str) -> bool:
    """Whether it names a file beside the index: no folder, no way up, no other kind of file."""
    fits = len(name) <= _MAX_FILE_NAME and name.isprintable()
    return fits and name.endswith(".safetensors") and not set(name) & {"/", "\\"}
