"""The C library, with what attention, rotations, sparse and low-rank weights take from it."""

from __future__ import annotations

import ctypes
from functools import cache

from bitnest.kernels.cpu import library as base


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, None where they cannot be compiled."""
    found = base.library()
    return None if found is None else prepare(found)


def prepare(found: ctypes.CDLL) -> ctypes.CDLL:
    """Declare all functions of a build, and give it its threads."""
    from bitnest.kernels.cpu import attention, lowrank, rotate, sparse

    base.declare(found)
    for part in (attention, lowrank, rotate, sparse):
        part.declare(found)
    found.set_threads(base.threads())
    return found
