"""Folding a checkpoint: a pass over its blocks, and a view of it with what was found.

    1. rotations need no text; each block's are proven on random states (`turn`)
    2. calibration text streams through the model as it is by then, block by block; from what the
       matrices read come scales and orders (`choose`), each proven before it is kept (`prove`)

Edges are found once for blocks of one structure. What cannot be proven, or lies on disk otherwise
than is understood, is left as it was and said. Memory: one block in float64 beside its float32.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.data import CalibrationSet
from bitnest.calibrate.stream import Stream
from bitnest.checkpoint import FLOATS, Checkpoint
from bitnest.device import choose_device
from bitnest.errors import RecipeError, UnsupportedModel
from bitnest.folds import Fold, parse_folds
from bitnest.progress import Progress, Silent
from bitnest.quantize.folding.changes import Change, Unmapped
from bitnest.quantize.folding.choose import edge_order, edge_scales
from bitnest.quantize.folding.places import (
    Changes,
    Places,
    inside_experts,
    order_changes,
    scale_changes,
)
from bitnest.quantize.folding.prove import Proposal, Prover, proving
from bitnest.quantize.folding.statistics import Inputs, measure_inputs
from bitnest.quantize.folding.turn import (
    block_parts,
    head_turn,
    stream_rotation,
    turn_block,
    turn_ends,
)
from bitnest.quantize.folding.view import FoldedCheckpoint
from bitnest.quantize.transforms.edges import Edge
from bitnest.quantize.transforms.proof import Call
from bitnest.quantize.transforms.trace import find_edges
from bitnest.sites import find_sites
from bitnest.skeleton import Skeleton

Plan = tuple[Proposal | None, Proposal | None, Proposal | None]
"""Of one edge: scales, the order once they are folded, and the order without them."""

PROBE = (2, 12)  # sequences and tokens that edges are sought and folds proven on
LISTED = 8  # edges named in a record of what was skipped


@dataclass(frozen=True)
class Folding:
    """What is to be folded. folds: in order. text: None until it is read, or where none is."""

    folds: tuple[Fold, ...]
    text: CalibrationSet | None = None

    @property
    def wants_text(self) -> bool:
        """Whether text is needed to choose."""
        return any(fold.kind != "rotate" for fold in self.folds)

    def to_json(self) -> dict[str, Any]:
        """Everything of it that a result depends on."""
        text = None if self.text is None else self.text.sha256
        return {"asked": [str(fold) for fold in self.folds], "text": text}

    def key(self, fingerprint: dict[str, Any]) -> str:
        """A name for its result in a run of that fingerprint, whatever formats it is for."""
        own = ("source", "config", "torch", "transformers", "device", "threads", "fold")
        text = json.dumps({name: fingerprint[name] for name in own}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Skipped:
    """Folds that were not made. edges: those that could not be, with how often. even: edges whose
    scales all came out as 1."""

    edges: dict[str, int]
    even: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"not_folded": self.edges, "even": self.even}

    @property
    def text(self) -> str:
        """One sentence for a person."""
        listed = ", ".join(f"{what} ({count} times)" for what, count in self.edges.items())
        said = [f"not folded, since it would not be exact here: {listed}"] if listed else []
        if self.even:
            said.append(f"no scales at {self.even} edges: channels are as loud as each other there")
        return "; ".join(said)


def fold_checkpoint(
    checkpoint: Checkpoint,
    folds: Sequence[str | Fold],
    calibration: CalibrationSet | None,
    *,
    device: str | None = None,
    hidden: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FoldedCheckpoint:
    """`checkpoint` with folds in it; see `bitnest.folds` for their names.

    calibration: may be None for rotations alone. hidden: bytes of hidden states kept in memory.

    Raises:
        RecipeError: a fold spelt wrongly, no text where one is needed, nothing that can be folded.
        UnsupportedModel: a residual stream that cannot be rotated.
    """
    asked = parse_folds(folds)
    view = FoldedCheckpoint.of(checkpoint, asked, trust_remote_code=trust_remote_code)
    skeleton = Skeleton.build(view, trust_remote_code=trust_remote_code)
    folding = Folding(asked, calibration)
    return fold_view(
        view, skeleton, folding, device=choose_device(device), hidden=hidden, progress=progress
    )


@torch.no_grad()
def fold_view(
    view: FoldedCheckpoint,
    skeleton: Skeleton,
    folding: Folding,
    *,
    device: torch.device,
    hidden: int | None = None,
    progress: Progress | None = None,
) -> FoldedCheckpoint:
    """A view without changes, with those that `folding` asks for. skeleton: of that view.

    Raises:
        See `fold_checkpoint`.
    """
    if folding.wants_text and folding.text is None:
        raise RecipeError("folds are chosen by what a text makes matrices read",
                          hint="give calibration text; only rotate needs none")  # fmt: skip
    work = _Folder(view, skeleton, folding, device, hidden, progress or Silent())
    work.rotate()
    work.smooth_and_permute()
    if not work.changes and not work.even:
        names = ", ".join(str(fold) for fold in folding.folds)
        said = ", ".join(work.skipped) or "no norm or matrix has its channels to itself"
        raise RecipeError(
            f"nothing can be folded by {names}: {said}",
            where=str(view.path),
            hint="compress without --fold, or with smooth-all=0.5, which has more edges",
        )
    return work.view()


def skipped_of(record: dict[str, Any]) -> Skipped | None:
    """What a record says was not folded, or None."""
    edges, even = record.get("skipped") or {}, record.get("even", 0)
    return Skipped(dict(edges), even) if edges or even else None


@dataclass
class _Folder:
    """The passes over one model. changes: by tensor, so far."""

    base: FoldedCheckpoint
    skeleton: Skeleton
    folding: Folding
    device: torch.device
    hidden: int | None
    progress: Progress
    changes: dict[str, list[Change]] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    even: int = 0  # edges whose scales are all 1

    def __post_init__(self) -> None:
        self.places = Places(self.skeleton, find_sites(self.skeleton))
        self._edges: dict[str, list[Edge]] = {}
        self.by_kind = {fold.kind: fold for fold in self.folding.folds}

    def view(self) -> FoldedCheckpoint:
        """The checkpoint with what was folded so far."""
        listed = dict(self.skipped.most_common(LISTED))
        record = {
            "asked": [str(fold) for fold in self.folding.folds],
            "done": dict(sorted(self.done.items())),
            **({"skipped": listed} if listed else {}),
            **({"even": self.even} if self.even else {}),
        }
        own = {name: tuple(changes) for name, changes in self.changes.items()}
        return replace(self.base, changes=own, record=record)

    @cached_property
    def probe(self) -> Stream:
        """How blocks are called, learnt on a few tokens."""
        return Stream(self.skeleton, self.tokens, dtype=torch.float32, device=self.device)

    @property
    def tokens(self) -> torch.Tensor:
        """Some tokens: which ones does not matter, blocks are given random states."""
        rows = self.skeleton.model.get_input_embeddings().weight.shape[0]
        return torch.arange(PROBE[0] * PROBE[1]).mul(13).remainder(rows).view(PROBE)

    def call(self, layer: int) -> Call:
        """How one block is called, on random states in float64."""
        args, kwargs = self.probe.call(layer, PROBE[0])
        return Call(self.probe.hidden.to(self.device), args, kwargs).randomised()

    def edges(self, block: nn.Module, call: Call) -> list[Edge]:
        """Edges of a block, found once for all of its structure."""
        key = str([(name, tuple(p.shape)) for name, p in block.named_parameters()])
        if key not in self._edges:
            self._edges[key] = find_edges(block, call)
        return self._edges[key]

    def rotate(self) -> None:
        """Rotations: inside heads, and of the stream."""
        fold = self.by_kind.get("rotate")
        if fold is None:
            return
        rotation = None if fold.heads else stream_rotation(self.skeleton)
        if rotation is not None:
            found = turn_ends(self.skeleton, self.probe, self.tokens, rotation)
            self._put_stream(found, "embedding, last norm and head", "")
        self.progress.phase("rotating", len(self.skeleton.blocks))
        for layer, block in enumerate(self.skeleton.blocks):
            prefix = f"{self.skeleton.prefix}.{layer}"
            self.skeleton.fill(prefix, dtype=torch.float32, device=self.device)
            call = self.call(layer)
            edges = self.edges(block, call)
            with proving(block, call) as prover:
                for edge in edges:
                    proposal = head_turn(block, edge)
                    if proposal is not None:
                        self._try(prover, prefix, proposal)
                if rotation is not None:
                    parts = block_parts(prover, rotation_width(self.skeleton))
                    found = turn_block(prover, *parts, rotation)
                    self._put_stream(found, f"block {layer}", prefix)
            self.skeleton.drop(prefix)
            self.progress.step()
        if rotation is not None:
            self.done["rotate residual stream"] = 1
        self.skeleton = replace(self.skeleton, checkpoint=self.view())

    def _put_stream(self, found: Changes | None, what: str, prefix: str) -> None:
        try:
            if found is not None:
                self._enter(prefix, found)
                return
        except Unmapped:
            pass
        raise UnsupportedModel(
            f"the residual stream of {type(self.skeleton.model).__name__} cannot be rotated "
            f"exactly: {what} would compute something else",
            where=str(self.base.path),
            hint="rotate=heads turns only what is inside heads; norms behind matrices, LayerNorm "
            "and learned positions do not allow more",
        )

    def smooth_and_permute(self) -> None:
        """Scales and orders, by what the text makes matrices read."""
        if not self.folding.wants_text:
            return
        text = self.folding.text
        assert text is not None
        measured = measure_inputs(
            self.skeleton, text, device=self.device, hidden=self.hidden, progress=self.progress
        )
        _ = self.probe  # before the pass holds a block
        for layer, inputs in measured:
            block, prefix = self.skeleton.blocks[layer], f"{self.skeleton.prefix}.{layer}"
            call = self.call(layer)
            # chosen before `proving`, inside which nothing is rounded to a stored type
            plans = [self._plan(block, prefix, e, inputs) for e in self.edges(block, call)]
            with proving(block, call) as prover:
                for smooth, permute, plain in plans:
                    good = smooth is not None and self._try(prover, prefix, smooth)
                    order = permute if good else plain
                    if order is not None:
                        self._try(prover, prefix, order)

    def _plan(self, block: nn.Module, prefix: str, edge: Edge, inputs: Inputs) -> Plan:
        """What one edge is to get, as far as that is asked for."""
        fold = self.by_kind.get("smooth")
        inner = edge.producer.matrix.module if inside_experts(block, edge) else None
        scale, smooth = None, None
        if fold is not None and (edge.offset is not None or fold.every):
            scale = edge_scales(block, prefix, edge, inputs, fold)
        if scale is not None and bool((scale == 1).all()):
            scale, self.even = None, self.even + 1
        if scale is not None:
            stored = self._stored(prefix, edge)
            changes = scale_changes(block, edge, scale, stored) if edge.linear else {}
            smooth = Proposal(f"smooth {edge.label}", changes, inner)
        if "permute" not in self.by_kind or edge.offset is not None:
            return smooth, None, None
        permute, plain = (self._order(block, prefix, edge, inputs, s, inner) for s in (scale, None))
        return smooth, permute, plain

    def _order(
        self,
        block: nn.Module,
        prefix: str,
        edge: Edge,
        inputs: Inputs,
        scale: torch.Tensor | None,
        inner: str | None,
    ) -> Proposal | None:
        order = edge_order(block, prefix, edge, inputs, scale)
        if order is None:
            return None
        changes = None if edge.span == 1 else order_changes(block, edge, order)
        return Proposal(f"permute {edge.label}", changes or {}, inner)

    def _stored(self, prefix: str, edge: Edge) -> torch.dtype:
        """The type that an edge's producer has on disk."""
        source = self.skeleton.sources.get(f"{prefix}.{edge.producer.matrix}.weight")
        if source is None:
            return self.base.dtype
        return FLOATS[self.base.tensors[source.names[0]].dtype]

    def _try(self, prover: Prover, prefix: str, proposal: Proposal) -> bool:
        """Fold if it can be proven and found on disk; count it either way."""
        good = bool(proposal.changes)
        try:
            if good:
                self.places.tensors({f"{prefix}.{p}": own for p, own in proposal.changes.items()})
        except Unmapped:
            good = False
        good = good and prover(proposal)
        if good:
            self._enter(prefix, proposal.changes)
            self.done[proposal.what] += 1
        else:
            self.skipped[proposal.what] += 1
        return good

    def _enter(self, prefix: str, changes: Changes) -> None:
        start = f"{prefix}." if prefix else ""
        found = self.places.tensors({f"{start}{path}": own for path, own in changes.items()})
        for name, own in found.items():
            self.changes.setdefault(name, []).extend(own)


def rotation_width(skeleton: Skeleton) -> int:
    """Width of the residual stream."""
    return int(skeleton.model.get_input_embeddings().weight.shape[1])
