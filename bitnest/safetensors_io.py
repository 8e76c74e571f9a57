"""Reading and writing .safetensors files tensor by tensor, with every byte accounted for.

A file is 8 bytes N (little-endian), N bytes of JSON header, then the tensors' bytes without holes.
Written by hand here for two reasons: reads are plain `pread` of one range, so memory stays at one
tensor (a memory map counts every page it touched), and the writer keeps the order it is given, so
that what is read together lies together. Files are byte-identical for identical input and open
with the safetensors library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnest.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
CHUNK = 8 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, type name, shape, and byte range within the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.stop - self.start


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names and places of all tensors of `file`, checked against its real size.

    Raises:
        CheckpointError: unreadable, truncated, holes or overlaps, sizes that do not match shapes.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    "not a safetensors file, or cut short", where=str(file), hint=_REFETCH
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(
            f"cannot read: {error.strerror}", where=str(file), hint="check the file's permissions"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            "the safetensors header is damaged", where=str(file), hint=_REFETCH
        ) from error
    infos = {
        name: _tensor_info(file, name, entry, 8 + length)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise CheckpointError(
                f"tensor '{name}' leaves a hole or overlaps another", where=str(file), hint=_REFETCH
            )
        end = info.stop
    if end != size:
        raise CheckpointError(
            f"the file has {size:,} bytes, its header describes {end:,}",
            where=str(file),
            hint=_REFETCH,
        )
    return infos


_REFETCH = "the download or copy may have stopped early: fetch this file again"


def _tensor_info(file: Path, name: str, entry: object, base: int) -> TensorInfo:
    try:
        assert isinstance(entry, dict)
        start, stop = (int(x) + base for x in entry["data_offsets"])
        shape = tuple(int(x) for x in entry["shape"])
        dtype = str(entry["dtype"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the header entry of tensor '{name}' is damaged", where=str(file), hint=_REFETCH
        ) from error
    if dtype in DTYPES:
        expected = DTYPES[dtype].itemsize
        for dim in shape:
            expected *= dim
        if expected != stop - start:
            raise CheckpointError(
                f"tensor '{name}' has {stop - start:,} bytes, its shape needs {expected:,}",
                where=str(file),
                hint=_REFETCH,
            )
    return TensorInfo(file, dtype, shape, start, stop)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """One tensor, read from its byte range alone.

    Raises:
        CheckpointError: the type is unknown or the file ended early.
    """
    if info.dtype not in DTYPES:
        raise CheckpointError(f"unknown tensor type {info.dtype}", where=str(info.file))
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    read_range(info.file, info.start, buffer)
    return buffer.view(DTYPES[info.dtype]).view(info.shape)


def read_range(file: Path, start: int, buffer: torch.Tensor) -> None:
    """Fill the uint8 `buffer` from `file` at byte `start`.

    Raises:
        CheckpointError: the file ended early.
    """
    view = byte_view(buffer)
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise CheckpointError("the file ended early", where=str(file), hint=_REFETCH)
            done += count


def byte_view(buffer: torch.Tensor) -> memoryview:
    """The bytes of a one-dimensional uint8 tensor, not copied."""
    array: Any = buffer.numpy()
    return memoryview(array)


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its description now, its values when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        count = self.dtype.itemsize
        for dim in self.shape:
            count *= dim
        return count


def entry(name: str, tensor: torch.Tensor) -> Entry:
    """An `Entry` of a tensor already at hand."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_file(file: Path, entries: Sequence[Entry]) -> tuple[int, str]:
    """Write `entries` in their order; the file appears under its name only when whole.

    Returns its size in bytes and the sha256 of its contents.
    """
    text = header_text([(item.name, item.dtype, item.shape) for item in entries])
    offset = sum(item.nbytes for item in entries)
    digest = hashlib.sha256()
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            for chunk in _file_bytes(text, entries):
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, file)
    return 8 + len(text) + offset, digest.hexdigest()


def header_text(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The JSON header of a file of tensors (name, type, shape), in their order, padded to 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _file_bytes(header: bytes, entries: Sequence[Entry]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for item in entries:
        tensor = item.values().detach().cpu().contiguous()
        assert tensor.dtype == item.dtype and tuple(tensor.shape) == item.shape, item.name
        flat = tensor.view(-1)
        if flat.stride(0) != 1:  # a single value may keep the stride of what it was cut from
            flat = flat.clone(memory_format=torch.contiguous_format)
        data = byte_view(flat.view(torch.uint8))
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]
