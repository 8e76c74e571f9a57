"""The dials of a plan, spelt once for `plan` and `compress`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from bitnest.errors import RecipeError

Bits = typer.Option(
    None, "--bits", help="Average code width over the planned weights, such as 3.5 (default: 4)."
)
Size = typer.Option(
    None,
    "--size",
    help="Every byte of the artifact, such as 12GiB; embedding and head planned too.",
)
MaxKl = typer.Option(
    None, "--max-kl", help="Mean KL to the original in nats per token, such as 0.02."
)
MinAgreement = typer.Option(
    None, "--min-agreement", help="Share of tokens with the same top choice, such as 95%."
)
Context = typer.Option(
    0, "--context", min=0, help="With --size: tokens of 16-bit cache to fit too."
)
Nested = typer.Option(
    None,
    "--nested",
    help="Weights that can be read at any of these widths: 2-8 or 2,3,4,6,8. With a budget, each "
    "up to the width that it deserves.",
)
BaseSize = typer.Option(
    None,
    "--base-size",
    help="With --nested: memory for all weights at their narrowest, which sets the width that each "
    "begins at (default: the narrowest for all).",
)
Prune = typer.Option(
    "sparsegpt", "--prune", help="How sparse formats choose: sparsegpt, wanda or magnitude."
)
TargetName = typer.Option(
    "native", "--target", help="Who is to load it: native, vllm-cuda, vllm-cpu, transformers, gguf."
)
PolicyName = typer.Option(
    "bitnest",
    "--policy",
    help="bitnest, or for comparison: uniform, handmade, frequency, moqa, mcmoe, baq, mxmoe, "
    "lpvit.",
)
Candidates = typer.Option(
    [], "--candidate", help="Format to choose among; may be repeated (default: those measured)."
)
Ends = typer.Option(
    None,
    "--ends/--no-ends",
    help="Plan embedding and head too (default: with --size, --max-kl, --min-agreement).",
)
Exact = typer.Option(
    False, "--exact", help="Solve each linear problem to a proven optimum, by integer programming."
)

Inputs = typer.Option(
    [],
    "--inputs",
    help="What inputs of packed matrices are rounded to as the model runs: int8-token, int6-g128, "
    "fp8-token, mxfp4 ...; of several every matrix gets one (default: they stay as they are).",
)
InputBits = typer.Option(
    None, "--input-bits", help="Mean width of inputs over multiply-accumulates, such as 6.4."
)
InputTime = typer.Option(
    None,
    "--input-time",
    help="With --latency: time of all products, as a share of that with inputs at their widest.",
)


def read_latency(path: Path | None) -> dict[str, float] | None:
    """A table of seconds by format.

    Raises:
        RecipeError: it cannot be read, or has times that are not above 0.
    """
    if path is None:
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): float(value) for name, value in table.items()}
        if not found or min(found.values()) <= 0:
            raise ValueError("no times, or one that is not above 0")
        return found
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RecipeError(
            "cannot read the table of latencies", where=str(path),
            hint='a JSON object, format: seconds per weight, such as {"int4-g128": 1e-11}, or '
            'per multiply-accumulate, {"int8-channel/int8-token": 1e-11}',
        ) from error  # fmt: skip


def found(model: str, lora: Sequence[str] = ()) -> bool:
    """Whether statistics of the model lie where they are looked for."""
    from bitnest.api.planning import default_statistics
    from bitnest.statistics import is_statistics

    return is_statistics(default_statistics(model, lora))


def remark(model: str, statistics: Path | None, lora: Sequence[str] = ()) -> None:
    """Say which statistics are about to be used or made when none were named, on stderr."""
    from bitnest.api.planning import default_statistics
    from bitnest.cli.render import say

    if statistics is None:
        place = default_statistics(model, lora)
        say(
            f"planning with the statistics in {place}"
            if found(model, lora)
            else f"measuring the model first, into {place}; further plans reuse it"
        )


def remark_nested(model: str) -> None:
    """Say that a nested artifact is no original, on stderr."""
    from bitnest.cli.render import say
    from bitnest.packed.decoded import decoding_note

    if note := decoding_note(model):
        say(f"{model} is {note}")


def parse_share(text: str | None) -> float | None:
    """A share such as 95% or 0.95.

    Raises:
        RecipeError: not one.
    """
    if text is None:
        return None
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError as error:
        raise RecipeError(f"not a share: '{text}'", hint="for example 95% or 0.95") from error
    return value / 100 if text.strip().endswith("%") else value
