"""What every matrix of a model reads, measured by one pass of text, block by block.

    absmax       max_t |x_tj|                per channel; experts: of the tokens routed to each
    mean_square  mean_t x_tj^2

and whatever else `Moments` has. Down projections of experts are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bitnest.calibrate.data import CalibrationSet
from bitnest.calibrate.moments import Moments
from bitnest.calibrate.observe import Observer
from bitnest.calibrate.stream import Stream
from bitnest.kernels.experts import up_name
from bitnest.progress import Progress, Silent
from bitnest.quantize.memory import release
from bitnest.sites import Site
from bitnest.skeleton import Skeleton

Inputs = dict[str, Moments]
"""By parameter path: Moments of what it reads, (), or (E,) for all experts' matrices in one."""


@torch.no_grad()
def measure_inputs(
    skeleton: Skeleton,
    calibration: CalibrationSet,
    *,
    device: torch.device | None = None,
    hidden: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Inputs]]:
    """Block by block, what its matrices read. While the caller has one, the block holds its weights
    in float32.

    hidden: bytes of hidden states kept in memory, None for all.

    Raises:
        UnsupportedModel: a model that cannot be streamed.
    """
    device, progress = device or torch.device("cpu"), progress or Silent()
    stream = Stream(
        skeleton, calibration.tokens, dtype=torch.float32, device=device, memory_limit=hidden
    )
    progress.phase("measuring inputs", len(skeleton.blocks))
    for layer in range(len(skeleton.blocks)):
        prefix = f"{skeleton.prefix}.{layer}"
        skeleton.fill(prefix, dtype=torch.float32, device=device)
        observer = Observer(skeleton.blocks[layer], prefix, labels=1, full=False)
        with observer:
            stream.run(layer, keep=True, after_batch=observer.after_batch)
        yield layer, _inputs(skeleton, observer)
        skeleton.drop(prefix)
        release()
        progress.step()


def site_inputs(
    skeleton: Skeleton,
    sites: Sequence[Site],
    calibration: CalibrationSet,
    **options: Any,
) -> dict[str, Moments]:
    """Moments of what each site reads, by name; `options` as those of `measure_inputs`. Sites that
    nothing was sent to are left out."""
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    found: dict[str, Moments] = {}
    for _, inputs in measure_inputs(skeleton, calibration, **options):
        for path, moments in inputs.items():
            for site in by_path.get(path, []):
                one = moments.tokens.dim() == 1
                found[site.name] = moments.at((site.expert,)) if one else moments  # type: ignore[arg-type]
    return found


def _inputs(skeleton: Skeleton, observer: Observer) -> Inputs:
    found: Inputs = {}
    for seen in observer.inputs.values():
        for reader in seen.readers:
            found[f"{reader}.weight"] = seen.moments.at((0,))
    for name, sums in observer.fused.items():
        module = skeleton.model.get_submodule(name)
        found[f"{name}.{up_name(module)}"] = sums.up.at((0,))
        found[f"{name}.down_proj"] = sums.down.at((0,))
    return found
