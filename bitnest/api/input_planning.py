"""What verbs ask of inputs: one format for all, or several and a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bitnest.errors import RecipeError
from bitnest.formats.inputs import DENSE
from bitnest.recipe import Rule

if TYPE_CHECKING:
    from bitnest.quantize.allocation.inputs import InputDials


def asked_inputs(
    inputs: str | Sequence[str] | None,
    bits: float | None,
    time: float | None,
    latency: Mapping[str, float] | None,
    barred: Mapping[str, bool],
) -> tuple[str | None, InputDials | None]:
    """The one format that all inputs get, or what they are to be planned by; None for neither.
    barred: options that widths of inputs cannot be planned beside, and whether they are given.

    Raises:
        RecipeError, FormatError: several without a budget, a budget without several, a barred one.
    """
    from bitnest.quantize.allocation.inputs import InputDials

    names = [inputs] if isinstance(inputs, str) else list(inputs or ())
    dials = InputDials.of(names, bits, time, latency)
    if latency is not None and time is None:
        raise RecipeError("measured latencies without a budget of time",
                          hint="--input-time 0.8")  # fmt: skip
    if dials is None or not dials.planned:
        return names[0] if names else None, None
    for option, given in barred.items():
        if given:
            raise RecipeError(f"several --inputs are not planned beside {option}",
                              hint=f"leave out {option}, or name one --inputs")  # fmt: skip
    return None, dials


def measured_inputs(dials: InputDials | None, rules: Sequence[Rule]) -> list[str]:
    """Formats of inputs whose losses a plan needs."""
    if dials is None:
        return []
    ruled = [rule.inputs for rule in rules if rule.inputs is not None]
    return [name for name in dict.fromkeys([*dials.formats, *ruled]) if name != DENSE]
