"""LoRA adapters on a loaded model: beside weights that are packed, merged into those that are not.

A packed matrix W keeps its codes. What adapters make of it is added to what it gives,

    y = W x + sum_i c_i (M_i(W) - W) x
    LoRA, rsLoRA   c s B (A x)
    DoRA           c ((g - 1) W x + g s B (A x)),  g = m / |row of W + s B A|

in float32, rounded to the type of y. Row lengths are those of the decoded weights; they are taken
at first use and again when the width of a nested weight changes. So W is never decoded, changed and
rounded to codes again, which would lose most of a small change.

Tensors that are not packed (norms, biases, routers, an embedding or head kept as it was, a whole
plain checkpoint) are merged, as `bitnest merge` would. Which tensors an adapter changes, what fits
and what is refused is `MergedCheckpoint`'s to say: an artifact is shown to it as the checkpoint
that it stands for. A weight that was dropped stays dropped.

Left out: whole tensors in place of packed ones (ESFT, modules_to_save), and packed embeddings or
heads. They are refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitnest.artifact import Artifact, is_artifact
from bitnest.changes import Change
from bitnest.checkpoint import Checkpoint
from bitnest.errors import CheckpointError
from bitnest.lora import open_adapters
from bitnest.manifest import SiteRecord
from bitnest.merged import MergedCheckpoint
from bitnest.packed.decoded import DecodedCheckpoint
from bitnest.packed.modules import PackedLinear, PackedWeight
from bitnest.safetensors_io import read_tensor
from bitnest.sites import ENDS, find_sites
from bitnest.skeleton import Skeleton


@dataclass(frozen=True)
class Adapters:
    """Adapters checked against the model in a directory, to be put on it once it is loaded.

    merged: the model with them in it; its factors and its dense tensors are read from there.
    skeleton: of it. sites: of packed matrices that they change, with the changes of each.
    """

    merged: MergedCheckpoint
    skeleton: Skeleton
    sites: tuple[tuple[SiteRecord, tuple[Change, ...]], ...]

    @classmethod
    def of(
        cls, path: Path, loras: Sequence[str], *, trust_remote_code: bool = False
    ) -> Adapters | None:
        """`loras` (PATH or PATH:scale) for the artifact or checkpoint in `path`; None without any.

        Raises:
            CheckpointError: an adapter that is unusable, of another base, or that changes packed
                weights in a way that cannot be kept apart from them.
            RecipeError: a scale that is none.
            UnsupportedModel: the artifact's sites are not where this version of transformers has
                them.
        """
        if not loras:
            return None
        base: Checkpoint
        if is_artifact(path):
            base = DecodedCheckpoint.of(Artifact.open(path), whole=True)
        else:
            base = Checkpoint.open(path)
        opened = open_adapters(loras)
        merged = MergedCheckpoint.of(base, opened, trust_remote_code=trust_remote_code)
        skeleton = Skeleton.build(merged, trust_remote_code=trust_remote_code)
        merged.check_sites(find_sites(skeleton))
        packed = base.sources if isinstance(base, DecodedCheckpoint) else {}
        sites = []
        for name, changes in merged.changes.items():
            for record in packed.get(name, ()):
                _check_apart(merged, record, changes)
                sites.append((record, changes))
        return cls(merged, skeleton, tuple(sites))

    @property
    def nbytes(self) -> int:
        """Bytes of the factors that stay apart, as they are stored."""
        found = {}
        for _, changes in self.sites:
            for change in changes:
                assert change.factors is not None
                for info in (change.factors.a, change.factors.b, change.factors.magnitude):
                    if info is not None:
                        found[info.file, info.start] = info.nbytes
        return sum(found.values())

    def put_on(self, model: Any) -> None:
        """Change `model`, loaded from the same directory, in place."""
        state = model.state_dict(keep_vars=True)  # parameters, and buffers that checkpoints hold
        with torch.no_grad():
            for name, values in self._dense(state):
                state[name].copy_(values)
        if not self.sites:
            return
        weights = {record.site.name: weight for record, weight in model.bitnest_source.weights}
        for record, changes in self.sites:
            weight = weights[record.site.name]
            if not weight.dropped:
                added = Added(weight, record.site.expert, changes)
                _attach(model.get_submodule(record.site.module), record, added)

    def _dense(self, own: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of `own` that are changed, merged; packed ones are not among them."""
        for name, source in self.skeleton.sources.items():
            if name in own and not self.merged.changes.keys().isdisjoint(source.names):
                yield name, self.skeleton.read(name)


def _check_apart(merged: MergedCheckpoint, record: SiteRecord, changes: Sequence[Change]) -> None:
    site = record.site
    for change in changes:
        if site.kind not in ENDS and change.whole is None and change.factors is not None:
            continue
        said = "replaces" if change.whole is not None else "changes"
        what = f"the {site.kind}, which is packed" if site.kind in ENDS else "a packed weight"
        raise CheckpointError(
            f"the adapter {said} {what}: '{site.name}'",
            where=str(merged.adapters[change.adapter][0].path),
            hint="merge it before compressing: bitnest compress MODEL --lora ADAPTER",
        )


class _Wide(nn.Module):
    """Holds float32 buffers that move between devices and keep their type."""

    def _apply(self, fn: Any, recurse: bool = True) -> _Wide:
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


class Added(_Wide):
    """What adapters add to the product of one packed matrix W (out, in).

    a (R, in), b (out, R): the plain factors of all, with their scales. turned: DoRA's.
    """

    a: torch.Tensor
    b: torch.Tensor

    def __init__(self, packed: PackedWeight, expert: int | None, changes: Sequence[Change]) -> None:
        super().__init__()
        self.rows = packed.shape[0]
        left, right = [torch.empty(self.rows, 0)], [torch.empty(0, packed.shape[1])]
        turned = []
        for change in changes:
            assert change.factors is not None
            b, a = change.factors.pair(expert)
            if change.factors.magnitude is not None:
                length = read_tensor(change.factors.magnitude).float().flatten()
                turned.append(_Turned(packed, a, b, length, change.scale))
            else:
                left.append(b * change.scale)
                right.append(a)
        device = packed.device
        self.register_buffer("a", torch.cat(right).to(device), persistent=False)
        self.register_buffer("b", torch.cat(left, dim=1).to(device), persistent=False)
        self.turned = nn.ModuleList(turned)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What x (..., in) gives with the adapters in it; y = W x (..., out), without a bias."""
        wide, product = x.float(), y.float()
        total = product + (wide @ self.a.T) @ self.b.T
        for turned in self.turned:
            total = total + turned(wide, product)
        return total.to(y.dtype)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """W with the adapters merged in, for W (out, in) in float32."""
        return self(torch.eye(weight.shape[1], device=weight.device), weight.T).T


class _Turned(_Wide):
    """DoRA's part: factors a (r, in), b (out, r), m (out,), and the scale c of the whole change."""

    a: torch.Tensor
    b: torch.Tensor
    length: torch.Tensor

    def __init__(
        self, packed: PackedWeight, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, scale: float
    ) -> None:
        super().__init__()
        for name, tensor in (("a", a), ("b", b), ("length", m)):
            self.register_buffer(name, tensor.to(packed.device), persistent=False)
        self.scale = scale
        self.of = (packed,)  # in a tuple, or it would be a submodule twice
        self.known: tuple[str, torch.Tensor] | None = None  # format and gain

    def gain(self) -> torch.Tensor:
        """g (out,), of the decoded weights at their present width.

        Raises:
            CheckpointError: a row without a length.
        """
        packed = self.of[0]
        if self.known is None or self.known[0] != packed.fmt.name:
            rows = packed.decode(torch.float32) + self.b @ self.a
            norm = torch.linalg.vector_norm(rows, dim=1)
            if not bool(norm.all()):
                raise CheckpointError(
                    "a row of weights that DoRA is to scale is zero",
                    hint="merge the adapter before compressing: bitnest compress --lora",
                )
            self.known = packed.fmt.name, self.length / norm
        return self.known[1].to(self.a.device)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gain = self.gain()
        return self.scale * ((gain - 1) * y + gain * ((x @ self.a.T) @ self.b.T))


class AdaptedLinear(PackedLinear):
    """A PackedLinear with adapters."""

    added: Added

    @property
    def weight(self) -> torch.Tensor:
        """The decoded matrix with the adapters in it, in float32."""
        return self.added.matrix(self.packed.decode(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.added(x, self.packed.product(x))
        return y if self.bias is None else y + self.bias


def _attach(module: Any, record: SiteRecord, added: Added) -> None:
    """Give a packed linear or experts module its adapters."""
    site = record.site
    if isinstance(module, PackedLinear):
        module.added = added
        module.__class__ = AdaptedLinear
        return
    if module.packed_added is None:
        module.packed_added, module.added = {}, nn.ModuleList()
    module.added.append(added)
    module.packed_added[f"{site.param}.{site.expert}", site.rows] = added
