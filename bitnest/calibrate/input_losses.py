"""Losses of rounded inputs from statistics, in the unit of the weights' losses.

`input_errors` says how they were measured. An expert's are drawn towards those of its layer's and
projection's others, as the weights' are (`predict.drawn`). Without gradients they are the output
error times what a unit of it costs at the site by the probes of its group.

Of a matrix whose weights and inputs are both rounded the two losses add: the errors are of
independent roundings, and what they share is of higher order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch

from bitnest.errors import StatisticsError
from bitnest.formats import parse_format
from bitnest.formats.bases import basis_of
from bitnest.formats.inputs import DENSE
from bitnest.sites import ENDS
from bitnest.statistics import Statistics


class InputLosses:
    """Losses of every site's inputs by basis and format."""

    def __init__(self, statistics: Statistics, per_error: np.ndarray, share: np.ndarray) -> None:
        """per_error: what a unit of a site's output error costs, (S, L), where gradients were not
        measured. share: of tokens that reach each site, (S,)."""
        self.statistics = statistics
        self._per_error, self._share = per_error, share
        self._number = {site.name: i for i, site in enumerate(statistics.sites)}
        self._bases: dict[str, str] = {}

    def loss(self, site: str, weights: str, inputs: str) -> np.ndarray:
        """Of a site whose weight has the format `weights` and whose inputs have `inputs`, (L,).

        Raises:
            StatisticsError: it was not measured.
        """
        if inputs == DENSE:
            return np.zeros(len(self.statistics.labels))
        self.statistics.check_inputs([inputs])
        if weights not in self._bases:
            self._bases[weights] = basis_of(parse_format(weights))
        basis = self._bases[weights]
        if basis not in self.statistics.bases:
            named = basis or "its own basis"
            raise StatisticsError(
                f"what inputs lose beside {weights} was not measured: no candidate is stored in "
                f"{named}",
                where=str(self.statistics.path),
                hint="of @awq, and of @perm before another transform, it is not known beforehand"
                if "awq" in basis or "perm" in basis[:-4]
                else f"bitnest analyze MODEL --format {weights} with the same --inputs",
            )
        place = (self.statistics.bases.index(basis), self.statistics.inputs.index(inputs))
        return np.asarray(self._losses[(self._number[site], *place)])

    def chosen(
        self, weights: Mapping[str, str], inputs: Mapping[str, str]
    ) -> dict[int, np.ndarray]:
        """Losses (L,) by number of the site. weights, inputs: formats by site.

        Raises:
            StatisticsError: one was not measured.
        """
        return {
            self._number[name]: self.loss(name, weights[name], fmt) for name, fmt in inputs.items()
        }

    @cached_property
    def _losses(self) -> np.ndarray:
        """(S, B, P, L), zero at the ends."""
        from bitnest.calibrate.predict import draw

        statistics = self.statistics
        errors = self._read("sites.input_error", 3)
        noise = errors * self._share[:, None, None]
        if statistics.header["importance"]["kind"] == "probes":
            return np.asarray(noise[..., None] * self._per_error[:, None, None])
        losses = self._read("sites.input_loss", 4)
        sites, *tried, labels = losses.shape
        flat = losses.reshape(sites, -1, labels)
        drawn = draw(statistics.sites, noise.reshape(sites, -1), flat)
        return drawn.reshape(sites, *tried, labels)

    def _read(self, name: str, dimensions: int) -> np.ndarray:
        statistics = self.statistics
        shape = (len(statistics.bases), len(statistics.inputs), len(statistics.labels))
        parts = []
        for layer in statistics.layers:
            if not layer["sites"]:
                continue
            if layer["sites"][0]["kind"] in ENDS:
                parts.append(torch.zeros(len(layer["sites"]), *shape[: dimensions - 1]))
                continue
            if not statistics.has(layer["layer"], name):
                raise StatisticsError(
                    "what inputs lose was measured on parts of the text only",
                    where=str(statistics.path),
                    hint="bitnest analyze with --inputs on all the text",
                )
            parts.append(statistics.read(layer["layer"], name))
        return np.asarray(torch.cat([part.double() for part in parts]).numpy())
