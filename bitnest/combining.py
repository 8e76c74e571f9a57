"""How the changes that several adapters make to one matrix become one change.

    linear       sum_i c_i D_i, D_i = M_i(W) - W
    ties         of each D_i the `density` largest in magnitude; at every place the sign of their
                 sum; the mean of c_i D_i over those that have that sign
    dare_linear  each number of D_i kept with probability `density` and divided by it; summed
    dare_ties    so thinned, then elected and averaged as in ties

D_i are whole products in float32, of one matrix at a time (of fused experts, of each), never
factors. All but linear are peft's own functions (peft.utils.merge_utils), so that what they mean is
what peft means by them: signs are elected before the weights c_i. Random numbers depend on the seed
and the matrix' name alone, so a resumed run draws the same.

Papers: TIES 2306.01708, DARE 2311.03099.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitnest.errors import RecipeError, require

LINEAR = "linear"
METHODS = (LINEAR, "ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class Combine:
    """method: one of METHODS. density: share of numbers that ties and dare keep. seed: of dare.

    Raises:
        RecipeError: an unknown method, a density that is no share. MissingExtra: peft is needed.
    """

    method: str = LINEAR
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(
                f"unknown way to combine '{self.method}'", hint="one of " + ", ".join(METHODS)
            )
        if not 0 < self.density <= 1:
            raise RecipeError(f"density {self.density:g} is no share above 0 and up to 1",
                              hint="--density 0.5")  # fmt: skip
        if self.method != LINEAR:
            require("peft", "lora")

    def change(
        self, deltas: Sequence[torch.Tensor], scales: Sequence[float], name: str
    ) -> torch.Tensor:
        """The one change that `deltas` (float32, of one shape) make of the matrix `name`."""
        if self.method == LINEAR:
            return torch.stack([c * d for c, d in zip(scales, deltas, strict=True)]).sum(0)
        from peft.utils import merge_utils

        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a density of 1 keeps all, as it should
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            combine = getattr(merge_utils, self.method)
            found: torch.Tensor = combine(list(deltas), torch.tensor(scales), self.density)
        return found

    def to_json(self) -> dict[str, Any]:
        """For a record; nothing where the changes are simply summed."""
        return {} if self.method == LINEAR else {"combine": dict(vars(self))}
