"""Memory for weights: 64-byte aligned pieces of large mappings, in huge pages where Linux has them.

Reading a weight touches every page of it once; with pages of 4 KiB the walks through the page table
cost about a tenth of the bandwidth. A mapping lives as long as any tensor cut from it.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

import torch

CHUNK = 32 << 20  # bytes of a mapping that small pieces share
HUGE = 2 << 20
ALIGN = 64
SLACK = 4096  # after each mapping: kernels fetch ahead

_lock = threading.Lock()
_open: list[torch.Tensor] = []  # the mapping that still has room: what is left of it


def allocate(count: int) -> torch.Tensor:
    """uint8 (count,), aligned to 64 bytes, zero."""
    size = -(-count // ALIGN) * ALIGN
    if size > CHUNK // 4:
        return _map(size)[:count]
    with _lock:
        if not _open or len(_open[0]) < size:
            _open[:] = [_map(CHUNK)]
        left = _open[0]
        _open[0] = left[size:]
    return left[:count]


def hold(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor, contiguous, in the arena."""
    count = tensor.numel() * tensor.element_size()
    copy = allocate(count).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _map(size: int) -> torch.Tensor:
    """A mapping of its own that starts at a huge page."""
    whole = -(-(size + SLACK) // HUGE) * HUGE + (HUGE if size >= HUGE else 0)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(size + ALIGN, dtype=torch.uint8)
    memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    start = -tensor.data_ptr() % HUGE if size >= HUGE else 0
    return tensor[start : start + size]
