"""Embedding and head in the formats that probes chose, as they would be stored.

A vocabulary in eight formats is large, so what is kept are codes and scales, decoded when a probe
is at it. They are written down with the statistics' state: a resumed run need not solve them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bitnest.formats import PackedFormat
from bitnest.kernels.rows import decode_into
from bitnest.safetensors_io import entry, read_header, read_tensor, write_file
from bitnest.sites import ENDS, Site


class EndWeights:
    """Stored tensors by site and format number.

    sites: of the model; the ends among them count. tied: whether the embedding is the head too.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        formats: Sequence[PackedFormat] = (),
        plans: Sequence[Mapping[str, int]] = (),
        *,
        tied: bool = False,
    ) -> None:
        self.sites = [site for site in sites if site.kind in ENDS]
        self.formats, self.tied = list(formats), tied
        self._wanted = {
            (site.name, plan[site.name])
            for plan in plans
            for site in self.sites
            if site.name in plan
        }
        self._kept: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    @property
    def wanted(self) -> bool:
        """Whether any plan changes an end."""
        return bool(self._wanted)

    def site(self, kind: str) -> Site | None:
        """The end of that kind, None if the model has none."""
        return next((site for site in self.sites if site.kind == kind), None)

    @property
    def head(self) -> Site | None:
        """The site whose matrix the head is."""
        return self.site("embedding" if self.tied else "head")

    def keep(self, site: Site, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """A site was solved in format `number`."""
        if (site.name, number) in self._wanted:
            self._kept[site.name, number] = {k: v.cpu() for k, v in tensors.items()}

    def decode_into(self, out: torch.Tensor, site: Site, number: int) -> torch.Tensor:
        """Fill `out` (V, I) with the site's weight in format `number`."""
        tensors = {k: v.to(out.device) for k, v in self._kept[site.name, number].items()}
        return decode_into(out, tensors, self.formats[number])

    def save(self, file: Path) -> None:
        """Write everything down."""
        write_file(file, [
            entry(f"{number}.{part}.{name}", tensor.contiguous())
            for (name, number), tensors in self._kept.items()
            for part, tensor in tensors.items()
        ])  # fmt: skip

    def load(self, file: Path) -> None:
        """The inverse of `save`."""
        for key, info in read_header(file).items():
            number, part, name = key.split(".", 2)
            self._kept.setdefault((name, int(number)), {})[part] = read_tensor(info)
