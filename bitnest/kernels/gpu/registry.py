"""The specialisations of kernels that are compiled ahead of time.

A module of this package lists them as VARIANTS; `variants` collects all. Importing those modules
decorates their kernels, for the GPU or for the interpreter as TRITON_INTERPRET says.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import bitnest.kernels.gpu as package
from bitnest.kernels.gpu import interpreter

TOOLS = ("registry", "compile", "interpreter")  # modules without kernels

interpreter.mend()  # every module with kernels imports this one


@dataclass(frozen=True)
class Variant:
    """One specialisation.

    name: unique, `<op>-<what distinguishes it>`. function: decorated by triton.jit. signature:
    Triton type of every argument that is no constexpr, `*bf16` or `i32`. constexprs: values of
    the others; None may stand for a pointer that is not given. aligned: whether pointers are
    multiples of 16 bytes, as torch allocates them, and which integers are multiples of 16.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = field(default=())


def variants() -> list[Variant]:
    """All of them, by name.

    Raises:
        ValueError: two of one name.
    """
    found: dict[str, Variant] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name in TOOLS or info.ispkg:
            continue
        for variant in getattr(import_module(f"{package.__name__}.{info.name}"), "VARIANTS", ()):
            if variant.name in found:
                raise ValueError(f"two kernel variants are called {variant.name}")
            found[variant.name] = variant
    return [found[name] for name in sorted(found)]
