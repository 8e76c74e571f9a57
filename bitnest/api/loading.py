"""Loading, at a width, at widths by site, or in a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitnest.artifact import Artifact, is_artifact
from bitnest.checkpoint import resolve_model
from bitnest.errors import RecipeError
from bitnest.packed.loading import load_model
from bitnest.sizes import parse_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from bitnest.quantize.allocation.fitting import Fitted


def load(
    model: str | Path,
    *,
    bits: int | Mapping[str, int] | None = None,
    size: int | str | None = None,
    lora: Sequence[str] = (),
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `model` (artifact, checkpoint directory, hub id or `demo`), in eval mode.

    bits: width at which nested weights are read, for all or by site or pattern
    (`{"kind:attention": 8, "*.experts.*": 3}`); only their planes are. size: bytes, or `2GiB`,
    that all weights may take instead: `fit_widths` chooses. None of both: whole. lora: adapters,
    PATH or PATH:scale, kept beside packed weights and merged into others. dtype: compute type of
    what is not packed, and of what packed weights decode to. A model from an artifact has
    `set_bits`, which raises or lowers it in place.

    Raises:
        CheckpointError, ArtifactError: the directory cannot be loaded.
        RecipeError, FormatError: bits or size, and nothing there can be read at them.
    """
    if size is not None:
        if bits is not None:
            raise RecipeError("bits and size both say what is read", hint="leave out one")
        bits = fit_widths(model, size).widths
    return load_model(
        model, dtype=dtype, device=device, bits=bits, lora=lora,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def fit_widths(artifact: str | Path, size: int | str) -> Fitted:
    """The width of every weight of a nested artifact at which all weights take at most `size`
    bytes, and what KL that is predicted to cost. Reads the manifest, no weights.

    Raises:
        ArtifactError: not an artifact.
        RecipeError: nothing is nested, or the size is too small for the narrowest widths.
    """
    from bitnest.quantize.allocation.fitting import fit_widths as fit

    if isinstance(size, bool) or not isinstance(size, int | str):
        raise RecipeError(f"{size!r} is no size", hint="bytes, or '2GiB'")
    path = resolve_model(artifact)
    if not is_artifact(path):
        raise RecipeError(
            "a plain checkpoint has one width", where=str(path), hint="leave out --size"
        )
    return fit(Artifact.open(path), parse_size(size) if isinstance(size, str) else size)
