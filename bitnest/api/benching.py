"""Speed of kernels on this machine, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitnest.errors import BitnestError


def bench_kernels(
    device: str | None, quick: bool, done: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """device (cpu, or cuda), what was measured on, and rows. done: called with each row of a CPU's
    as it comes; a GPU's rows go to stderr. None: cuda if its kernels run here.

    Raises:
        BitnestError: another device, or no kernels for it here.
    """
    from bitnest.kernels.gpu.paths import missing

    if device not in {None, "cpu", "cuda"}:
        raise BitnestError(f"no bench of kernels for '{device}'", hint="--device cpu, or cuda")
    why = "" if device == "cpu" else missing()
    if device == "cuda" and why:
        raise BitnestError(
            f"Triton kernels do not run here: {why}", hint="bitnest doctor says more; --device cpu"
        )
    if device == "cpu" or why:
        from bitnest.kernels.bench import cpu

        return cpu.usual(quick, done)
    from bitnest.kernels.bench import gpu

    return gpu.usual(quick)
