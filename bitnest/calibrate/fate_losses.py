"""What fates of experts lose, from statistics, in the unit of other losses [ours].

Sensitivity says what it costs to lose an expert's output to second order (`zero`): its down
projection's loss per relative output error, at an error of 1. A fate costs as much more or less as
its layer errs with it, measured on a sample (`prune/experts/fates`):

    loss(e, fate) = LARGE * loss_zero(e) * error(e, fate) / error(e, zero)

LARGE is what so large a change costs beyond second order. At 2, as for a dropped expert's zeros
(`predict.WHOLE`), it errs on the side of keeping experts: plans of books-moe at 2 to 3 bits with 13
to 25 of 96 experts gone came out 2 to 19 percent below what was predicted, those without any 6 to
19 percent above (benchmarks/plan_fates). One token more than were seen counts for every expert, at
its layer's mean loss per token: one that none chose is not free.

Statistics without fates know the loss of zero; drop, constant and copy are taken to err as much,
and what statistics with fates did not measure twice as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.formats import FateFormat
from bitnest.statistics import Statistics

LARGE = 2.0  # of a fate's loss to second order
BLUR = 1e-3  # of a layer's mean error, added to errors that are divided
Place = tuple[int, int]  # block, expert


@dataclass(frozen=True)
class Offer:
    """A fate that an expert may have. fate: with its partner. loss: by dataset, (L,)."""

    fate: FateFormat
    loss: np.ndarray


class FateLosses:
    """Losses of whole experts' fates.

    zero: by expert, (L,), the loss of its output to second order. last: by expert, place of the
    site that it is counted at. kinds: that were measured.
    """

    def __init__(self, statistics: Statistics, losses: np.ndarray, errors: np.ndarray) -> None:
        """losses: raw, (S, F, L). errors: relative, (S, F)."""
        self.statistics = statistics
        self.kinds = tuple((statistics.header.get("fates") or {}).get("kinds", ()))
        self.last: dict[Place, int] = {}
        for i, site in enumerate(statistics.sites):
            if site.expert is not None:
                self.last[site.layer, site.expert] = i
        known = errors > 0
        ratios = losses / np.where(known, errors, 1.0)[:, :, None] * known[:, :, None]
        self._slopes = ratios.sum(axis=1) / np.maximum(known.sum(axis=1), 1)[:, None]
        self.zero = self._zero()
        self._layers: Mapping[int, dict[str, Any]] = {
            layer["layer"]: layer
            for layer in (statistics.header.get("fates") or {"layers": ()})["layers"]
        }

    def _zero(self) -> dict[Place, np.ndarray]:
        """loss / error differs by a percent between formats: their mean is taken."""
        found = {place: self._slopes[i] for place, i in self.last.items()}
        tokens = _tokens(self.statistics)
        for block in {block for block, _ in found}:
            own = [place for place in found if place[0] == block]
            seen = sum(tokens.get(place, 0) for place in own)
            each = sum((found[place] for place in own), np.zeros(len(self.statistics.labels)))
            each = each / max(1, seen)
            for place in own:
                found[place] = found[place] + each
        return found

    def matrix(self, site: int) -> np.ndarray:
        """Of a matrix beside experts that goes with its block, (L,): as if it went alone, so that
        the sum over a block is too high rather than too low."""
        return np.asarray(LARGE * self._slopes[site])

    def offers(self, place: Place, kinds: Sequence[str]) -> list[Offer]:
        """The fates of `kinds` that the expert may have, least loss first."""
        found = [o for kind in kinds if (o := self._offer(place, kind)) is not None]
        return sorted(found, key=lambda offer: float(offer.loss.sum()))

    def loss(self, place: Place, fate: FateFormat) -> np.ndarray:
        """Of one fate, (L,), measured or not; see above. A merger that was not counts twice."""
        offer = self._offer(place, fate.kind)
        if offer is not None and fate.partner in {None, offer.fate.partner}:
            return offer.loss
        times = 1.0 if not self.kinds and fate.kind != "merge" else 2.0
        found = np.asarray(times * LARGE * self.zero[place])
        return found if offer is None else np.maximum(found, offer.loss)

    def _offer(self, place: Place, kind: str) -> Offer | None:
        block, expert = place
        if kind not in self.kinds or block not in self._layers:
            return None
        layer = self._layers[block]
        error = layer[kind][expert]
        if error is None:
            return None
        partner = layer["partner"][expert] if kind == "merge" else None
        return Offer(FateFormat(kind, partner), self._scaled(place, error))

    def _scaled(self, place: Place, error: float) -> np.ndarray:
        zero = self._layers[place[0]]["zero"]
        blur = BLUR * sum(zero) / len(zero) + 1e-30
        return LARGE * self.zero[place] * (error + blur) / (zero[place[1]] + blur)


def _tokens(statistics: Statistics) -> dict[Place, int]:
    found = {}
    for layer in statistics.layers:
        for i, item in enumerate(layer["experts"]):
            counts = statistics.read(layer["layer"], f"experts.{i}.up.tokens").sum(0)
            for expert in range(item["experts"]):
                found[layer["layer"], expert] = int(counts[expert])
    return found
