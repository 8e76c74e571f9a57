"""What whole blocks cost: influence of every block, KL of the model without those of least.

Block Influence is ShortGPT's (`prune/blocks`). It ranks blocks and says nothing in nats, so the
model is measured without each of the TRIED blocks of least influence [ours]: windows go on from
the block with what it reads, and through the model's own head. The first block is never tried, nor
the last, as in `prune/blocks` and because what it adds is read by the head alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bitnest.calibrate.collector import reference_experts
from bitnest.calibrate.data import CalibrationSet
from bitnest.calibrate.probes import Measured, Probes
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.tail import open_tail
from bitnest.progress import Progress
from bitnest.prune.blocks import influences
from bitnest.quantize.memory import release
from bitnest.sites import Site, is_experts
from bitnest.skeleton import Skeleton

TRIED = 3


def measure_blocks(
    skeleton: Skeleton,
    calibration: CalibrationSet,
    windows: CalibrationSet,
    labels: Sequence[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory_limit: int | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """By block: "layer", "influence" on `calibration`, and "kl" by label, mean nats per prediction
    of the model without it on `windows`. kl is None of blocks that were not tried, and of labels
    without windows. memory_limit: see `Stream`."""
    found = influences(skeleton, calibration, dtype=dtype, device=device, progress=progress)
    tried = least(found)
    measured: dict[int, list[float | None]] = {}
    if tried:
        stream = Stream(
            skeleton, windows.tokens, dtype=dtype, device=device, memory_limit=memory_limit,
            labels=windows.labels, singles=True,
        )  # fmt: skip
        numbers = [list(labels).index(label) for label in windows.labels]
        for block, own in zip(
            tried, _without(stream, windows.tokens, numbers, tried, progress), strict=True
        ):
            known = {item.label: item.kl for item in own}
            measured[block] = [known.get(number) for number in range(len(labels))]
    return [
        {"layer": block, "influence": value, "kl": measured.get(block)}
        for block, value in found.items()
    ]


def least(influence: Mapping[int, float]) -> list[int]:
    """Blocks that are tried: TRIED of least influence, ascending."""
    inner = sorted(influence)[1:-1]
    return sorted(sorted(inner, key=lambda block: (influence[block], block))[:TRIED])


def _without(
    stream: Stream,
    tokens: torch.Tensor,
    numbers: Sequence[int],
    tried: Sequence[int],
    progress: Progress,
) -> list[list[Measured]]:
    """KL of the model without each of `tried` in turn: probes that change nothing but begin with
    what their block reads after it. numbers: of the samples' labels."""
    skeleton = stream.skeleton

    def parameter(site: Site) -> torch.Tensor:
        return skeleton.model.get_parameter(site.path).data

    probes = Probes(stream, [{} for _ in tried], range(len(tokens)), parameter)
    progress.phase("leaving out blocks", len(skeleton.blocks) + probes.rounds)
    for layer, block in enumerate(skeleton.blocks):
        prefix = f"{skeleton.prefix}.{layer}"
        skeleton.fill(prefix, dtype=stream.dtype, device=stream.device)
        probes.advance(layer)
        if layer in tried:
            probes.restore(tried.index(layer), stream.hidden)
        with reference_experts(m for m in block.modules() if is_experts(m)):
            stream.run(layer, keep=True)
        skeleton.drop(prefix)
        release()
        progress.step()
    with open_tail(stream) as tail:
        return probes.measure(tail, tokens, numbers, progress.step)
