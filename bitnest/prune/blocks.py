"""Which blocks change their input least, and so can go.

Block Influence (ShortGPT, Men et al. 2024), over tokens t with block inputs x_t and outputs y_t:

    BI = 1 - mean_t cos(x_t, y_t)

The blocks of lowest BI go, all measured once on the whole model, as published. The first block is
kept: what it reads is the embedding alone, and without it nothing has mixed tokens [ours].
"""

from __future__ import annotations

import torch

from bitnest.calibrate.data import CalibrationSet
from bitnest.calibrate.stream import Stream
from bitnest.errors import RecipeError
from bitnest.progress import Progress
from bitnest.skeleton import Skeleton


def least_blocks(
    skeleton: Skeleton,
    calibration: CalibrationSet,
    count: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> tuple[tuple[int, ...], dict[int, float]]:
    """The `count` blocks that can go, ascending, and the influence of every block.

    Raises:
        RecipeError: more than all but two.
    """
    total = len(skeleton.blocks)
    check_count(count, total)
    found = influences(skeleton, calibration, dtype=dtype, device=device, progress=progress)
    order = sorted(range(1, total), key=lambda block: (found[block], block))
    return tuple(sorted(order[:count])), found


def check_count(count: int, total: int) -> None:
    """Refuse to leave out more blocks than all but two.

    Raises:
        RecipeError: it is more, or none.
    """
    if not 0 < count <= total - 2:
        raise RecipeError(
            f"{count} of {total} blocks", where="--blocks",
            hint=f"1 to {total - 2} can go" if total > 2 else "the model is too small to lose one",
        )  # fmt: skip


def influences(
    skeleton: Skeleton,
    calibration: CalibrationSet,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> dict[int, float]:
    """Block Influence of every block; see above."""
    stream = Stream(skeleton, calibration.tokens, dtype=dtype, device=device)
    found: dict[int, float] = {}
    progress.phase("measuring blocks", len(skeleton.blocks))
    for layer in range(len(skeleton.blocks)):
        prefix = f"{skeleton.prefix}.{layer}"
        skeleton.fill(prefix, dtype=dtype, device=device)
        alike, tokens = 0.0, 0
        with torch.no_grad():
            for part in stream.batches():
                before = stream.hidden[part].float()
                after = stream.forward_checked(layer, part)
                cosine = torch.nn.functional.cosine_similarity(
                    before, after.float().to(before.device), dim=-1
                )
                alike, tokens = alike + float(cosine.double().sum()), tokens + cosine.numel()
                stream.hidden[part] = after
        stream.forget()
        skeleton.drop(prefix)
        found[layer] = 1 - alike / tokens
        progress.step()
    return found
