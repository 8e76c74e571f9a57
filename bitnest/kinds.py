"""Kinds of sites, by name: for code that speaks of them without loading torch (`sites` does)."""

from __future__ import annotations

KINDS = ("attention", "mlp", "expert", "shared_expert", "router", "embedding", "head", "other")
ENDS = frozenset({"embedding", "head"})  # outside the blocks
UNNAMED_DENSE = ENDS | {"router"}  # dense unless a rule names them
