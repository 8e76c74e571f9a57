"""The library of CPU kernels as other machines have it, for tests of every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bitnest.kernels import native
from bitnest.kernels.cpu import team
from bitnest.kernels.cpu.library import Inputs

MACHINES = {
    "native": (),
    "avx512": ("-march=skylake-avx512",),
    "avx2": ("-march=x86-64-v3",),
    "portable": ("-march=x86-64",),
}
NEEDS = {"avx512": "avx512bw", "avx2": "avx2", "portable": "sse2"}


@pytest.fixture(params=MACHINES)
def machine(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run as this machine's, or a lesser one's, with two threads."""
    info = Path("/proc/cpuinfo")
    if request.param != "native" and (
        not info.exists() or NEEDS[request.param] not in info.read_text()
    ):
        pytest.skip("this machine cannot run it")
    found = native.build_variant("cpu", MACHINES[request.param])
    if found is None:
        pytest.skip("no compiler")
    prepared = team.prepare(found)
    prepared.set_threads(2)
    monkeypatch.setattr(team, "library", lambda: prepared)


def planes_of(x: torch.Tensor, planes: int, block: int) -> tuple[Any, torch.Tensor, Any]:
    """Inputs (T, I) as planes of bytes under a scale per `block` columns: the struct, the numbers
    that it stands for in float64, and what the struct points to."""
    tokens, columns = x.shape
    padded, largest = -(-columns // 32) * 32, (127, 32512, 8323072)[planes - 1]
    count = -(-padded // block)
    cut = F.pad(x.double(), (0, count * block - columns)).view(tokens, count, block)
    scales = (cut.abs().amax(2) / largest).clamp_min(1e-30).float()
    q = (cut / scales.double()[..., None]).round()
    exact = (q * scales.double()[..., None]).flatten(1)[:, :columns]
    left, codes = q.flatten(1)[:, :padded].long(), []
    for p in range(planes):
        up = torch.div(left + 128, 256, rounding_mode="floor") if p < planes - 1 else 0 * left
        codes.insert(0, left - 256 * up)
        left = up
    held = torch.stack(codes, 1).to(torch.int8).contiguous()
    sums = held.view(tokens, planes, padded // 16, 16).sum(3, dtype=torch.int32)
    struct = Inputs(
        tokens, padded, planes, block, held.data_ptr(), scales.data_ptr(), sums.data_ptr(), None
    )
    return struct, exact, (held, scales, sums)
