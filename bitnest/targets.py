"""Targets: what an engine can load, as far as a plan has to know.

A target says which formats a site may have (`allows`), and which sites must have the same
(`together`). The engines' own tables stay where the exporters read them; this is the shape they are
handed to the allocator in. `native`, bitnest's own runtime, loads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitnest.formats import AnyFormat
from bitnest.sites import Site


def anything(_site: Site, _fmt: AnyFormat) -> str:
    """No rule is broken."""
    return ""


def each_alone(sites: Sequence[Site]) -> list[list[Site]]:
    """Every site chooses for itself."""
    return [[site] for site in sites]


TARGETS = ("native", "vllm-cuda", "vllm-cpu", "transformers", "gguf")  # what files may name


@dataclass(frozen=True)
class Target:
    """name: of the engine. formats: candidates when none are named, coarse to fine; `dense` is
    always one. allows: why a site must not have a format, empty if it may. together: divides the
    sites of a model into groups of equal formats, in order. rules: the same in words, one line
    each."""

    name: str
    formats: tuple[str, ...]
    allows: Callable[[Site, AnyFormat], str] = anything
    together: Callable[[Sequence[Site]], list[list[Site]]] = each_alone
    rules: tuple[str, ...] = ()
