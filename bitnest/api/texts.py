"""Calibration texts: from what was typed to windows of tokens, with the checks that come first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bitnest.checkpoint import Checkpoint
from bitnest.errors import CheckpointError, DataError, RecipeError

if TYPE_CHECKING:
    from bitnest.calibrate.data import CalibrationSet, DataSource


def check_windows(data: Sequence[str], length: int) -> None:
    """What an analysis needs of its text besides what calibration does.

    Raises:
        RecipeError, DataError: windows of one token, or a label that is taken.
    """
    from bitnest.calibrate.observe import COVER

    if length < 2:
        raise RecipeError(f"--length {length} leaves nothing to predict", hint="--length 2 or more")
    for item in sources(data):
        if item.label == COVER:
            raise DataError(
                f"the label '{COVER}' is kept for windows drawn for coverage",
                where=item.source,
                hint=f"name it otherwise: --data text={item.source}",
            )


def check_length(config: Any, length: int) -> None:
    """Refuse windows longer than the model's context.

    Raises:
        RecipeError: they are.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise RecipeError(
            f"--length {length} is more than the model's context of {limit} tokens",
            hint=f"--length {limit} or less",
        )


def check_vocabulary(model: Any, calibration: CalibrationSet, checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer of another model.

    Raises:
        CheckpointError: it gives tokens that the model does not have.
    """
    largest, known = int(calibration.tokens.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise CheckpointError(
            f"the tokenizer gives token {largest}, the model's vocabulary has {known}",
            where=str(checkpoint.path),
            hint="the tokenizer is of another model: copy the right one beside the weights",
        )


def calibration_set(
    tokenizer: Any,
    sources: Sequence[DataSource],
    samples: int,
    length: int,
    seed: int,
    *,
    pack: str = "join",
) -> CalibrationSet:
    """Windows of the sources; see `calibrate.data.calibration_windows`."""
    from bitnest.calibrate.data import calibration_windows

    return calibration_windows(
        tokenizer, sources, samples=samples, length=length, seed=seed, pack=pack
    )


def sources(data: Sequence[str]) -> list[DataSource]:
    """The sources that `label=source` texts name; the embedded text if there are none."""
    from bitnest import demo
    from bitnest.calibrate.sources import parse_source

    texts = list(data) or [f"demo={demo.calibration_text()}"]
    return [parse_source(text, weighted=True) for text in texts]
