"""Weights of several checkpoints of one run, from what the trainer recorded of each.

    w_i = 1 / loss_i^p   or   w_i = step_i^p,   then divided by their sum

The formula is ours: practice weights checkpoints by a metric, but no public source states how. p,
the penalty, says how hard a worse or earlier checkpoint is punished; 0 is the plain mean. The loss
is the last `eval_loss` that `trainer_state.json` records up to the checkpoint's step, or the last
training `loss` if none was evaluated; all checkpoints must offer the same one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnest.errors import CheckpointError, RecipeError

STATE = "trainer_state.json"
METRICS = ("loss", "step")


def run_weights(paths: Sequence[Path], metric: str, penalty: float = 1.0) -> list[float]:
    """Weights of the checkpoints in `paths`, which add up to 1.

    Raises:
        RecipeError: unknown metric, or a penalty that is no finite number of at least 0.
        CheckpointError: a checkpoint has no usable record.
    """
    if metric not in METRICS:
        raise RecipeError(f"unknown metric '{metric}'", hint=f"one of {', '.join(METRICS)}")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise RecipeError(f"penalty {penalty} is no number of at least 0", hint="1, or 0: the mean")
    states = [_state(path) for path in paths]
    if metric == "step":
        values = [_positive(state.get("global_step"), path, "global_step")
                  for state, path in zip(states, paths, strict=True)]  # fmt: skip
    else:
        found = [{key: _last(state, key) for key in ("eval_loss", "loss")} for state in states]
        key = "eval_loss" if all(own["eval_loss"] is not None for own in found) else "loss"
        values = [1 / _positive(own[key], path, key)
                  for own, path in zip(found, paths, strict=True)]  # fmt: skip
    largest = max(values)  # a ratio does not overflow, whatever the penalty
    weights = [(value / largest) ** penalty for value in values]
    return [weight / sum(weights) for weight in weights]


def _state(path: Path) -> dict[str, Any]:
    file = path / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no readable {STATE}, which records loss and step", where=str(path),
            hint="name checkpoint directories of the trainer, or give scales: DIRECTORY:0.5",
        ) from error  # fmt: skip
    if not isinstance(state, dict) or not isinstance(state.get("log_history", []), list):
        raise CheckpointError("not a record of a trainer", where=str(file))
    return state


def _last(state: dict[str, Any], key: str) -> Any:
    """The last value of `key` up to the checkpoint's step."""
    step = state.get("global_step") or math.inf
    rows = [row for row in state.get("log_history", []) if isinstance(row, dict) and key in row]
    return next((row[key] for row in reversed(rows) if row.get("step", 0) <= step), None)


def _positive(value: Any, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{key} is {value}, not a positive number", where=str(path / STATE),
            hint="weight by the other metric, or give scales: DIRECTORY:0.5",
        )  # fmt: skip
    return float(value)
