"""Statistics: what calibration measured, on disk, reopened by every later command.

    statistics.json          the header: source, data, options, sites, layers, probes, checksums
    block-00001.safetensors  per decoder block, sums with the dataset label as an axis; the last one
                             is of embedding and head, without experts

    inputs.<i>.<moment>          of the i-th input of the block, (L, ...)
    inputs.<i>.hessian, weight   (L, I, I) sums of x x^T over (L,) tokens, if they were kept
    experts.<i>.up|down.<moment> of what gate/up and down of each expert read, (L, E, ...)
    experts.<i>.hessian.up|down  (L, E, I, I) sums of w x x^T with weights experts.<i>.weight
    experts.<i>.norms|output|output2|weight|fitted|logits|logits2|margins     (L, ...)
    experts.<i>.trace            (tokens, k) experts chosen, samples in order
    experts.<i>.rows             (n, hidden) of the states that reached the layer, evenly spread
    fisher.<module or parameter> (L, ...) squared gradients per prediction (`calibrate/fisher.py`)
    sites.error (S, F), sites.loss (S, F, L), sites.output (S,)        sensitivity of S sites
    sites.input_error (S, B, P), sites.input_loss (S, B, P, L)  of their inputs, if asked for, in
                                 header.inputs' B bases and P formats (`calibrate/input_errors.py`)
    sites.peaks (S, 3), sites.energy (S,)                               of their weights
    columns.<site>               (I,) norms of the weight's columns
    lookups                      (L, V) how often each token occurs, of the ends only

The header's "fates", where they were asked for, holds relative errors of layers whose experts are
dropped, replaced or merged (`prune/experts/fates`), and of blocks their influence and the KL of the
model without them (`prune/block_fates`). They are of one run: a merger has none.

Nearly all are sums, so the statistics of two runs over the same model are added (`merge`), whatever
machine they ran on: those of two halves of the data are those of the whole, up to rounding. The
exceptions: absmax is a maximum, traces are joined, weights' own figures are the same in both, and
what comes out of a nonlinear solve (sites.error, sites.loss) is averaged by tokens, and so is what
inputs lose, which is an approximation and said so in the header. Parts must be of one model, one
set of options and one compute type, and no window of text may occur in two of them: it would count
double. Windows are compared by checksum, so text that was cut into other windows is not recognised.
Length and seed may differ; the merger's are null then.

`open` holds the header against SCHEMA, against itself and against the tensors' shapes, `verify`
every byte against its checksum; whatever computes new results from statistics (`merge`, `extend`,
`expect`) verifies them first.

Written as artifacts are (`workdir`): a killed run resumes, half a directory never looks whole. A
merger is cheap and starts again: one that fails leaves nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bitnest.errors import CheckpointError, StatisticsError
from bitnest.formats import fates_apart
from bitnest.formats.inputs import DENSE
from bitnest.recipe import PRUNERS
from bitnest.safetensors_io import Entry, TensorInfo, entry, read_header, read_tensor
from bitnest.sites import ENDS, Site
from bitnest.statistics.header import AGAIN, HEADER, VERSION, open_header
from bitnest.workdir import (
    Workdir,
    in_the_way,
    is_empty,
    partial_directory,
    sha256_file,
    write_text,
)


@dataclass(frozen=True)
class Statistics:
    """A directory of statistics. header: as in statistics.json."""

    path: Path
    header: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """Read and check the header, and that every file it names is there, whole in size, and has
        tensors of the shapes that follow from it.

        Raises:
            StatisticsError: not a directory of statistics, damaged, or of another version.
        """
        path = Path(path)
        header = open_header(path)
        for name, record in header["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != record["bytes"]:
                raise StatisticsError(
                    f"'{name}' is missing or has another size than the header says",
                    where=str(path),
                    hint=AGAIN,
                )
        statistics = cls(path, header)
        statistics._check_shapes()
        return statistics

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            StatisticsError: one differs.
        """
        for name, record in self.header["files"].items():
            if sha256_file(self.path / name) != record["sha256"]:
                raise StatisticsError(
                    f"'{name}' differs from what was written",
                    where=str(self.path),
                    hint=AGAIN,
                )

    @property
    def labels(self) -> list[str]:
        """Dataset labels, in the order of every label axis."""
        return list(self.header["labels"])

    @property
    def formats(self) -> list[str]:
        """Names of the candidate formats whose sensitivity was measured."""
        return list(self.header["formats"])

    @property
    def inputs(self) -> list[str]:
        """Names of the formats of inputs whose loss was measured."""
        return list((self.header.get("inputs") or {"formats": ()})["formats"])

    @property
    def bases(self) -> list[str]:
        """Bases of weights that it was measured in (`formats/bases`)."""
        return list((self.header.get("inputs") or {"bases": ()})["bases"])

    def check_inputs(self, names: Sequence[str]) -> None:
        """Refuse formats of inputs that were not measured.

        Raises:
            StatisticsError: one was not.
        """
        missing = [name for name in names if name not in {*self.inputs, DENSE}]
        if not missing:
            return
        formats = [f"--format {name}" for name in self.formats]
        wanted = dict.fromkeys([*self.inputs, *missing])
        inputs = [f"--inputs {name}" for name in wanted]
        raise StatisticsError(
            f"what inputs in '{missing[0]}' lose was not measured",
            where=str(self.path),
            hint=f"measured: {', '.join(self.inputs) or 'no format of inputs'}; bitnest analyze "
            f"MODEL {' '.join([*formats, *inputs])} -o DIR, then --statistics DIR",
        )

    @property
    def fates(self) -> list[str]:
        """Kinds of fates of experts whose loss is known (`calibrate/fate_losses`)."""
        return list((self.header.get("fates") or {"kinds": ()})["kinds"])

    @property
    def prune(self) -> str:
        """How sparse candidates chose what stays."""
        return str(self.header["options"].get("prune", PRUNERS[0]))

    def check_prune(self, prune: str, formats: Sequence[str]) -> None:
        """Refuse to go by losses of another way to prune than the one that is to be carried out.

        Raises:
            StatisticsError: one of the formats is sparse, and they are.
        """
        if prune != self.prune and any("%" in name for name in formats):
            raise StatisticsError(
                f"these statistics were measured with --prune {self.prune}, not {prune}",
                where=str(self.path),
                hint=f"--prune {self.prune}; or bitnest analyze MODEL --prune {prune} -o DIR, and "
                "--statistics DIR",
            )

    def check_formats(self, names: Sequence[str], otherwise: str = "") -> None:
        """Refuse formats that were not measured. otherwise: another way on, for the hint.

        Raises:
            StatisticsError: one was not.
        """
        formats, fates = fates_apart(names)
        missing = [name for name in formats if name not in self.formats]
        missing += [kind for kind in fates if kind not in self.fates]
        if missing:
            raise StatisticsError(
                f"format '{missing[0]}' is no candidate of these statistics",
                where=str(self.path),
                hint=f"measured: {', '.join(self.formats)}; {self.measuring(names)}{otherwise}",
            )

    def measuring(self, names: Sequence[str]) -> str:
        """The command that gives statistics of these formats: by adding those that are missing, if
        what that takes was kept, or else all anew."""
        kept = self.header["hessian"] != "full" or self.header["options"]["keep_hessians"]
        fates = fates_apart(names)[1]  # which --reuse cannot add
        kept = kept and not fates
        wanted = [n for n in dict.fromkeys(names) if not kept or n not in self.formats]
        formats = " ".join(f"--format {name}" for name in wanted)
        if kept and self.formats:
            return f"bitnest analyze MODEL --reuse {self.path} {formats} -o DIR adds to them"
        return f"bitnest analyze MODEL {formats} -o DIR, then --statistics DIR" + (
            "" if fates else " (if it has --keep-hessians, --reuse can add more later)"
        )

    @cached_property
    def sites(self) -> list[Site]:
        """Every site, in the model's order."""
        return [
            Site(**{**item, "shape": tuple(item["shape"]), "rows": _pair(item["rows"])})
            for layer in self.layers
            for item in layer["sites"]
        ]

    def sites_of(self, layer: int) -> list[Site]:
        """Sites of one block."""
        return [site for site in self.sites if site.layer == layer]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Per block, then of the ends if those are sites: inputs, experts, sites."""
        return list(self.header["layers"])

    @property
    def blocks(self) -> int:
        """How many of the layers are decoder blocks."""
        return sum(not is_ends(layer) for layer in self.layers)

    def read(self, layer: int, name: str) -> torch.Tensor:
        """One tensor of one block.

        Raises:
            KeyError: it was not measured.
        """
        return read_tensor(self._files[layer][name])

    def has(self, layer: int, name: str) -> bool:
        """Whether `read` would find it."""
        return name in self._files[layer]

    def names(self, layer: int) -> list[str]:
        """Tensors of one block."""
        return list(self._files[layer])

    @cached_property
    def _files(self) -> list[dict[str, TensorInfo]]:
        try:
            return [read_header(self.path / layer["file"]) for layer in self.layers]
        except CheckpointError as error:
            raise StatisticsError(
                f"a block is damaged: {error.what}", where=error.where, hint=AGAIN
            ) from error

    def _check_shapes(self) -> None:
        for number, layer in enumerate(self.layers):
            for name, shape in self._shapes(number, layer).items():
                info = self._files[number].get(name)
                found = info.shape if info else None
                if found != shape:
                    raise StatisticsError(
                        f"'{HEADER}' or '{layer['file']}' is damaged: by the header, '{name}' has "
                        f"the shape {shape}, in the file {found}",
                        where=str(self.path),
                        hint=AGAIN,
                    )

    def _shapes(self, number: int, layer: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
        """Of one tensor at least for every axis that the header speaks of. None: not there."""
        labels, formats, sites = len(self.labels), len(self.formats), len(layer["sites"])
        shapes: dict[str, tuple[int, ...] | None] = {
            f"columns.{site['name']}": (site["shape"][1],) for site in layer["sites"]
        }
        for i in range(len(layer["inputs"])):
            shapes[f"inputs.{i}.tokens"] = (labels,)
        if is_ends(layer):
            shapes["lookups"] = (labels, layer["sites"][0]["shape"][0])
        for i, item in enumerate(layer["experts"]):
            shapes[f"experts.{i}.up.tokens"] = (labels, item["experts"])
            shapes[f"experts.{i}.trace"] = (self.header["tokens"], item["top_k"])
        shapes[f"inputs.{len(layer['inputs'])}.tokens"] = None
        shapes[f"experts.{len(layer['experts'])}.trace"] = None
        if sites and formats:
            shapes |= {"sites.error": (sites, formats), "sites.output": (sites,)}
        if self.has(number, "sites.loss"):
            shapes["sites.loss"] = (sites, formats, labels)
        if sites and self.inputs and not is_ends(layer):
            tried = (sites, len(self.bases), len(self.inputs))
            shapes["sites.input_error"] = tried
            if self.has(number, "sites.input_loss"):
                shapes["sites.input_loss"] = (*tried, labels)
        return shapes


class StatisticsWriter(Workdir):
    """Writes statistics block by block."""

    noun = "directory of statistics"

    def write_block(
        self, layer: int, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Store one block. record: its inputs, experts and sites."""
        name = f"block-{layer + 1:05d}.safetensors"
        entries: list[Entry] = [entry(key, value.contiguous()) for key, value in tensors.items()]
        self.save_block(layer, {**record, "file": name}, {name: entries})

    def finish(
        self, header: Mapping[str, Any], before: Callable[[Statistics], object] = lambda _: None
    ) -> Statistics:
        """Write the header and give the directory its name. before: called with the statistics
        where they lie until then; may add files, and nothing is published if it raises."""
        layers, files = [], {}
        for layer in range(self.blocks):
            content = self.saved_block(layer)
            files.update(content.pop("files"))
            layers.append(content)
        whole = {"version": VERSION, **header, "layers": layers, "files": files}
        write_text(self.work / HEADER, json.dumps(whole, indent=1) + "\n")
        before(Statistics.open(self.work))
        self.publish()
        return Statistics.open(self.out)

    def discard(self) -> None:
        """Close; of a run that did not finish, keep nothing."""
        if self._lock is not None:
            shutil.rmtree(self.state, ignore_errors=True)
        self.close()


def finished_statistics(out: Path, fingerprint: Mapping[str, Any]) -> Statistics | None:
    """The statistics already in `out` if they were made from exactly these inputs.

    Raises:
        ArtifactError: something else is there.
    """
    if is_empty(out):
        return None
    if (out / HEADER).is_file():
        found = Statistics.open(out)
        if found.header.get("fingerprint") == fingerprint:
            shutil.rmtree(partial_directory(out), ignore_errors=True)  # killed right after renaming
            return found
    raise in_the_way(out)


def is_ends(layer: Mapping[str, Any]) -> bool:
    """Whether a layer of the header is that of embedding and head."""
    return bool(layer["sites"]) and all(site["kind"] in ENDS for site in layer["sites"])


def is_statistics(path: Path) -> bool:
    """Whether the directory claims to hold statistics."""
    return (path / HEADER).is_file()


def _pair(rows: Sequence[int] | None) -> tuple[int, int] | None:
    return None if rows is None else (rows[0], rows[1])
