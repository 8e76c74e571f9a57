"""Spill: tensors kept by name in memory up to a limit, and beyond it in a file that vanishes."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Hashable
from typing import IO

import torch

DONT_NEED = 4  # MADV_DONTNEED of <sys/mman.h>


class Spill:
    """Tensors by key, written once each, until `clear`. limit: bytes in memory, None for all.

    Files are read and written, not mapped: mapped pages would count as the process's own.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._kept: dict[Hashable, torch.Tensor] = {}
        self._places: dict[Hashable, int] = {}
        self._held = self._end = 0
        self._file: IO[bytes] | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept or key in self._places

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a copy."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._limit is None or self._held + nbytes <= self._limit:
            self._kept[key] = tensor.detach().to("cpu", copy=True)
            self._held += nbytes
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="bitnest-spill-")  # noqa: SIM115
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < nbytes:
            done += os.pwrite(self._file.fileno(), data[done:], self._end + done)
        self._places[key] = self._end
        self._end += nbytes

    def copy_to(self, key: Hashable, out: torch.Tensor) -> None:
        """Fill `out`, of the shape and type of what was put.

        Raises:
            KeyError: nothing was.
        """
        if key in self._kept:
            out.copy_(self._kept[key])
            return
        place = self._places[key]
        assert self._file is not None
        read = torch.empty(out.shape, dtype=out.dtype)
        data = read.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(data):
            count = os.preadv(self._file.fileno(), [data[done:]], place + done)
            if not count:
                raise OSError("a spilled tensor was cut short")
            done += count
        out.copy_(read)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._places.clear()
        self._held = self._end = 0
        if self._file is not None:
            self._file.truncate(0)


def forget(mapped: torch.Tensor) -> None:
    """Take a file-backed tensor's pages out of the process; what they hold stays in the file."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.nbytes), DONT_NEED)
