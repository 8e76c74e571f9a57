"""Preflight: what a run will take and what the result will do, before hours are spent.

    disk     the artifact, to the byte (`sizing`), and what is free where it goes
    memory   what the process holds now, one block in float32 with the copies its reading needs, the
             hidden states of all samples, an expert layer's routed tokens, and the work on the
             largest matrices
    time     products of the calibration passes and of GPTQ, over this machine's measured rate
             for products, times OVERHEAD
    speed    one token reads every active weight once: bytes that move over the memory's bandwidth
             (roofline); measured here by a read, from data sheets for named machines

What does not fit a machine's memory is read from further away. For batches with a key-value cache
of K tokens in memory, prompts of p and answers of g tokens, MoE-Lens bounds the throughput by

    T = PME * K / delta,   PME = 2 (p + g) / ((2 p + g) g),   delta = model bytes / I/O bandwidth

Every figure is an estimate and says so; after the run it is held against what was measured.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import torch

from bitnest.errors import RecipeError
from bitnest.formats import AnyFormat, DenseFormat, widths
from bitnest.quantize.compress import Job
from bitnest.quantize.memory import FOLDING_COPIES, WORK, WORKING_COPIES, resident_bytes
from bitnest.quantize.sizing import Sizes, cache_bytes
from bitnest.reduced_config import TOP_K, first_of

OVERHEAD = 2.5  # of a run over its products alone; measured on models of 4 to 22 M parameters
GPTQ_FLOPS = 3.0  # per O I^2, the sweep's updates and the error; I^3 apart
NESTING = 5e-6  # seconds a weight for codes of all widths; measured on 22 M parameters
BLIND = 0.4  # of it without samples
PACKING = 200e6  # bytes of source a second, rounded with clipping; docs/performance.md
LIBRARIES = 200 << 20  # bytes that libraries take once they run; measured on the embedded model
PROMPT, ANSWER = 512, 128  # tokens, for the offloading bound


@dataclass(frozen=True)
class Machine:
    """Bandwidths in bytes per second, memory in bytes. io: of the link that weights come over when
    they do not fit. source: where the figures are from."""

    name: str
    bandwidth: float
    memory: float
    io: float
    source: str


GB, GIB = 1e9, float(1 << 30)
MACHINES = {
    m.name: m
    for m in (
        Machine("a100", 2039 * GB, 80 * GB, 32 * GB, "NVIDIA A100 80GB SXM data sheet, PCIe 4"),
        Machine("h100", 3350 * GB, 80 * GB, 64 * GB, "NVIDIA H100 SXM data sheet, PCIe 5"),
        Machine("h200", 4800 * GB, 141 * GB, 64 * GB, "NVIDIA H200 data sheet, PCIe 5"),
        Machine("l40s", 864 * GB, 48 * GB, 32 * GB, "NVIDIA L40S data sheet, PCIe 4"),
        Machine("rtx4090", 1008 * GB, 24 * GB, 32 * GB, "NVIDIA RTX 4090 specification, PCIe 4"),
        Machine("rtx5090", 1792 * GB, 32 * GB, 64 * GB, "NVIDIA RTX 5090 specification, PCIe 5"),
        Machine("m2-ultra", 800 * GB, 192 * GB, 7 * GB, "Apple M2 Ultra specification, its disk"),
    )
}


@dataclass(frozen=True)
class Speed:
    """One machine. fits: whether artifact and cache do. decode: tokens per second of one stream at
    most. batch: throughput bound of MoE-Lens where it does not fit, else None."""

    machine: str
    fits: bool
    decode: float
    batch: float | None
    source: str


@dataclass(frozen=True)
class Preflight:
    """disk: bytes. free: bytes where the artifact goes, None if not asked. memory: peak bytes.
    seconds: wall time. active: bytes that one token reads."""

    disk: int
    free: int | None
    memory: int
    seconds: float
    active: int
    speeds: tuple[Speed, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "speeds": [vars(speed) for speed in self.speeds]}


def preflight(
    job: Job,
    formats: Mapping[str, AnyFormat],
    sizes: Sizes,
    *,
    samples: int,
    length: int,
    machine: str | None = None,
    out: Path | None = None,
) -> Preflight:
    """What carrying out `formats` takes and gives.

    samples: 0 where none is read. machine: a name in MACHINES, besides this one.

    Raises:
        RecipeError: an unknown machine.
    """
    if machine is not None and machine not in MACHINES:
        raise RecipeError(f"unknown machine '{machine}'", hint="one of " + ", ".join(MACHINES))
    active = active_bytes(job, formats, sizes)
    machines = [this_machine(), *([MACHINES[machine]] if machine else [])]
    return Preflight(
        disk=sizes.artifact,
        free=None if out is None else free_bytes(out),
        memory=peak_memory(job, samples, length),
        seconds=flops(job, samples, length) / product_rate() * OVERHEAD
        + packing_seconds(job)
        + nesting_seconds(job, formats, samples),
        active=active,
        speeds=tuple(_speed(job, m, sizes, active) for m in machines),
    )


def active_bytes(job: Job, formats: Mapping[str, AnyFormat], sizes: Sizes) -> int:
    """Bytes of weights that one token reads: all that is packed or dense, of experts k in E, of the
    embedding one row."""
    config = job.skeleton.model.config.get_text_config()
    experts: dict[int, int] = {}
    for site in job.sites:
        if site.expert is not None:
            experts[site.layer] = max(experts.get(site.layer, 0), site.expert + 1)
    total = float(sizes.packed + sizes.dense)
    for site in job.sites:
        nbytes = formats[site.name].nbytes(site.shape)
        if site.expert is not None:
            k = min(first_of(config, TOP_K, 2), experts[site.layer])
            total -= nbytes * (1 - k / experts[site.layer])
    tied = bool(getattr(config, "tie_word_embeddings", False))
    table = job.skeleton.model.get_input_embeddings()
    if table is not None and not tied:
        embedding = next((s for s in job.sites if s.kind == "embedding"), None)
        whole = (
            formats[embedding.name].nbytes(embedding.shape) if embedding
            else table.weight.numel() * job.itemsize
        )  # fmt: skip
        total -= whole * (1 - 1 / table.weight.shape[0])
    return max(1, round(total))


def _speed(job: Job, machine: Machine, sizes: Sizes, active: int) -> Speed:
    need = sizes.artifact + sizes.cache
    fits = need <= machine.memory
    if fits:
        return Speed(machine.name, True, machine.bandwidth / active, None, machine.source)
    token = cache_bytes(job.skeleton.model.config, 1)
    kept = max(1.0, 0.5 * machine.memory / token)  # half of the memory for the cache
    pme = 2 * (PROMPT + ANSWER) / ((2 * PROMPT + ANSWER) * ANSWER)
    batch = pme * kept / (sizes.artifact / machine.io)
    return Speed(machine.name, False, machine.io / active, batch, machine.source)


@cache
def this_machine() -> Machine:
    """The accelerator or CPU at hand; bandwidth by reading 256 MiB, the best of five."""
    if torch.cuda.is_available():
        free, memory = torch.cuda.mem_get_info()
        data = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda").view(torch.int32)
        seconds = _best(lambda: int(data.sum()))
        return Machine(
            "here", data.nbytes / seconds, float(free or memory), 32 * GB, "measured read"
        )
    data = torch.zeros(1 << 26, dtype=torch.float32)
    seconds = _best(lambda: float(data.sum()))
    total = 1024.0 * next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemTotal")
    )
    return Machine("here", data.nbytes / seconds, total, 2 * GB, "measured read of memory")


@cache
def product_rate(width: int = 768) -> float:
    """Float32 operations per second of a square product here, the best of five."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(width, width, device=device)
    return 2 * width**3 / _best(lambda: float((a @ a)[0, 0]))


def _best(call: Any) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def check_memory(found: Preflight, limit: int | None) -> None:
    """Refuse a run that this machine's memory cannot hold.

    Raises:
        RecipeError: it would need more.
    """
    total = this_machine().memory
    if limit is None and not torch.cuda.is_available() and found.memory > total:
        raise RecipeError(
            f"compressing takes some {found.memory / GIB:.1f} GiB, this machine has "
            f"{total / GIB:.1f}",
            hint=f"--memory {0.8 * total / GIB:.0f}GiB keeps it within that, through files",
        )


def peak_resident() -> int:
    """Bytes this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(out: Path) -> int:
    """Free bytes where `out` would go."""
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def flops(job: Job, samples: int, length: int) -> float:
    """Operations of compressing: two passes of all samples, sums of outer products, and GPTQ; none
    where no sample is read."""
    if not samples:
        return 0.0
    tokens = samples * length
    config = job.skeleton.model.config.get_text_config()
    experts: dict[int, int] = {}
    for site in job.sites:
        if site.expert is not None:
            experts[site.layer] = max(experts.get(site.layer, 0), site.expert + 1)
    total = 0.0
    inputs: set[tuple[int, str, int]] = set()
    for site in job.sites:
        out, inner = site.shape
        share = 1.0
        if site.expert is not None:
            share = min(1.0, first_of(config, TOP_K, 2) / experts[site.layer])
        total += 2 * 2 * tokens * share * site.numel
        if isinstance(job.formats[site.name], DenseFormat) and site.kind == "router":
            continue
        total += GPTQ_FLOPS * out * inner**2
        key = (site.layer, site.module.rpartition(".")[0] + str(site.expert), inner)
        if key not in inputs:
            inputs.add(key)
            total += 2 * tokens * share * inner**2 + 3 * inner**3
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = len(job.skeleton.blocks)
    return total + 2 * 2 * 2 * layers * tokens * length * heads * size


def packing_seconds(job: Job) -> float:
    """Rounding to nearest and packing."""
    return sum(site.numel for site in job.sites) * job.itemsize / PACKING


def nesting_seconds(job: Job, formats: Mapping[str, AnyFormat], samples: int) -> float:
    """Choosing codes that serve several widths; without samples one sweep, and no passes."""
    nested = [site.numel for site in job.sites if widths(formats[site.name])]
    return sum(nested) * NESTING * (1.0 if samples else BLIND)


def peak_memory(job: Job, samples: int, length: int) -> int:
    """Bytes the process will hold at most, or --memory if that is less."""
    blocks = job.skeleton.blocks
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks) * 4
    largest = max(p.numel() for b in blocks for p in b.parameters()) * job.itemsize
    hidden = samples * length * job.skeleton.model.config.get_text_config().hidden_size * 4
    widest = max(site.shape[1] for site in job.sites)
    tallest = max(site.numel for site in job.sites if site.layer < len(blocks))
    work = max(WORK, WORKING_COPIES * 4 * (widest**2 + tallest))
    routed = hidden if any(site.expert is not None for site in job.sites) else 0
    if job.folding is not None:
        work += FOLDING_COPIES * block  # proven in float64
    batch = (
        4
        * 2048
        * max(widest, getattr(job.skeleton.model.config.get_text_config(), "vocab_size", 0) // 8)
    )
    need = resident_bytes() + LIBRARIES + block + 2 * largest + hidden + routed + work + batch
    return min(need, job.memory) if job.memory is not None else ceil(need)
