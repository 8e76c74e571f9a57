"""The memory budget of a compression run: what fits is decided before work starts.

`--memory` bounds the whole process. From it come off what the process already uses and one decoder
block in float32 with the copies its reading needs; an eighth of the rest may hold hidden states
(more goes to a file) and half of it the Hessians and working copies of one chunk of experts.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitnest.errors import RecipeError
from bitnest.sites import ENDS, Site
from bitnest.skeleton import Skeleton

WORKING_COPIES = 10  # arrays of the size of a matrix or Hessian alive at once while solving
FOLDING_COPIES = 3  # of a float32 block beside it while folds are proven: one in float64, changes
FLOAT = 4
WORK = 32 << 20  # bytes for one chunk of experts without --memory: batches that fit caches
ENDS_WORK = 256 << 20  # bytes for one slice of embedding or head, at most


@dataclass(frozen=True)
class Budget:
    """What may be held at once.

    hidden: bytes of hidden states in memory, None for all. work: bytes for one chunk of experts.
    hessians: bytes for Hessians that are kept beside hidden states and the work on the largest
    matrix, None for all. ends: bytes for one slice of the embedding or head. spare: bytes
    for that and its Hessian, beside the matrix as it is stored, None for all.
    """

    hidden: int | None
    work: int
    hessians: int | None = None
    ends: int = ENDS_WORK
    spare: int | None = None

    @classmethod
    def plan(cls, skeleton: Skeleton, sites: Sequence[Site], memory: int | None) -> Budget:
        """Divide `memory` bytes.

        Raises:
            RecipeError: one block alone is larger than that.
        """
        if memory is None:
            return cls(None, WORK)
        block = max(sum(p.numel() for p in block.parameters()) * FLOAT for block in skeleton.blocks)
        largest = max(p.numel() for b in skeleton.blocks for p in b.parameters())
        within = [site for site in sites if site.kind not in ENDS]
        matrix = max(_matrix_bytes(group) for group in _solved_together(within))
        fixed = resident_bytes() + block + 2 * largest * skeleton.checkpoint.dtype.itemsize
        rest = memory - fixed
        if rest < matrix:
            enough = math.ceil(10 * (fixed + 2 * matrix) / 2**30) / 10 + 0.1
            raise RecipeError(
                f"--memory {_size(memory)} is too little: one block and the work on its largest "
                f"matrix need {_size(fixed + matrix)}",
                hint=f"--memory {enough:.1f}GiB or more",
            )
        ends = [site for site in sites if site.kind in ENDS]
        held = max((site.numel for site in ends), default=0) * skeleton.checkpoint.dtype.itemsize
        spare = max(memory - resident_bytes() - 2 * held - rest // 8, 0)
        square = WORKING_COPIES * FLOAT * max((site.shape[1] ** 2 for site in ends), default=0)
        return cls(
            rest // 8,
            min(WORK, rest // 2),
            rest - rest // 4 - matrix,
            min(ENDS_WORK, max(spare - square, 0)),
            spare,
        )

    @staticmethod
    def check_folding(skeleton: Skeleton, memory: int | None) -> None:
        """Refuse to prove folds, in float64, in less memory than that takes.

        Raises:
            RecipeError: it is too little.
        """
        block = max(sum(p.numel() for p in block.parameters()) * FLOAT for block in skeleton.blocks)
        need = resident_bytes() + (1 + FOLDING_COPIES) * block
        if memory is not None and memory < need:
            raise RecipeError(
                f"--memory {_size(memory)} is too little for --fold: one block and its proof in "
                f"float64 need {_size(need)}",
                hint=f"--memory {math.ceil(10 * need / 2**30) / 10 + 0.1:.1f}GiB or more, or leave "
                "out --fold",
            )

    def expert_chunk(self, sites: Sequence[Site]) -> int:
        """How many experts of a layer are solved at once."""
        experts: dict[int | None, list[Site]] = {}
        for site in sites:
            experts.setdefault(site.expert, []).append(site)
        largest = max(_matrix_bytes(group) for group in experts.values())
        return max(1, min(len(experts), self.work // largest))


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f}MiB"


def _solved_together(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that may be stacked: those of one parent module and width, or of one expert."""
    together: dict[tuple[str, int | None, int], list[Site]] = {}
    for site in sites:
        parent = site.module if site.param != "weight" else site.module.rpartition(".")[0]
        together.setdefault((parent, site.expert, site.shape[1]), []).append(site)
    return list(together.values())


def _matrix_bytes(sites: Sequence[Site]) -> int:
    """Working bytes for matrices solved together, Hessian included."""
    width = max(site.shape[1] for site in sites)
    return WORKING_COPIES * FLOAT * (width * width + sum(site.numel for site in sites))


def resident_bytes() -> int:
    """Memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * 4096


def release() -> None:
    """Give freed memory back to the system, where the C library offers it (glibc).

    Blocks come and go by the hundred megabytes; without this the process keeps the largest mix it
    ever held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
